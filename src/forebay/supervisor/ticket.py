"""Ticket: what `submit` returns, and the states of a task from its verdict to its result."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterable
from contextvars import Context
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, NoReturn, Protocol

import msgspec

from forebay import clock, context
from forebay._json import plain_field, plain_value
from forebay._renamed import renamed
from forebay.call_usage import NO_USAGE, CallUsage
from forebay.context import RunningTask
from forebay.errors import (
    ForebayError,
    NestedTooDeep,
    Overloaded,
    ResultUnavailable,
    StillSpilled,
    TaskCancelled,
    TaskExpired,
    TaskFailed,
    TaskTimedOut,
    WrongLoop,
    fresh_copy,
)
from forebay.events import Event, EventBus, Subscription, TaskFinished, TaskStarted
from forebay.task import Deadline, Priority, ResultT_co, Task, TaskResult, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.admission import QueueEntry
    from forebay.interfaces import Lease
    from forebay.supervisor.runs.ticket_retries import TicketRetries
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.worker import WorkerAgent

MAX_UNREAD_EVENTS = 1000  # of `Ticket.events`, besides the last one

_RUNNING, _WAITING = TaskStatus.RUNNING, TaskStatus.WAITING  # attribute access on an enum is slow on the hot path


class Refusal(NamedTuple):
    """The reason for not admitting a task, and what may be done instead."""

    reason: str
    limited_by: str | None
    load: float
    may_spill: bool
    retry_after: float | None = None  # seconds, infinity if unknown; None: take the next slot of the retry schedule
    final: bool = False  # waiting for room would not help


class TicketRun(RunningTask, Protocol):
    """The run of a ticket's handler, as far as the ticket and its slot need it."""

    worker: WorkerAgent
    started_at: float
    abandoned_at: float | None
    zombie: bool

    @property
    def awaits_start(self) -> bool:
        """True while the store has not recorded its start: its handler has not begun."""

    def ends_at(self) -> float:
        """Return the loop time of its timeout or its deadline, whichever comes first."""

    def time_out(self) -> None:
        """End the ticket because its time is up, and ask the handler to stop."""

    def end_early(self, status: TaskStatus, error: str) -> None:
        """End the ticket now and ask the handler to stop."""

    def abandon(self) -> None:
        """Ask the handler to stop without ending the ticket."""

    def handler_ended(self, value: Any, cause: BaseException | None) -> None:
        """Finish the run: its handler returned `value`, or raised `cause`."""


class TicketSlot(Protocol):
    """The `Slot` whose body runs in place of a handler."""

    def grant(self, run: TicketRun) -> None:
        """Let the body run."""

    def resolve(self, outcome: TaskResult | ForebayError) -> None:
        """Record that the ticket has ended."""

    def stop(self) -> None:
        """Cancel the body."""


# Waits until the run that lent its slot has one again.
Reclaim = Callable[[], Awaitable[None]]


