"""A saga for people: what its log holds, as plain data and lines of text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from forebay._json import JsonStruct, plain_value
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_result
from forebay.saga.records import (
    UNFINISHED,
    CompensatedEntry,
    CompensatingEntry,
    DoneEntry,
    Entry,
    FailedEntry,
    FinishedEntry,
    LogDamaged,
    ParkedEntry,
    ResolvedEntry,
    RestartedEntry,
    RetriedEntry,
    SagaHistory,
    SagaState,
    StartedEntry,
    StepRecord,
    StepState,
    StoredSaga,
    UndoFailedEntry,
    UndoneEntry,
    decode_entries,
)


class StepView(JsonStruct, frozen=True, kw_only=True):
    """A step of a saga.

    Attributes:
        name: of the step.
        state: its state. STARTED: its outcome is unknown.
        key: its idempotency key.
        function: the name of its function.
        compensable: whether it has a compensation.
        pivot: whether it is the pivot.
        error: what it raised, or empty.
        undo_failures: how often its compensation has raised.
        undo_error: what that raised last, or empty.
    """

    name: str
    state: StepState
    key: str
    function: str
    compensable: bool
    pivot: bool
    error: str
    undo_failures: int
    undo_error: str


class HistoryLine(JsonStruct, frozen=True, kw_only=True):
    """An entry of the log of a saga: its time, in epoch seconds, and a text without outputs."""

    at: float
    text: str


class OutputView(JsonStruct, frozen=True, kw_only=True):
    """An output in the log of a saga.

    Attributes:
        step: the name of the step. None: it is the result of the saga.
        value: as plain data for JSON.
        problem: why that is None although the output is not, or empty.
    """

    step: str | None
    value: Any
    problem: str = ""


class SagaView(JsonStruct, frozen=True, kw_only=True):
    """A saga, as its log has it.

    Attributes:
        saga_id: unique in the log.
        name: of the saga.
        version: of its definition.
        state: its state.
        why: why it is parked, or compensates; empty otherwise.
        round: how often it has begun, from 1.
        created_at: epoch seconds at which this round began.
        updated_at: epoch seconds of its last entry.
        claims: how many processes have taken it since its last entry.
        lease_until: epoch seconds at which the lease of the process that drives it expires; None without one.
        error: what it compensates for, also while it is parked; empty while it goes forward.
        parked_step: the step for which it is parked. None: it is parked as a whole, or not parked.
        steps: of this round, in the order of their starts.
        history: its entries, rounds before this one included.
        outputs: of the steps that are done, and its result; None unless they were asked for.
        damage: why entries cannot be read, or empty. Then steps and history are those of the entries before.
    """

    saga_id: str
    name: str
    version: str
    state: SagaState
    why: str
    round: int
    created_at: float
    updated_at: float
    claims: int
    lease_until: float | None
    error: str
    parked_step: str | None
    steps: tuple[StepView, ...]
    history: tuple[HistoryLine, ...]
    outputs: tuple[OutputView, ...] | None = None
    damage: str = ""

    def is_abandoned(self, now: float) -> bool:
        """Return whether the saga is unfinished, and no process drives it: the next one to look takes it."""
        return self.state in UNFINISHED and (self.lease_until is None or self.lease_until <= now)


def view_saga(stored: StoredSaga, *, outputs: bool = False) -> SagaView:
    """Return a stored saga for people, even if its log is damaged."""
    header = stored.header
    history, entries, damage = SagaHistory(header.saga_id), [], ""
    try:
        for encoded in stored.entries:
            (entry,) = decode_entries(header.saga_id, [encoded])
            history.add(entry)
            entries.append(entry)
    except LogDamaged as error:
        damage = error.why
    return SagaView(
        saga_id=header.saga_id,
        name=header.name,
        version=header.version,
        state=header.state,
        why=header.why,
        round=history.round,
        created_at=header.created_at,
        updated_at=header.updated_at,
        claims=header.claims,
        lease_until=stored.until if stored.holder else None,
        error=history.error or history.error_type,
        parked_step=_parked_step(entries) if header.state is SagaState.PARKED else None,
        steps=tuple(map(_view_step, history.steps.values())),
        history=tuple(HistoryLine(at=entry.at, text=describe(entry)) for entry in entries),
        outputs=_view_outputs(history) if outputs else None,
        damage=damage,
    )


def _parked_step(entries: Sequence[Entry]) -> str | None:
    return next((entry.step for entry in reversed(entries) if isinstance(entry, ParkedEntry)), None)


def _view_step(step: StepRecord) -> StepView:
    return StepView(
        name=step.name,
        state=step.state,
        key=step.key,
        function=step.function,
        compensable=step.compensable,
        pivot=step.pivot,
        error=step.error or step.error_type,
        undo_failures=step.undo_errors,
        undo_error=step.undo_error,
    )


def _view_outputs(history: SagaHistory) -> tuple[OutputView, ...]:
    encoded: list[tuple[str | None, bytes | None]] = [(step.name, step.output) for step in history.steps.values()]
    encoded.append((None, history.result))
    return tuple(_view_output(step, output) for step, output in encoded if output is not None)


def _view_output(step: str | None, encoded: bytes) -> OutputView:
    try:
        value = decode_result(encoded)
    except (EnvelopeDamaged, EnvelopeTooNew) as error:
        return OutputView(step=step, value=None, problem=str(error))
    plain = plain_value("value", value)
    return OutputView(step=step, value=plain["value"], problem=plain.get("value_error", ""))


def describe(entry: Entry) -> str:  # noqa: C901, PLR0911 - a line for each kind
    """Return what an entry says, without its output."""
    match entry:
        case StartedEntry():
            kinds = [name for name in ("compensable", "pivot") if getattr(entry, name)]
            return f"step {entry.step!r} began: {entry.function}{f' ({kinds[0]})' if kinds else ''}"
        case DoneEntry():
            return f"step {entry.step!r} is done{_said_by(entry.by)}"
        case FailedEntry():
            clean = " without an effect" if entry.clean else ""
            return f"step {entry.step!r} failed{clean}: {entry.error or entry.error_type}"
        case UndoneEntry():
            return f"step {entry.step!r} is undone{_said_by(entry.by)}"
        case UndoFailedEntry():
            return f"the compensation of step {entry.step!r} failed: {entry.error}"
        case CompensatingEntry():
            return f"compensates: {entry.error or entry.error_type}"
        case ParkedEntry():
            return f"parked{'' if entry.step is None else f' for step {entry.step!r}'}: {entry.why}"
        case RetriedEntry():
            return "a person lets it go on"
        case FinishedEntry():
            return "has returned: it is done"
        case CompensatedEntry():
            return "all its effects are undone"
        case ResolvedEntry():
            return f"closed by a person{f': {entry.note}' if entry.note else ''}"
        case RestartedEntry():
            return "was submitted again, and begins a new round"


def _said_by(by: str) -> str:
    return f", says {by if by != 'check' else 'its check'}" if by else ""
