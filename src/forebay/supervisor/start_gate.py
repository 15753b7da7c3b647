"""The start gate: a run starts only while the calls that it will make would not wait long."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Final

from forebay.supervisor.worker import URGENT
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.admission import QueueEntry
    from forebay.interfaces import LoadSource
    from forebay.supervisor.core import Core
    from forebay.supervisor.cost_selection import CostSelector
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.run import ActiveRuns, Run
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.slot_counts import SlotCounts
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent
    from forebay.upstream.declared_upstream import DeclaredUpstream

_MIN_RECHECK: Final = 0.25  # seconds, at least, until a source that blocks all runs is asked again


class OtherWorkers:
    """The workers of a pool that are left for a task after one has not taken it. True while there may be any.

    What stops a run is the load of its worker's sources, so those that use the same ones are skipped with it, and there
    are no more searches than different sets of them.

    Args:
        pool: the pool.
        avoid: a worker that does not count.
    """

    def __init__(self, pool: Pool, avoid: WorkerAgent | None = None) -> None:
        self._paths = max(1, len(pool.source_paths))
        self._avoid = avoid
        self._skipped: set[tuple[LoadSource, ...]] = set()

    def __bool__(self) -> bool:
        return len(self._skipped) < self._paths

    def skip(self, worker: WorkerAgent) -> None:
        """Skip `worker`, and those that use the same sources."""
        self._skipped.add(tuple(worker.sources))

    def count(self, worker: WorkerAgent) -> bool:
        """Return whether `worker` is one of them."""
        return worker is not self._avoid and tuple(worker.sources) not in self._skipped


class StartGate:
    """Keeps runs in the queue while the load sources of their worker are under pressure, so that started runs can end.

    If all runs start and then wait for each other's calls, they end late or never, because a run is worth something
    only after its last call. But an estimate must not lock the gate: while no call of a priority or a better one is
    queued, one run of the priority starts in the time of each typical call, whatever wait is expected. No run starts
    past calls that do wait: runs with more calls than there are slots would start faster than they end, until none
    ends in time.
    """

    def __init__(self, core: Core, *, dispatch: Callable[[WorkerAgent], None], runs: ActiveRuns) -> None:
        self._dispatch = dispatch  # starts waiting tasks on a worker
        self._loop = core.loop
        self._timers = core.timers
        self._counts_of: Mapping[WorkerAgent, Sequence[SlotCounts]] = core.pools.counts_of
        self._runs = runs
        # Workers with free slots that they may not use: which source blocks them, and which priority waits.
        self._blocked: dict[WorkerAgent, tuple[LoadSource, Priority]] = {}
        self._last_start: dict[tuple[LoadSource, Priority], float] = {}  # loop time, by source and priority
        self._recheck_timers: dict[WorkerAgent, Timer] = {}  # when a run may start whatever the pressure
        self._watched: dict[LoadSource, dict[WorkerAgent, None]] = {}

    def watch(self, worker: WorkerAgent, source: LoadSource) -> None:
        """Dispatch to `worker` whenever the pressure on `source` falls."""
        self._watched.setdefault(source, {})[worker] = None
        source.on_relief(worker, partial(self._relieved, worker))

    def source_used(self, run: Run, source: LoadSource) -> None:
        """Record that `run` is the first of its worker to call `source`, which may have been declared."""
        worker = run.worker
        self.watch(worker, source)
        self._last_start.setdefault((source, run.task.priority), run.started_at)
        for declared in tuple(worker.declared):
            if declared.covers(source):
                self._replace_declared(run, declared, source)

    def _replace_declared(self, run: Run, declared: DeclaredUpstream, source: LoadSource) -> None:
        """Replace a declared upstream of the run's worker by `source`, the real one."""
        worker = run.worker
        for priority in Priority:
            if (last := self._last_start.get((declared, priority))) is not None:
                self._last_start[source, priority] = max(last, self._last_start.get((source, priority), last))
        for other in self._runs.on(worker):
            if other.expected_sources is not None and declared in other.expected_sources:
                other.first_call_made(declared)
                if other is not run:
                    other.expect_call(source)
        if (blocked := self._blocked.get(worker)) is not None and blocked[0] is declared:
            self._unblock(worker)
        self._unwatch(worker, declared)
        worker.remove_declared(declared)
        self._loop.call_soon(self._dispatch, worker)  # not now: a handler is in the middle of a step

    def may_start_next(self, worker: WorkerAgent, pool: Pool | None, entry: QueueEntry | None = None) -> bool:
        """Return whether `entry`, or without one the head of `pool`, may start on `worker` now, if there is any.

        If not, the dispatcher is called again when it may.
        """
        head = entry or (None if pool is None else pool.queue.head())
        if head is None or pool is None:
            self._unblock(worker)
            return True
        return self.may_start(worker, head[3], waiting=len(pool.queue))

    def pick(  # noqa: PLR0913 - the facts about a task
        self,
        pool: Pool,
        priority: Priority,
        *,
        nested: bool = False,
        idle_first: bool = False,
        avoid: WorkerAgent | None = None,
        ticket: Ticket | None = None,
    ) -> WorkerAgent | None:
        """Return the worker on which a run of `priority` may start now, if there is one, but never `avoid`.

        None while its type is paused. It is the cheapest that makes the deadline of `ticket`, where workers differ in
        cost; without one, or for CRITICAL and HIGH, the one that would finish first.
        """
        if pool.paused:
            return None
        if pool.by_cost is not None and ticket is not None and priority > URGENT:
            return self._pick_cheapest(pool.by_cost, pool, ticket, avoid)
        worker = pool.selector.pick(priority, nested=nested, idle_first=idle_first)
        if worker is None or (worker is not avoid and self._may_start_one(worker, priority)):
            return worker
        others = OtherWorkers(pool, avoid)
        if worker is not avoid:
            others.skip(worker)
        while others and (other := pool.selector.pick_among(others.count, priority, nested=nested)) is not None:
            if self._may_start_one(other, priority):
                return other
            others.skip(other)
        return None

    def _pick_cheapest(
        self, costs: CostSelector, pool: Pool, ticket: Ticket, avoid: WorkerAgent | None
    ) -> WorkerAgent | None:
        others = None if avoid is None else OtherWorkers(pool, avoid)
        while (worker := self.cheapest(costs, pool, ticket, others)) is not None:
            if self._may_start_one(worker, ticket.task.priority):
                return worker
            others = others or OtherWorkers(pool, avoid)
            others.skip(worker)
            if not others:
                break
        return None

    def _may_start_one(self, worker: WorkerAgent, priority: Priority) -> bool:
        return not worker.sources or self.may_start(worker, priority, waiting=1)

    def cheapest(
        self, costs: CostSelector, pool: Pool, ticket: Ticket, others: OtherWorkers | None = None
    ) -> WorkerAgent | None:
        """Return the cheapest worker of `pool` that can accept the task of `ticket` and makes its deadline.

        It is one of the `others`, if they are given, and may be one that the start gate stops. See
        `CostSelector.pick_cheapest`.
        """
        left = math.inf if ticket.deadline is None else ticket.deadline.remaining()
        within, task = left / pool.relative_size(ticket.task.estimate), ticket.task
        count = None if others is None else others.count
        return costs.pick_cheapest(self._loop.time(), within, task.priority, nested=ticket.nested, eligible=count)

    def may_start(self, worker: WorkerAgent, priority: Priority, *, waiting: int) -> bool:
        """Return whether a run of `priority` may start on `worker` now; `waiting` runs are queued for it."""
        now = self._loop.time()
        for source in worker.sources:
            last = self._last_start.get((source, priority))
            again = now if last is None else last + source.typical_latency()
            if source.may_start(priority) or (now >= again and not source.blocks(priority)):
                continue
            if again <= now:  # a slot that becomes free dispatches to this worker; if none does, ask again
                again = now + max(_MIN_RECHECK, source.typical_latency())
            self._blocked[worker] = source, priority
            for counts in self._counts_of[worker]:
                counts.block_worker(worker)
            source.hold_back(worker, _blocked_runs(worker, waiting), priority)
            self._timers.cancel(self._recheck_timers.get(worker))
            self._recheck_timers[worker] = self._timers.at(again, self._dispatch, worker)
            return False
        for source in worker.sources:
            self._last_start[source, priority] = now
        self._unblock(worker)
        return True

    def _unblock(self, worker: WorkerAgent) -> None:
        if (blocked := self._blocked.pop(worker, None)) is not None:
            blocked[0].hold_back(worker, 0)
            for counts in self._counts_of[worker]:
                counts.unblock_worker(worker)

    def run_ended(self, run: Run) -> None:
        """Stop expecting calls of a run: a call that never came makes room for another run."""
        for source in tuple(run.expected_sources or ()):
            run.first_call_made(source)
            for worker, (other, _) in self._blocked.items():
                if other is source or set(other.accounts) & set(source.accounts):
                    self._loop.call_soon(self._dispatch, worker)  # not now: this run is still ending

    def queue_grew(self, pool: Pool) -> None:
        """Report the longer queue of `pool` to the sources that block its workers."""
        for worker, (source, priority) in self._blocked.items():
            if worker in pool.workers:
                source.hold_back(worker, _blocked_runs(worker, len(pool.queue)), priority)

    def forget(self, worker: WorkerAgent) -> None:
        """Forget a worker that is gone, and what only its sources were remembered for."""
        self._unblock(worker)
        self._timers.cancel(self._recheck_timers.pop(worker, None))
        for source in worker.sources:
            self._unwatch(worker, source)

    def _unwatch(self, worker: WorkerAgent, source: LoadSource) -> None:
        source.forget(worker)
        watchers = self._watched.get(source, {})
        watchers.pop(worker, None)
        if not watchers:
            self._watched.pop(source, None)
            for priority in Priority:
                self._last_start.pop((source, priority), None)

    def close(self) -> None:
        """Stop watching the sources."""
        for source, workers in self._watched.items():
            for worker in workers:
                source.forget(worker)

    def _relieved(self, worker: WorkerAgent) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has closed
            self._loop.call_soon_threadsafe(self._dispatch, worker)


def _blocked_runs(worker: WorkerAgent, waiting: int) -> int:
    return max(0, min(waiting, worker.max_concurrent - worker.current_tasks))