class TicketOwner(Protocol):
    """The dispatcher, as far as a ticket needs it."""

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on which tickets are awaited."""

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """End a ticket that has not ended."""

    def lend_slots(self, running: RunningTask | None, awaited: Ticket | None) -> Reclaim | None:
        """Lend the slot of `running` while it awaits a task, or room for one; return how to get it back."""

    def hold_strongly(self, task_id: str) -> Ticket | None:
        """Hold the ticket of a spilled task, because it is awaited."""


class Ticket(msgspec.Struct, Generic[ResultT_co], eq=False, weakref=True):  # a Struct, because it is made in C
    """The answer of admission control to one task; awaiting it returns the ``TaskResult``.

    A rejected ticket is false, and awaiting it raises ``Overloaded``. Awaiting any other returns its result however the
    task ended. Cancelling an await leaves the task running; `cancel` ends it.

    Attributes:
        task: the task that was submitted.
        verdict: ADMITTED, SPILLED or REJECTED.
        reason: why it was not admitted, otherwise None.
        limited_by: the resource that kept it from being admitted, otherwise None.
        load: the load of the fullest resource on the task's path, as admission control read it.
        retry_after: if rejected, seconds after which to try again, or None if unknown.
        status: where the task is now.
        deadline: its own deadline or its parent's, whichever is earlier.
    """

    _dispatcher: TicketOwner
    task: Task[ResultT_co]
    deadline: Deadline | None
    parent: RunningTask | None  # the run that submitted it: nested work goes before newer work of its priority
    submitted_at: float | None = None  # epoch seconds; set if it has a deadline or there is an overflow to order
    context: Context | None = None  # of its submitter, for its handler; NO_VARIABLES: empty; None: the supervisor's
    verdict: Verdict = Verdict.ADMITTED
    status: TaskStatus = TaskStatus.WAITING
    reason: str | None = None
    limited_by: str | None = None
    load: float | None = None
    retry_after: float | None = None
    # Kept for the dispatcher, and changed only by the methods below.
    slot: TicketSlot | None = None  # runs instead of a handler
    queue_entry: QueueEntry | None = None  # its entry in the queue of its pool
    expiry_timer: Timer | None = None  # ends it at its deadline while it waits
    run: TicketRun | None = None  # while its handler runs
    lease: Lease | None = None  # this process's right to its stored record
    stored: bool = False  # the task store has a record of it, so its end must be written there first
    nested: bool = False  # a run of its supervisor had not ended when it, or a task below it, submitted this
    depth: int = 0  # runs that led to it, whether or not they have ended
    order_time: float | None = None  # epoch seconds; its place in the task store, if not the time of its submission
    attempts: int = 0
    usage: CallUsage = NO_USAGE  # of the calls of all attempts so far
    cancel_reason: str | None = None  # why it was cancelled while the store had not answered
    pending_store_calls: int = 0  # calls of the store that decide what becomes of the task
    listeners: EventBus | None = None  # None if nobody listens to its events
    shared: bool = False  # another caller has submitted the same work, by its key
    in_line: bool = False  # its submitter waits for room: a rejection is not the last word
    size: int = 0  # estimated bytes of its payload and its result, once it has ended
    _outcome: TaskResult[ResultT_co] | ForebayError | None = None
    _waiters: list[asyncio.Future[None]] | None = None
    found: bool = False  # made for a record that was looked up: its task is read again when the record comes back
    held: bool = False  # it has waited for a cheaper worker though a slot was free
    retries: TicketRetries | None = None  # its failed attempts, if any may be followed by another

    def __repr__(self) -> str:
        return f"Ticket({self.task.task_id!r}, {self.verdict.name}, {self.status.name})"

    def __dir__(self) -> Iterable[str]:
        """List what is documented; the rest is for the dispatcher."""
        return _DOCUMENTED

    def __bool__(self) -> bool:
        return self.verdict is not Verdict.REJECTED

    @property
    def task_id(self) -> str:
        """The task's id."""
        return self.task.task_id

    @property
    def priority(self) -> Priority:
        """The task's priority."""
        return self.task.priority

    @property
    def result(self) -> TaskResult[ResultT_co] | None:
        """The result of the task; None while it has not ended."""
        return self._outcome if isinstance(self._outcome, TaskResult) else None

    @property
    def binding(self) -> NoReturn:
        """The old name of `limited_by`."""  # a property, because __getattr__ would slow down every attribute
        raise AttributeError(renamed("Ticket", "binding", "limited_by"))

    def done(self) -> bool:
        """Return whether awaiting it returns at once."""
        return self._outcome is not None or self.verdict is Verdict.REJECTED

    def as_dict(self, *, payload: bool = False, values: bool = True) -> dict[str, Any]:
        """Return it as plain data for JSON, with the result if the task has ended.

        Args:
            payload: whether the task's payload is in it.
            values: whether the handler's value is in it, as ``result`` of the result. If JSON cannot hold a value, that
                is None, and ``result_error`` (or ``payload_error``) says why.
        """
        task, outcome = self.task, self._outcome
        fields = {
            "task_id": task.task_id,
            "task_type": task.task_type,
            "priority": task.priority,
            "tenant": task.tenant,
            "key": task.key,
            "thread_id": task.thread_id,
            "deadline": None if self.deadline is None else self.deadline.at,
            "not_before": task.not_before,
            "verdict": self.verdict,
            "status": self.status,
            "reason": self.reason,
            "limited_by": self.limited_by,
            "load": self.load,
            "retry_after": self.retry_after,
            "attempts": self.attempts,
            "error": str(outcome) if isinstance(outcome, ForebayError) else None,
        }
        plain = {name: plain_field(value) for name, value in fields.items()}
        plain["result"] = outcome.as_dict(values=values) if isinstance(outcome, TaskResult) else None
        return plain | plain_value("payload", task.payload) if payload else plain

    def cancel(self, reason: str = "cancelled by its submitter") -> bool:
        """End the task: take it out of the queue or the overflow, or cancel its handler.

        The ticket ends CANCELLED at once. A handler that does not stop holds its slot until it really ends. A task in
        the overflow ends once its record is marked; if another process has started it, it goes on there.

        Returns:
            False if the task had ended already.
        """
        if self.done():
            return False
        self._dispatcher.cancel(self, reason)
        return True

    def __await__(self) -> Generator[Any, None, TaskResult[ResultT_co]]:
        if type(self._outcome) is TaskResult:
            return self._outcome
        return (yield from self._wait().__await__())

    async def _wait(self, *, cancel_task: bool = False) -> TaskResult[ResultT_co]:
        if self._outcome is None and self.verdict is not Verdict.REJECTED:
            if asyncio.get_running_loop() is not self._dispatcher.loop:
                raise WrongLoop(what=f"The ticket of task {self.task_id!r}", advice="use supervisor.portal() there")
            reclaim = self._dispatcher.lend_slots(context.running_task(), self)
            try:
                if self._outcome is None:  # the lent slot may have gone to this task, or its deadline may have passed
                    waiter = self.watch()
                    try:
                        await waiter
                    finally:
                        self.unwatch(waiter)
            except asyncio.CancelledError:
                if cancel_task and not self.shared and not self.has_waiters:
                    self.cancel("its caller has gone")  # before reclaiming the slot, which this task may hold
                raise
            finally:
                if reclaim is not None:
                    await reclaim()
        return self.outcome()

    def outcome(self) -> TaskResult[ResultT_co]:
        """Return the result of a ticket that is done, or raise what awaiting it raises."""
        if self.verdict is Verdict.REJECTED:
            raise self.refusal()
        if isinstance(self._outcome, ForebayError):
            raise fresh_copy(self._outcome)
        assert self._outcome is not None  # noqa: S101 - it is done
        return self._outcome

    def watch(self) -> asyncio.Future[None]:
        """Return a future that is done once the task has ended; the ticket counts as awaited until `unwatch`."""
        waiter = self._dispatcher.loop.create_future()
        self._hold_strongly()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        return waiter

    def unwatch(self, waiter: asyncio.Future[None]) -> None:
        """Forget a future that `watch` returned."""
        if self._waiters is not None and waiter in self._waiters:
            self._waiters.remove(waiter)

    def refusal(self) -> Overloaded:
        """Return the rejection as an exception."""
        return Overloaded(
            self.reason or "rejected", limited_by=self.limited_by, load=self.load, retry_after=self.retry_after
        )

    async def value(self, *, cancel_task: bool = False) -> ResultT_co:
        """Wait for the task and return its handler's value.

        Args:
            cancel_task: cancelling this await cancels the task too, unless others wait for it or have submitted it too.

        Raises:
            Overloaded: it was rejected, or a call of its handler was.
            TaskFailed: its handler raised; the handler's exception is the cause. TaskCancelled if it was cancelled.
            TaskTimedOut: it ran longer than its timeout. TaskExpired if its deadline passed.
            ResultUnavailable: it succeeded, but only the process that ran it has its value.
        """
        value: ResultT_co = value_of(await self._wait(cancel_task=cancel_task))
        return value

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens to the task from now on: TaskStarted, TaskProgress, TaskRetried, and last TaskFinished.

        If the task has started or finished already, that event is yielded first. The newest 1,000 unread events are
        kept.
        """
        first, subscription = self.listen()
        try:
            for event in first:
                yield event
            while subscription is not None and (later := await self.next_event(subscription)) is not None:
                yield later
        finally:
            if subscription is not None:
                subscription.close()

    def listen(self) -> tuple[list[Event], Subscription | None]:
        """Return the last event so far, if it started or ended already, and a subscription to those to come, if any."""
        if self.verdict is Verdict.REJECTED:
            raise self.refusal()
        if isinstance(self._outcome, ForebayError):
            raise fresh_copy(self._outcome)
        now = self._dispatcher.loop.time()
        if self._outcome is not None:
            return [TaskFinished(at=now, task_id=self.task_id, result=self._outcome)], None
        self._hold_strongly()
        if self.listeners is None:
            self.listeners = EventBus()
        subscription = self.listeners.subscribe(bound=MAX_UNREAD_EVENTS + 1)
        if (run := self.run) is None:
            return [], subscription
        at, worker_id = run.started_at, run.worker.name
        time = clock.wall_time() - (now - at)
        started = TaskStarted(at=at, time=time, task_id=self.task_id, worker_id=worker_id, attempt=self.attempts)
        return [started], subscription

    async def next_event(self, events: Subscription) -> Event | None:
        """Wait for the next event. A run that waits for it lends its slot, because the task may need it to start."""
        reclaim = self._dispatcher.lend_slots(context.running_task(), self) if events.empty else None
        try:
            return await anext(events, None)
        finally:
            if reclaim is not None:
                await reclaim()

    def _hold_strongly(self) -> None:
        """Have the dispatcher hold a spilled ticket, because it is awaited."""
        if self.status is TaskStatus.SPILLED:
            self._dispatcher.hold_strongly(self.task_id)

    # --- what the dispatcher reads ---

    @property
    def has_waiters(self) -> bool:
        """True if anyone awaits its end."""
        return bool(self._waiters)

    @property
    def is_observed(self) -> bool:
        """True if anyone awaits its end or listens to its events."""
        return bool(self._waiters) or self.listeners is not None

    def emit(self, event: Event) -> None:
        """Send `event` to the listeners of this ticket."""
        if self.listeners is not None:
            self.listeners.emit(event)

    # --- the verdict ---

    def admit(self, load: float) -> None:
        """Record the load at which the task was admitted."""
        self.load = load

    def raise_priority(self, priority: Priority) -> None:
        """Give the task, which is not queued yet, a better priority than it was submitted with."""
        self.task = msgspec.structs.replace(self.task, priority=min(priority, self.task.priority))

    def explain(self, refusal: Refusal) -> None:
        """Record why the task was not admitted."""
        self.reason, self.limited_by, self.load = refusal.reason, refusal.limited_by, refusal.load

    def forget_refusal(self) -> None:
        """Forget why the task was not admitted, because it was after all."""
        self.reason = self.limited_by = None

    def reject(self, refusal: Refusal, retry_after: float | None) -> None:
        """Make it REJECTED; `retry_after` is in seconds, or None if unknown."""
        self.verdict = Verdict.REJECTED
        self.status = TaskStatus.REJECTED
        self.explain(refusal)
        self.retry_after = retry_after

    def stand_in_line(self, *, waits: bool) -> None:
        """Record whether its submitter waits for room if it is rejected."""
        self.in_line = waits

    def share(self) -> None:
        """Record that another caller has submitted the same work."""
        self.shared = True

    # --- the queue ---

    @property
    def place_in_store(self) -> float | None:
        """The time that orders it in the task store, in epoch seconds; None without a store."""
        return self.submitted_at if self.order_time is None else self.order_time

    def submission(self) -> float:
        """Return epoch seconds that tell this submission from others of its task id, in every attempt at it."""
        place = self.place_in_store
        if place is None:  # without a store nothing else needs it
            place = self.submitted_at = clock.wall_time()
        return place

    def nest(self, *, order_time: float | None) -> None:
        """Make it a nested task, stored in the place of its outermost run."""
        self.nested = True
        self.order_time = order_time

    def descend(self, depth: int) -> None:
        """Record how many runs led to it."""
        self.depth = depth

    def wait(self) -> None:
        """Make it WAITING without an entry in the queue: behind another task of its conversation."""
        self.status = _WAITING

    def hold(self) -> None:
        """Make it WAITING for a cheaper worker, without an entry in the queue."""
        self.status = _WAITING
        self.held = True

    def enqueue(self, entry: QueueEntry) -> None:
        """Make it WAITING in the queue."""
        self.status = _WAITING
        self.queue_entry = entry

    def leave_queue(self) -> QueueEntry | None:
        """Forget its entry in the queue, and return it if it had one."""
        entry, self.queue_entry = self.queue_entry, None
        return entry

    def set_expiry(self, timer: Timer) -> None:
        """Keep the timer that ends it at its deadline."""
        self.expiry_timer = timer

    def clear_expiry(self) -> Timer | None:
        """Forget the timer of its deadline, and return it if it had one: the caller cancels it."""
        timer, self.expiry_timer = self.expiry_timer, None
        return timer

    # --- the run ---

    def occupy(self, slot: TicketSlot) -> None:
        """Have `slot` run instead of a handler."""
        self.slot = slot

    def start(self, run: TicketRun) -> None:
        """Make it RUNNING, out of the queue, and count the attempt."""
        self.run = run
        self.status = _RUNNING
        self.queue_entry = None
        self.attempts += 1

    def add_usage(self, usage: CallUsage) -> None:
        """Add the usage of a call that its handler has made."""
        self.usage += usage

    def take_back_attempt(self) -> None:
        """Stop counting an attempt that another process makes instead."""
        self.attempts -= 1

    def end_run(self) -> None:
        """Forget the run and the parent: an ended ticket must not keep its ancestors alive."""
        self.run = None
        self.parent = None

    def forget_parent(self) -> None:
        """Forget the parent, because the task has ended without a run."""
        self.parent = None

    def keep_parent(self, parent: RunningTask | None) -> None:
        """Keep the parent, because the task may run again."""
        self.parent = parent

    # --- its next attempt ---

    @property
    def awaits_retry(self) -> bool:
        """True if another attempt is to be made after one that failed."""
        return self.retries is not None and self.retries.pending

    @property
    def is_stopping(self) -> bool:
        """True while the handler of an attempt that failed has not stopped."""
        return self.retries is not None and self.retries.stopping is not None

    def keep_retries(self, retries: TicketRetries) -> None:
        """Remember its failed attempts."""
        self.retries = retries

    def await_retry(self) -> None:
        """Make it WAITING without a run: an attempt has failed, and another is to be made."""
        self.run = None
        self.status = _WAITING

    # --- the task store ---

    def begin_store_call(self) -> None:
        """Count a call of the store whose answer decides what becomes of the task."""
        self.pending_store_calls += 1

    def end_store_call(self) -> None:
        """Stop counting a call of the store."""
        self.pending_store_calls -= 1

    def cancel_later(self, reason: str) -> None:
        """Remember to cancel it once the store has answered."""
        self.cancel_reason = reason

    def spill(self) -> None:
        """Make it SPILLED: stored instead of admitted."""
        self.verdict = Verdict.SPILLED
        self.stored = True
        self.status = TaskStatus.SPILLED

    def confirm_spilled(self) -> None:
        """Give the verdict SPILLED to a task that was refilled before the store's answer arrived."""
        self.verdict = Verdict.SPILLED

    def move_to_store(self) -> None:
        """Set the status to SPILLED, whatever the verdict was: it waits in the store, or another process has it."""
        self.status = TaskStatus.SPILLED

    def mark_stored(self) -> None:
        """Remember that the store has a record of it."""
        self.stored = True

    def forget_record(self) -> None:
        """Remember that the store has no record of it any more."""
        self.stored = False

    def hold_lease(self, lease: Lease) -> None:
        """Take the right to its stored record."""
        self.stored = True
        self.lease = lease

    def refill(self, lease: Lease) -> None:
        """Take over a stored task, with the attempts that were made so far."""
        self.hold_lease(lease)
        self.attempts = lease.record.attempts
        used = lease.record.usage  # by attempts elsewhere, too; or less than is known here by now
        if used is not None and (not self.usage or used.calls > self.usage.calls):
            self.usage = used

    def read_attempts(self, attempts: int) -> None:
        """Set the number of its attempts to what the store says: other processes made them."""
        self.attempts = attempts

    def adopt(self, lease: Lease) -> None:
        """Take back the right to a task that still waits or runs here."""
        self.hold_lease(lease)
        self.status = TaskStatus.WAITING if self.run is None else TaskStatus.RUNNING

    def drop_lease(self) -> None:
        """Forget the right to its stored record."""
        self.lease = None

    def restore(self, task: Task, deadline: Deadline | None) -> None:
        """Replace the task and its deadline by those in the store."""
        self.task = task
        self.deadline = deadline
        self.found = False

    def mark_found(self) -> None:
        """Remember that its task was read for whoever asked: its payload may be missing, or not what a handler gets."""
        self.found = True

    def restore_context(self, context: Context) -> None:
        """Have its handler run in a copy of `context`: another process submitted it."""
        self.context = context

    # --- the end ---

    def without_cause(self, result: TaskResult) -> Ticket:
        """Return an ended ticket with `result`, but without the exception that is its cause.

        The frames of its traceback hold every local variable of the handler.
        """
        cause = result.cause if isinstance(result.cause, Overloaded | ResultUnavailable) else None
        result = msgspec.structs.replace(result, cause=None if cause is None else fresh_copy(cause))
        return Ticket(
            self._dispatcher,
            self.task,
            self.deadline,
            None,
            self.submitted_at,
            verdict=self.verdict,
            status=result.status,
            reason=self.reason,
            limited_by=self.limited_by,
            load=self.load,
            stored=self.stored,
            attempts=self.attempts,
            shared=self.shared,
            _outcome=result,
        )

    def measure(self, size: int) -> None:
        """Keep the estimated bytes of its payload and its result."""
        self.size = size

    async def follow(self, other: Ticket) -> None:
        """End as `other` does: it is the same work, stored under the same key."""
        try:
            self.resolve(await other)
        except ForebayError as error:
            self.resolve(fresh_copy(error))

    def resolve(self, outcome: TaskResult | ForebayError) -> None:
        """End it with its result, or with the error that awaiting it raises. Every ticket ends exactly once."""
        assert self._outcome is None  # noqa: S101 - a second end is a bug of the caller
        self._outcome = outcome
        self.context = None  # it may hold anything, and this ticket may be kept for long
        if isinstance(outcome, TaskResult):
            self.status = outcome.status
        elif not isinstance(outcome, StillSpilled):
            self.status = TaskStatus.UNKNOWN
        if self.slot is not None:
            self.slot.resolve(outcome)
        if self.listeners is not None:
            if isinstance(outcome, TaskResult):
                self.listeners.emit(TaskFinished(at=self._dispatcher.loop.time(), task_id=self.task_id, result=outcome))
            self.wake_waiters()
        elif self._waiters is not None:
            self.wake_waiters()

    def wake_waiters(self) -> None:
        """Wake whoever awaits the ticket or listens to its events: it has ended, or was rejected."""
        if self._waiters is not None:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters = None
        if self.listeners is not None:
            self.listeners.close()
            self.listeners = None


