"""Fan-out: many tasks at once, fed to the supervisor as room appears, with their results as they finish."""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sized
from contextvars import Context, copy_context
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, Generic, Literal, Protocol, Self, TypeAlias, TypedDict

import msgspec

from forebay import clock, context
from forebay._hooks import call_plain_hook, is_async
from forebay._validate import check_whole, is_positive, reject
from forebay.call_usage import NO_USAGE
from forebay.context import RunningTask
from forebay.errors import ForebayError, InvalidTask, QuorumNotReached, WrongLoop
from forebay.retry import Retry
from forebay.supervisor.room import RoomQueue, RoomTurn
from forebay.supervisor.runs.slot_loans import is_own_nested
from forebay.supervisor.ticket import Reclaim, Ticket
from forebay.task import Deadline, Estimate, Priority, ResultT_co, Task, TaskResult, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.timers import Timer, Timers

_OWNER: Final = "fan_out"
_LEFT: Final = "its fan-out was left"
_ENOUGH: Final = "its fan-out has enough results"
_TOO_FEW: Final = "its fan-out cannot reach its quorum any more"
_RECHECK: Final = 1.0  # seconds after which it is looked again whether a second attempt may begin
_TAIL: Final = 0.95
_YIELD_INTERVAL: Final = 100  # tasks that are submitted without giving the loop a turn

Hedge: TypeAlias = float | Literal["p95"]


class TaskOptions(TypedDict, total=False):
    """The fields of a Task that all tasks of a `map` share."""

    priority: Priority
    timeout: float | None
    deadline: Deadline | None
    spill: bool
    durable: bool
    tenant: str
    thread_id: str | None
    estimate: Estimate | None
    not_before: float | None


class FanOutProgress(msgspec.Struct, frozen=True, kw_only=True):
    """The progress of a fan-out.

    Attributes:
        total: how many tasks there are, or None if that is not known before the last one.
        submitted: tasks that have been submitted.
        succeeded: tasks that have succeeded.
        failed: tasks that have ended in any other way, or were rejected; not those that a quorum has cancelled.
    """

    total: int | None
    submitted: int
    succeeded: int
    failed: int


OnProgress: TypeAlias = Callable[[FanOutProgress], object]


class FanOutOptions(TypedDict, total=False):
    """The arguments of `map` that are those of its fan-out."""

    retry: Retry | None
    limit: int | None
    hedge: Hedge | None
    progress: OnProgress | None


class MapOptions(FanOutOptions, TaskOptions, total=False):
    """The arguments of a `map` that makes its tasks itself."""


class FanOutAdmission(Protocol):
    """Admission control, as far as a fan-out needs it."""

    loop: asyncio.AbstractEventLoop
    room: RoomQueue

    @property
    def may_ask_store(self) -> bool:
        """True if submitting a task may take time, because there is an overflow."""

    def enter_line(
        self, task: Task, on_turn: Callable[[], object], *, is_waiting: Callable[[], bool] | None = None
    ) -> RoomTurn:
        """Put the submitter of a task in line for room, in which it lets others pass unless `is_waiting`."""

    async def submit_once(self, task: Task) -> Ticket:
        """Submit a task whose submitter waits for room."""

    def submit_hedge(self, task: Task, original: Ticket) -> Ticket | None:
        """Start a second attempt at a running task on another worker, if there is one."""

    def pool_of(self, task_type: str) -> Pool:
        """Return the pool of a task."""

    def lend_slots(self, running: RunningTask | None, awaited: Ticket | None) -> Reclaim | None:
        """Lend the slot of `running` while it awaits a task, or room for one."""


class _Branch:
    """One task of a fan-out, and its tickets: the second is a hedge."""

    __slots__ = ("context", "index", "task", "tickets", "timer", "watches")

    def __init__(self, index: int, task: Task, ticket: Ticket, context: Context | None) -> None:
        self.index = index
        self.task = task
        self.tickets = [ticket]
        self.context = context  # of its submitter, for a second attempt; None if there is to be none
        self.watches: list[tuple[Ticket, asyncio.Future[None]]] = []
        self.timer: Timer | None = None


