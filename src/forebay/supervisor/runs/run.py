"""Run: the state of one attempt at a task; with the runs in progress, and the claims of those that lent their slot."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import itertools
import math
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import copy_context
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVarTuple

import msgspec

from forebay import clock
from forebay._hooks import await_hook, call_hook, is_awaitable, is_interrupt
from forebay.context import EventReceiver
from forebay.errors import Overloaded, fresh_copy
from forebay.events import TaskProgress
from forebay.task import Deadline, Priority, Task, TaskStatus

if TYPE_CHECKING:
    from forebay.call_usage import CallUsage
    from forebay.interfaces import LoadSource
    from forebay.supervisor.core import Core
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent

Ts = TypeVarTuple("Ts")

_adding = threading.Lock()  # of any run: held for a microsecond


class StopIterationCarrier(BaseException):
    """Carries a handler's StopIteration out of a coroutine, where raising it would mean the end of the coroutine."""

    def __init__(self, cause: StopIteration) -> None:
        self.cause = cause


class HandlerRunner(Protocol):
    """The `Runner` that steps a handler."""

    def stop(self, run: Run) -> None:
        """Cancel the handler of `run`."""

    def handles(self, run: Run, aio: asyncio.Task[Any] | None) -> bool:
        """Return whether the handler of `run` is running, in `aio`."""


class RunEnder(Protocol):
    """The `RunCompletion` of a dispatcher, as far as a run needs it."""

    def time_out(self, run: Run) -> None:
        """End a run whose time is up."""

    def end_early(self, run: Run, status: TaskStatus, error: str, cause: BaseException | None = None) -> None:
        """End the ticket of a run now, and ask the handler to stop."""

    def fail_early(self, run: Run, cause: BaseException) -> None:
        """End the ticket of a run now: its handler has failed, and waits until what it has begun has stopped."""

    def abandon(self, run: Run) -> None:
        """Ask the handler of a run to stop without ending the ticket."""

    def handler_ended(self, run: Run, value: Any, cause: BaseException | None) -> None:
        """Finish a run whose handler has ended."""


class RunOwner(Protocol):
    """The dispatcher, as far as its runs need it."""

    @property
    def core(self) -> Core:
        """The objects that the parts of the supervisor share."""

    @property
    def completion(self) -> RunEnder:
        """The ways in which a run can end."""

    @property
    def slot_claims(self) -> SlotClaims:
        """The runs that lent their slot and wait to have it back."""

    def is_above(self, other: object) -> bool:
        """Return whether the dispatcher `other` is that of a supervisor below this one."""

    def take_slot(self, run: Run) -> None:
        """Take a slot of the run's worker."""

    def lend_slot(self, run: Run) -> None:
        """Lend the slot of a run, and start what comes next."""

    def count_claims(self, tenant: str, by: int) -> None:
        """Count `by` more runs that have begun and that only the bound of `tenant` keeps from a slot."""

    def dispatch(self, worker: WorkerAgent) -> None:
        """Start as many waiting tasks on `worker` as it has slots for."""

    def source_used(self, run: Run, source: LoadSource) -> None:
        """Record that the run is the first of its worker to call `source`."""


