"""How tasks end: in the line, by their handler, or before their handler has (a zombie)."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from forebay.errors import Overloaded, RemoteError, StillSpilled
from forebay.events import WorkerFailed, WorkerRecovered, ZombieEnded, ZombieFound, log
from forebay.supervisor.run import Run
from forebay.task import TaskResult, TaskStatus
from forebay.typing import Outcome

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent

_SUCCESS, _SUCCEEDED = Outcome.SUCCESS, TaskStatus.SUCCEEDED  # an enum's attribute is dear on the hot path
_NO_TIME = 1e-3  # seconds; the loop's clock and the wall's may differ by so much when a timer fires
_FORGIVING = 10.0  # seconds after which a failure no longer counts against a worker's score


class Endings:
    """The ways out. Each gives the ticket its result exactly once, and each slot back when its handler has ended."""

    def __init__(self, house: Dispatcher, *, zombie_grace: float) -> None:
        self._house = house
        self._grace = zombie_grace

    # --- before a handler began ---

    def expire(self, ticket: Ticket, error: str) -> None:
        """End a waiting ticket whose deadline cannot be met."""
        self.withdraw(ticket, TaskStatus.EXPIRED, error)

    def withdraw(self, ticket: Ticket, status: TaskStatus, error: str) -> None:
        """End a ticket that waits inside, and free its place."""
        self._house.leave_line(ticket)
        ticket.parent = None
        self._house.finish(ticket, unsuccessful(ticket, status, error))

    # --- before a handler ended ---

    def out_of_time(self, run: Run) -> None:
        """End a run at its timeout, or at its deadline if that came first."""
        if run.deadline is not None and run.deadline.remaining() <= _NO_TIME:
            house = self._house
            house.pools[run.task.task_type].times.cut_off(house.loop.time() - run.began_at)
            self.abandon(run, TaskStatus.EXPIRED, "its deadline passed while it ran")
        else:
            timeout = run.task.timeout or run.worker.timeout
            self.abandon(run, TaskStatus.TIMED_OUT, f"it ran longer than its timeout of {timeout:g} s")

    def watch_time(self, run: Run) -> None:
        """End `run` in time.

        Those that may run as long as their worker says end in the order in which they began: one timer a worker will
        do for them, and none has to be cancelled.
        """
        worker, timers = run.worker, self._house.timers
        if run.task.timeout is not None or run.deadline is not None:
            run.timer = timers.at(self._house.ends_at(run), self.out_of_time, run)
        elif worker.clock is None:
            worker.clock = timers.at(run.began_at + worker.timeout, self._look_at_clock, worker)

    def _look_at_clock(self, worker: WorkerAgent) -> None:
        worker.clock = None
        now = self._house.loop.time()
        for run in list(worker.runs):
            if run.timer is not None or run.abandoned_at is not None or run.ticket.occupant is not None:
                continue  # it has a timer of its own, or needs none any more
            if (due := run.began_at + worker.timeout) > now:
                if worker.clock is None:  # else another has begun, since one of these ended
                    worker.clock = self._house.timers.at(due, self._look_at_clock, worker)
                break
            self.out_of_time(run)

    def abandon(self, run: Run, status: TaskStatus, error: str) -> None:
        """End the ticket now and ask the handler to stop; until it does, the run is a zombie and holds its slot."""
        if run.abandoned_at is not None or run.ended:
            return
        duration_ms = 1000 * (self._house.loop.time() - run.began_at)
        self._detach(run, Outcome.FAULT if status is TaskStatus.TIMED_OUT else Outcome.IGNORED)
        result = unsuccessful(run.ticket, status, error, worker_id=run.worker.name, duration_ms=duration_ms)
        self._house.finish(run.ticket, result)
        self._stop(run)
        if run.worker.probing:
            self._house.serve(run.worker)  # the probe is returned, whether or not its handler stops

    def set_aside(self, run: Run) -> None:
        """Ask the handler to stop without ending the ticket: the task is to be run again, elsewhere."""
        if run.abandoned_at is None and not run.ended:
            self._detach(run, Outcome.IGNORED)
            self._stop(run)

    def _detach(self, run: Run, outcome: Outcome) -> None:
        """What the handler still does no longer matters to the ticket."""
        house = self._house
        now = run.abandoned_at = house.loop.time()
        run.worker.zombies += 1
        self._disarm(run)
        run.timer = house.timers.at(now + self._grace, self._still_there, run)
        self._judge(run, outcome)

    def _stop(self, run: Run) -> None:
        if run.ticket.occupant is not None:
            run.ticket.occupant.stop()
        else:
            run.stop()

    def _still_there(self, run: Run) -> None:
        house, worker = self._house, run.worker
        run.zombie = True
        house.counts.zombies += 1
        task_id, name = run.task.task_id, worker.name
        log.warning(
            "task %r ended, but its handler on worker %r did not stop: it keeps its slot until it does", task_id, name
        )
        house.tell(run.ticket, ZombieFound(at=house.loop.time(), task_id=task_id, worker_id=name))
        if sum(other.zombie for other in worker.runs) >= worker.max_concurrent:
            worker.stuck = self.trip(worker, "every slot is held by a handler that does not stop") or worker.stuck

    # --- when a handler has ended ---

    def ended(self, run: Run, value: Any, cause: BaseException | None) -> None:
        """Take the end of a handler: result, pace, breaker; then its slot goes to whoever comes next."""
        house, worker, ticket, task = self._house, run.worker, run.ticket, run.task
        now = house.loop.time()
        seconds = now - run.began_at
        run.ended = True
        worker.runs.pop(run, None)
        if run.timer is not None:
            self._disarm(run)
        if run.expected:
            house.start_gate.ended(run)
        if worker.handler.on_end is not None:
            worker.handler.on_end(task)
        success = cause is None and run.abandoned_at is None
        house.pools[task.task_type].ended(seconds, run.calls, success=success)
        if ticket.run is run:  # else it has been begun again beside a handler that did not stop
            ticket.run = None
            ticket.parent = None  # what it knew of its ancestors must not keep them alive
        if success:
            self._succeeded(run, value, now, seconds)
        elif run.abandoned_at is None:
            self._failed(run, cause, 1000 * seconds)
        else:
            self._stopped(run, now - run.abandoned_at)
        if task.thread is not None and ticket.run is None:
            house.next_of_thread(ticket)
        if run.holds:
            house.give(run, now)
        if house.watchers:
            house.stirred()

    def _succeeded(self, run: Run, value: Any, now: float, seconds: float) -> None:
        worker, ticket = run.worker, run.ticket
        worker.succeeded(run.task.task_type, seconds)
        if worker.breaker.record(now, _SUCCESS, run.era) is not None:
            self.breaker_changed(worker, "")
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
            self._house.finish(ticket, result)
        else:
            self._house.settle(ticket, result)

    def _stopped(self, run: Run, after: float) -> None:
        """The handler of a run that was abandoned `after` seconds ago is there no more."""
        house, worker = self._house, run.worker
        worker.zombies -= 1
        if run.zombie:
            self._unstick(worker)
            task_id, now = run.task.task_id, house.loop.time()
            house.tell(run.ticket, ZombieEnded(at=now, task_id=task_id, worker_id=worker.name, after=after))

    def _failed(self, run: Run, cause: BaseException | None, duration_ms: float) -> None:
        ticket, worker = run.ticket, run.worker
        status, outcome = TaskStatus.FAILED, Outcome.FAULT
        overflow = self._house.overflow
        if run.refusals and not isinstance(cause, Overloaded):
            cause = next(reversed(run.refusals.values()))  # whatever its framework has made of that
        if isinstance(cause, StillSpilled) and ticket.lease is not None and overflow is not None and overflow.durable:
            self._judge(run, Outcome.IGNORED)
            overflow.put_back(ticket)  # what it waited for is left to the next process, and so is it
            return
        if isinstance(cause, asyncio.CancelledError):
            status, outcome = TaskStatus.CANCELLED, Outcome.IGNORED
            error = "its handler was cancelled, and not by its supervisor"
        elif isinstance(cause, Overloaded | StillSpilled):
            outcome = Outcome.IGNORED  # refused or put off further on: that says nothing about this worker
            error = describe(cause)
        else:
            error = describe(cause)
            if run.blameless:
                outcome = Outcome.IGNORED
        self._judge(run, outcome)
        result = unsuccessful(ticket, status, error, worker_id=worker.name, duration_ms=duration_ms, cause=cause)
        self._house.finish(ticket, result)

    # --- the worker's breaker ---

    def _judge(self, run: Run, outcome: Outcome) -> None:
        """Tell the worker's breaker and its score how a run went."""
        worker = run.worker
        now = self._house.loop.time()
        if outcome is Outcome.FAULT:
            worker.punish()
            self._house.timers.at(now + _FORGIVING, self._forgive, worker)
        if worker.breaker.record(now, outcome, run.era) is not None:
            self.breaker_changed(worker, "too many of its tasks failed")

    def _forgive(self, worker: WorkerAgent) -> None:
        worker.forgive()
        for pool in worker.pools:
            if worker.can_accept():
                pool.router.lowered(worker)

    def trip(self, worker: WorkerAgent, reason: str) -> bool:
        """Open a worker's breaker for a reason of our own. False: it was open already."""
        opened = worker.breaker.trip(self._house.loop.time()) is not None
        if opened:
            self.breaker_changed(worker, reason)
        return opened

    def _unstick(self, worker: WorkerAgent) -> None:
        """A zombie has ended: if zombies alone had made the worker FAILED, it can serve again, unless told to wait."""
        if worker.stuck and worker.breaker.remaining(self._house.loop.time()) is not None:
            self.revive(worker)

    def revive(self, worker: WorkerAgent) -> None:
        """Close a worker's breaker."""
        worker.stuck = False
        worker.breaker.reset()
        self.breaker_changed(worker, "")

    def breaker_changed(self, worker: WorkerAgent, reason: str) -> None:
        """Bring the house up to date with a worker's breaker, and come back when it has slept."""
        house = self._house
        now = house.loop.time()
        failed = worker.failed
        if worker.read_breaker(now):
            worker.phase += 1
        self.watch_breaker(worker)
        if worker.failed and not failed:
            sleep = worker.breaker.remaining(now)
            again = "until it is revived" if sleep is None else f"for {sleep:.1f} s"
            log.warning("worker %r is FAILED %s: %s", worker.name, again, reason)
            house.bus.emit(WorkerFailed(at=now, worker_id=worker.name, reason=reason, retry_in=sleep))
        elif failed and not worker.failed:
            log.info("worker %r takes work again", worker.name)
            house.bus.emit(WorkerRecovered(at=now, worker_id=worker.name))
        house.refit(worker)
        house.stirred()

    def watch_breaker(self, worker: WorkerAgent) -> None:
        """Come back when time alone will have changed a worker's breaker: it has slept, or a probe is overdue."""
        timers, now = self._house.timers, self._house.loop.time()
        if worker.alarm is not None:
            timers.cancel(worker.alarm)
            worker.alarm = None
        remaining = worker.breaker.remaining(now)
        if remaining:  # neither None nor nothing; a sum of floats may fall short of it by a hair
            worker.alarm = timers.at(now + remaining + 1e-6, self._alarmed, worker)

    def _alarmed(self, worker: WorkerAgent) -> None:
        self.breaker_changed(worker, "a probe is overdue")

    def _disarm(self, run: Run) -> None:
        if run.timer is not None:
            self._house.timers.cancel(run.timer)
            run.timer = None


def unsuccessful(  # noqa: PLR0913 - the fields of a result
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


def describe(cause: BaseException | None) -> str:
    """An exception as ``"ValueError: ..."``; its own ``str`` may fail."""
    try:
        text = str(cause)
    except Exception:  # noqa: BLE001 - a broken __str__ must not lose the task
        text = "(its message cannot be shown)"
    if isinstance(cause, RemoteError):
        return text  # the type is the first word of it
    return f"{type(cause).__name__}: {text}" if text else type(cause).__name__
