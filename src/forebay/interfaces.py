"""The seams: Protocols, and the frozen data that crosses them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

import msgspec

from forebay.task import Priority, Task


class WorkerState(Enum):
    """What a worker is up to: FAILED is its breaker open, OVERLOADED is every slot taken."""

    IDLE = "idle"
    BUSY = "busy"
    OVERLOADED = "overloaded"
    FAILED = "failed"


class Outcome(Enum):
    """What an ending says about the one that served it."""

    SUCCESS = "success"
    OVERLOAD = "overload"  # evidence of congestion
    FAULT = "fault"  # evidence of breakage
    IGNORED = "ignored"  # says nothing


class WorkerHandler(Protocol):
    """What runs a task: anything callable with the Task that returns the value, or an awaitable of it.

    A plain callable runs in a thread and holds its slot until the thread ends.
    """

    def __call__(self, task: Task, /) -> Any: ...  # noqa: D102 - the class says it


# --- what travels ---------------------------------------------------------------------------------------------------


class Codec(Protocol):
    """Between the payloads (or the results) of a task type and plain data, which the overflow can store.

    Plain data: None, bool, int, float, str, bytes, and lists, tuples and dicts with str keys of these.
    """

    def coerce(self, value: Any) -> Any:
        """The value as whoever asked for this type gets it, whether or not it goes through the overflow.

        Raises:
            Misfit: it is not of the type.
        """

    def dump(self, value: Any) -> Any:
        """What `fit` returned, as plain data. What it has no plain form of it leaves as it is: storing refuses that."""

    def load(self, plain: Any) -> Any:
        """What `dump` was given, from what it returned; perhaps by an earlier release of the program.

        Raises:
            Misfit: it is not of the type.
        """


class TypeMismatch(Exception):
    """A value is not of the type that was declared for it.

    Attributes:
        path: where in it, as ``".topic[0]"``; empty for the whole.
        why: what is wrong there. Never the value.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


_NAME_SHOWN = 40  # characters of a key that a path shows: a longer one is no name but content


def path_segment(name: object) -> str:
    """A step of a path. A key is shown if it looks like a name: a payload's content is never echoed."""
    if isinstance(name, int):
        return f"[{name}]"
    named = isinstance(name, str) and name.isidentifier() and len(name) <= _NAME_SHOWN
    return f".{name}" if named else "[...]"


class Reading(msgspec.Struct, frozen=True):
    """What one resource holds against what it may hold.

    Attributes:
        resource: its name, such as ``"pool:research"``.
        load: the ratio; 1.0 is full, and more than full is possible.
    """

    resource: str
    load: float


# --- calls ---------------------------------------------------------------------------------------------------------


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """What a call takes of an upstream's quotas. A token is an LLM token and nothing else.

    Attributes:
        requests: 1, or 0 for what was already counted.
        input_tokens: tokens sent.
        output_tokens: tokens received.
        tokens: of the quotas that count both together; some providers charge ``max_tokens`` there.
    """

    requests: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    tokens: int = 0


class RateLimitHeaders(msgspec.Struct, frozen=True, kw_only=True):
    """What a provider's headers said of one of its quotas, just now.

    Attributes:
        unit: a field of `Charge`: ``"requests"``, ``"input_tokens"``, ``"output_tokens"`` or ``"tokens"``.
        limit: how much it grants in a period, or None if that was not said.
        remaining: how much is left, or None.
        reset: seconds until it is full again, or None; never negative.
    """

    unit: str
    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None


class Grant(msgspec.Struct):
    """One held slot of a limit, as the limit marked it when it was given.

    Attributes:
        at: seconds, of the clock that the holder brings.
        in_flight: slots held at that moment, this one included.
        epoch: which of the limit's epochs it belongs to.
        full: whether the limit was as good as used up.
    """

    granted_at: float
    in_flight: int
    epoch: int = 0
    at_limit: bool = False