class Run(msgspec.Struct, eq=False):  # a Struct, because it is made in C
    """One attempt at a task, in progress on a worker. It is the running task in the context of its handler."""

    dispatcher: RunOwner
    ticket: Ticket
    task: Task
    deadline: Deadline | None
    worker: WorkerAgent
    breaker_epoch: int
    breaker_phase: int
    started_at: float  # loop time
    holds_slot: bool = True  # False while the slot is lent, and after the end
    runner: HandlerRunner | None = None
    timer: Timer | None = None
    awaited_tasks: int = 0  # tasks, of any supervisor, that it awaits
    awaited_elsewhere: int = 0  # those of them that are in another supervisor
    exemptions: int = 0  # awaits, here or below, for which new runs may have to begin
    slot_loans: int = 0  # tasks that it, or a run below it, awaits and that may need its slot
    abandoned_at: float | None = None  # loop time at which its ticket ended before its handler did
    zombie: bool = False  # abandoned, and still running after the grace
    ended: bool = False
    calls: dict[LoadSource, int] | None = None  # how often it has called each source
    expected_sources: dict[LoadSource, None] | None = None  # sources that it has not called yet and is expected to
    # Final rejections of its calls, and when they came, by what rejected them.
    rejections: dict[object, tuple[Overloaded, float]] | None = None
    left_behind: bool = False  # a task that it, or a run below it, has submitted is left to the next process
    usd: float | None = None  # what its calls were charged by upstreams with budgets
    upstream_failed: bool = False  # one of its calls failed because of the upstream
    in_thread: bool = False  # its handler runs in a thread, which its runner only waits for
    continued_submission: float | None = None  # the earlier submission whose saga it goes on with

    # --- as the running task ---

    @property
    def attempt(self) -> int:
        """The number of this start of the task's handler, from 1."""
        return self.ticket.attempts

    @property
    def submission(self) -> float:
        """Epoch seconds that tell this submission of the task from others of its id, in every attempt at it."""
        return self.ticket.submission() if self.continued_submission is None else self.continued_submission

    def continue_submission(self, submission: float) -> None:
        """Go on with the work of an earlier submission: agents find the checkpoints that it has left."""
        self.continued_submission = submission

    def record_call(self, source: LoadSource) -> None:
        """Count a call of `source`, which other runs of its worker will call too. Callable from any thread."""
        calls = self.calls
        if calls is None:
            calls = self.calls = {}
        calls[source] = calls.get(source, 0) + 1
        if self.expected_sources is not None and source in self.expected_sources:
            self._in_loop(self.first_call_made, source)
        elif source not in self.worker.sources:
            self._in_loop(self.dispatcher.source_used, self, source)

    def record_rejection(self, by: object, error: Overloaded) -> None:
        """Record that a call was rejected for good."""
        self.rejections = {**(self.rejections or {}), by: (fresh_copy(error), clock.now())}

    def rejection_by(self, by: object) -> Overloaded | None:
        """Return the error with which a call fails at once, because `by` rejected an earlier one of the run for good.

        None if it rejected none, or once its retry_after has passed, or if that one call was too large: then the run
        has handled the rejection.
        """
        if not self.rejections or by not in self.rejections:
            return None
        error, rejected_at = self.rejections[by]
        if error.retry_after is None and error.load != math.inf:
            return fresh_copy(error)
        left = 0.0 if error.retry_after is None else rejected_at + error.retry_after - clock.now()
        if left > 0:
            return Overloaded(error.reason, limited_by=error.limited_by, load=error.load, retry_after=left)
        self.rejections = {other: rejection for other, rejection in self.rejections.items() if other is not by}
        return None

    def record_usage(self, usage: CallUsage, *, usd: float | None = None) -> None:
        """Add the usage of a call to that of the task; `usd` is what it was charged. Callable from any thread."""
        with _adding:  # and at once: a handler that has made calls in threads may end before the loop has a turn
            self.ticket.add_usage(usage)  # of all attempts: a call that was cut off may end while the next one runs
            if usd is not None:
                self.usd = (self.usd or 0.0) + usd

    @property
    def event_receiver(self) -> EventReceiver:
        """The supervisor, as a receiver of the events of upstreams."""
        return self.dispatcher.core

    def record_upstream_fault(self) -> None:
        """Record that a call failed because of its upstream."""
        self.upstream_failed = True

    def record_left_behind(self) -> None:
        """Record that a task that it, or a run below it, has submitted is left to the next process.

        It may fail for that, with whatever exception its framework makes of StillSpilled.
        """
        self.left_behind = True

    def report(self, value: Any) -> None:
        """Send `value` to the listeners of the task's events, if it has any now. Callable from any thread."""
        if self.ticket.listeners is not None or self.dispatcher.core.bus.active:  # else the loop is not woken in vain
            self._in_loop(self._emit_progress, value)

    def _in_loop(self, callback: Callable[[*Ts], object], *arguments: *Ts) -> None:
        if asyncio._get_running_loop() is self.dispatcher.core.loop:  # noqa: SLF001 - documented; None in a thread
            callback(*arguments)
        else:
            with contextlib.suppress(RuntimeError):  # the loop has closed: nobody listens any more
                self.dispatcher.core.loop.call_soon_threadsafe(callback, *arguments)

    def _emit_progress(self, value: Any) -> None:
        if not self.ended:
            at = self.dispatcher.core.loop.time()
            event = TaskProgress(at=at, task_id=self.task.task_id, value=value)
            self.dispatcher.core.registry.emit(self.ticket, event)
            self.dispatcher.core.bus.limit_backlog()  # a handler may report much without ever giving the loop a turn

    @property
    def tenant_weight(self) -> float:
        """The share of turns of its tenant, which upstreams give its calls."""
        return self.dispatcher.core.tenants.weight(self.task.tenant)

    # --- expected calls ---

    def expect_calls(self, sources: Mapping[LoadSource, None]) -> None:
        """Expect a first call of each of `sources`."""
        self.expected_sources = dict(sources)
        for source in sources:
            source.add_expected_calls(1)

    def expect_call(self, source: LoadSource) -> None:
        """Expect a first call of `source`, unless it is expected already."""
        if self.expected_sources is not None and source not in self.expected_sources:
            self.expected_sources[source] = None
            source.add_expected_calls(1)

    def first_call_made(self, source: LoadSource) -> None:
        """Stop expecting the first call of `source`: it was made, or never will be."""
        if self.expected_sources is not None and source in self.expected_sources:
            del self.expected_sources[source]
            source.add_expected_calls(-1)

    # --- its slot ---

    @property
    def is_probe(self) -> bool:
        """True if it is a probe of its worker's half-open breaker and has not been abandoned."""
        worker = self.worker
        return worker.probing and self.breaker_phase == worker.breaker_phase and self.abandoned_at is None

    @property
    def lends_slot(self) -> bool:
        """True while others may use its slot: see `SlotLoan`."""
        return self.awaited_tasks > 0 and self.slot_loans > 0

    @property
    def lacks_slot(self) -> bool:
        """True if it lent its slot, and would now go on without one."""
        return not (self.holds_slot or self.lends_slot or self.ended)

    @property
    def is_suspended(self) -> bool:
        """True if it has lent its slot and has not ended."""
        return not (self.holds_slot or self.ended)

    def take_slot(self) -> None:
        """Record that it has a slot of its worker again."""
        self.worker.resume(self.task.priority, exempt=self.exemptions > 0)
        self.holds_slot = True

    def give_slot(self) -> None:
        """Record that it has lent its slot."""
        self.worker.suspend(self.task.priority, exempt=self.exemptions > 0)
        self.holds_slot = False

    def begin_exemption(self) -> bool:
        """Count an await, here or below, that may need new runs to begin; return True if it counts as open no more."""
        self.exemptions += 1
        first = self.exemptions == 1 and self.is_suspended
        if first:
            self.worker.change_exempt(self.task.priority, 1)
        return first

    def end_exemption(self) -> None:
        """Stop counting an await that might have needed new runs."""
        self.exemptions -= 1
        if not self.exemptions and self.is_suspended:
            self.worker.change_exempt(self.task.priority, -1)

    def begin_await(self, dispatcher: RunOwner) -> None:
        """Count a task of `dispatcher` that it awaits."""
        self.awaited_tasks += 1
        if dispatcher is not self.dispatcher:
            self.awaited_elsewhere += 1

    def end_await(self, dispatcher: RunOwner) -> None:
        """Stop counting a task of `dispatcher` that it awaited."""
        self.awaited_tasks -= 1
        if dispatcher is not self.dispatcher:
            self.awaited_elsewhere -= 1

    def begin_loan(self) -> None:
        """Count an await, here or below, that may need its slot."""
        self.slot_loans += 1

    def end_loan(self) -> None:
        """Stop counting an await that might have needed its slot."""
        self.slot_loans -= 1

    # --- its handler ---

    def attach(self, runner: HandlerRunner) -> None:
        """Remember the runner that steps its handler."""
        self.runner = runner

    def is_handled_in(self, aio: asyncio.Task[Any] | None) -> bool:
        """Return whether its handler is running, in `aio`."""
        return self.runner is not None and self.runner.handles(self, aio)

    @property
    def awaits_start(self) -> bool:
        """True while the store has not recorded its start: its handler has not begun."""
        return self.runner is None and self.ticket.slot is None

    async def call_in_thread(self) -> Any:
        """Call the handler in a thread, and return its value."""
        # The thread returns an exception as a value, because no future can carry StopIteration.
        self.in_thread = True
        loop, work = self.dispatcher.core.loop, copy_context().run
        try:
            value, cause = await loop.run_in_executor(
                self.dispatcher.core.threads, work, _call_handler, self.worker.handler.call, self.task
            )
        finally:
            self.in_thread = False
        if isinstance(cause, StopIteration):
            raise StopIterationCarrier(cause)
        if cause is not None:
            raise cause
        return await value if inspect.isawaitable(value) else value

    def stop(self) -> None:
        """Ask the handler, or the body of the slot, to stop. If it does not, it is a zombie until it does.

        A thread cannot be stopped, and cancelling the coroutine that waits for it would only hide it.
        """
        if self.ticket.slot is not None:
            self.ticket.slot.stop()
            return
        on_cancel = self.worker.handler.on_cancel
        if on_cancel is not None:
            what = f"on_cancel of worker {self.worker.name!r}"
            asked = call_hook(what, on_cancel, self.task)
            if is_awaitable(asked):
                self.dispatcher.core.run_in_background(await_hook(what, asked))
        if self.runner is not None and not self.in_thread:
            self.runner.stop(self)

    # --- its time ---

    def restart_clock(self, now: float) -> None:
        """Count its time from `now`: its handler starts only now that the start is recorded."""
        self.started_at = now

    def ends_at(self) -> float:
        """Return the loop time of its timeout or its deadline, whichever comes first."""
        timeout = self.started_at + (self.task.timeout or self.worker.timeout)
        return timeout if self.deadline is None else min(timeout, self.started_at + self.deadline.remaining())

    def set_timer(self, timer: Timer) -> None:
        """Keep a timer of its own: for its end or, once it is abandoned, for its grace."""
        self.timer = timer

    def clear_timer(self) -> Timer | None:
        """Forget its timer, and return it if it had one: the caller cancels it."""
        timer, self.timer = self.timer, None
        return timer

    @property
    def ends_with_worker_timeout(self) -> bool:
        """True if the timer of its worker ends it, because it has none of its own."""
        handler_started = self.runner is not None  # not while its start is being recorded
        return handler_started and self.timer is None and self.abandoned_at is None and self.ticket.slot is None

    # --- its end ---

    def time_out(self) -> None:
        """End the ticket because its time is up, and ask the handler to stop."""
        self.dispatcher.completion.time_out(self)

    def end_early(self, status: TaskStatus, error: str, cause: BaseException | None = None) -> None:
        """End the ticket now, and ask the handler to stop."""
        self.dispatcher.completion.end_early(self, status, error, cause)

    def fail_early(self, cause: BaseException) -> None:
        """End the ticket now: the handler has failed, and waits until what it has begun has stopped."""
        self.dispatcher.completion.fail_early(self, cause)

    def abandon(self) -> None:
        """Ask the handler to stop without ending the ticket: the task is to run again."""
        self.dispatcher.completion.abandon(self)

    def handler_ended(self, value: Any, cause: BaseException | None) -> None:
        """Finish the run: its handler returned `value`, or raised `cause`."""
        self.dispatcher.completion.handler_ended(self, value, cause)

    def mark_abandoned(self, now: float) -> bool:
        """Record that its ticket no longer depends on its handler, which has been asked to stop.

        Returns:
            True if its worker may now begin another run: one that is abandoned without a slot is not open, unless its
            handler is in a thread, which cannot be stopped and goes on to work.
        """
        if self.holds_slot and self.is_probe:
            self.worker.abandon_probe()
        self.abandoned_at = now
        self.worker.add_zombie()
        return not self.in_thread and self.begin_exemption()

    def mark_zombie(self) -> None:
        """Record that its handler has not stopped within the grace."""
        self.zombie = True

    def end(self) -> bool:
        """Record that its handler has really ended; return whether it held a slot, which the caller now returns."""
        held = self.holds_slot
        if not (held or self.ended):  # suspended
            self.worker.resume(self.task.priority, exempt=self.exemptions > 0)
        self.ended, self.holds_slot = True, False
        return held