class FanOut(Generic[ResultT_co]):
    """An async iterator over the results of many tasks, as `fan_out` of a supervisor makes it.

    Reading it submits the tasks: as many as there is room for, and the next ones as others finish. So it may be wider
    than the queue, and its tasks may come from a generator. Each result is a TaskResult, whether the task succeeded or
    not; that of a task that was rejected for good has the status REJECTED. Leaving the iteration, or the block of
    ``async with``, cancels the tasks that have not ended, apart from those that others have submitted too.
    """

    def __init__(  # noqa: PLR0913 - the arguments of `fan_out`
        self,
        admission: FanOutAdmission,
        timers: Timers,
        tasks: Iterable[Task[ResultT_co]],
        *,
        retry: Retry | None = None,
        limit: int | None = None,
        quorum: int | None = None,
        hedge: Hedge | None = None,
        ordered: bool = False,
        progress: OnProgress | None = None,
    ) -> None:
        _check(tasks, retry=retry, limit=limit, quorum=quorum, hedge=hedge, progress=progress)
        self._admission = admission
        self._timers = timers
        self._tasks: Iterator[Task] | None = iter(tasks)  # None: all have been submitted
        self._retry = retry
        self._limit = limit
        self._quorum = quorum
        self._hedge = hedge
        self._ordered = ordered
        self._on_progress = progress
        self._total = len(tasks) if isinstance(tasks, Sized) else None
        self._submitted = self._succeeded = self._failed = 0
        self._yielded = 0
        self._next: Task | None = None  # there is no room for it yet
        self._submission: asyncio.Task[Ticket] | None = None  # of it, while the overflow has not answered
        self._turn: RoomTurn | None = None
        self._branches: dict[int, _Branch] = {}  # that have not ended, by index
        self._inside: Counter[str] = Counter()  # results not yet read, and branches that have not ended, by task type
        self._error: ForebayError | None = None  # to be raised: a ticket has ended without a result
        self._results: dict[int, tuple[Task, TaskResult[ResultT_co]]] = {}  # not yielded yet, by index
        self._changed = asyncio.Event()
        self._reading = asyncio.Lock()

    def expect(self, total: int | None) -> None:
        """Say how many tasks there are, if that is known though the tasks come from a generator."""
        self._total = total if self._total is None else self._total

    # --- reading ---

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> TaskResult[ResultT_co]:
        return (await self.read())[1]

    async def read(self) -> tuple[int, TaskResult[ResultT_co]]:
        """Return the next result, with the position of its task.

        Raises:
            StopAsyncIteration: there are no more.
            QuorumNotReached: too many tasks have failed.
            Others: as `submit`; then the tasks that have not ended are cancelled.
        """
        if asyncio.get_running_loop() is not self._admission.loop:
            raise WrongLoop(what="The fan-out", advice="use supervisor.portal() there")
        try:
            async with self._reading:
                try:
                    return await self._read()
                except StopAsyncIteration:
                    raise
                except Exception:
                    self.cancel()
                    raise
        finally:
            if self._turn is not None:
                self._admission.room.pass_turn(self._turn)

    async def _read(self) -> tuple[int, TaskResult[ResultT_co]]:
        while True:
            self._changed.clear()
            if self._error is not None:
                raise self._error
            found = self._next_result()
            if found is not None:
                return found
            self._check_quorum()
            await self._feed()
            if self._error is not None or self._next_index() is not None:
                continue
            if not (self._branches or self._next):
                self._check_quorum()  # the number of tasks may be known only now
                raise StopAsyncIteration
            await self._wait()

    def _next_index(self) -> int | None:
        """Return the position of the next result to yield, if it is there."""
        if not self._ordered:
            return next(iter(self._results), None)
        if self._yielded in self._results:
            return self._yielded
        over = not (self._branches or self._next or self._tasks)
        return min(self._results, default=None) if over else None  # those between were cancelled

    def _next_result(self) -> tuple[int, TaskResult[ResultT_co]] | None:
        """Return the next result to yield, if it is there."""
        index = self._next_index()
        if index is None:
            return None
        task, result = self._results.pop(index)
        self._yielded += 1
        self._inside[task.task_type] -= 1
        return index, result

    async def _wait(self) -> None:
        """Wait until a task has ended, or there was room for the next one. A run lends its slot meanwhile.

        It has not taken its slot back when it tries whether there is room: with it, it might leave none itself.
        """
        running = context.running_task()
        reclaim = None
        if running is not None:
            reclaim = self._admission.lend_slots(running, self._awaited_by(running))
        try:
            await self._wait_for_change()
            while self._turn is not None and self._error is None and self._next_index() is None:
                self._changed.clear()
                await self._feed()
                if self._turn is not None:
                    await self._wait_for_change()
        finally:
            if reclaim is not None:
                await reclaim()

    async def _wait_for_change(self) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._time_left()):
                await self._changed.wait()

    def _time_left(self) -> float | None:
        """Return the seconds until the deadline of the task that waits for room; None if there is none."""
        deadline = None if self._turn is None or self._next is None else self._next.deadline
        return None if deadline is None else deadline.remaining()

    def _awaited_by(self, running: RunningTask) -> Ticket | None:
        """Return the ticket for which a run waits: one that may need a new run to begin, if there is any."""
        if self._turn is not None:
            return None
        tickets = [ticket for branch in self._branches.values() for ticket in branch.tickets]
        return next((ticket for ticket in tickets if not is_own_nested(running, ticket)), tickets[-1])

    # --- submitting ---

    async def _feed(self) -> None:
        """Submit tasks as long as there is room."""
        while self._error is None and (task := self._next or self._take()) is not None:
            self._next = task
            if self._submission is None:
                if self._is_window_full(task):  # it may have shrunk since the task was rejected
                    self._leave_line()
                    return
                if _is_late(task):
                    self._leave_line()
                    self._next = None
                    self._expire(task)
                    continue
                if not self._may_try(task):
                    return
            ticket = await self._ticket_of(task)
            if ticket is None:
                return
            if not ticket and ticket.in_line:
                self._stand_in_line(task)
                return
            self._leave_line()
            self._next = None
            self._submit(task, ticket)
            if not self._submitted % _YIELD_INTERVAL:
                await asyncio.sleep(0)

    async def _ticket_of(self, task: Task) -> Ticket | None:
        """Submit a task, and return its ticket; None if the fan-out was left meanwhile.

        The overflow may take its time. A reader that is cancelled meanwhile leaves the answer to the next one, because
        submitting the task a second time would be a mistake.
        """
        if self._submission is None:
            if not self._admission.may_ask_store:
                return await self._admission.submit_once(task)
            self._submission = asyncio.ensure_future(self._admission.submit_once(task))
        submission = self._submission
        await asyncio.wait((submission,))
        if self._submission is not submission:
            return None
        self._submission = None
        return submission.result()

    def _take(self) -> Task | None:
        """Return the next task, or None if there is none."""
        if self._tasks is None:
            return None
        task = next(self._tasks, None)
        if task is None:
            self._tasks = None
            self._total = self._submitted
            self._cancel_if_decided()
            return None
        if not isinstance(task, Task):
            raise InvalidTask(
                field="itself", value=type(task).__name__, expected='a Task, such as Task("research", {...})'
            )
        if self._retry is not None and task.retry is None and not _is_late(task):
            task = msgspec.structs.replace(task, retry=self._retry)
        return task

    def _is_window_full(self, task: Task) -> bool:
        """Return whether as many tasks are outstanding as may be; by default as many of a type as can be inside."""
        if self._limit is not None:
            return self._inside.total() >= self._limit
        pool = self._admission.pool_of(task.task_type)
        return self._inside[task.task_type] >= max(1, pool.usable_slots + pool.queue_bound)

    def _may_try(self, task: Task) -> bool:
        """Return whether no other producer stands in line before this one; if one does, stand in line, too."""
        room = self._admission.room
        if self._turn is not None and (self._turn.task_type, self._turn.tenant) != (task.task_type, task.tenant):
            self._leave_line()
        if self._turn is not None:
            return room.is_first(self._turn)
        if room.is_behind(task):
            self._enter_line(task)
            return False
        return True

    def _stand_in_line(self, task: Task) -> None:
        """Wait for room: the task was rejected, and may be admitted later."""
        if self._turn is None:
            self._enter_line(task)
        else:
            self._admission.room.pass_turn(self._turn)

    def _enter_line(self, task: Task) -> None:
        # While nobody reads, nothing is submitted, so others must not wait for this one.
        self._turn = self._admission.enter_line(task, self._changed.set, is_waiting=self._reading.locked)

    def _leave_line(self) -> None:
        if self._turn is not None:
            self._admission.room.leave(self._turn)
            self._turn = None

    def _submit(self, task: Task, ticket: Ticket) -> None:
        may_hedge = self._hedge is not None and _can_be_hedged(task)
        branch = _Branch(self._submitted, task, ticket, copy_context() if may_hedge else None)
        self._submitted += 1
        self._inside[task.task_type] += 1
        self._branches[branch.index] = branch
        if ticket.done():
            self.branch_ended(branch)
            return
        self._watch(branch, ticket)
        if may_hedge:
            self._arm_hedge(branch)
        self._report()

    def _expire(self, task: Task) -> None:
        """End a task whose deadline has passed before there was room for it."""
        error = "its deadline passed before there was room for it"
        result = TaskResult(task_id=task.task_id, worker_id=None, success=False, status=TaskStatus.EXPIRED, error=error)
        index = self._submitted
        self._submitted += 1
        self._inside[task.task_type] += 1
        self._keep_result(index, task, result)

    # --- results ---

    def _watch(self, branch: _Branch, ticket: Ticket) -> None:
        done = ticket.watch()
        branch.watches.append((ticket, done))
        done.add_done_callback(partial(_ticket_ended, weakref.ref(self), branch))

    def branch_ended(self, branch: _Branch) -> None:
        """Take the result of a branch one of whose attempts has ended, whether or not anybody reads it by now."""
        if branch.index not in self._branches:  # both of its attempts had ended, or it was cancelled
            return
        try:
            result = _result_of(branch)
        except ForebayError as error:  # it is left in the overflow, for example
            self._error = error.with_traceback(None)  # which refers to this fan-out
            self._changed.set()
            return
        if result is None:  # the other attempt goes on
            return
        del self._branches[branch.index]
        self._stop(branch, _ENOUGH)
        self._keep_result(branch.index, branch.task, result)

    def _keep_result(self, index: int, task: Task, result: TaskResult) -> None:
        """Keep the result of a task until it is read."""
        if result.success:
            self._succeeded += 1
        else:
            self._failed += 1
        self._results[index] = (task, result)
        self._changed.set()
        self._cancel_if_decided()
        self._report()

    def _cancel_if_decided(self) -> None:
        """Cancel the rest once the quorum is made, or out of reach, however slowly the results are read."""
        if self._quorum is not None and self._succeeded == self._quorum:
            self._error = None  # of a task that is not needed
            self._cancel(_ENOUGH)
        elif self._is_quorum_out_of_reach:
            self._cancel(_TOO_FEW)

    @property
    def _is_quorum_out_of_reach(self) -> bool:
        """True once the tasks that are left cannot make the quorum any more."""
        return self._quorum is not None and self._total is not None and self._total - self._failed < self._quorum

    def _check_quorum(self) -> None:
        """Raise QuorumNotReached if the quorum is out of reach."""
        if self._is_quorum_out_of_reach:
            assert self._quorum is not None  # noqa: S101 - it is out of reach
            assert self._total is not None  # noqa: S101 - as above
            raise QuorumNotReached(quorum=self._quorum, total=self._total, failed=self._failed)

    def _report(self) -> None:
        if self._on_progress is not None:
            state = FanOutProgress(
                total=self._total, submitted=self._submitted, succeeded=self._succeeded, failed=self._failed
            )
            call_plain_hook("progress of a fan-out", self._on_progress, state)

    # --- hedges ---

    def _arm_hedge(self, branch: _Branch) -> None:
        """Look again when the task has run for so long that a second attempt may be faster."""
        now, ticket = self._admission.loop.time(), branch.tickets[0]
        after = self._hedge_after(branch.task)
        due = now + (after or _RECHECK)
        if ticket.run is not None and after:
            due = max(now, ticket.run.started_at + after)
        branch.timer = self._timers.at(due, _hedge_due, weakref.ref(self), branch)

    def _hedge_after(self, task: Task) -> float:
        """Return the seconds of running after which a task gets a second attempt; 0 while that is unknown."""
        if self._hedge == "p95":
            return self._admission.pool_of(task.task_type).service_times.quantile(_TAIL)
        return self._hedge or 0.0

    def hedge(self, branch: _Branch) -> None:
        """Make a second attempt at a task that has run for long, or look again later."""
        branch.timer = None
        ticket = branch.tickets[0]
        if branch.index not in self._branches or ticket.done() or _is_late(branch.task):
            return
        after = self._hedge_after(branch.task)
        run = ticket.run
        if run is None or not after or self._admission.loop.time() < run.started_at + after - 1e-6:
            self._arm_hedge(branch)
            return
        copy = msgspec.structs.replace(branch.task, task_id=clock.new_id(), spill=False)
        assert branch.context is not None  # noqa: S101 - it may be hedged
        second = branch.context.run(self._admission.submit_hedge, copy, ticket)  # else in that of a timer
        if second is None:  # no other worker is free, or the retry budget is used up
            again = self._admission.loop.time() + _RECHECK
            branch.timer = self._timers.at(again, _hedge_due, weakref.ref(self), branch)
            return
        branch.tickets.append(second)
        self._watch(branch, second)

    # --- leaving ---

    def cancel(self) -> None:
        """Submit nothing more, and cancel the tasks that have not ended. Results that were not read are dropped."""
        self._cancel(_LEFT)
        self._error = None
        self._results.clear()

    def _cancel(self, reason: str) -> None:
        self._leave_line()
        task, self._tasks, self._next = self._next, None, None
        submission, self._submission = self._submission, None
        if submission is not None and task is not None:
            submission.cancel()
            submission.add_done_callback(partial(_cancel_late, task, reason))
        branches, self._branches = self._branches, {}
        for branch in branches.values():
            self._stop(branch, reason)
        self._changed.set()  # another reader may wait

    def _stop(self, branch: _Branch, reason: str) -> None:
        """Cancel the attempts of a branch that go on, unless others wait for them."""
        self._timers.cancel(branch.timer)
        for ticket, done in branch.watches:
            ticket.unwatch(done)
        branch.watches.clear()
        for number, ticket in enumerate(branch.tickets):
            if number or _is_own(ticket, branch.task):
                _cancel_unless_shared(ticket, reason)

    async def aclose(self) -> None:
        """Leave the iteration: cancel the tasks that have not ended."""
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.cancel()

    def __del__(self) -> None:
        if getattr(self, "_reading", None) is None or self._admission.loop.is_closed():
            return
        if not (self._branches or self._turn or self._submission):
            return
        with contextlib.suppress(RuntimeError):  # the loop has closed meanwhile
            if asyncio._get_running_loop() is self._admission.loop:  # noqa: SLF001 - documented; None in a thread
                self.cancel()
            else:
                self._admission.loop.call_soon_threadsafe(self.cancel)