_DOCUMENTED = (
    *(name for name in dir(object) if name != "__dir__"),
    "__await__", "__bool__", "as_dict", "cancel", "deadline", "done", "events", "limited_by", "load", "priority",
    "reason", "refusal", "result", "retry_after", "status", "task", "task_id", "value", "verdict",
)  # fmt: skip


def value_of(result: TaskResult) -> Any:
    """Return the value of a result, or raise what `Ticket.value` raises."""
    if result.status is not TaskStatus.SUCCEEDED:
        raise as_error(result) from result.cause
    if isinstance(result.cause, ResultUnavailable):
        raise fresh_copy(result.cause)
    return result.result


def as_error(result: TaskResult) -> ForebayError:
    """Return the exception that `Ticket.value` raises for a result without success."""
    facts: dict[str, Any] = {"task_id": result.task_id, "worker_id": result.worker_id, "error": result.error}
    match result.status:
        case TaskStatus.TIMED_OUT:
            return TaskTimedOut(**facts)
        case TaskStatus.EXPIRED:
            return TaskExpired(**facts)
        case TaskStatus.CANCELLED:
            return TaskCancelled(**facts)
    if isinstance(result.cause, Overloaded | NestedTooDeep):
        return fresh_copy(result.cause)
    return TaskFailed(**facts)


