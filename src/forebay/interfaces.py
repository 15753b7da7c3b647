"""The interfaces between packages: Protocols, and the frozen data that is passed through them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from typing import Any, Protocol

import msgspec

from forebay._json import JsonStruct
from forebay.call_usage import CallUsage
from forebay.task import DEFAULT_TENANT, Priority, Task


class WorkerState(Enum):
    """The state of a worker: FAILED means that its breaker is open, OVERLOADED that every slot is taken."""

    IDLE = "idle"
    BUSY = "busy"
    OVERLOADED = "overloaded"
    FAILED = "failed"


class Outcome(Enum):
    """The meaning of an end of a call or a run for the upstream or the worker that served it."""

    SUCCESS = "success"
    OVERLOAD = "overload"  # evidence of congestion
    FAULT = "fault"  # evidence of breakage
    IGNORED = "ignored"  # no evidence of either


class WorkerHandler(Protocol):
    """A callable that runs a task: it takes the Task and returns the value, or an awaitable of it.

    A plain callable runs in a thread and holds its slot until the thread ends.
    """

    def __call__(self, task: Task, /) -> Any: ...  # noqa: D102 - the class says it


# --- payloads and results ------------------------------------------------------------------------------------------


class Codec(Protocol):
    """Converts the payloads (or the results) of a task type to plain data, which the overflow can store, and back.

    Plain data: None, bool, int, float, str, bytes, and lists, tuples and dicts with str keys of these.
    """

    def coerce(self, value: Any) -> Any:
        """Return `value` as a value of the codec's type; the same whether or not it goes through the overflow.

        Raises:
            TypeMismatch: it is not of the type.
        """

    def dump(self, value: Any) -> Any:
        """Return a coerced value as plain data. A part without a plain form may be left: encoding rejects it."""

    def load(self, plain: Any) -> Any:
        """Return the value that `dump` turned into `plain`, perhaps in an earlier release of the program.

        Raises:
            TypeMismatch: it is not of the type.
        """


class TypeMismatch(Exception):
    """A value is not of the type that was declared for it.

    Attributes:
        path: the part that is wrong, as ``".topic[0]"``; empty for the whole value.
        reason: what is wrong with it. Never the value.
    """

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


_MAX_NAME = 40  # characters of a key that a path shows: a longer key is content rather than a name


def path_segment(name: object) -> str:
    """Return an index, field or key as a segment of a path; a key only if it looks like a name, never as content."""
    if isinstance(name, int):
        return f"[{name}]"
    is_name = isinstance(name, str) and name.isidentifier() and len(name) <= _MAX_NAME
    return f".{name}" if is_name else "[...]"


class Reading(JsonStruct, frozen=True):
    """The load of one resource.

    Attributes:
        resource: its name, such as ``"pool:research"``.
        load: its use over its capacity; 1.0 is full, and more is possible.
    """

    resource: str
    load: float


class Demand(JsonStruct, frozen=True, kw_only=True):
    """The slots that the tasks of some types ask for at one moment, as far as one supervisor knows.

    Attributes:
        slots: slots of the workers here that are not FAILED.
        running: slots that are taken here.
        queued: tasks that wait here for a slot and for nothing else, and producers that wait for room.
        spilled: tasks that wait in the overflow for a slot and for nothing else, of whatever process.
        paused: those of `spilled` whose type is paused here: only other processes begin them.
        elsewhere: tasks of the overflow that other processes have leased; None without an overflow that other processes
            can use.
        refused: tasks that were rejected since the start because there was no room for them.
        service: mean of the seconds for which a task holds its slot; None before the first has ended here.
        limited_by: what keeps runs from starting though they have a slot, such as an account whose quota or budget is
            used up or whose breaker is open, and its part; or a worker that is FAILED. More workers would not help.
            None if nothing does.
        host: the lag of the event loop over the lag that is allowed.
    """

    slots: int = 0
    running: int = 0
    queued: int = 0
    spilled: int = 0
    paused: int = 0
    elsewhere: int | None = None
    refused: int = 0
    service: float | None = None
    limited_by: str | None = None
    host: float = 0.0


# --- calls ---------------------------------------------------------------------------------------------------------


class Charge(msgspec.Struct, frozen=True, kw_only=True):
    """The amounts of an upstream's quotas that a call uses. A token is an LLM token and nothing else.

    Attributes:
        requests: 1, or 0 for a call that was counted already.
        input_tokens: tokens sent.
        output_tokens: tokens received.
        tokens: for quotas that count both together; some providers charge ``max_tokens`` there.
        most_output_tokens: output tokens that it may use at most, for strict quotas; 0 for no more than is expected.
        most_tokens: the same of `tokens`.
    """

    requests: int = 1
    input_tokens: int = 0
    output_tokens: int = 0
    tokens: int = 0
    most_output_tokens: int = 0
    most_tokens: int = 0

    @property
    def output_tokens_at_most(self) -> int:
        """The amount that it takes from a strict quota of output tokens."""
        return max(self.output_tokens, self.most_output_tokens)

    @property
    def tokens_at_most(self) -> int:
        """The amount that it takes from a strict quota of input and output tokens together."""
        return max(self.tokens, self.most_tokens)


class RateLimitHeaders(msgspec.Struct, frozen=True, kw_only=True):
    """The state of one quota, as a provider's response headers just reported it.

    Attributes:
        unit: a field of `Charge`: ``"requests"``, ``"input_tokens"``, ``"output_tokens"`` or ``"tokens"``.
        limit: the amount granted in a period, or None if it was not reported.
        remaining: the amount left, or None.
        reset: seconds until the quota is full again, or None; never negative.
    """

    unit: str
    limit: int | None = None
    remaining: int | None = None
    reset: float | None = None


class LoadSource(Protocol):
    """A resource that the calls of a run use, such as an account of an upstream, as task admission sees it.

    Callable from any thread. Sources are compared by identity.

    Attributes:
        name: of the resource, in messages.
    """

    name: str

    @property
    def accounts(self) -> Sequence[LoadSource]:
        """The accounts any of which could serve those calls; of a single account, the account itself."""

    def load(self, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """Return the load for calls of `priority`, and the part of the account that limits it.

        The load is the expected wait of the next typical call over the longest wait allowed; at least 1.0 if no call of
        that priority is let through.
        """

    def time_until_below(self, priority: Priority, load: float) -> tuple[float, float]:
        """Return the seconds until the load is below `load`, and how many seconds apart calls fit in from then on.

        The first is infinity if it is unknown; the second is 0 if it does not matter.
        """

    def may_start(self, priority: Priority) -> bool:
        """Return whether a run may start now without its calls delaying those of running runs too much."""

    def typical_latency(self) -> float:
        """Return the seconds that a call typically takes."""

    def blocks(self, priority: Priority) -> bool:
        """Return whether a call of `priority` would certainly not be sent now: it would queue, or be rejected."""

    def hold_back(self, holder: object, runs: int, priority: Priority = Priority.NORMAL) -> None:
        """Count in the load `runs` runs of `holder` that do not start because of this source.

        Args:
            holder: identifies the caller; a later call replaces its count.
            runs: how many runs it holds back.
            priority: the priority of the first of them.
        """

    def add_expected_calls(self, runs: int) -> None:
        """Expect the first call of `runs` more runs (or fewer, if negative), which have begun but made no call yet."""

    def on_relief(self, holder: object, callback: Callable[[], None]) -> None:
        """Call `callback`, from any thread, when runs that `holder` holds back may start again."""

    def forget(self, holder: object) -> None:
        """Drop the counts and the callback of `holder`, which has closed."""


# --- the task store ------------------------------------------------------------------------------------------------


class RecordState(Enum):
    """The state of a stored task: WAITING when spilled, LEASED when running or durable, then DONE or DEAD.

    PARKED is a task that waits behind another one of its conversation, DELAYED one that waits for a time: that of its
    retry after an attempt has failed, or the `not_before` that it was stored with.
    """

    WAITING = "waiting"
    PARKED = "parked"
    LEASED = "leased"
    DELAYED = "delayed"
    DONE = "done"
    DEAD = "dead"


class TaskRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A task as it is stored.

    Attributes:
        task_id: unique in the store.
        task_type: the queue that it belongs to.
        priority: its priority in that queue.
        deadline: epoch seconds, or None.
        key: idempotency key, or None. It is unique among the records that have not ended or have succeeded. A record
            that was DONE without success has lost it; a DEAD one keeps it for its requeue, and does not take it.
        envelope: the encoded task; empty once DONE.
        enqueued_at: epoch seconds when it was first submitted or, of a nested task, its outermost run was; orders
            records of the same priority and deadline.
        attempts: starts of the handler so far, apart from those that an orderly stop cut off.
        thread_id: the conversation that it belongs to, or None.
        failures: attempts that ended with an error, of those in `attempts`. The others have lost their process.
        total_delay: seconds of all its delays so far.
        last_error: what the last of those attempts ended with; None if there is none.
        usage: of the calls of those attempts; None if they made none.
        tenant: whose it is. The tenants of one task type and priority take turns.
        not_before: epoch seconds before which it is not to run, or None. `TaskStore.put` reads it, and nothing later.
    """

    task_id: str
    task_type: str
    priority: Priority
    envelope: bytes
    enqueued_at: float
    deadline: float | None = None
    key: str | None = None
    attempts: int = 0
    thread_id: str | None = None
    failures: int = 0
    total_delay: float = 0.0
    last_error: str | None = None
    usage: CallUsage | None = None
    tenant: str = DEFAULT_TENANT
    not_before: float | None = None


