"""The end of a run: when its handler ends, or before that (a zombie); and what it means for the worker's breaker."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from forebay._hooks import call_plain_hook, raise_again_if_interrupt
from forebay._text import error_text, format_duration
from forebay.errors import (
    NestedTooDeep,
    Overloaded,
    RemoteError,
    SagaCompensated,
    SagaParked,
    SagaTaken,
    StillSpilled,
    StoreUnavailable,
    TaskFailed,
    UnusableTask,
    WorkerStopped,
)
from forebay.events import WorkerFailed, WorkerRecovered, ZombieEnded, ZombieFound, log
from forebay.interfaces import Outcome
from forebay.supervisor.runs.run import ActiveRuns, Run, was_interrupted
from forebay.supervisor.ticket import Ticket, unsuccessful_result
from forebay.task import TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.context import RunningTask
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.retries import TaskRetries
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.slot_counts import SlotCounts
    from forebay.supervisor.worker import WorkerAgent

# attribute access on an enum is slow on the hot path
_SUCCESS, _IGNORED, _SUCCEEDED, _FAILED, _EXPIRED, _TIMED_OUT = (
    Outcome.SUCCESS, Outcome.IGNORED, TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.EXPIRED, TaskStatus.TIMED_OUT,
)  # fmt: skip
_CLOCK_TOLERANCE = 1e-3  # seconds by which the loop's clock and that of deadlines may differ
_ALL_ZOMBIES = "every slot is held by a handler that does not stop"
_PENALTY_LIFETIME = 10.0  # seconds after which a failure no longer counts against a worker's score
_SAGA_ENDS = (SagaCompensated, SagaParked, SagaTaken, StoreUnavailable)  # the last: its log is away


class CompletionDispatcher(Protocol):
    """The dispatcher, as far as the end of a run needs it."""

    def finish(self, ticket: Ticket, result: TaskResult) -> None:
        """Give a ticket its result; if the task is stored, only once the store has the result."""

    def can_requeue(self, ticket: Ticket) -> bool:
        """Return whether a task is stored where the next process finds it."""

    def requeue(self, ticket: Ticket) -> None:
        """Leave a stored task to the next process."""

    def next_in_conversation(self, ticket: Ticket) -> None:
        """Start or queue the next task of the conversation."""

    def return_slot(self, run: Run, now: float | None = None) -> None:
        """Return the slot of a run, and start what comes next."""

    def forget_suspended(self, run: Run) -> None:
        """Stop counting a run that has lent its slot."""

    def suspended_run_ended(self, run: Run) -> None:
        """Forget a run that has ended without having its slot back."""

    def dispatch(self, worker: WorkerAgent, now: float | None = None) -> None:
        """Start as many waiting tasks on `worker` as it has slots for."""

    def update_slots(self, worker: WorkerAgent) -> None:
        """Count the slots that `worker` has now, and dispatch to it."""

    def start_worker(self, worker: WorkerAgent) -> None:
        """Start the handler of a worker."""


class RunCompletion:
    """The ways in which a run ends.

    Each gives the ticket its result exactly once, and returns the slot once the handler has ended.

    Args:
        core: the objects that the parts of the supervisor share.
        dispatcher: the dispatcher.
        runs: the runs in progress.
        retries: the tasks that wait for their next attempt.
        on_run_end: called with a run that ends with calls still expected of it.
        zombie_grace: seconds that a handler has to stop before it is a zombie.

    Attributes:
        zombies: how many handlers have outlived their timeout or cancellation, and the grace after it.
        timed_workers: workers with a timer for those of their runs that end at the worker's timeout.
    """

    def __init__(  # noqa: PLR0913 - the parts of the supervisor that it uses
        self,
        core: Core,
        dispatcher: CompletionDispatcher,
        *,
        runs: ActiveRuns,
        retries: TaskRetries,
        on_run_end: Callable[[Run], None],
        zombie_grace: float,
    ) -> None:
        self._dispatcher = dispatcher
        self._loop = core.loop
        self._timers = core.timers
        self._registry = core.registry
        self._bus = core.bus
        self._pools: Mapping[str, Pool] = core.pools.by_type
        self._counts_of: Mapping[WorkerAgent, Sequence[SlotCounts]] = core.pools.counts_of
        self._runs = runs
        self._retries = retries
        self._on_run_end = on_run_end
        self._grace = zombie_grace
        self.zombies = 0
        self.timed_workers: dict[WorkerAgent, Timer] = {}  # the timer may be late, if the run that it is for has ended
        self._breaker_timers: dict[WorkerAgent, Timer] = {}  # when time alone changes a breaker

    # --- before the handler has ended ---

    def time_out(self, run: Run) -> None:
        """End a run at its timeout, or at its deadline if that came first."""
        now, timeout = self._loop.time(), run.task.timeout or run.worker.timeout
        if run.deadline is not None and now + run.deadline.remaining() <= run.started_at + timeout + _CLOCK_TOLERANCE:
            pool = self._pools[run.task.task_type]
            pool.record_timeout(now - run.started_at, run.task.estimate)
            if pool.by_cost is not None:
                pool.by_cost.record_cut_off(now, run.worker, now - run.started_at)
            self.end_early(run, _EXPIRED, "its deadline passed while it ran")
        else:
            self.end_early(run, _TIMED_OUT, f"it ran longer than its timeout of {format_duration(timeout)}")

    def arm_timeout(self, run: Run) -> None:
        """Set the timer that ends `run` when its time is up.

        Runs with the worker's timeout end in the order in which they started, so one timer a worker is enough for them,
        and none has to be cancelled.
        """
        worker, timers = run.worker, self._timers
        if run.task.timeout is not None or run.deadline is not None:
            run.set_timer(timers.at(run.ends_at(), self.time_out, run))
        elif worker not in self.timed_workers:
            self.timed_workers[worker] = timers.at(
                run.started_at + worker.timeout, RunCompletion._check_timeouts, self, worker
            )

    def _check_timeouts(self, worker: WorkerAgent) -> None:
        self.timed_workers.pop(worker, None)
        now = self._loop.time()
        for run in self._runs.on(worker):
            if not run.ends_with_worker_timeout:
                continue
            if (due := run.started_at + worker.timeout) > now:
                if worker not in self.timed_workers:  # otherwise another run has started, since one of these ended
                    self.timed_workers[worker] = self._timers.at(due, RunCompletion._check_timeouts, self, worker)
                break
            self.time_out(run)

    def end_early(self, run: Run, status: TaskStatus, error: str, cause: BaseException | None = None) -> None:
        """End the ticket now and ask the handler to stop; until it does, the run is a zombie and holds its slot.

        A task whose time was up, or whose worker is stopped, waits for its next attempt instead, if it is to be
        retried.
        """
        if run.abandoned_at is None and not run.ended:
            makes_room = self._end_ticket(run, status, error, cause, _fault(run) if status is _TIMED_OUT else _IGNORED)
            run.stop()
            self._make_room(run, makes_room)

    def fail_early(self, run: Run, cause: BaseException) -> None:
        """End the ticket of a run now: its handler has failed, and waits until what it has begun has stopped.

        It is not asked to stop: it does once that has.
        """
        if run.abandoned_at is None and not run.ended:
            cause, error = _blame_rejection(run, *_read_cause(cause))
            self._make_room(run, self._end_ticket(run, _FAILED, error, cause, _outcome(run, cause)))

    def _end_ticket(
        self, run: Run, status: TaskStatus, error: str, cause: BaseException | None, outcome: Outcome
    ) -> bool:
        """Abandon a run, and end its ticket or have its task retried; return as `_detach` does."""
        duration_ms = 1000 * (self._loop.time() - run.started_at)
        run.worker.record_other_end(status)
        makes_room = self._detach(run, outcome)
        worker = run.worker.name
        result = unsuccessful_result(run.ticket, status, error, worker_id=worker, duration_ms=duration_ms, cause=cause)
        if status not in (_TIMED_OUT, _FAILED) or not self._retries.retry(run, result):
            self._dispatcher.finish(run.ticket, result)
        return makes_room

    def _make_room(self, run: Run, makes_room: bool) -> None:  # noqa: FBT001 - what `_end_ticket` returned
        if run.worker.probing or makes_room:  # the probe is free again, whether or not its handler stops
            self._dispatcher.dispatch(run.worker)

    def abandon(self, run: Run) -> None:
        """Ask the handler to stop without ending the ticket: the task is to run again, in another process."""
        if run.abandoned_at is None and not run.ended:
            makes_room = self._detach(run, _IGNORED)
            run.stop()
            if makes_room:
                self._dispatcher.dispatch(run.worker)

    def _detach(self, run: Run, outcome: Outcome) -> bool:
        """Abandon the run: whatever its handler still does no longer changes the ticket.

        Returns:
            True if its worker may now begin another run.
        """
        now = self._loop.time()
        makes_room = run.mark_abandoned(now)
        self._runs.stop(run)
        self._timers.cancel(run.clear_timer())
        run.set_timer(self._timers.at(now + self._grace, self._mark_zombie, run))
        self._record_outcome(run, outcome)
        return makes_room

    def _mark_zombie(self, run: Run) -> None:
        worker = run.worker
        run.mark_zombie()
        worker.record_zombie()
        self.zombies += 1
        task_id, name = run.task.task_id, worker.name
        log.warning(
            "task %r has ended, but its handler on worker %r did not stop: it holds its slot until it does",
            task_id,
            name,
        )
        self._registry.emit(run.ticket, ZombieFound(at=self._loop.time(), task_id=task_id, worker_id=name))
        if run.ticket.retries is not None and run.ticket.retries.stopping is run:
            self._retries.attempt_stopped(run.ticket, zombie=True)
        if self._runs.are_all_zombies(worker) and worker.breaker.trip(self._loop.time()) is not None:
            self._update_breaker(worker, _ALL_ZOMBIES)
            worker.mark_stuck()
        if self._registry.listeners:
            self._registry.notify_progress()

    # --- when the handler has ended ---

    def handler_ended(self, run: Run, value: Any, cause: BaseException | None) -> None:
        """Process the end of a handler: record its result and its duration, and give its slot to what comes next."""
        if run.ended:
            self._orphan_stopped(run)
            return
        worker, ticket, task = run.worker, run.ticket, run.task
        cause, error = (None, "") if cause is None else _read_cause(cause)  # first, because it is user code
        now = self._loop.time()
        seconds = now - run.started_at
        holds_slot, parent = run.end(), ticket.parent
        self._forget(run)
        success = cause is None and run.abandoned_at is None
        pool = self._pools[task.task_type]
        pool.service_times.record(seconds, success=success)
        if success:
            self._succeeded(run, value, now, seconds, pool)
        elif run.abandoned_at is None:
            self._failed(run, parent, cause, error, 1000 * seconds)
        else:
            self._abandoned_run_stopped(run, now - run.abandoned_at)
        if task.thread_id is not None and ticket.run is None and not ticket.awaits_retry:
            self._dispatcher.next_in_conversation(ticket)
        if holds_slot:
            self._dispatcher.return_slot(run, now)
        else:
            self._dispatcher.suspended_run_ended(run)
        if self._registry.listeners:
            self._registry.notify_progress()
        if worker.handler.on_end is not None:  # last, because it is user code and may do anything
            call_plain_hook(f"on_end of worker {worker.name!r}", worker.handler.on_end, task)

    def close(self) -> None:
        """Leave the handlers that have not stopped to their workers: the next run knows nothing of them."""
        for run in self._runs:
            holds_slot = run.end()
            run.worker.add_orphan(run, holds_slot=holds_slot, zombie=run.abandoned_at is not None)
            if not holds_slot:
                self._dispatcher.forget_suspended(run)

    def _forget(self, run: Run) -> None:
        """Drop what is kept for a run while its handler has not ended."""
        self._runs.remove(run)
        if run.timer is not None:
            self._timers.cancel(run.clear_timer())
        if run.expected_sources:
            self._on_run_end(run)
        if run.ticket.run is run:  # otherwise the task was started again before this handler had stopped
            run.ticket.end_run()

    def _orphan_stopped(self, run: Run) -> None:
        """Process the end of a handler that has outlived its supervisor."""
        self._forget(run)
        run.worker.orphan_stopped(run, self._loop.time())
        if run.task.thread_id is not None and run.ticket.run is None:
            self._dispatcher.next_in_conversation(run.ticket)
        if run.worker.handler.on_end is not None:
            call_plain_hook(f"on_end of worker {run.worker.name!r}", run.worker.handler.on_end, run.task)

    def _succeeded(self, run: Run, value: Any, now: float, seconds: float, pool: Pool) -> None:
        worker, ticket, task = run.worker, run.ticket, run.task
        if run.calls is not None:
            pool.record_calls(run.calls)
        if task.estimate is not None:
            pool.record_estimated(seconds, task.estimate)
        worker.record_success(task.task_type, seconds)
        if pool.tracks_costs or run.usd is not None:
            pool.record_cost(now, worker, seconds, run.usd)
        if worker.breaker.record(now, _SUCCESS, run.breaker_epoch) is not None:
            self._update_breaker(worker, "")
        result = TaskResult(
            task_id=task.task_id,
            worker_id=worker.name,
            success=True,
            status=_SUCCEEDED,
            result=value,
            duration_ms=1000 * seconds,
            attempts=ticket.attempts,
            usage=ticket.usage,
        )
        if ticket.stored:
            self._dispatcher.finish(ticket, result)
        else:
            self._registry.settle(ticket, result)

    def _abandoned_run_stopped(self, run: Run, after: float) -> None:
        """Process the end of a handler whose run was abandoned `after` seconds ago."""
        worker, ticket = run.worker, run.ticket
        worker.remove_zombie()
        if ticket.retries is not None and ticket.retries.stopping is run:
            self._retries.attempt_stopped(ticket)
        if run.zombie:
            now = self._loop.time()
            if worker.stuck and worker.breaker.retry_after(now) is not None:  # None: a person is to revive it
                self.revive(worker)
            task_id = run.task.task_id
            self._registry.emit(ticket, ZombieEnded(at=now, task_id=task_id, worker_id=worker.name, after=after))

    def _failed(
        self, run: Run, parent: RunningTask | None, cause: BaseException | None, error: str, duration_ms: float
    ) -> None:
        ticket, worker = run.ticket, run.worker
        status = _FAILED
        if cause is not None:
            cause, error = _blame_rejection(run, cause, error)
        interrupted = was_interrupted(run, cause)
        left_behind = run.left_behind or isinstance(cause, StillSpilled)
        if (interrupted or left_behind) and self._dispatcher.can_requeue(ticket):
            self._record_outcome(run, _IGNORED)
            # A task that it needs is left to the next process, or this process ends; so it is left too.
            self._dispatcher.requeue(ticket)
            return
        outcome = _outcome(run, cause)
        if interrupted:
            status, outcome = TaskStatus.CANCELLED, _IGNORED
            error = "its program was interrupted (KeyboardInterrupt)"
        elif isinstance(cause, asyncio.CancelledError):
            status, outcome = TaskStatus.CANCELLED, _IGNORED
            error = "its handler was cancelled, and not by its supervisor"
        worker.record_other_end(status)
        self._record_outcome(run, outcome)
        result = unsuccessful_result(ticket, status, error, worker_id=worker.name, duration_ms=duration_ms, cause=cause)
        if status is TaskStatus.FAILED:
            ticket.keep_parent(parent)
            if self._retries.retry(run, result):
                return
            ticket.forget_parent()
        self._dispatcher.finish(ticket, result)

    # --- the worker's breaker ---

    def _record_outcome(self, run: Run, outcome: Outcome) -> None:
        """Record the outcome of a run in its worker's breaker and score."""
        worker = run.worker
        now = self._loop.time()
        if outcome is Outcome.FAULT:
            worker.raise_penalty()
            self._timers.at(now + _PENALTY_LIFETIME, self._lower_penalty, worker)
        if worker.breaker.record(now, outcome, run.breaker_epoch) is not None:
            self._update_breaker(worker, "too many of its tasks failed")

    def _lower_penalty(self, worker: WorkerAgent) -> None:
        worker.lower_penalty()
        if worker.can_accept():
            for counts in self._counts_of[worker]:
                counts.score_fell(worker)

    def forget(self, worker: WorkerAgent) -> None:
        """Forget a worker on which nothing runs any more."""
        self._timers.cancel(self.timed_workers.pop(worker, None))
        self._timers.cancel(self._breaker_timers.pop(worker, None))

    def slots_changed(self, worker: WorkerAgent) -> None:
        """Follow a change of the number of slots: zombies may hold all of them now, or no longer."""
        now = self._loop.time()
        all_zombies = self._runs.are_all_zombies(worker)
        if all_zombies and worker.breaker.trip(now) is not None:
            self._update_breaker(worker, _ALL_ZOMBIES)
            worker.mark_stuck()
        elif worker.stuck and not all_zombies and worker.breaker.retry_after(now) is not None:
            self.revive(worker)
        else:
            self._dispatcher.update_slots(worker)
        self._registry.notify_progress()

    def fail_start(self, worker: WorkerAgent) -> None:
        """Make a worker FAILED whose handler could not be started."""
        worker.mark_start_failed()
        worker.breaker.trip(self._loop.time())
        self._update_breaker(worker, "its handler could not be started")

    def fail_until_revived(self, worker: WorkerAgent, reason: str) -> None:
        """Make a worker FAILED until `revive`: it is stopped, and not started again by itself."""
        reported = worker.failed
        worker.breaker.hold_open(self._loop.time())
        self._update_breaker(worker, reason)
        if reported:  # as FAILED for a time, because of its tasks
            self._report_failed(worker, reason)

    def revive(self, worker: WorkerAgent) -> None:
        """Close a worker's breaker."""
        worker.close_breaker()
        self._update_breaker(worker, "")

    def _update_breaker(self, worker: WorkerAgent, reason: str) -> None:
        """Follow a change of a worker's breaker, and set the timer of the next one."""
        now = self._loop.time()
        failed = worker.failed
        worker.update_from_breaker(now)
        self.arm_breaker_timer(worker)
        if worker.failed and not failed:
            self._report_failed(worker, reason)
        elif failed and not worker.failed:
            log.info("worker %r accepts tasks again", worker.name)
            self._bus.emit(WorkerRecovered(at=now, worker_id=worker.name))
        if not (worker.ready or worker.failed or worker.leaving):
            self._dispatcher.start_worker(worker)  # the start is its probe
        self._dispatcher.update_slots(worker)
        self._registry.notify_progress()

    def _report_failed(self, worker: WorkerAgent, reason: str) -> None:
        now = self._loop.time()
        retry_in = worker.breaker.retry_after(now)
        until = "until it is revived" if retry_in is None else f"for {format_duration(retry_in)}"
        log.warning("worker %r is FAILED %s: %s", worker.name, until, reason)
        self._bus.emit(WorkerFailed(at=now, worker_id=worker.name, reason=reason, retry_in=retry_in))

    def arm_breaker_timer(self, worker: WorkerAgent) -> None:
        """Set the timer for the next change of a worker's breaker by time: it allows a probe, or a probe is overdue."""
        now = self._loop.time()
        self._timers.cancel(self._breaker_timers.pop(worker, None))
        remaining = worker.breaker.retry_after(now)
        if remaining:  # neither None nor 0
            due = now + remaining + 1e-6  # a sum of floats may fall a little short
            self._breaker_timers[worker] = self._timers.at(due, self._update_breaker, worker, "a probe is overdue")