class Limit(Protocol):
    """How many calls may be in flight. Implementations are pure: they see grants, outcomes and times, nothing else.

    Times are seconds of one clock that does not go back. Each grant is given to `observe` exactly once.
    """

    def limit(self, now: float) -> int:
        """How many may be in flight now; 0 while none may."""

    def reopens_at(self, now: float) -> float | None:
        """When time alone will raise `limit` from 0, in the clock's seconds; None if it will not."""

    def grant(self, now: float, in_flight: int) -> Grant:
        """Mark a slot that is taken now; `in_flight` counts it."""

    def accepted(self, now: float, grant: Grant) -> None:
        """Its call was not refused: the answer has begun, or none has come for a second. At most once for a grant."""

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Its call has ended. `stretch`: its time over the time expected for its output tokens, if that is known."""


class LoadSource(Protocol):
    """What the calls of a run draw on, such as an account of an upstream, as the task plane feels it.

    Callable from any thread. Sources are compared by identity.
    """

    name: str

    @property
    def accounts(self) -> Sequence[LoadSource]:
        """The accounts that could each serve those calls, its own name and load apart; of one account itself."""

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """Expected wait of the next typical call over the longest allowed, 1.0 where none of that rung passes; why."""

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:
        """Seconds until it reads less than `load`, or infinity: unknown; and how far apart calls fit in then, or 0."""

    def may_start(self, priority: Priority) -> bool:
        """Whether the calls of a run that starts now would wait no longer than is good for those that are under way."""

    def typical_latency(self) -> float:
        """Seconds that a call takes, typically."""

    def blocks(self, priority: Priority) -> bool:
        """Whether a call of that rung would surely not be sent now: such or better ones wait, or none may pass."""

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """So many runs of `who`, `rung` the next of them, do not start for its sake: they count in its load."""

    def add_expected_calls(self, runs: int) -> None:
        """So many runs more (or fewer) have begun and not yet made their first call: it is expected."""

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """Call `callback`, from any thread, when runs of `who` are held back and may start again."""

    def forget(self, holder: object) -> None:
        """`who` has gone."""


# --- the ledger of tasks -------------------------------------------------------------------------------------------


class RecordState(Enum):
    """Where a stored task is: a spilled one WAITING, a durable one written already LEASED, a result DONE."""

    WAITING = "waiting"
    LEASED = "leased"
    DONE = "done"
    DEAD = "dead"


class TaskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it is stored.

    Attributes:
        task_id: unique in the ledger.
        task_type: which queue it stands in.
        priority: its rung in that queue.
        deadline: epoch seconds, or None.
        key: idempotency key, or None; unique in the ledger while its row is kept, ended or not.
        envelope: the encoded task; empty once DONE.
        enqueued_at: epoch seconds when it was first submitted: its place among those of its priority and deadline.
        attempts: starts of the handler so far.
    """

    task_id: str
    task_type: str
    priority: Priority
    envelope: bytes
    enqueued_at: float
    deadline: float | None = None
    key: str | None = None
    attempts: int = 0


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """A timed right to a stored task.

    Attributes:
        row: the task.
        fence: this lease's own id, compared for equality: a holder whose lease was given to another is refused.
        until: epoch seconds at which it lapses unless renewed.
    """

    record: TaskRecord
    fence: str
    until: float


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """How a stored task ended.

    Attributes:
        status: the value of its final TaskStatus, such as ``"succeeded"``.
        worker_id: who ran it last, or None.
        result: the encoded value, or None if there is none or it could not be encoded.
        error: what went wrong, or None.
        duration_ms: milliseconds of the last attempt.
        attempts: starts of the handler.
        finished_at: epoch seconds.
    """

    status: str
    worker_id: str | None = None
    result: bytes | None = None
    error: str | None = None
    duration_ms: float = 0.0
    attempts: int = 0
    finished_at: float = 0.0


class DeadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A row that is DEAD.

    Attributes:
        row: the task; a listing leaves its envelope out, which `Ledger.find` has.
        completion: why it died, and when.
    """

    record: TaskRecord
    completion: Completion


class PutResult(Enum):
    """What became of a row that was offered."""

    STORED = "stored"
    FULL = "full"  # the bound is reached; nothing was written
    DUPLICATE = "duplicate"  # its task_id or its key is there already; nothing was written


class TaskStore(Protocol):
    """The overflow: one ledger of rows, WAITING, LEASED, DONE or DEAD. Times are epoch seconds, given by the caller.

    A write has happened, at the ledger's durability, when its call returns; where that was cancelled, it may have. What
    waits and what is leased counts against the ledger's bound. As many rows that are DONE are kept besides, and as many
    that are DEAD; of each the oldest are dropped.

    Raises:
        LedgerUnusable: from any method, if the ledger is not open or has failed.
    """

    durable: bool  # whether what it holds survives its process

    async def open(self) -> None:
        """Connect and prepare.

        Raises:
            LedgerUnusable: it cannot be; the message says why and what to do.
        """

    async def close(self) -> None:
        """Finish what is under way and let go. Idempotent."""

    async def put(self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0) -> PutResult:
        """Store `row`: WAITING, behind its equals; or, if a fence is given, LEASED under it until `until`.

        What is a DUPLICATE is that also when the ledger is full.
        """

    async def lease(
        self, task_type: str, limit: int, *, until: float, priority: Priority | None = None
    ) -> Sequence[Lease]:
        """Lease up to `limit` waiting rows of `task_type`, and of `rung` if it is given.

        By priority, then deadline (none last), then `enqueued_at`, then who was put first. Cancelled, it keeps none:
        what it leased after all goes back to its place.
        """

    async def begin_attempt(self, lease: Lease) -> bool:
        """Count a start of the handler. False: the lease has been lost, so it must not be started."""

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        """Extend `leases` to `until`, and return those that have been lost. None becomes shorter.

        It blocks, and may be called from any thread: whoever holds up the event loop must not lose leases by that.
        """

    async def release(self, leases: Sequence[Lease]) -> None:
        """Give rows back, WAITING at the place where they stood. Lost leases are passed over."""

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a row DONE. With a fence: only if LEASED under it; with None: only if WAITING (it was given up).

        Returns:
            False if it was not so, and nothing was written.
        """

    async def reap(self, *, now: float, max_attempts: int) -> Sequence[DeadRecord]:
        """Give LEASED rows that lapsed before `now` back, WAITING at their place.

        Once `max_attempts` starts were made they become DEAD instead, with a completion of status FAILED: these are
        returned.
        """

    async def prune(self, *, before: float) -> int:
        """Drop DONE rows that ended before `before`; return how many."""

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        """Mark a row DEAD that nobody can run. False: the lease has been lost, and nothing was written."""

    async def list_dead(self, limit: int, *, after: tuple[float, str] | None = None) -> Sequence[DeadRecord]:
        """Up to `limit` DEAD rows by when they died, then by id; those behind `after`, such a pair, if it is given."""

    async def requeue(self, task_id: str) -> PutResult | None:
        """Make a DEAD row WAITING at the place where it stood, with no attempts made.

        Returns:
            STORED; FULL if the bound is reached; None if it is not DEAD.
        """

    async def delete_dead(self, task_id: str) -> bool:
        """Drop a DEAD row. False: there is none of that id."""

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        """The row of that id, with its completion if it is DONE or DEAD."""

    async def find_key(self, key: str) -> str | None:
        """The task id stored under an idempotency key, or None."""

    async def depths(self) -> Mapping[tuple[str, Priority], int]:
        """How many rows are WAITING, by task type and priority."""