def _may_resume(run: Run) -> bool:
    """Return whether a run that has lent its slot may take a free one: by the reserve, and the bound of its tenant."""
    return _reserve_allows(run) and run.dispatcher.core.tenants.may_resume(run.task.tenant)


def _reserve_allows(run: Run) -> bool:
    return not run.worker.reserve or run.worker.may_take_slot(run.task.priority, again=True)


def was_interrupted(run: Run, cause: BaseException | None) -> bool:
    """Return whether a Ctrl-C ended the handler of `run`, which cannot be if it ran in a thread."""
    in_loop = run.ticket.slot is not None or not run.worker.handler.blocking
    return in_loop and cause is not None and is_interrupt(cause)


def _call_handler(call: Any, task: Task) -> tuple[Any, BaseException | None]:
    try:
        return call(task), None
    except BaseException as exc:  # noqa: BLE001 - given to the loop as a value
        return None, exc


class ActiveRuns:
    """The runs in progress, zombies included, by worker."""

    def __init__(self) -> None:
        self._by_worker: dict[WorkerAgent, dict[Run, None]] = {}  # in the order in which their handlers started
        self._stopping: dict[str, Run] = {}  # abandoned ones, by task id
        # Done when nothing runs on the worker, or when the run has ended.
        self._awaited: dict[WorkerAgent | Run, asyncio.Future[None]] = {}

    def add_worker(self, worker: WorkerAgent) -> None:
        """Make room for the runs of a worker."""
        self._by_worker[worker] = {}

    def remove_worker(self, worker: WorkerAgent) -> None:
        """Forget a worker on which nothing runs any more."""
        del self._by_worker[worker]

    def add(self, run: Run) -> None:
        """Add a run that starts now."""
        self._by_worker[run.worker][run] = None

    def move_to_end(self, run: Run) -> None:
        """Make it the latest run of its worker, because its handler starts only now."""
        runs = self._by_worker[run.worker]
        runs[run] = runs.pop(run)

    def remove(self, run: Run) -> None:
        """Remove a run whose handler has ended."""
        runs = self._by_worker[run.worker]
        runs.pop(run, None)
        if self._stopping and self._stopping.get(run.task.task_id) is run:
            del self._stopping[run.task.task_id]
        if self._awaited:
            self._answer(run)
            if not runs:
                self._answer(run.worker)

    def _answer(self, awaited: WorkerAgent | Run) -> None:
        if (future := self._awaited.pop(awaited, None)) is not None:
            future.get_loop().call_soon(future.set_result, None)  # not now: the run is still ending

    def stop(self, run: Run) -> None:
        """Remember a run that was abandoned, until its handler has stopped."""
        self._stopping[run.task.task_id] = run

    def when_stopped(self, task_id: str) -> asyncio.Future[None] | None:
        """Return a future that is done once the handler of a task that has ended has stopped; None if it has."""
        run = self._stopping.get(task_id)
        return None if run is None else self._future(run)

    def when_idle(self, worker: WorkerAgent) -> asyncio.Future[None] | None:
        """Return a future that is done once nothing runs on a worker; None if nothing does."""
        return self._future(worker) if self._by_worker.get(worker) else None

    def _future(self, awaited: WorkerAgent | Run) -> asyncio.Future[None]:
        if awaited not in self._awaited:
            self._awaited[awaited] = asyncio.get_running_loop().create_future()
        return self._awaited[awaited]

    def on(self, worker: WorkerAgent) -> list[Run]:
        """Return the runs on a worker, in the order in which their handlers started."""
        return list(self._by_worker.get(worker, ()))

    def are_all_zombies(self, worker: WorkerAgent, priority: Priority = Priority.CRITICAL) -> bool:
        """Return whether zombies hold every slot of a worker, or as many as a task of `priority` could take."""
        runs, slots = self._by_worker.get(worker, ()), worker.slots_for(priority)
        return len(runs) >= slots and sum(run.zombie and run.holds_slot for run in runs) >= slots

    def are_all_stuck(self, worker: WorkerAgent, priority: Priority) -> bool:
        """Return the same, with runs whose start the store has not recorded counted as zombies."""
        runs = self._by_worker.get(worker, ())
        stuck = sum(run.holds_slot and (run.zombie or run.awaits_start) for run in runs)
        return stuck >= worker.slots_for(priority)

    def __bool__(self) -> bool:
        return any(self._by_worker.values())

    def __iter__(self) -> Iterator[Run]:
        return itertools.chain.from_iterable(self._by_worker.values())