class Lease(msgspec.Struct, frozen=True, kw_only=True):
    """The exclusive right to a stored task for a limited time.

    Attributes:
        record: the task, with the attempts that had been made when it was leased. For the attempts that fail under the
            lease, the holder goes on with a lease of the same fence whose record counts them in `attempts`, `failures`,
            `total_delay`, `last_error` and `usage`. What the store writes of these five is what that record says.
        fence: the id of this lease, compared for equality: the store rejects a holder whose lease went to another.
        until: epoch seconds at which it expires unless it is renewed.
    """

    record: TaskRecord
    fence: str
    until: float


class Completion(msgspec.Struct, frozen=True, kw_only=True):
    """The end of a stored task.

    Attributes:
        status: the value of its final TaskStatus, such as ``"succeeded"``.
        worker_id: the worker that ran it last, or None.
        result: the encoded value, or None if there is none or it could not be encoded.
        error: what went wrong, or None.
        duration_ms: milliseconds of the last attempt.
        attempts: starts of the handler.
        finished_at: epoch seconds.
        usage: of the calls that the task made; None if it made none, or an earlier version stored it.
    """

    status: str
    worker_id: str | None = None
    result: bytes | None = None
    error: str | None = None
    duration_ms: float = 0.0
    attempts: int = 0
    finished_at: float = 0.0
    usage: CallUsage | None = None


class DeadRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record that is DEAD.

    Attributes:
        record: the task.
        completion: the reason and the time of its end.
    """

    record: TaskRecord
    completion: Completion


class StoredRecord(msgspec.Struct, frozen=True, kw_only=True):
    """A record in a listing.

    Attributes:
        record: the task without its envelope, which `TaskStore.find` returns.
        completion: its end if it is DONE or DEAD, else None.
        until: epoch seconds at which its lease expires if it is LEASED, or it is due if it is DELAYED; else None.
    """

    record: TaskRecord
    completion: Completion | None = None
    until: float | None = None

    @property
    def position(self) -> tuple[float, str]:
        """Its place in the listing: the time of its end, else its `enqueued_at`; and its task id."""
        time = self.record.enqueued_at if self.completion is None else self.completion.finished_at
        return time, self.record.task_id


class PutResult(Enum):
    """The result of storing a record."""

    STORED = "stored"
    PARKED = "parked"  # stored, without a lease, behind other tasks of its conversation
    FULL = "full"  # the bound is reached; nothing was written
    DUPLICATE = "duplicate"  # its task_id or its key is taken; nothing was written

    @property
    def written(self) -> bool:
        """True if the record is in the store."""
        return self in (PutResult.STORED, PutResult.PARKED)


class WakeResult(msgspec.Struct, frozen=True, kw_only=True):
    """The result of waking the DELAYED records of a store.

    Attributes:
        woken: how many became WAITING or PARKED.
        delayed: how many are still DELAYED.
        next_due: epoch seconds at which the first of these is due, or None if there are none.
    """

    woken: int
    delayed: int
    next_due: float | None


class TaskStore(Protocol):
    """A store of task records (the overflow), each WAITING, PARKED, LEASED, DELAYED, DONE or DEAD.

    Times are epoch seconds, given by the caller. Each task that has not ended counts towards the store's bound. In
    addition, as many DONE and as many DEAD records are kept, the oldest dropped first.

    **Conversations.** Of the records of one `thread_id` that have not ended, one is WAITING, LEASED or DELAYED, and the
    others are PARKED behind it. Once it has ended, the oldest of them becomes WAITING: by `enqueued_at`, then order of
    insertion. So no two tasks of a conversation are leased at a time, by whatever processes. While it is WAITING, an
    older record that is stored or comes back takes its place. A record that is DELAYED by its `not_before` has not
    joined its conversation: nothing waits behind it, and when `wake` wakes it, it joins in the order of `enqueued_at`.

    **Writes.** When a call returns, its write has happened, as durably as the store promises. If it raised
    StoreUnavailable or was cancelled, the write may have happened. A read may return a write whose call has not
    returned yet, but only one that is as durable as if it had.

    **Failures.** Every method raises StoreUnavailable if the store is not open or has failed. After a failure the next
    call tries again, since a supervisor opens its store only once.

    **Threads.** All methods are called on the event loop that opened the store, except `renew`, which may be called
    from any thread at any time. None but `renew` may block. A client that blocks runs in an executor of the store's
    own, through `loop.run_in_executor`: the event loop of the simulation runs such a job inline, in virtual time.

    **Fences.** A lease is held as long as its fence is the record's, even past its time: only `reap` ends it.

    Whether several processes may open the store at once, a supervisor does not need to know: the store's documentation
    says it.
    """

    @property
    def durable(self) -> bool:
        """True if its records survive the process.

        It may turn False while the store is open, because somebody has removed what it writes to. Then `put` raises.
        """

    async def open(self) -> None:
        """Connect and prepare. Idempotent; also after `close`. If it is cancelled, the store is not open.

        Raises:
            StoreUnavailable: it cannot be opened; the message says why and what to do.
        """

    async def close(self) -> None:
        """Finish the pending operations and disconnect. Idempotent.

        If it is cancelled, the store closes nevertheless; the next `close` or `open` waits for that. The same object
        may be opened again, and then has its records, even if it is not durable.
        """

    def subscribe(
        self,
        *,
        on_waiting: Callable[[], None],
        on_ended: Callable[[], None],
        on_lost: Callable[[], None] | None = None,
        on_interrupted: Callable[[], None] | None = None,
    ) -> None:
        """Call `on_waiting` when another process may have made records WAITING, and `on_ended` when it has ended some.

        Call `on_lost` when the store has noticed that all records are gone, such as those of a server that was emptied:
        the operations in which it did raise StoreUnavailable, and later ones begin new records. What is submitted in
        `on_lost` comes before whatever the callers of those operations submit next.

        Call `on_interrupted` when the store answers again after it was away, even if no operation has failed: leases
        may have lapsed that nobody could renew.

        They are called on the event loop that opened the store, each at most about once in 20 ms, and never while the
        store is closed. A later call replaces both. A call may be in vain, and a store that cannot hear of other
        processes makes none: whoever subscribes must also ask from time to time.
        """

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        """Store `record`: WAITING, behind its equals; or, if a fence is given, LEASED under it until `until`.

        Without a fence, a record whose `not_before` is after `now` is DELAYED until then. Only `put` looks at
        `not_before`: a record that comes back, by whatever method, does not wait for it again.

        Calls that run at once insert their records in the order of the calls. Its key is taken by a record with that
        key that has not ended or has succeeded. Its task id is taken by any record but two kinds that make way: a DONE
        one without a key, and a DEAD one with this key.

        Returns:
            STORED, also if DELAYED; PARKED if other records of its conversation are older or LEASED, so that it has no
            lease; DUPLICATE, also if the store is full; or FULL.
        """

    async def lease(
        self,
        task_type: str,
        limit: int,
        *,
        until: float,
        priority: Priority | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> Sequence[Lease]:
        """Lease up to `limit` waiting records of `task_type`, and of `priority` if it is given.

        The order is by priority, then deadline (none last), then `enqueued_at`, then order of insertion. If the call is
        cancelled, it holds no lease: what was leased after all is released. A limit below 1 leases nothing.

        Args:
            task_type: the type of the records.
            limit: how many at most.
            until: when the leases expire.
            priority: None for any.
            shares: how many at most of each tenant in each priority, in this order, and of others none. None: of any.
        """

    async def begin_attempt(self, lease: Lease) -> bool:
        """Count a start of the handler. Return False if the lease is lost, so that the handler must not start."""

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        """Let `leases` last until `until`, and return those that are lost.

        That may be earlier than before, if the wall clock was set back.

        It blocks, and may be called from any thread, so that a blocked event loop does not lose leases.
        """

    async def release(self, leases: Sequence[Lease]) -> None:
        """Make leased records WAITING again, in their old order, or PARKED. Lost leases are ignored.

        A record has the attempts and failures of `lease.record`. So those count that failed under the lease, and one
        that has not ended does not: a holder that gives it back has not crashed.
        """

    async def record_failures(self, lease: Lease) -> bool:
        """Give a record, which stays LEASED, the failures, `total_delay` and `last_error` of `lease.record`.

        So attempts that have failed do not count as lost leases if the process is lost before the next one ends.

        Returns:
            False if the lease is lost, and nothing was written.
        """

    async def delay(self, lease: Lease, *, due: float) -> bool:
        """Make a leased record DELAYED until `due`, and end its lease: an attempt has failed, and is to be repeated.

        Any process may do that. The record keeps its attempts, and has the failures, `total_delay` and `last_error` of
        `lease.record`.

        Args:
            lease: the lease on it.
            due: epoch seconds.

        Returns:
            False if the lease is lost, and nothing was written.
        """

    async def wake(self, *, now: float) -> WakeResult:
        """Make the DELAYED records that are due by `now` WAITING again, in their old order, or PARKED."""

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a record DONE. With a fence: only if LEASED under it; without one, for a cancelled task: if not LEASED.

        Unless the task has succeeded, the record loses its key, which may be used again.

        Returns:
            False if it was in another state, and nothing was written.
        """

    async def reap(self, *, now: float, max_attempts: int, latest: float = math.inf) -> Sequence[DeadRecord]:
        """Release every lease whose `until` is before `now`; one that lasts until `now` is still held.

        Args:
            now: epoch seconds.
            max_attempts: starts of a handler, over lost leases, after which a record is dead. Those that ended with an
                error are not counted.
            latest: also release leases whose `until` is after that: they are from before the wall clock was set back.

        Returns:
            The records with `max_attempts` such starts: these became DEAD instead, with a completion of status FAILED.
        """

    async def prune(self, *, before: float) -> int:
        """Drop DONE records that ended before `before`, and return how many.

        A store that runs out of room may drop others, the oldest first.
        """

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        """Mark a record DEAD that has failed for good, or cannot be run. Its key may be used again.

        Returns:
            False if the lease is lost, and nothing was written.
        """

    async def list_records(
        self, state: RecordState, limit: int, *, after: tuple[float, str] | None = None
    ) -> Sequence[StoredRecord]:
        """Return up to `limit` records in `state`: DONE and DEAD by the time of their end, others by `enqueued_at`.

        Records of the same time are ordered by task id. One that is in `state` throughout is on exactly one page.

        Args:
            state: the state of the records.
            limit: the size of the page.
            after: the `position` of the last record of the page before; None: the first page.
        """

    async def requeue(self, task_id: str) -> PutResult | None:
        """Make a DEAD record WAITING again, or PARKED, in its old order and with no attempts or failures counted.

        Returns:
            STORED; DUPLICATE if another record has taken its key; FULL if the bound is reached; None if it is not DEAD.
        """

    async def delete_dead(self, task_id: str) -> bool:
        """Delete a DEAD record. Return False if there is none of that id."""

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        """Return the record of that id, with its completion if it is DONE or DEAD; None if there is none."""

    async def find_key(self, key: str) -> str | None:
        """Return the id of the task that has taken an idempotency key, or None."""

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        """Return how many records are WAITING, by task type, priority and tenant."""

    async def leased(self) -> Mapping[str, int]:
        """Return how many records are LEASED, by task type. Its cost grows with these, and not with what waits."""

    async def conversations(self) -> Mapping[str, int]:
        """Return how many records have not ended, by `thread_id`; those without one are left out."""


class TaskIndex(TaskStore, Protocol):
    """A task store that may be the index of a queue service: the envelopes are in the queue, the rest is in the index.

    The queue chooses the record that comes next, so the index leases by id.
    """

    async def lease_ids(self, task_ids: Sequence[str], *, until: float) -> Sequence[Lease]:
        """Lease those of the records `task_ids` that are WAITING, in this order, until `until`. Others are left out.

        If the call is cancelled, it holds no lease: what was leased after all is released.
        """

    async def replace(
        self, lease: Lease, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult | None:
        """Put `record` as `put` does, in place of the record of `lease`, which has its id and key and no conversation.

        Returns:
            STORED or PARKED, as `put`; None if the lease is lost, and nothing was written.
        """

    async def set_envelope(self, task_id: str, envelope: bytes) -> bool:
        """Replace the envelope of a record that is not DONE. Return False if there is none, and nothing was written."""
