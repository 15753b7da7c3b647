"""A priority queue in which tenants take turns."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, Generic, TypeVar

from forebay.admission.priority_queue import RANK_LAST, PriorityQueue, QueueEntry
from forebay.admission.tenant_turns import TenantTurns
from forebay.task import Priority

T = TypeVar("T")

_RANK, _ITEM, _PRIORITY, _TENANT = 0, 2, 3, 4
_NOTHING: Mapping[str, int] = MappingProxyType({})
_NO_TENANTS: Mapping[tuple[float, int], int] = MappingProxyType({})


class _Lanes:
    """The entries of one priority and one first part of the rank: a heap for each tenant, and their turns.

    Attributes:
        by_tenant: the heap of each tenant, removed entries included.
        lengths: how many entries of each tenant have not been removed.
    """

    __slots__ = ("by_tenant", "lengths", "turns")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.turns = TenantTurns(weights)
        self.by_tenant: dict[str, list[QueueEntry]] = {}
        self.lengths: dict[str, int] = {}

    def push(self, entry: QueueEntry, blocked: Container[str]) -> None:
        """Add an entry to the lane of its tenant."""
        tenant = entry[_TENANT]
        heapq.heappush(self.by_tenant.setdefault(tenant, []), entry)
        self.lengths[tenant] = self.lengths.get(tenant, 0) + 1
        if tenant not in blocked:
            self.turns.join(tenant)

    def shorten(self, tenant: str) -> None:
        """Count one entry less of a tenant; forget it with the last one."""
        self.lengths[tenant] -= 1
        if not self.lengths[tenant]:
            del self.lengths[tenant], self.by_tenant[tenant]
            self.turns.leave(tenant)

    def first(self) -> QueueEntry | None:
        """Return the first entry of the tenant that has the next turn, or None."""
        tenant = self.turns.next()
        if tenant is None:
            return None
        lane = self.by_tenant[tenant]
        while lane[0][_ITEM] is None:
            heapq.heappop(lane)
        return lane[0]


class TenantQueue(PriorityQueue[T], Generic[T]):
    """A queue ordered by priority, then the first part of the rank, then tenants by turns, then rank and sequence.

    So a tenant that pushes a thousand items waits for itself: another one's next item is served within a turn. Within a
    tenant the order is that of `PriorityQueue`. It costs more than that queue, which is enough for one tenant.

    Args:
        tenant_of: returns the tenant of an item.
        weights: tenants' shares of turns; 1.0 for a tenant that is not named.
        blocked: tenants whose items are not served now. Whoever changes it calls `block` or `unblock`.
        starvation_bound: as for `PriorityQueue`.
    """

    __slots__ = ("_blocked", "_lanes", "_tenant_of", "_weights")

    def __init__(
        self,
        tenant_of: Callable[[T], str],
        weights: Mapping[str, float],
        *,
        blocked: Collection[str] = (),
        starvation_bound: int = 20,
    ) -> None:
        super().__init__(starvation_bound=starvation_bound)
        self._tenant_of = tenant_of
        self._weights = weights
        self._blocked = blocked
        self._lanes: tuple[dict[int, _Lanes], ...] = tuple({} for _ in Priority)  # by the first part of the rank

    def __iter__(self) -> Iterator[T]:
        """Iterate over all items in no particular order."""
        for lanes in self._all_lanes():
            for entry in chain.from_iterable(lanes.by_tenant.values()):
                if entry[_ITEM] is not None:
                    yield entry[_ITEM]

    def take_over(self, queue: PriorityQueue[T]) -> None:
        """Take all entries of `queue`, which keep their identity, and its counts of priorities passed over."""
        for entry in queue.entries():
            self._add(entry, self._tenant_of(entry[_ITEM]))
        self._passed_over = [*queue.passed_over]

    def push(self, item: T, priority: Priority, rank: Any, sequence: int) -> QueueEntry:
        """Add an item; return its entry, for `remove`. The first part of the rank must be a number."""
        entry: QueueEntry = [rank, sequence, item, priority]
        self._add(entry, self._tenant_of(item))
        return entry

    def _add(self, entry: QueueEntry, tenant: str) -> None:
        entry.append(tenant)
        priority = entry[_PRIORITY]
        self._group(priority, entry[_RANK][0]).push(entry, self._blocked)
        self._lengths[priority] += 1
        self.length += 1

    def remove(self, entry: QueueEntry) -> None:
        """Remove an item before it is served. Do nothing if it was removed or served already."""
        if entry[_ITEM] is not None:
            self._lanes_of(entry).shorten(entry[_TENANT])
            super().remove(entry)

    # --- the order ---

    def head(self) -> QueueEntry | None:
        """Return the entry that `pop` would serve, or None if there is none, or only of blocked tenants."""
        for priority in self.serving_order():
            if (entry := self.first_of(priority)) is not None:
                return entry
        return None

    def in_order(self) -> Iterator[T]:
        """Iterate over all items by priority, rank and sequence number, without regard to turns."""
        entries = (entry for lanes in self._all_lanes() for lane in lanes.by_tenant.values() for entry in lane)
        for entry in sorted((entry for entry in entries if entry[_ITEM] is not None), key=_order):
            yield entry[_ITEM]

    def pop(self) -> T:
        """Serve the head and return its item.

        Raises:
            IndexError: there is none.
        """
        head = self.head()
        if head is None:
            raise IndexError
        item: T = head[_ITEM]
        self.serve(head)
        return item

    def _first(self, priority: int) -> QueueEntry | None:
        groups = self._lanes[priority]
        for group in sorted(groups):
            if (entry := groups[group].first()) is not None:
                return entry
        return None

    def _remove_first(self, head: QueueEntry) -> None:
        lanes, tenant = self._lanes_of(head), head[_TENANT]
        heapq.heappop(lanes.by_tenant[tenant])
        lanes.turns.serve(tenant)
        lanes.shorten(tenant)

    def _sweep(self) -> None:
        for lanes in self._all_lanes():
            for lane in lanes.by_tenant.values():
                lane[:] = [entry for entry in lane if entry[_ITEM] is not None]
                heapq.heapify(lane)
        self._removed = 0

    # --- tenants ---

    def block(self, tenant: str) -> None:
        """Serve no item of `tenant`, which is blocked now."""
        for lanes in self._all_lanes():
            lanes.turns.leave(tenant)

    def unblock(self, tenant: str) -> None:
        """Serve items of `tenant` again, from the present turn on."""
        for lanes in self._all_lanes():
            if tenant in lanes.lengths:
                lanes.turns.join(tenant)

    def length_of(self, tenant: str, priority: Priority = Priority.LOW) -> int:
        """Return the number of items of a tenant, of a priority and the better ones."""
        groups = self._lanes[: priority + 1]
        return sum(lanes.lengths.get(tenant, 0) for by_rank in groups for lanes in by_rank.values())

    def length_in_group(self, tenant: str, group: int) -> int:
        """Return the number of items of a tenant whose rank begins with `group`."""
        return sum(groups[group].lengths.get(tenant, 0) for groups in self._lanes if group in groups)

    def lengths_by_tenant(self) -> Mapping[str, int]:
        """Return the number of items of each tenant that has any."""
        found = Counter[str]()
        for lanes in self._all_lanes():
            found.update(lanes.lengths)
        return found

    def lengths_without_blocked(self) -> Sequence[int]:
        """Return the number of items by priority, without those of blocked tenants."""
        if not self._blocked:
            return self._lengths
        return [
            sum(
                count
                for lanes in groups.values()
                for tenant, count in lanes.lengths.items()
                if tenant not in self._blocked
            )
            for groups in self._lanes
        ]

    def ahead_of(  # noqa: PLR0913 - the last three go together
        self,
        tenant: str,
        priority: Priority,
        group: int,
        *,
        elsewhere: Mapping[str, int] = _NOTHING,
        tenants_elsewhere: Mapping[tuple[float, int], int] = _NO_TENANTS,
        behind: int = 0,
    ) -> int:
        """Return how many items at most would be served before a new one of `tenant` whose rank begins with `group`.

        It looks at each tenant that has items here, and at no other one.

        Args:
            tenant: whose it is.
            priority: its priority.
            group: the first part of its rank.
            elsewhere: items that take part in the turns of this priority and group, by tenant.
            tenants_elsewhere: how many tenants these are, by weight and number of items.
            behind: how many of these, of its own tenant, go before it.
        """
        ahead = sum(self._lengths[:priority])
        groups = self._lanes[priority]
        ahead += sum(sum(lanes.lengths.values()) for other, lanes in groups.items() if other < group)
        lanes = self._group(priority, group)
        turns, weight = lanes.turns, lanes.turns.weight
        own = lanes.lengths.get(tenant, 0) + behind
        ahead += own
        for (other, count), tenants in tenants_elsewhere.items():  # as if none of them had items here
            ahead += tenants * turns.turns_before(tenant, own + 1, other, most=count)
        for name in {*lanes.lengths, *self._blocked, tenant}:
            here, there = lanes.lengths.get(name, 0), elsewhere.get(name, 0)
            if there:
                ahead -= turns.turns_before(tenant, own + 1, weight(name), most=there)
            if name != tenant and name not in self._blocked:
                ahead += turns.turns_before(tenant, own + 1, weight(name), most=here + there)
        return ahead

    # --- items elsewhere, which will be pushed with the last group ---

    def begin_elsewhere(self, tenant: str, priority: Priority) -> None:
        """Have items of a tenant that are elsewhere take part in the turns of a priority, until `end_elsewhere`."""
        self._group(priority, RANK_LAST[0]).turns.begin_elsewhere(tenant)

    def end_elsewhere(self, tenant: str, priority: Priority) -> None:
        """Forget that items of a tenant and of a priority are elsewhere."""
        self._group(priority, RANK_LAST[0]).turns.end_elsewhere(tenant)

    def shares(
        self, priority: Priority, turns: int, elsewhere: Mapping[str, int], *, overdue: bool = False
    ) -> Mapping[str, int]:
        """Return how many items of each tenant are to be pushed now, so that they are here in their turns.

        Args:
            priority: their priority.
            turns: how many of the next items of that priority count.
            elsewhere: how many there are, by tenant.
            overdue: True if they go before the items that are here.
        """
        lanes = self._group(priority, RANK_LAST[0])
        here: Mapping[str, int] = _NOTHING if overdue else lanes.lengths
        if not overdue:
            turns -= sum(
                count
                for group, first in self._lanes[priority].items()
                if group < RANK_LAST[0]
                for tenant, count in first.lengths.items()
                if tenant not in self._blocked
            )
        return lanes.turns.shares(turns, here=here, elsewhere=elsewhere, blocked=self._blocked)

    def _group(self, priority: int, group: int) -> _Lanes:
        groups = self._lanes[priority]
        lanes = groups.get(group)
        if lanes is None:
            lanes = groups[group] = _Lanes(self._weights)
        return lanes

    def _lanes_of(self, entry: QueueEntry) -> _Lanes:
        return self._lanes[entry[_PRIORITY]][entry[_RANK][0]]

    def _all_lanes(self) -> Iterator[_Lanes]:
        return chain.from_iterable(groups.values() for groups in self._lanes)


def _order(entry: QueueEntry) -> tuple[Any, Any, Any]:
    rank, sequence, _, priority, _ = entry
    return priority, rank, sequence