_Claim: TypeAlias = tuple[Run, asyncio.Future[None]]  # a run, and the future that is done when it has a slot


class SlotClaims:
    """The runs that lent their slot and wait to have it back, by worker, in the order of their claims.

    A claim on a free slot that only the bound of the run's tenant forbids counts towards that bound as if the run had
    the slot: what has begun goes before what has not, also where new tasks wait on another worker.
    """

    def __init__(self) -> None:
        self._claims: dict[WorkerAgent, deque[_Claim]] = {}
        self._counted: dict[WorkerAgent, set[_Claim]] = {}  # those that count towards the bound of their tenant

    def claim(self, run: Run) -> asyncio.Future[None] | None:
        """Take a slot for `run` if one is free, else the next one that is.

        Returns:
            None if `run` need not wait: it has a slot, or it is being cancelled. Otherwise a future that is done when
            it has a slot. A run that does not stop when it is cancelled gets the next slot too: it is at work.
        """
        worker = run.worker
        if worker.has_free_slot() and _may_resume(run) and not self._is_behind(worker):
            run.dispatcher.take_slot(run)
            return None
        if run.abandoned_at is not None and any(other is run for other, _ in self._claims.get(worker, ())):
            return None
        granted: asyncio.Future[None] = run.dispatcher.core.loop.create_future()
        worker.hold_back_claims(worker.has_free_slot() and not self._is_behind(worker))
        self._claims.setdefault(worker, deque()).append((run, granted))
        worker.add_claim()
        self._count_for_tenants(worker)
        return None if run.abandoned_at is not None else granted

    def withdraw(self, run: Run, granted: asyncio.Future[None]) -> None:
        """Remove a claim, if it is still there."""
        self._remove(run.worker, [claim for claim in self._claims.get(run.worker, ()) if claim == (run, granted)])

    def grant(self, worker: WorkerAgent) -> None:
        """Give the free slots of `worker` to the runs that claim them and may take them, the oldest claim first."""
        while worker.pending_claims and worker.has_free_slot():
            run = next((run for run, _ in self._claims[worker] if _may_resume(run)), None)
            worker.hold_back_claims(run is None)
            if run is None:
                self._count_for_tenants(worker)
                return
            if run.lacks_slot:
                run.dispatcher.take_slot(run)
            answered = [claim for claim in self._claims[worker] if claim[0] is run]  # one slot answers them all
            self._remove(worker, answered)
            for _, granted in answered:
                if not granted.done():
                    granted.set_result(None)

    def _count_for_tenants(self, worker: WorkerAgent) -> None:
        """Count claims on the free slots of `worker` towards the bounds of their tenants, which alone forbid them."""
        counted = self._counted.get(worker, set())
        free = worker.max_concurrent - worker.current_tasks - len(counted)
        for claim in self._claims[worker]:
            if free <= 0:
                break
            run = claim[0]
            if (
                claim not in counted
                and _reserve_allows(run)
                and not run.dispatcher.core.tenants.may_resume(run.task.tenant)
            ):
                self._counted.setdefault(worker, counted).add(claim)
                run.dispatcher.count_claims(run.task.tenant, 1)
                free -= 1

    def waiting(self) -> list[WorkerAgent]:
        """Return the workers of which a slot is claimed."""
        return [worker for worker, claims in self._claims.items() if claims]

    def _is_behind(self, worker: WorkerAgent) -> bool:
        """Return whether a run that could take a free slot of `worker` claims one already."""
        return worker.pending_claims > 0 and any(_may_resume(run) for run, _ in self._claims[worker])

    def forget(self, worker: WorkerAgent) -> None:
        """Forget a worker on which nothing runs any more."""
        self._claims.pop(worker, None)

    def close(self) -> None:
        """Let every run that waits for its slot go on without one, because no slot is given any more."""
        for worker, claims in self._claims.items():
            for claim in list(claims):
                self._remove(worker, [claim])
                if not claim[1].done():
                    claim[1].set_result(None)

    def _remove(self, worker: WorkerAgent, claims: Iterable[_Claim]) -> None:
        for claim in claims:
            self._claims[worker].remove(claim)
            worker.remove_claim()
            counted = self._counted.get(worker)
            if counted is not None and claim in counted:
                counted.remove(claim)
                if not counted:
                    del self._counted[worker]
                claim[0].dispatcher.count_claims(claim[0].task.tenant, -1)