def _is_own(ticket: Ticket, task: Task) -> bool:
    """Return whether a ticket is that of `task`, and not what somebody else has submitted under its key.

    It may have the task with a payload of the declared type.
    """
    return ticket.task_id == task.task_id


def _cancel_unless_shared(ticket: Ticket, reason: str) -> None:
    """Cancel a task, unless others wait for it."""
    if not (ticket.done() or ticket.shared or ticket.is_observed):
        ticket.cancel(reason)


def _cancel_late(task: Task, reason: str, submission: asyncio.Future[Ticket]) -> None:
    """Cancel a task whose fan-out was left before the overflow had answered."""
    if not submission.cancelled() and submission.exception() is None and _is_own(submission.result(), task):
        _cancel_unless_shared(submission.result(), reason)


# Tickets and timers hold a fan-out weakly, so that its tasks are cancelled once nobody reads it any more.


def _ticket_ended(fan_out: weakref.ref[FanOut], branch: _Branch, _: object) -> None:
    if (known := fan_out()) is not None:
        known.branch_ended(branch)


def _hedge_due(fan_out: weakref.ref[FanOut], branch: _Branch) -> None:
    if (known := fan_out()) is not None:
        known.hedge(branch)


def _is_late(task: Task) -> bool:
    """Return whether the deadline of a task has passed."""
    return task.deadline is not None and task.deadline.remaining() <= 0