def spilled_ticket(dispatcher: TicketOwner, task: Task, *, submitted_at: float | None = None) -> Ticket:
    """Return a ticket for a task that the store has and this process did not submit."""
    ticket = Ticket(dispatcher, task, None, None, submitted_at)
    ticket.confirm_spilled()
    ticket.mark_stored()
    return ticket


def found_ticket(
    dispatcher: TicketOwner, task: Task, deadline: Deadline | None, *, submitted_at: float | None, attempts: int
) -> Ticket:
    """Return a ticket for a record that somebody has asked for, and that this process does not hold."""
    ticket = spilled_ticket(dispatcher, task, submitted_at=submitted_at)
    ticket.restore(task, deadline)
    ticket.read_attempts(attempts)
    ticket.move_to_store()
    ticket.mark_found()
    return ticket


def unsuccessful_result(  # noqa: PLR0913 - the fields of a result
    ticket: Ticket,
    status: TaskStatus,
    error: str,
    *,
    worker_id: str | None = None,
    duration_ms: float = 0.0,
    cause: BaseException | None = None,
) -> TaskResult:
    """Return the result of a task that did not succeed."""
    return TaskResult(
        task_id=ticket.task_id,
        worker_id=worker_id,
        success=False,
        status=status,
        error=error,
        duration_ms=duration_ms,
        attempts=ticket.attempts,
        usage=ticket.usage,
        cause=cause,
    )
