"""The pools of a supervisor, and which of them a worker serves next."""

from __future__ import annotations

import heapq
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol
from weakref import WeakValueDictionary

from forebay.supervisor.pool import Pool
from forebay.supervisor.slot_counts import SlotCounts
from forebay.supervisor.tenants import Tenants
from forebay.supervisor.worker import URGENT, WorkerAgent
from forebay.supervisor.worker_selection import Selector
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.admission import QueueEntry

_MAX_PASSED_OVER = 20  # dequeues of a shared worker after which a pool that was passed over is served
_MANY = 8  # task types of a worker above which its pools share the counts of its slots


class ServedPools(Protocol):
    """The pools that a worker serves."""

    @property
    def pools(self) -> Sequence[Pool]:
        """All of them."""

    def next_pool(self) -> Pool | None:
        """Return the pool whose head the worker takes next, or None if no task waits."""

    def first_for(self, worker: WorkerAgent) -> tuple[Pool, QueueEntry] | tuple[None, None]:
        """Return the pool and the entry of the task that a worker may begin first: one with a reserve or many runs."""

    def most_urgent(self) -> QueueEntry | None:
        """Return the most urgent of the entries that are served next, or None if no task waits."""

    def pass_over(self, priority: Priority) -> None:
        """Count the lower priorities that wait as passed over, because a task of `priority` did not wait."""

    def with_spilled(self) -> Iterable[Pool]:
        """Return the pools for which records may wait in the overflow."""


class FewPools:
    """The pools that workers of the same few task types serve: they are searched."""

    __slots__ = ("__weakref__", "pools")

    def __init__(self, pools: Sequence[Pool]) -> None:
        self.pools = pools

    def next_pool(self) -> Pool | None:
        """Return the pool whose head the worker takes next, or None if no task waits.

        The order is by priority, rank and sequence number; a pool that was passed over too often goes first.
        """
        pools = self.pools
        if len(pools) == 1:
            pool = pools[0]
            if not pool.queue.length or pool.paused:
                return None
            return pool if not pool.takes_turns or pool.has_head else None
        waiting = [(pool, head) for pool in pools if (head := pool.queue.head()) is not None and not pool.paused]
        if not waiting:
            return None
        chosen, _ = min(waiting, key=urgency_among)
        for pool, _ in waiting:
            pool.pass_over(served=pool is chosen)
        return chosen

    def first_for(self, worker: WorkerAgent) -> tuple[Pool, QueueEntry] | tuple[None, None]:
        """Return the pool and the entry of the task that a worker with many open runs may begin first, if any."""
        return first_for(worker, self.pools)

    def most_urgent(self) -> QueueEntry | None:
        """Return the most urgent of the entries that are served next, or None if no task waits."""
        heads = [head for pool in self.pools if not pool.paused and (head := pool.queue.head()) is not None]
        return min(heads, key=_urgency, default=None)

    def pass_over(self, priority: Priority) -> None:
        """Count the lower priorities that wait as passed over, because a task of `priority` did not wait."""
        for pool in self.pools:
            if pool.queue.length:
                pool.queue.pass_over(priority)

    def with_spilled(self) -> Iterable[Pool]:
        """Return the pools for which records may wait in the overflow."""
        return self.pools