def _check(tasks: Any, *, retry: Any, limit: Any, quorum: Any, hedge: Any, progress: Any) -> None:  # noqa: PLR0913
    """Check the arguments of a fan-out.

    Raises:
        InvalidSetting: one of them is invalid.
    """
    if not isinstance(tasks, Iterable):
        reject(_OWNER, "tasks", tasks, "an iterable of Tasks, such as a list or a generator")
    if retry is not None and not isinstance(retry, Retry):
        reject(_OWNER, "retry", retry, "a Retry, for example Retry(max_attempts=3), or None")
    check_whole(_OWNER, "limit", limit, none="for as many as can be inside")
    check_whole(_OWNER, "quorum", quorum, none="for all results")
    if hedge is not None and hedge != "p95" and not is_positive(hedge):
        reject(_OWNER, "hedge", hedge, 'a positive number of seconds, "p95", or None for no second attempts')
    if progress is not None and not callable(progress):
        expected = "a plain function that takes a FanOutProgress, such as forebay.progress_bar(), or None"
        reject(_OWNER, "progress", progress, expected)
    if is_async(progress):
        reject(_OWNER, "progress", "an async function", "a plain function: it is called, not awaited")
    if quorum is not None and isinstance(tasks, Sized) and len(tasks) < quorum:
        reject(_OWNER, "quorum", quorum, f"at most the number of tasks, {len(tasks)}")


