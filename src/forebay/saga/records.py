"""The entries of a saga's log, which are written ahead of each step, and the history that they add up to."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import Enum
from hashlib import sha256
from typing import ClassVar, NamedTuple, TypeAlias

import msgspec

from forebay.errors import ForebayError


class SagaState(Enum):
    """The state of a saga. RUNNING and COMPENSATING go on, in whatever process has the lease; the others have ended.

    PARKED waits for a person, DONE has all its effects, COMPENSATED has none, and RESOLVED was closed by a person.
    """

    RUNNING = "running"
    COMPENSATING = "compensating"
    PARKED = "parked"
    DONE = "done"
    COMPENSATED = "compensated"
    RESOLVED = "resolved"


UNFINISHED = (SagaState.RUNNING, SagaState.COMPENSATING)
MAX_LEASE = 600.0  # seconds; as that of a supervisor
LONGEST_AHEAD = 1.1 * MAX_LEASE  # seconds from now to the end of a lease; a longer one was given by another clock
REPEATABLE = (SagaState.COMPENSATED, SagaState.RESOLVED)  # submitted again, such a saga begins a new round


class StepState(Enum):
    """The state of a step, as far as the log knows.

    STARTED: it was begun, and its outcome is unknown. FAILED: it raised, and may have had an effect. NOT_DONE: it had
    none. DONE: it has its effect and its output. UNDONE: its compensation has succeeded.
    """

    STARTED = "started"
    FAILED = "failed"
    NOT_DONE = "not done"
    DONE = "done"
    UNDONE = "undone"


_MAX_KEY = 200  # characters: servers accept 255, and a compensation may add some of its own


class LogDamaged(ForebayError, ValueError):
    """The log of saga {saga_id!r} cannot be read ({why}): it was damaged, or a newer version of Forebay wrote it."""

    saga_id: str
    why: str


class _Entry(msgspec.Struct, frozen=True, kw_only=True, tag_field="entry", omit_defaults=True):
    """An entry of a log: the base of all kinds."""

    at: float  # epoch seconds
    writer: str = ""  # the fence under which it was written: no other holder has written the same; empty: a person


class StartedEntry(_Entry, frozen=True, tag="started"):
    """A step is about to be called, under its idempotency key."""

    step: str
    function: str
    compensable: bool = False
    pivot: bool = False


class DoneEntry(_Entry, frozen=True, tag="done"):
    """A step has returned, or a check or a person has found that it has its effect."""

    step: str
    output: bytes
    by: str = ""  # "check", or a person; empty: it returned


class FailedEntry(_Entry, frozen=True, tag="failed"):
    """A step has raised. With `clean`, it had no effect."""

    step: str
    error_type: str
    error: str
    clean: bool = False


class CutOffEntry(_Entry, frozen=True, tag="cut off"):
    """The function of the saga has cut off a step, by a timeout of its own, say, and goes on without its outcome."""

    step: str


class UndoneEntry(_Entry, frozen=True, tag="undone"):
    """The compensation of a step has succeeded, or a person has undone it."""

    step: str
    by: str = ""


class UndoFailedEntry(_Entry, frozen=True, tag="undo failed"):
    """The compensation of a step has raised, and will be tried again unless the saga is parked next."""

    step: str
    error: str


class CompensatingEntry(_Entry, frozen=True, tag="compensating"):
    """The saga goes back from here."""

    error_type: str
    error: str


class ParkedEntry(_Entry, frozen=True, tag="parked"):
    """The saga waits for a person, because of a step or (None) of the saga as a whole."""

    why: str
    step: str | None = None


class RetriedEntry(_Entry, frozen=True, tag="retried"):
    """A person lets a parked saga go on."""


class FinishedEntry(_Entry, frozen=True, tag="finished"):
    """The saga has returned."""

    result: bytes


class CompensatedEntry(_Entry, frozen=True, tag="compensated"):
    """All compensations have succeeded."""


class ResolvedEntry(_Entry, frozen=True, tag="resolved"):
    """A person has closed the saga as it is."""

    note: str = ""


class RestartedEntry(_Entry, frozen=True, tag="restarted"):
    """A compensated saga was submitted again, and begins a new round: its steps have new keys."""


Entry: TypeAlias = (
    StartedEntry
    | DoneEntry
    | FailedEntry
    | CutOffEntry
    | UndoneEntry
    | UndoFailedEntry
    | CompensatingEntry
    | ParkedEntry
    | RetriedEntry
    | FinishedEntry
    | CompensatedEntry
    | ResolvedEntry
    | RestartedEntry
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Entry).decode


def encode_entry(entry: Entry, *, writer: str = "") -> bytes:
    """Return an entry as a log stores it."""
    return _encode(msgspec.structs.replace(entry, writer=writer) if writer else entry)


def decode_entries(saga_id: str, entries: Iterable[bytes]) -> Sequence[Entry]:
    """Return the entries that a log has stored.

    Raises:
        LogDamaged: one of them cannot be read.
    """
    try:
        return [_decode(each) for each in entries]
    except (msgspec.DecodeError, RecursionError, UnicodeDecodeError) as error:
        raise LogDamaged(saga_id=saga_id, why=type(error).__name__) from None


class SagaHeader(msgspec.Struct, frozen=True, kw_only=True):
    """The header of a saga: all that a log knows of it but its entries.

    Attributes:
        saga_id: unique in the log.
        name: of the saga.
        version: of its definition, as ``@saga(version=)`` declares it.
        envelope: the encoded task that began it, or this round of it.
        submission: epoch seconds that tell the submission of its task from others.
        state: its state.
        why: why it is parked, or compensates; empty otherwise.
        created_at: epoch seconds of its first entry.
        updated_at: epoch seconds of its last entry.
        claims: how many processes have taken it since its last entry, and not come to write another.
    """

    saga_id: str
    name: str
    version: str
    envelope: bytes
    submission: float
    state: SagaState = SagaState.RUNNING
    why: str = ""
    created_at: float = 0.0
    updated_at: float = 0.0
    claims: int = 0


class StoredSaga(msgspec.Struct, frozen=True, kw_only=True):
    """A saga as its log has it.

    Attributes:
        header: of the saga.
        entries: in the order in which they were written.
        holder: the fence of the process that drives it; empty if nobody does.
        until: epoch seconds at which its lease expires.
    """

    header: SagaHeader
    entries: Sequence[bytes] = ()
    holder: str = ""
    until: float = 0.0


class LogWrite(NamedTuple):
    """Entries to be written to the log of a saga.

    Attributes:
        number: how many entries stand before them.
        entries: encoded; at least one.
        state: the state of the saga after them.
        why: why it is parked, or compensates; empty otherwise.
    """

    number: int
    entries: Sequence[bytes]
    state: SagaState
    why: str = ""


class StepRecord(msgspec.Struct, kw_only=True):
    """A step, as the log knows it.

    Attributes:
        name: of the step.
        key: its idempotency key.
        function: the name of its function, for people.
        compensable: whether it has a compensation.
        pivot: whether it is the pivot.
        state: its state.
        output: encoded, if it is DONE, or was before it was undone.
        error_type, error: what it raised, unless it is DONE since.
        undo_errors: how often its compensation has raised.
        undo_error: what that raised last, unless it is UNDONE since.
        started: how many entries there were with its start.
        ended: how many with its end, which is before or after that of the pivot; 0: it is STARTED.
        told: how many when its outcome was there for the function of the saga, a failure once it is undone; 0: none.
        cut_off: whether the function has cut it off, and got no other outcome.
    """

    name: str
    key: str
    function: str
    compensable: bool
    pivot: bool
    state: StepState = StepState.STARTED
    output: bytes | None = None
    error_type: str = ""
    error: str = ""
    undo_errors: int = 0
    undo_error: str = ""
    started: int
    ended: int = 0
    told: int = 0
    cut_off: bool = False

    @property
    def needs_undo(self) -> bool:
        """True if it has, or may have, an effect that its compensation undoes."""
        return self.compensable and self.state in _WITH_EFFECT


_WITH_EFFECT = (StepState.STARTED, StepState.FAILED, StepState.DONE)


def _undo_rank(step: StepRecord) -> tuple[bool, int]:
    return step.state is StepState.DONE, -(step.ended or step.started)


class SagaHistory:
    """The state of a saga that its entries add up to. `add` is the only thing that changes it.

    Attributes:
        saga_id: of the saga.
        round: how often it has begun, from 1.
        state: its state.
        steps: of this round, in the order of their starts.
        result: encoded, once it is DONE.
        error_type, error: why it compensates.
        why: why it is parked.
        count: how many entries there are.
        overlapped: whether steps of this round were in progress side by side.
    """

    _STATES: ClassVar = {
        CompensatingEntry: SagaState.COMPENSATING,
        ParkedEntry: SagaState.PARKED,
        FinishedEntry: SagaState.DONE,
        CompensatedEntry: SagaState.COMPENSATED,
        ResolvedEntry: SagaState.RESOLVED,
        RestartedEntry: SagaState.RUNNING,
    }

    def __init__(self, saga_id: str, entries: Iterable[Entry] = ()) -> None:
        self.saga_id = saga_id
        self.round = 1
        self.count = 0
        self._reset()
        for entry in entries:
            self.add(entry)

    def _reset(self) -> None:
        self.state = SagaState.RUNNING
        self.steps: dict[str, StepRecord] = {}
        self.result: bytes | None = None
        self.error_type = self.error = self.why = ""
        self.overlapped = False

    @property
    def goes_back(self) -> bool:
        """True once it compensates, also while it is parked."""
        return bool(self.error_type)

    @property
    def pivot(self) -> StepRecord | None:
        """The pivot, once it was begun."""
        return next((step for step in self.steps.values() if step.pivot), None)

    @property
    def past_pivot(self) -> bool:
        """True once the pivot is DONE: nothing before it is undone any more."""
        return (pivot := self.pivot) is not None and pivot.state is StepState.DONE

    @property
    def unknown(self) -> Sequence[StepRecord]:
        """The steps whose outcome is unknown."""
        return [step for step in self.steps.values() if step.state is StepState.STARTED]

    def to_undo(self) -> Sequence[StepRecord]:
        """Return the steps to undo, in that order: what may have ended first, then in reverse order of completion."""
        steps = [step for step in self.steps.values() if step.needs_undo]
        return sorted(steps, key=_undo_rank)

    def key_of(self, step: str) -> str:
        """Return the idempotency key of a step in this round: the same in every process, and no other step's."""
        key = f"{self.saga_id}/{self.round}/{step}"
        return key if len(key) <= _MAX_KEY else sha256(key.encode()).hexdigest()

    def add(self, entry: Entry) -> None:
        """Add an entry that was written after the others."""
        self.count += 1
        match entry:
            case StartedEntry() | DoneEntry() | FailedEntry() | CutOffEntry() | UndoneEntry() | UndoFailedEntry():
                self._add_to_step(entry)
            case CompensatingEntry():
                self.error_type, self.error = entry.error_type, entry.error
            case ParkedEntry():
                self.why = entry.why
            case RetriedEntry():
                self.state = SagaState.COMPENSATING if self.goes_back else SagaState.RUNNING
                self.why = ""
            case FinishedEntry():
                self.result = entry.result
            case RestartedEntry():
                self.round += 1
                self._reset()
        self.state = self._STATES.get(type(entry), self.state)

    def _add_to_step(
        self, entry: StartedEntry | DoneEntry | FailedEntry | CutOffEntry | UndoneEntry | UndoFailedEntry
    ) -> None:
        name = entry.step
        if isinstance(entry, StartedEntry):
            self.overlapped |= any(step.state is StepState.STARTED for step in self.steps.values())
            self.steps[name] = StepRecord(
                name=name,
                key=self.key_of(name),
                function=entry.function,
                compensable=entry.compensable,
                pivot=entry.pivot,
                started=self.count,
            )
            return
        if (step := self.steps.get(name)) is None:
            raise LogDamaged(saga_id=self.saga_id, why=f"it has an end of step {name!r}, and no start")
        if step.state is StepState.STARTED and not isinstance(entry, UndoFailedEntry):
            step.ended = self.count
        match entry:
            case DoneEntry():
                step.state, step.output = StepState.DONE, entry.output
                step.ended = step.told = self.count
                step.error_type = step.error = ""
            case FailedEntry():
                step.state = StepState.NOT_DONE if entry.clean else StepState.FAILED
                step.error_type, step.error, step.told = entry.error_type, entry.error, self.count
            case CutOffEntry():
                step.cut_off, step.told = True, self.count
            case UndoneEntry():
                step.state, step.undo_error = StepState.UNDONE, ""
                if step.output is None:
                    step.told = 0 if self.goes_back else self.count
            case UndoFailedEntry():
                step.undo_errors += 1
                step.undo_error = entry.error
