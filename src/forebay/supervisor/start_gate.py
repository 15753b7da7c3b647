"""The start gate: a run starts only while the calls that it will make would not wait long."""

from __future__ import annotations

import contextlib
from functools import partial
from typing import TYPE_CHECKING, Final

from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.interfaces import LoadSource
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.run import Run
    from forebay.supervisor.worker import WorkerAgent
    from forebay.upstream.declared_upstream import DeclaredUpstream

_MIN_RECHECK: Final = 0.25  # seconds, at least, to another look at a source that lets nobody through


class StartGate:
    """Holds runs in the line while what they draw on is pressed, so that those that have begun can end.

    Runs that all begin and then wait for each other's calls end late, or never: the calls of a run must all be made
    before any of it counts. But an estimate must not lock the gate: while no call of its rung or a better one stands in
    the line, one run of each rung starts in every typical call's time, whatever wait is expected. Started past calls
    that do wait, runs of more calls than there are slots would begin faster than they end, until none is in time.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        # Who has free slots, for whose sake they stay free, and which rung waits.
        self._blocked: dict[WorkerAgent, tuple[LoadSource, Priority]] = {}
        self._last_start: dict[tuple[LoadSource, Priority], float] = {}  # when a run of that rung last started

    def watch(self, worker: WorkerAgent, source: LoadSource) -> None:
        """`worker` draws on `source`: serve it whenever that is relieved."""
        source.on_relief(worker, partial(self._relieved, worker))

    def source_used(self, run: Run, source: LoadSource) -> None:
        """`run` is the first of its worker that draws on `source`, which may have been foretold."""
        worker = run.worker
        self.watch(worker, source)
        self._last_start.setdefault((source, run.task.priority), run.started_at)
        for foretold in [foretold for foretold in worker.declared if foretold.covers(source)]:
            self._replace_declared(run, foretold, source)

    def _replace_declared(self, run: Run, declared: DeclaredUpstream, source: LoadSource) -> None:
        """What was foretold of a worker is `source`: it takes its place."""
        worker = run.worker
        for priority in Priority:
            if (last := self._last_start.get((declared, priority))) is not None:
                self._last_start[source, priority] = max(last, self._last_start.get((source, priority), last))
        for other in worker.runs:
            if other.expected_sources is not None and declared in other.expected_sources:
                other.first_call_made(declared)
                if other is not run and source not in other.expected_sources:  # it may be what was foretold twice over
                    other.expected_sources[source] = None
                    source.add_expected_calls(1)
        if (held := self._blocked.get(worker)) is not None and held[0] is declared:
            self._unblock(worker)
        declared.forget(worker)
        worker.declared.remove(declared)
        del worker.sources[declared]
        self._dispatcher.loop.call_soon(self._dispatcher.dispatch, worker)  # not now: a handler is amid a step

    def may_start_head(self, worker: WorkerAgent, pool: Pool | None) -> bool:
        """Whether the head of `pool`, if any, may start on `worker` now. If not, it is served again when it may."""
        head = None if pool is None else pool.queue.head()
        if head is None or pool is None:
            self._unblock(worker)
            return True
        return self.may_start(worker, head[3], waiting=len(pool.queue))

    def pick(self, pool: Pool, priority: Priority, *, idle_first: bool = False) -> WorkerAgent | None:
        """The worker on which a run of `rung` may start now, if there is one."""
        worker = pool.selector.pick(idle_first=idle_first)
        if worker is None or not worker.sources or self.may_start(worker, priority, waiting=1):
            return worker
        return None

    def may_start(self, worker: WorkerAgent, priority: Priority, *, waiting: int) -> bool:
        """Whether a run of `rung` may start on `worker` now; `waiting` are in the line, for whom it is asked."""
        now = self._dispatcher.loop.time()
        for source in worker.sources:
            last = self._last_start.get((source, priority))
            again = now if last is None else last + source.typical_latency()
            if source.may_start(priority) or (now >= again and not source.blocks(priority)):
                continue
            if again <= now:  # who frees a slot will serve this worker; if nobody does, look again
                again = now + max(_MIN_RECHECK, source.typical_latency())
            self._blocked[worker] = source, priority
            for pool in worker.pools:
                pool.blocked_workers[worker] = None
            source.hold_back(worker, _blocked_runs(worker, waiting), priority)
            if worker.recheck_timer is not None:
                self._dispatcher.timers.cancel(worker.recheck_timer)
            worker.recheck_timer = self._dispatcher.timers.at(again, self._dispatcher.dispatch, worker)
            return False
        for source in worker.sources:
            self._last_start[source, priority] = now
        self._unblock(worker)
        return True

    def _unblock(self, worker: WorkerAgent) -> None:
        if (held := self._blocked.pop(worker, None)) is not None:
            held[0].hold_back(worker, 0)
            for pool in worker.pools:
                pool.blocked_workers.pop(worker, None)

    def run_started(self, run: Run) -> None:
        """`run` has its slot: its first calls are to be expected."""
        run.expected_sources = dict(run.worker.sources)
        for source in run.expected_sources:
            source.add_expected_calls(1)

    def run_ended(self, run: Run) -> None:
        """`run` has ended: a call that was expected of it and never came makes room for another run."""
        for source in tuple(run.expected_sources or ()):
            run.first_call_made(source)
            for worker, (other, _) in self._blocked.items():
                if other is source or set(other.accounts) & set(source.accounts):
                    self._dispatcher.loop.call_soon(
                        self._dispatcher.dispatch, worker
                    )  # later: this run is amid its end

    def queue_grew(self, pool: Pool) -> None:
        """The line of `pool` has grown, and perhaps what is held back with it."""
        for worker, (source, rung) in self._blocked.items():
            if worker in pool.workers:
                source.hold_back(worker, _blocked_runs(worker, len(pool.queue)), rung)

    def close(self) -> None:
        """Let go of what was watched."""
        for worker in self._dispatcher.workers.values():
            for source in worker.sources:
                source.forget(worker)

    def _relieved(self, worker: WorkerAgent) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._dispatcher.loop.call_soon_threadsafe(self._dispatcher.dispatch, worker)


def _blocked_runs(worker: WorkerAgent, waiting: int) -> int:
    return min(waiting, worker.max_concurrent - worker.current_tasks)
