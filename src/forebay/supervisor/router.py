"""The router: of the workers that can accept, the one with the least expected finish, in O(log workers)."""

from __future__ import annotations

import heapq
from collections.abc import Callable

from forebay.supervisor.worker import WorkerAgent


class Router:
    """A heap of workers by score, mended lazily.

    A score that has *risen* since its entry was pushed (the worker took a task) is found when the entry reaches the
    top; one that has *fallen* must be announced by `lowered`, or a better worker would lie buried.
    """

    __slots__ = ("_current", "_heap", "_idle", "_stamp", "score")

    def __init__(self, score: Callable[[WorkerAgent], float]) -> None:
        self.score = score
        self._heap: list[tuple[float, int, WorkerAgent]] = []
        self._current: dict[
            WorkerAgent, int
        ] = {}  # the stamp of the entry that counts; no entry, no worker in the heap
        self._idle: dict[WorkerAgent, None] = {}  # in the order in which they fell idle
        self._stamp = 0

    def lowered(self, worker: WorkerAgent) -> None:
        """`worker` may have become a better choice: it finished something, came, or came back."""
        if not worker.current_tasks and worker.can_accept():
            self._idle[worker] = None
        self._push(worker, self.score(worker))
        if len(self._heap) > 2 * len(self._current) + 16:
            self._sweep()

    def taken(self, worker: WorkerAgent) -> None:
        """`worker` took a task, or left: it is not idle."""
        self._idle.pop(worker, None)

    def pick(self, *, idle_first: bool = False) -> WorkerAgent | None:
        """The best worker that can accept, or None. With `idle_first`, an IDLE one goes before all others."""
        best = self._best()
        if idle_first and best is not None and best.current_tasks:
            for worker in self._idle:
                if worker.can_accept():
                    return worker
        return best

    def _best(self) -> WorkerAgent | None:
        heap = self._heap
        while heap:
            score, stamp, worker = heap[0]
            if self._current.get(worker) != stamp:
                heapq.heappop(heap)
            elif not worker.can_accept():
                heapq.heappop(heap)
                del self._current[worker]  # `lowered` brings it back
            elif (now_scores := self.score(worker)) > score:
                self._stamp += 1
                self._current[worker] = self._stamp
                heapq.heapreplace(heap, (now_scores, self._stamp, worker))
            else:
                return worker
        return None

    def _push(self, worker: WorkerAgent, score: float) -> None:
        self._stamp += 1
        self._current[worker] = self._stamp
        heapq.heappush(self._heap, (score, self._stamp, worker))

    def _sweep(self) -> None:
        self._heap = [entry for entry in self._heap if self._current.get(entry[2]) == entry[1]]
        heapq.heapify(self._heap)
