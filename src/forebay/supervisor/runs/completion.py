"""How tasks end: in the line, by their handler, or before their handler has (a zombie)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from forebay.errors import Overloaded, RemoteError, StillSpilled
from forebay.events import WorkerFailed, WorkerRecovered, ZombieEnded, ZombieFound, log
from forebay.interfaces import Outcome
from forebay.supervisor.runs.run import Run
from forebay.task import TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent

_SUCCESS, _SUCCEEDED = Outcome.SUCCESS, TaskStatus.SUCCEEDED  # an enum's attribute is dear on the hot path
_CLOCK_TOLERANCE = 1e-3  # seconds; the loop's clock and the wall's may differ by so much when a timer fires
_PENALTY_LIFETIME = 10.0  # seconds after which a failure no longer counts against a worker's score


class RunCompletion:
    """The ways out. Each gives the ticket its result exactly once, and each slot back when its handler has ended."""

    def __init__(self, dispatcher: Dispatcher, *, zombie_grace: float) -> None:
        self._dispatcher = dispatcher
        self._grace = zombie_grace

    # --- before a handler began ---

    def expire(self, ticket: Ticket, error: str) -> None:
        """End a waiting ticket whose deadline cannot be met."""
        self.end_waiting(ticket, TaskStatus.EXPIRED, error)

    def end_waiting(self, ticket: Ticket, status: TaskStatus, error: str) -> None:
        """End a ticket that waits inside, and free its place."""
        self._dispatcher.dequeue(ticket)
        ticket.parent = None
        self._dispatcher.finish(ticket, unsuccessful_result(ticket, status, error))

    # --- before a handler ended ---

    def time_out(self, run: Run) -> None:
        """End a run at its timeout, or at its deadline if that came first."""
        if run.deadline is not None and run.deadline.remaining() <= _CLOCK_TOLERANCE:
            house = self._dispatcher
            house.pools[run.task.task_type].service_times.record_timeout(house.loop.time() - run.started_at)
            self.end_early(run, TaskStatus.EXPIRED, "its deadline passed while it ran")
        else:
            timeout = run.task.timeout or run.worker.timeout
            self.end_early(run, TaskStatus.TIMED_OUT, f"it ran longer than its timeout of {timeout:g} s")

    def arm_timeout(self, run: Run) -> None:
        """End `run` in time.

        Those that may run as long as their worker says end in the order in which they began: one timer a worker will
        do for them, and none has to be cancelled.
        """
        worker, timers = run.worker, self._dispatcher.timers
        if run.task.timeout is not None or run.deadline is not None:
            run.timer = timers.at(self._dispatcher.ends_at(run), self.time_out, run)
        elif worker.timeout_timer is None:
            worker.timeout_timer = timers.at(run.started_at + worker.timeout, self._check_timeouts, worker)

    def _check_timeouts(self, worker: WorkerAgent) -> None:
        worker.timeout_timer = None
        now = self._dispatcher.loop.time()
        for run in list(worker.runs):
            if run.timer is not None or run.abandoned_at is not None or run.ticket.slot is not None:
                continue  # it has a timer of its own, or needs none any more
            if (due := run.started_at + worker.timeout) > now:
                if worker.timeout_timer is None:  # else another has begun, since one of these ended
                    worker.timeout_timer = self._dispatcher.timers.at(due, self._check_timeouts, worker)
                break
            self.time_out(run)

    def end_early(self, run: Run, status: TaskStatus, error: str) -> None:
        """End the ticket now and ask the handler to stop; until it does, the run is a zombie and holds its slot."""
        if run.abandoned_at is not None or run.ended:
            return
        duration_ms = 1000 * (self._dispatcher.loop.time() - run.started_at)
        self._detach(run, Outcome.FAULT if status is TaskStatus.TIMED_OUT else Outcome.IGNORED)
        result = unsuccessful_result(run.ticket, status, error, worker_id=run.worker.name, duration_ms=duration_ms)
        self._dispatcher.finish(run.ticket, result)
        self._stop_handler(run)
        if run.worker.probing:
            self._dispatcher.dispatch(run.worker)  # the probe is returned, whether or not its handler stops

    def abandon(self, run: Run) -> None:
        """Ask the handler to stop without ending the ticket: the task is to be run again, elsewhere."""
        if run.abandoned_at is None and not run.ended:
            self._detach(run, Outcome.IGNORED)
            self._stop_handler(run)

    def _detach(self, run: Run, outcome: Outcome) -> None:
        """What the handler still does no longer matters to the ticket."""
        house = self._dispatcher
        now = run.abandoned_at = house.loop.time()
        run.worker.zombies += 1
        self._cancel_timer(run)
        run.timer = house.timers.at(now + self._grace, self._mark_zombie, run)
        self._record_outcome(run, outcome)

    def _stop_handler(self, run: Run) -> None:
        if run.ticket.slot is not None:
            run.ticket.slot.stop()
        else:
            run.stop()

    def _mark_zombie(self, run: Run) -> None:
        house, worker = self._dispatcher, run.worker
        run.zombie = True
        house.counts.zombies += 1
        task_id, name = run.task.task_id, worker.name
        log.warning(
            "task %r ended, but its handler on worker %r did not stop: it keeps its slot until it does", task_id, name
        )
        house.emit(run.ticket, ZombieFound(at=house.loop.time(), task_id=task_id, worker_id=name))
        if sum(other.zombie for other in worker.runs) >= worker.max_concurrent:
            worker.stuck = (
                self.trip_breaker(worker, "every slot is held by a handler that does not stop") or worker.stuck
            )

    # --- when a handler has ended ---

    def handler_ended(self, run: Run, value: Any, cause: BaseException | None) -> None:
        """Take the end of a handler: result, pace, breaker; then its slot goes to whoever comes next."""
        house, worker, ticket, task = self._dispatcher, run.worker, run.ticket, run.task
        now = house.loop.time()
        seconds = now - run.started_at
        run.ended = True
        worker.runs.pop(run, None)
        if run.timer is not None:
            self._cancel_timer(run)
        if run.expected_sources:
            house.start_gate.run_ended(run)
        if worker.handler.on_end is not None:
            worker.handler.on_end(task)
        success = cause is None and run.abandoned_at is None
        house.pools[task.task_type].record_run(seconds, run.calls, success=success)
        if ticket.run is run:  # else it has been begun again beside a handler that did not stop
            ticket.run = None
            ticket.parent = None  # what it knew of its ancestors must not keep them alive
        if success:
            self._succeeded(run, value, now, seconds)
        elif run.abandoned_at is None:
            self._failed(run, cause, 1000 * seconds)
        else:
            self._abandoned_run_stopped(run, now - run.abandoned_at)
        if task.thread_id is not None and ticket.run is None:
            house.next_in_conversation(ticket)
        if run.holds_slot:
            house.return_slot(run, now)
        if house.progress_listeners:
            house.notify_progress()

    def _succeeded(self, run: Run, value: Any, now: float, seconds: float) -> None:
        worker, ticket = run.worker, run.ticket
        worker.record_success(run.task.task_type, seconds)
        if worker.breaker.record(now, _SUCCESS, run.breaker_epoch) is not None:
            self.update_breaker(worker, "")
        result = TaskResult(
            task_id=run.task.task_id,
            worker_id=worker.name,
            success=True,
            status=_SUCCEEDED,
            result=value,
            duration_ms=1000 * seconds,
            attempts=ticket.attempts,
        )
        if ticket.stored:
            self._dispatcher.finish(ticket, result)
        else:
            self._dispatcher.settle(ticket, result)

    def _abandoned_run_stopped(self, run: Run, after: float) -> None:
        """The handler of a run that was abandoned `after` seconds ago is there no more."""
        house, worker = self._dispatcher, run.worker
        worker.zombies -= 1
        if run.zombie:
            self._revive_if_stuck(worker)
            task_id, now = run.task.task_id, house.loop.time()
            house.emit(run.ticket, ZombieEnded(at=now, task_id=task_id, worker_id=worker.name, after=after))

    def _failed(self, run: Run, cause: BaseException | None, duration_ms: float) -> None:
        ticket, worker = run.ticket, run.worker
        status, outcome = TaskStatus.FAILED, Outcome.FAULT
        overflow = self._dispatcher.spill
        if run.rejections and not isinstance(cause, Overloaded):
            cause = next(reversed(run.rejections.values()))  # whatever its framework has made of that
        if isinstance(cause, StillSpilled) and ticket.lease is not None and overflow is not None and overflow.durable:
            self._record_outcome(run, Outcome.IGNORED)
            overflow.requeue(ticket)  # what it waited for is left to the next process, and so is it
            return
        if isinstance(cause, asyncio.CancelledError):
            status, outcome = TaskStatus.CANCELLED, Outcome.IGNORED
            error = "its handler was cancelled, and not by its supervisor"
        elif isinstance(cause, Overloaded | StillSpilled):
            outcome = Outcome.IGNORED  # refused or put off further on: that says nothing about this worker
            error = describe_error(cause)
        else:
            error = describe_error(cause)
            if run.upstream_failed:
                outcome = Outcome.IGNORED
        self._record_outcome(run, outcome)
        result = unsuccessful_result(ticket, status, error, worker_id=worker.name, duration_ms=duration_ms, cause=cause)
        self._dispatcher.finish(ticket, result)

    # --- the worker's breaker ---

    def _record_outcome(self, run: Run, outcome: Outcome) -> None:
        """Tell the worker's breaker and its score how a run went."""
        worker = run.worker
        now = self._dispatcher.loop.time()
        if outcome is Outcome.FAULT:
            worker.raise_penalty()
            self._dispatcher.timers.at(now + _PENALTY_LIFETIME, self._lower_penalty, worker)
        if worker.breaker.record(now, outcome, run.breaker_epoch) is not None:
            self.update_breaker(worker, "too many of its tasks failed")

    def _lower_penalty(self, worker: WorkerAgent) -> None:
        worker.lower_penalty()
        for pool in worker.pools:
            if worker.can_accept():
                pool.selector.update(worker)

    def trip_breaker(self, worker: WorkerAgent, reason: str) -> bool:
        """Open a worker's breaker for a reason of our own. False: it was open already."""
        opened = worker.breaker.trip(self._dispatcher.loop.time()) is not None
        if opened:
            self.update_breaker(worker, reason)
        return opened

    def _revive_if_stuck(self, worker: WorkerAgent) -> None:
        """A zombie has ended: if zombies alone had made the worker FAILED, it can serve again, unless told to wait."""
        if worker.stuck and worker.breaker.retry_after(self._dispatcher.loop.time()) is not None:
            self.revive(worker)

    def revive(self, worker: WorkerAgent) -> None:
        """Close a worker's breaker."""
        worker.stuck = False
        worker.breaker.reset()
        self.update_breaker(worker, "")

    def update_breaker(self, worker: WorkerAgent, reason: str) -> None:
        """Bring the house up to date with a worker's breaker, and come back when it has slept."""
        house = self._dispatcher
        now = house.loop.time()
        failed = worker.failed
        if worker.update_from_breaker(now):
            worker.breaker_phase += 1
        self.arm_breaker_timer(worker)
        if worker.failed and not failed:
            sleep = worker.breaker.retry_after(now)
            again = "until it is revived" if sleep is None else f"for {sleep:.1f} s"
            log.warning("worker %r is FAILED %s: %s", worker.name, again, reason)
            house.bus.emit(WorkerFailed(at=now, worker_id=worker.name, reason=reason, retry_in=sleep))
        elif failed and not worker.failed:
            log.info("worker %r takes work again", worker.name)
            house.bus.emit(WorkerRecovered(at=now, worker_id=worker.name))
        house.update_slots(worker)
        house.notify_progress()

    def arm_breaker_timer(self, worker: WorkerAgent) -> None:
        """Come back when time alone will have changed a worker's breaker: it has slept, or a probe is overdue."""
        timers, now = self._dispatcher.timers, self._dispatcher.loop.time()
        if worker.breaker_timer is not None:
            timers.cancel(worker.breaker_timer)
            worker.breaker_timer = None
        remaining = worker.breaker.retry_after(now)
        if remaining:  # neither None nor nothing; a sum of floats may fall short of it by a hair
            worker.breaker_timer = timers.at(now + remaining + 1e-6, self._breaker_timer_fired, worker)

    def _breaker_timer_fired(self, worker: WorkerAgent) -> None:
        self.update_breaker(worker, "a probe is overdue")

    def _cancel_timer(self, run: Run) -> None:
        if run.timer is not None:
            self._dispatcher.timers.cancel(run.timer)
            run.timer = None


def unsuccessful_result(  # noqa: PLR0913 - the fields of a result
    ticket: Ticket,
    status: TaskStatus,
    error: str,
    *,
    worker_id: str | None = None,
    duration_ms: float = 0.0,
    cause: BaseException | None = None,
) -> TaskResult:
    """The result of a task that did not succeed."""
    return TaskResult(
        task_id=ticket.task_id,
        worker_id=worker_id,
        success=False,
        status=status,
        error=error,
        duration_ms=duration_ms,
        attempts=ticket.attempts,
        cause=cause,
    )


def describe_error(cause: BaseException | None) -> str:
    """An exception as ``"ValueError: ..."``; its own ``str`` may fail."""
    try:
        text = str(cause)
    except Exception:  # noqa: BLE001 - a broken __str__ must not lose the task
        text = "(its message cannot be shown)"
    if isinstance(cause, RemoteError):
        return text  # the type is the first word of it
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
