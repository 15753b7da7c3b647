"""Worker selection: finds the worker that would finish a task first, in O(log workers)."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable
from typing import Protocol

from forebay.supervisor.worker import WorkerAgent
from forebay.task import Priority

# Scores with stamps. They hold no worker: neither one that is gone, nor anything for the garbage collector to follow.
_Heap = list[tuple[float, int]]
_STAMP = 1  # index in an entry


class Selector(Protocol):
    """The workers of one task type, as far as a source of their scores needs it."""

    def expect(self, worker: WorkerAgent, source: ScoreSource) -> None:
        """Take the score of `worker` into account before the next pick, and tell `source` then that it is known."""


class ScoreSource(Protocol):
    """The `PoolGroup` of a worker of many task types, as far as a selector needs it."""

    def inform(self, worker: WorkerAgent, selector: Selector) -> None:
        """Remember that `selector` knows the present score of `worker`."""


class WorkerSelector:
    """The workers of one task type by score, in heaps that are corrected when they are read.

    A score that has *risen* since its entry was pushed (the worker took a task) is corrected when the entry reaches the
    top. After a score has *fallen*, `update` or `expect` must be called, or the worker would stay too far down.

    Workers without a measured duration are scored with the pool's typical one. All these scores change when it does, so
    they have a heap of their own, ordered without it.

    Args:
        task_type: the task type whose durations count.
        typical: returns the pool's typical seconds for a task.
    """

    __slots__ = ("_expected", "_heaps", "_idle", "_last_stamp", "_stamps", "_task_type", "_typical", "_workers")

    def __init__(self, task_type: str, typical: Callable[[], float]) -> None:
        self._task_type = task_type
        self._typical = typical
        self._heaps: tuple[_Heap, _Heap] = ([], [])  # workers with a duration of their own; workers without
        # The stamp of the entry that counts for a worker, and the worker by it; other entries are stale.
        self._stamps: dict[WorkerAgent, int] = {}
        self._workers: dict[int, WorkerAgent] = {}
        self._last_stamp = 0
        self._idle: dict[WorkerAgent, None] = {}  # in the order in which they became idle
        self._expected: dict[WorkerAgent, ScoreSource] = {}  # to be pushed again before the next pick

    def update(self, worker: WorkerAgent) -> None:
        """Push `worker` again, because it is new, finished a task, or can accept tasks again."""
        self._idle.pop(worker, None)
        if not worker.current_tasks and worker.can_accept():
            self._idle[worker] = None
        self._push(worker)
        timed, fresh = self._heaps
        if len(timed) + len(fresh) > 2 * len(self._stamps) + 16:
            self._compact()

    def expect(self, worker: WorkerAgent, source: ScoreSource) -> None:
        """Push `worker` again before the next pick, and tell `source` then that its score is known."""
        self._expected[worker] = source

    def forget(self, worker: WorkerAgent) -> None:
        """Forget a worker that is gone."""
        self._idle.pop(worker, None)
        self._expected.pop(worker, None)
        self._drop(worker)
        self._compact()

    def pick(
        self, priority: Priority = Priority.CRITICAL, *, nested: bool = False, idle_first: bool = False
    ) -> WorkerAgent | None:
        """Return the best worker that can accept a task, or None.

        Args:
            priority: of the task.
            nested: the task is a nested one, which a worker accepts however many of its runs wait for such.
            idle_first: prefer an IDLE worker.
        """
        if self._expected:
            self._update_expected()
        best = self._best()
        if best is not None and (best.suspended or best.reserve) and not best.may_begin(priority, nested=nested):
            best = self._best_for_new_run(priority, nested=nested)
        if idle_first and best is not None and best.current_tasks:
            return self._first_idle(priority, nested=nested) or best
        return best

    def pick_among(
        self, eligible: Callable[[WorkerAgent], bool], priority: Priority, *, nested: bool
    ) -> WorkerAgent | None:
        """Return the best of the `eligible` workers that can accept a task, or None: a search of all."""
        able = [
            worker
            for worker in self._stamps
            if worker.can_accept() and worker.may_begin(priority, nested=nested) and eligible(worker)
        ]
        return self._least_score(able)

    def _least_score(self, workers: Iterable[WorkerAgent]) -> WorkerAgent | None:
        typical = self._typical()
        return min(workers, key=lambda worker: self._key(worker, typical), default=None)

    def _first_idle(self, priority: Priority, *, nested: bool) -> WorkerAgent | None:
        """Return the worker that has been idle for longest and may begin the task; forget those that are not idle."""
        busy = []
        found = None
        for worker in self._idle:
            if worker.current_tasks:
                busy.append(worker)
            elif worker.can_accept() and worker.may_begin(priority, nested=nested):
                found = worker
                break
        for worker in busy:
            del self._idle[worker]
        return found

    def _update_expected(self) -> None:
        expected, self._expected = self._expected, {}
        for worker, source in expected.items():
            self.update(worker)
            source.inform(worker, self)

    def _best_for_new_run(self, priority: Priority, *, nested: bool) -> WorkerAgent | None:
        """Return the best worker that may begin a new run: a search of all, since the best one may not."""
        return self._least_score(
            worker for worker in self._stamps if worker.can_accept() and worker.may_begin(priority, nested=nested)
        )

    def _best(self) -> WorkerAgent | None:
        timed, fresh = self._top(0), self._top(1)
        if timed is None or fresh is None:
            return timed or fresh
        typical = self._typical()
        return min(timed, fresh, key=lambda worker: self._key(worker, typical))

    def _top(self, which: int) -> WorkerAgent | None:
        heap = self._heaps[which]
        while heap:
            score, stamp = heap[0]
            worker = self._workers.get(stamp)
            if worker is None:
                heapq.heappop(heap)
            elif not worker.can_accept():
                heapq.heappop(heap)
                self._drop(worker)  # `update` brings it back
            elif which != self._heap_index(worker) or self._score(worker) > score:
                heapq.heappop(heap)
                self._push(worker)
            else:
                return worker
        return None

    def _heap_index(self, worker: WorkerAgent) -> int:
        return 0 if worker.has_duration(self._task_type) else 1

    def _key(self, worker: WorkerAgent, typical: float) -> float:
        """Return what the workers are ordered by; `typical` is the duration of one that has none of its own."""
        return worker.score(self._task_type, typical)

    def _score(self, worker: WorkerAgent) -> float:
        return worker.score(self._task_type, 1.0)

    def _push(self, worker: WorkerAgent) -> None:
        if (stale := self._stamps.get(worker)) is not None:
            del self._workers[stale]
        self._last_stamp += 1
        self._stamps[worker] = self._last_stamp
        self._workers[self._last_stamp] = worker
        heapq.heappush(self._heaps[self._heap_index(worker)], (self._score(worker), self._last_stamp))

    def _drop(self, worker: WorkerAgent) -> None:
        """Make the entry of a worker stale, if it has one."""
        if (stamp := self._stamps.pop(worker, None)) is not None:
            del self._workers[stamp]

    def _compact(self) -> None:
        """Remove the entries that do not count any more, so that there are no more than twice as many as workers."""
        for heap in self._heaps:
            if len(heap) > 2 * len(self._stamps):
                heap[:] = [entry for entry in heap if entry[_STAMP] in self._workers]
                heapq.heapify(heap)