def _fault(run: Run) -> Outcome:
    """Return how the failure of a run counts: that of a retry says more of its task than of its worker.

    But a probe is judged by whatever it does.
    """
    return Outcome.FAULT if run.ticket.retries is None or run.is_probe else _IGNORED


def _blame_rejection(run: Run, cause: BaseException, error: str) -> tuple[BaseException, str]:
    """Return what a handler failed with: the rejection of a call, if its framework may have wrapped that."""
    if run.rejections and not isinstance(cause, Overloaded):
        cause, _ = next(reversed(run.rejections.values()))
        error = describe_error(cause)
    return cause, error


def _outcome(run: Run, cause: BaseException | None) -> Outcome:
    """Return how the failure of a handler counts for its worker."""
    if isinstance(cause, Overloaded | StillSpilled):
        return _IGNORED  # its call or nested task was rejected or left: no fault of this worker
    if isinstance(cause, _SAGA_ENDS) and run.worker.handler.saga is not None:
        return _IGNORED  # a saga that was undone has done its work, and what it lost was not its worker's
    if run.upstream_failed or _is_submitters_mistake(cause) or _is_stop_of_other_worker(cause):
        return _IGNORED
    return _fault(run)


def _is_submitters_mistake(cause: BaseException | None) -> bool:
    """Return whether a handler failed because of its task, which no handler of its type could have run."""
    if isinstance(cause, RemoteError):
        return cause.type == UnusableTask.__name__
    return isinstance(cause, UnusableTask | NestedTooDeep)


def _is_stop_of_other_worker(cause: BaseException | None) -> bool:
    """Return whether a handler failed because the worker of a task that it awaited was stopped, to be restarted."""
    while isinstance(cause, TaskFailed):
        cause = cause.__cause__
    return isinstance(cause, WorkerStopped)


def describe_error(cause: BaseException | None) -> str:
    """Return an exception as ``"ValueError: ..."``, as it can be stored, even if its ``str`` fails."""
    try:
        text = error_text(str(cause))
    except BaseException as error:  # noqa: BLE001 - a broken __str__ must not lose the task
        raise_again_if_interrupt(error)
        text = "(its message cannot be shown)"
    if issubclass(type(cause), RemoteError):
        return text  # it begins with the type already
    return error_text(f"{type(cause).__name__}: {text}" if text else type(cause).__name__)


def _read_cause(cause: BaseException) -> tuple[BaseException, str]:
    """Return the exception of a handler and its description; one that cannot be looked at is replaced."""
    error = describe_error(cause)
    try:
        isinstance(cause, Overloaded)  # reads its __class__, which may be a property
    except BaseException:  # noqa: BLE001 - user code
        cause = RuntimeError(error)
    return cause, error
