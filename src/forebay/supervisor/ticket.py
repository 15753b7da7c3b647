"""Ticket: what `submit` returns."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Generator
from typing import TYPE_CHECKING, Any

import msgspec

from forebay import context
from forebay.errors import (
    ForebayError,
    Overloaded,
    ResultUnavailable,
    TaskCancelled,
    TaskExpired,
    TaskFailed,
    TaskTimedOut,
    WrongLoop,
)
from forebay.events import Event, EventBus, Subscription, TaskFinished, TaskStarted
from forebay.task import Deadline, Priority, Task, TaskResult, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.admission import QueueEntry
    from forebay.context import RunningTask
    from forebay.interfaces import Lease
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.runs.nested import SlotLoan
    from forebay.supervisor.runs.run import Run
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.slot import Slot

MAX_UNREAD_EVENTS = 1000  # and the end


class Ticket(msgspec.Struct, eq=False, weakref=True):  # a Struct, since it is made in C
    """The gate's answer to one task and, unless it was REJECTED, an awaitable ``TaskResult``.

    False if rejected. Awaiting a rejected ticket raises ``Overloaded``; awaiting any other never raises for how the
    task ended. Cancelling an await leaves the task running: `cancel` ends it.

    Attributes:
        task: what was submitted.
        verdict: ADMITTED, SPILLED or REJECTED.
        reason: why it was not admitted, else None.
        binding: the resource that refused it, else None.
        load: the load that the gate saw, of the resource that bound on the task's path.
        retry_after: if rejected, seconds after which a seat is expected, if that is known.
        status: where the task is now.
        deadline: its own deadline or its parent's, whichever is earlier.
    """

    _dispatcher: Dispatcher
    task: Task
    deadline: Deadline | None
    parent: RunningTask | None  # the run that submitted it: such work goes before newer work of its rung
    verdict: Verdict = Verdict.ADMITTED
    status: TaskStatus = TaskStatus.WAITING
    reason: str | None = None
    limited_by: str | None = None
    load: float | None = None
    retry_after: float | None = None
    # the dispatcher's own notes
    slot: Slot | None = None  # who runs in it, if that is no handler
    queue_entry: QueueEntry | None = None  # where it waits in the line
    expiry_timer: Timer | None = None  # ends it at its deadline while it waits
    run: Run | None = None  # while its handler runs
    lease: Lease | None = None  # this process's right to its stored row
    submitted_at: float | None = None  # epoch seconds, with a deadline or an overflow, where it is its place outside
    stored: bool = False  # the ledger has a row of it, so its end must be written there first
    attempts: int = 0
    cancel_reason: str | None = None  # why it was cancelled, while that cannot be done yet
    pending_store_calls: int = 0  # answers of the store that what becomes of it hangs on
    _outcome: TaskResult | ForebayError | None = None
    _waiters: list[asyncio.Future[None]] | None = None
    _bus: EventBus | None = None

    def __repr__(self) -> str:
        return f"Ticket({self.task.task_id!r}, {self.verdict.name}, {self.status.name})"

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
    def result(self) -> TaskResult | None:
        """How it ended, once it has."""
        return self._outcome if isinstance(self._outcome, TaskResult) else None

    def done(self) -> bool:
        """Whether awaiting it returns at once."""
        return self._outcome is not None or self.verdict is Verdict.REJECTED

    def cancel(self, reason: str = "cancelled by its submitter") -> bool:
        """End the task: out of the line, out of the overflow, or by cancelling its handler.

        The ticket ends CANCELLED at once; a handler that does not stop holds its slot until it really ends. A task in
        the overflow ends once its row is marked; if another process has begun it, it goes on there.

        Returns:
            False if the task had ended already.
        """
        if self.done():
            return False
        self._dispatcher.cancel(self, reason)
        return True

    def __await__(self) -> Generator[Any, None, TaskResult]:
        if type(self._outcome) is TaskResult:
            return self._outcome
        return (yield from self._wait().__await__())

    async def _wait(self, *, abandon: bool = False) -> TaskResult:
        if self._outcome is None and self.verdict is not Verdict.REJECTED:
            if asyncio.get_running_loop() is not self._dispatcher.loop:
                raise WrongLoop(what=f"The ticket of task {self.task_id!r}")
            loan: SlotLoan | None = self._dispatcher.lend_slots(context.running_task())
            try:
                if self._outcome is None:  # the slot that was lent may have gone to it, or its turn come too late
                    await self._wait_until_resolved()
            except asyncio.CancelledError:
                if abandon and not self.has_waiters:  # before the slot comes back: the task may be what holds it
                    self.cancel("its caller has gone")
                raise
            finally:
                if loan is not None:
                    await loan.reclaim()
        return self._result_or_raise()

    async def _wait_until_resolved(self) -> None:
        waiter = self._dispatcher.loop.create_future()
        self._hold_strongly()
        if self._waiters is None:
            self._waiters = []
        self._waiters.append(waiter)
        try:
            await waiter
        finally:
            if self._waiters is not None:
                self._waiters.remove(waiter)

    def _result_or_raise(self) -> TaskResult:
        if self.verdict is Verdict.REJECTED:
            raise self.refusal()
        if isinstance(self._outcome, ForebayError):
            raise self._outcome
        assert self._outcome is not None  # noqa: S101 - only reached once resolved
        return self._outcome

    def refusal(self) -> Overloaded:
        """The rejection as an exception."""
        return Overloaded(
            self.reason or "rejected", limited_by=self.limited_by, load=self.load, retry_after=self.retry_after
        )

    async def value(self, *, abandon: bool = False) -> Any:
        """The handler's value.

        Args:
            abandon: cancelling this await cancels the task too, unless others wait for it.

        Raises:
            Overloaded: it was rejected, or its handler met an overload further on.
            TaskFailed: its handler raised; the handler's exception is its cause. TaskCancelled if it was cancelled.
            TaskTimedOut: it ran longer than its timeout. TaskExpired if its deadline passed.
            ResultNotKept: it succeeded, and only the process that ran it has its value.
        """
        result = await self._wait(abandon=abandon)
        if result.status is TaskStatus.SUCCEEDED:
            if isinstance(result.cause, ResultUnavailable):
                raise result.cause
            return result.result
        raise as_error(result) from result.cause

    async def events(self) -> AsyncIterator[Event]:
        """Yield what happens to the task from now on: Started, Progress, and last Finished.

        A Started or Finished that has already been is told again. Of progress that nobody reads the newest 1,000 are
        kept.
        """
        if self.verdict is Verdict.REJECTED:
            raise self.refusal()
        if self._outcome is None:
            async with self._event_bus().subscribe(bound=MAX_UNREAD_EVENTS + 1) as subscription:
                if self.run is not None:
                    yield self._started_event(self.run)
                while (event := await self._next_event(subscription)) is not None:
                    yield event
        elif isinstance(self._outcome, ForebayError):
            raise self._outcome
        else:
            yield TaskFinished(at=self._dispatcher.loop.time(), task_id=self.task_id, result=self._outcome)

    async def _next_event(self, events: Subscription) -> Event | None:
        """The next event. Whoever waits for it in a run lends its slot: it may be what the task needs to start."""
        loan = self._dispatcher.lend_slots(context.running_task()) if events.empty else None
        try:
            return await anext(events, None)
        finally:
            if loan is not None:
                await loan.reclaim()

    def _event_bus(self) -> EventBus:
        self._hold_strongly()
        if self._bus is None:
            self._bus = EventBus()
        return self._bus

    def _hold_strongly(self) -> None:
        """Have the house hold it, though its task is outside: somebody waits for it."""
        if self.status is TaskStatus.SPILLED and self._dispatcher.spill is not None:
            self._dispatcher.spill.hold_strongly(self.task_id)

    def _started_event(self, run: Run) -> TaskStarted:
        worker_id = run.worker.name
        return TaskStarted(at=run.started_at, task_id=self.task_id, worker_id=worker_id, attempt=self.attempts)

    # --- what the dispatcher tells it ---

    @property
    def has_waiters(self) -> bool:
        """Whether anyone waits for its end."""
        return bool(self._waiters)

    @property
    def has_listeners(self) -> bool:
        """Whether anyone listens to its events."""
        return self._bus is not None

    def emit(self, event: Event) -> None:
        """Pass `event` to those who listen to this ticket."""
        if self._bus is not None:
            self._bus.emit(event)

    def wake_waiters(self) -> None:
        """It was rejected; whoever got it by its key before that need not wait."""
        self._wake()

    async def follow(self, other: Ticket) -> None:
        """End as `other` does: the same work, stored under the same key."""
        try:
            self.resolve(await other)
        except ForebayError as error:
            self.resolve(error)

    def resolve(self, outcome: TaskResult | ForebayError) -> None:
        """End it, once: later calls are a bug of the caller's."""
        assert self._outcome is None  # noqa: S101 - every ticket ends exactly once
        self._outcome = outcome
        if isinstance(outcome, TaskResult):
            self.status = outcome.status
        if self.slot is not None:
            self.slot.resolve(outcome)
        if self._bus is not None and isinstance(outcome, TaskResult):
            self._bus.emit(TaskFinished(at=self._dispatcher.loop.time(), task_id=self.task_id, result=outcome))
        if self._waiters is not None or self._bus is not None:
            self._wake()

    def _wake(self) -> None:
        if self._waiters is not None:
            for waiter in self._waiters:
                if not waiter.done():
                    waiter.set_result(None)
            self._waiters = None
        if self._bus is not None:
            self._bus.close()
            self._bus = None


def as_error(result: TaskResult) -> ForebayError:
    """The exception that stands for a result without success."""
    facts = {"task_id": result.task_id, "worker_id": result.worker_id, "error": result.error}
    match result.status:
        case TaskStatus.TIMED_OUT:
            return TaskTimedOut(**facts)
        case TaskStatus.EXPIRED:
            return TaskExpired(**facts)
        case TaskStatus.CANCELLED:
            return TaskCancelled(**facts)
    if isinstance(result.cause, Overloaded):
        return result.cause
    return TaskFailed(**facts)