class PoolGroup(SlotCounts):
    """The pools that workers of the same many task types serve.

    Whatever their number, what happens to one of these workers is recorded here, once, and each pool looks here when it
    needs to know. The waiting pools are in a heap by their heads, which is corrected when it is read.
    """

    __slots__ = (
        "_dequeues",
        "_heads",
        "_heap",
        "_informed",
        "_served_at",
        "_with_nested",
        "_with_spilled",
        "_with_urgent",
        "pools",
    )

    def __init__(self, pools: Sequence[Pool]) -> None:
        super().__init__()
        self.pools = pools
        self._informed: dict[WorkerAgent, list[Selector]] = {}  # selectors that know a worker's present score
        self._heads: dict[Pool, QueueEntry] = {}  # of the pools in which a task waits
        self._heap: list[tuple[tuple[int, Any, int], QueueEntry, Pool]] = []
        self._served_at: OrderedDict[Pool, int] = (
            OrderedDict()
        )  # dequeues when a pool was last served, or began to wait
        self._dequeues = 0
        self._with_nested: dict[Pool, None] = {}  # in which a nested task waits: as few as open runs
        self._with_urgent: dict[Pool, None] = {}  # in which a CRITICAL or HIGH task waits
        self._with_spilled: dict[Pool, None] = {}
        for pool in pools:
            pool.join(self)

    # --- its workers ---

    def add_worker(self, worker: WorkerAgent) -> None:
        """Add a worker, which no pool knows yet."""
        self._informed[worker] = []
        for pool in self.pools:
            pool.selector.expect(worker, self)

    def remove_worker(self, worker: WorkerAgent) -> None:
        """Remove a worker that has no slots any more; each of its pools removes it too."""
        del self._informed[worker]
        self.forget_worker(worker)

    @property
    def has_workers(self) -> bool:
        """True if it has a worker."""
        return bool(self._informed)

    def expect_all(self, pool: Pool) -> None:
        """Have the selector of `pool`, a new one, ask for the score of each worker of the group."""
        for worker in self._informed:
            pool.selector.expect(worker, self)

    def score_fell(self, worker: WorkerAgent) -> None:
        """Have each selector that knows the former score of `worker` ask for the present one."""
        informed, self._informed[worker] = self._informed[worker], []
        for selector in informed:
            selector.expect(worker, self)

    def inform(self, worker: WorkerAgent, selector: Selector) -> None:
        """Remember that `selector` knows the present score of `worker`."""
        self._informed[worker].append(selector)

    # --- the pool to serve next ---

    def head_changed(self, pool: Pool) -> None:
        """Take the head of the queue of `pool` into account, which may be another one."""
        if pool.nested and not pool.paused:
            self._with_nested[pool] = None
        else:
            self._with_nested.pop(pool, None)
        if pool.queue.ahead(URGENT) and not pool.paused:
            self._with_urgent[pool] = None
        else:
            self._with_urgent.pop(pool, None)
        head = None if pool.paused else pool.queue.head()
        if head is None:
            self._heads.pop(pool, None)
            self._served_at.pop(pool, None)
            return
        if self._heads.get(pool) is head:
            return
        self._heads[pool] = head
        self._served_at.setdefault(pool, self._dequeues)
        heapq.heappush(self._heap, (_urgency(head), head, pool))
        if len(self._heap) > 2 * len(self._heads) + 16:
            self._heap = [item for item in self._heap if self._heads.get(item[2]) is item[1]]
            heapq.heapify(self._heap)

    def next_pool(self) -> Pool | None:
        """Return the pool whose head a worker takes next, or None if no task waits.

        The order is that of `FewPools.next_pool`, except that a pool is passed over as often as others wait.
        """
        if not self._heads:
            return None
        pool, served_at = next(iter(self._served_at.items()))
        if self._dequeues - served_at < max(_MAX_PASSED_OVER, len(self._heads)):
            pool, _ = self._most_urgent()
        self._serve(pool)
        return pool

    def first_for(self, worker: WorkerAgent) -> tuple[Pool, QueueEntry] | tuple[None, None]:
        """Return the pool and the entry of the task that a worker with many open runs may begin first, if any."""
        if not self._heads:
            return None, None
        able = dict(self._with_nested)
        if worker.reserve:
            able |= self._with_urgent
        most_urgent, head = self._most_urgent()
        if worker.may_begin(head[3], overdue=True):  # otherwise none of the others either, of no better priority
            able[most_urgent] = None
        pool, entry = first_for(worker, tuple(able))
        if pool is None or entry is None:
            return None, None
        self._serve(pool)
        return pool, entry

    def most_urgent(self) -> QueueEntry | None:
        """Return the most urgent of the entries that are served next, or None if no task waits."""
        return self._most_urgent()[1] if self._heads else None

    def pass_over(self, priority: Priority) -> None:
        """Count the lower priorities that wait as passed over, because a task of `priority` did not wait."""
        for pool in tuple(self._heads):
            pool.queue.pass_over(priority)
            self.head_changed(pool)

    def _most_urgent(self) -> tuple[Pool, QueueEntry]:
        """Return the waiting pool with the most urgent head, and that."""
        while self._heads.get(self._heap[0][2]) is not self._heap[0][1]:
            heapq.heappop(self._heap)
        _, head, pool = self._heap[0]
        return pool, head

    def _serve(self, pool: Pool) -> None:
        """Count `pool` as served, and the other waiting ones as passed over."""
        self._dequeues += 1
        self._served_at[pool] = self._dequeues
        self._served_at.move_to_end(pool)

    # --- the overflow ---

    def spilled(self, pool: Pool) -> None:
        """Remember that records of `pool` may wait in the overflow."""
        self._with_spilled[pool] = None

    def with_spilled(self) -> Iterable[Pool]:
        """Return the pools for which records may wait in the overflow."""
        self._with_spilled = {pool: None for pool in self._with_spilled if pool.spilled}
        return tuple(self._with_spilled)