def _can_be_hedged(task: Task) -> bool:
    """Return whether a second attempt at a task may run beside the first: the others would wait for it, or store it."""
    return task.key is None and task.thread_id is None and not task.durable


def _result_of(branch: _Branch) -> TaskResult | None:
    """Return the result of a branch, with the usage of both its attempts; None while one goes on."""
    result = _result_of_attempts(branch)
    if result is None or len(branch.tickets) == 1:
        return result
    used = (ticket.usage if ticket.result is None else ticket.result.usage for ticket in branch.tickets)
    return msgspec.structs.replace(result, usage=sum(used, NO_USAGE))


def _result_of_attempts(branch: _Branch) -> TaskResult | None:
    """Return the result of the attempt that succeeded, else of the first; None while one goes on."""
    first = branch.tickets[0]
    for ticket in branch.tickets:
        if ticket.result is not None and ticket.result.success:
            return (
                msgspec.structs.replace(ticket.result, task_id=first.task_id) if ticket is not first else ticket.result
            )
    if not all(ticket.done() for ticket in branch.tickets):
        return None
    if first.verdict is Verdict.REJECTED:
        return TaskResult(
            task_id=first.task_id,
            worker_id=None,
            success=False,
            status=TaskStatus.REJECTED,
            error=first.reason,
            cause=first.refusal(),
        )
    return first.outcome()
