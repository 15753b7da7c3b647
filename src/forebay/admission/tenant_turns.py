"""Turns between tenants: each gets as many as its weight says, whatever the others have waiting."""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping

from forebay.admission.priority_queue import heap_in_order


class TenantTurns:
    """The order of the tenants that have work waiting: start-time fair queueing over tenants.

    A tenant's tag is one over its weight after its last turn; one that begins to wait gets a tag that far after the
    turn being served. The lowest tag has the next turn. A tenant that has nothing waiting is forgotten: it would get
    the same tag as a new one.

    Source: P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queueing", 1996, with tenants in place of flows.

    Args:
        weights: tenants' shares of turns; 1.0 for a tenant that is not named.
    """

    __slots__ = ("_heap", "_number", "_tags", "_virtual", "_weights")

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._virtual = 0.0  # the highest tag that was served
        self._tags: dict[str, tuple[float, int]] = {}  # with a number that orders equal tags
        self._heap: list[tuple[tuple[float, int], str]] = []  # those that are not a tenant's present tag are dropped
        self._number = 0

    def __contains__(self, tenant: str) -> bool:
        return tenant in self._tags

    def __iter__(self) -> Iterator[str]:
        return iter(self._tags)

    def join(self, tenant: str) -> None:
        """Give a tenant that begins to wait its place; do nothing if it has one."""
        if tenant not in self._tags:
            self._set(tenant, self._virtual)

    def leave(self, tenant: str) -> None:
        """Forget a tenant that has nothing waiting."""
        self._tags.pop(tenant, None)
        if not self._tags:
            self._virtual = 0.0
            self._heap.clear()

    def next(self) -> str | None:
        """Return the tenant that has the next turn, or None if none waits."""
        heap, tags = self._heap, self._tags
        while heap:
            tag, tenant = heap[0]
            if tags.get(tenant) == tag:
                return tenant
            heapq.heappop(heap)
        return None

    def in_order(self) -> Iterator[str]:
        """Iterate over the tenants by their next turns. They must not change meanwhile."""
        return (tenant for tag, tenant in heap_in_order(self._heap) if self._tags.get(tenant) == tag)

    def serve(self, tenant: str) -> None:
        """Count a turn of a tenant that waits."""
        self._virtual = max(self._virtual, self._tags[tenant][0])
        self._set(tenant, self._tags[tenant][0])

    def turns_before(self, tenant: str, turns: int, other: str) -> int:
        """Return how many turns `other` gets, at most, before `tenant` has had `turns` more."""
        return int(turns * self._weight(other) / self._weight(tenant) + 1)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)

    def _set(self, tenant: str, after: float) -> None:
        self._number += 1
        tag = self._tags[tenant] = after + 1.0 / self._weight(tenant), self._number
        heapq.heappush(self._heap, (tag, tenant))
        if len(self._heap) > 2 * len(self._tags) + 16:
            self._heap = [(tag, tenant) for tenant, tag in self._tags.items()]
            heapq.heapify(self._heap)