class Pools:
    """The pools of a supervisor, by task type and by worker.

    Attributes:
        by_type: the pool of each task type.
        by_worker: the pools that each worker serves.
        counts_of: where the slots of each worker are counted: in each of its pools, or once for many of them.
    """

    def __init__(self, max_queue_size: int | None, tenants: Tenants) -> None:
        self._max_queue_size = max_queue_size
        self._tenants = tenants
        self._groups: dict[frozenset[str], PoolGroup] = {}
        self._few: WeakValueDictionary[tuple[Pool, ...], FewPools] = (
            WeakValueDictionary()
        )  # as long as workers serve them
        self.by_type: dict[str, Pool] = {}
        self.by_worker: dict[WorkerAgent, ServedPools] = {}
        self.counts_of: dict[WorkerAgent, Sequence[SlotCounts]] = {}

    def add_worker(self, worker: WorkerAgent) -> list[Pool]:
        """Add a worker to the pools of its task types, and return the pools that are new."""
        added = [
            Pool(kind, self._max_queue_size, self._tenants) for kind in worker.task_types if kind not in self.by_type
        ]
        self.by_type.update((pool.task_type, pool) for pool in added)
        pools = tuple(self.by_type[task_type] for task_type in worker.task_types)
        for pool in pools:
            pool.add_worker(worker)
        if len(pools) <= _MANY:
            few = self._few.get(pools)
            if few is None:
                few = self._few[pools] = FewPools(pools)
            self.by_worker[worker], self.counts_of[worker] = few, few.pools
        else:
            kinds = frozenset(worker.task_types)
            group = self._groups.get(kinds)
            if group is None:
                group = self._groups[kinds] = PoolGroup(pools)
            group.add_worker(worker)
            self.by_worker[worker], self.counts_of[worker] = group, [group]
        return added

    def remove_worker(self, worker: WorkerAgent) -> None:
        """Remove a worker from its pools, which stay even without workers: see `remove_if_unused`."""
        served = self.by_worker.pop(worker)
        del self.counts_of[worker]
        for pool in served.pools:
            pool.remove_worker(worker)
        if isinstance(served, PoolGroup):
            served.remove_worker(worker)
            if not served.has_workers:
                del self._groups[frozenset(worker.task_types)]
                for pool in served.pools:
                    pool.leave(served)

    def remove_if_unused(self, pool: Pool) -> bool:
        """Remove a pool that has no workers and is not paused: its task type is no longer known. Return whether."""
        unused = not (pool.workers or pool.paused) and self.by_type.get(pool.task_type) is pool
        if unused:
            del self.by_type[pool.task_type]
        return unused


def first_for(worker: WorkerAgent, pools: Sequence[Pool]) -> tuple[Pool, QueueEntry] | tuple[None, None]:
    """Return the pool and the entry of the task that a worker may begin first, which has a reserve or many open runs.

    The order is that of `FewPools.next_pool`, among the tasks that it may begin.
    """
    found = [(pool, entry) for pool in pools if (entry := pool.first_for(worker)) is not None]
    if not found:
        return None, None
    chosen = min(found, key=urgency_among)
    if len(pools) > 1:
        for pool, _ in found:
            pool.pass_over(served=pool is chosen[0])
    return chosen


def urgency_among(waiting: tuple[Pool, QueueEntry]) -> tuple[int, Any, int]:
    """Return the key that orders the heads of pools: a pool that was passed over too often goes first."""
    pool, entry = waiting
    priority, rank, sequence = _urgency(entry)
    return (-1 if pool.times_passed_over >= _MAX_PASSED_OVER else priority), rank, sequence


def _urgency(entry: QueueEntry) -> tuple[int, Any, int]:
    return entry[3], entry[0], entry[1]
