"""Turns between tenants: each gets as many as its weight says, whatever the others have waiting."""

from __future__ import annotations

import heapq
from collections.abc import Container, Iterator, Mapping
from typing import TypeAlias

from forebay.admission.priority_queue import heap_in_order

Tag: TypeAlias = tuple[float, int]  # with a number that orders equal tags


class TenantTurns:
    """The order of the tenants that have work waiting: start-time fair queueing over tenants.

    A tenant's tag is one over its weight after its last turn; one that begins to wait gets a tag that far after the
    turn being served. The lowest tag has the next turn. A tenant that has nothing waiting is forgotten: it would get
    the same tag as a new one.

    A tenant may also have work elsewhere, which takes turns from the same tag once it has come here.

    Source: P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queueing", 1996, with tenants in place of flows.

    Args:
        weights: tenants' shares of turns; 1.0 for a tenant that is not named.
    """

    __slots__ = ("_absent", "_elsewhere", "_number", "_present", "_virtual", "_weights")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._virtual = 0.0  # the highest tag that was served
        self._present = _Tags()  # of tenants that have work here
        self._absent = _Tags()  # of tenants that have work elsewhere and none here
        self._elsewhere: set[str] = set()  # tenants that have work elsewhere
        self._number = 0

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._present.by_tenant

    def __iter__(self) -> Iterator[str]:
        return iter(self._present.by_tenant)

    def join(self, tenant: str) -> None:
        """Give a tenant that begins to wait here its place; do nothing if it has one."""
        if tenant not in self._present.by_tenant:
            self._present.put(tenant, self._absent.take(tenant) or self._tag(tenant, self._virtual))

    def leave(self, tenant: str) -> None:
        """Take out a tenant that has nothing waiting here; it keeps its tag if it has work elsewhere."""
        tag = self._present.take(tenant)
        if tag is not None and tenant in self._elsewhere:
            self._absent.put(tenant, tag)
        self._reset_if_idle()

    def begin_elsewhere(self, tenant: str) -> None:
        """Give a tenant that has work elsewhere its place; do nothing if it has one."""
        if tenant not in self._elsewhere:
            self._elsewhere.add(tenant)
            if tenant not in self._present.by_tenant:
                self._absent.put(tenant, self._tag(tenant, self._virtual))

    def end_elsewhere(self, tenant: str) -> None:
        """Forget that a tenant has work elsewhere."""
        self._elsewhere.discard(tenant)
        self._absent.take(tenant)
        self._reset_if_idle()

    def next(self) -> str | None:
        """Return the tenant with work here that has the next turn, or None."""
        return self._present.first()

    def serve(self, tenant: str) -> None:
        """Count a turn of a tenant that waits here."""
        tag = self._present.by_tenant[tenant][0]
        self._virtual = max(self._virtual, tag)
        self._present.put(tenant, self._tag(tenant, tag))

    def shares(
        self, turns: int, *, here: Mapping[str, int], elsewhere: Mapping[str, int], blocked: Container[str] = ()
    ) -> dict[str, int]:
        """Return how many of the next `turns` go to work that is elsewhere, by tenant; the first to have one is first.

        Args:
            turns: how many turns to look ahead.
            here: how much work each tenant has here, which goes first.
            elsewhere: how much work each tenant has elsewhere.
            blocked: tenants that have no turns now.
        """
        shares: dict[str, int] = {}
        taken: dict[str, int] = {}
        waiting = self._in_order()
        again: list[tuple[Tag, str]] = []  # tenants that have had a turn
        number = self._number
        head = next(waiting, None)
        while turns > 0 and (head is not None or again):
            if head is not None and not (again and again[0] < head):
                (tag, _), tenant = head
                head = next(waiting, None)
            else:
                (tag, _), tenant = heapq.heappop(again)
            count, own = taken.get(tenant, 0), here.get(tenant, 0)
            if tenant in blocked or count >= own + elsewhere.get(tenant, 0):
                continue
            taken[tenant] = count + 1
            if count >= own:
                shares[tenant] = shares.get(tenant, 0) + 1
            turns, number = turns - 1, number + 1
            heapq.heappush(again, ((tag + 1.0 / self.weight(tenant), number), tenant))
        return shares

    def turns_before(self, tenant: str, turns: int, other: float, *, most: int) -> int:
        """Return how many turns one of weight `other` gets before `tenant` has had `turns` more, but `most` of them."""
        return int(min(most, turns * other / self.weight(tenant) + 1))

    def weight(self, tenant: str) -> float:
        """Return the weight of a tenant."""
        return self._weights.get(tenant, 1.0)

    def _tag(self, tenant: str, after: float) -> Tag:
        """Return the tag of a tenant for its next turn after `after`."""
        self._number += 1
        return after + 1.0 / self.weight(tenant), self._number

    def _in_order(self) -> Iterator[tuple[Tag, str]]:
        """Iterate over the tenants, wherever their work is, by their next turns. They must not change meanwhile."""
        return heapq.merge(self._present.in_order(), self._absent.in_order())

    def _reset_if_idle(self) -> None:
        if not (self._present.by_tenant or self._absent.by_tenant):
            self._virtual = 0.0


class _Tags:
    """Tenants in the order of their tags.

    Attributes:
        by_tenant: the tag of each.
    """

    __slots__ = ("_heap", "by_tenant")

    def __init__(self) -> None:
        self.by_tenant: dict[str, Tag] = {}
        self._heap: list[tuple[Tag, str]] = []  # items that are not a tenant's present tag are dropped

    def put(self, tenant: str, tag: Tag) -> None:
        """Set the tag of a tenant."""
        self.by_tenant[tenant] = tag
        heapq.heappush(self._heap, (tag, tenant))
        if len(self._heap) > 2 * len(self.by_tenant) + 16:
            self._heap = [(tag, tenant) for tenant, tag in self.by_tenant.items()]
            heapq.heapify(self._heap)

    def take(self, tenant: str) -> Tag | None:
        """Remove a tenant, and return its tag if it had one."""
        tag = self.by_tenant.pop(tenant, None)
        if not self.by_tenant:
            self._heap.clear()
        return tag

    def first(self) -> str | None:
        """Return the tenant with the lowest tag, or None."""
        heap = self._heap
        while heap:
            tag, tenant = heap[0]
            if self.by_tenant.get(tenant) == tag:
                return tenant
            heapq.heappop(heap)
        return None

    def in_order(self) -> Iterator[tuple[Tag, str]]:
        """Iterate over the tenants with their tags, the lowest first."""
        self.first()  # drops the items of tenants that have gone: they are the lowest, and would be passed every time
        before = None
        for item in heap_in_order(self._heap):
            if item != before and self.by_tenant.get(item[1]) == item[0]:  # a tag that came back is in it twice
                yield item
            before = item
