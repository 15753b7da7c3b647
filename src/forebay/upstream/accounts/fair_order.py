"""The order of calls in an account's queue: runs that started earlier go first, and tenants take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Final

from forebay.upstream.call_request import CallRequest

_HEAD: Final = -1.0  # before every tag
_REMEMBERED: Final = 10_000  # runs whose tag is kept


class FairOrder:
    """Start-time fair queueing over runs: a run gets a tag at its first call, and goes before newer runs.

    The tags of a tenant are one over its weight apart, and a tenant that was idle begins at the tag being served. So
    tenants take turns by weight, however many runs one of them has.

    Source: P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queueing", 1996, applied to runs instead of packets.

    Args:
        weights: tenants' shares of turns; 1.0 for a tenant that is not named.
    """

    __slots__ = ("_latest", "_tags", "_virtual", "_weights")

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._virtual = 0.0  # the highest tag that was served
        self._latest: dict[str, float] = {}  # the last tag by tenant, where it is above that
        self._tags: OrderedDict[str, float] = OrderedDict()

    def rank(self, request: CallRequest) -> tuple[float, float]:
        """Return where a call stands within its priority; the lowest rank goes first.

        Retries go before all others, and among themselves the call goes first that asked first.
        """
        if request.retries:
            return (_HEAD, request.asked_at)
        return (self.tag(request), request.deadline)

    def tag(self, request: CallRequest) -> float:
        """Return the tag of the call's run. A call outside of any task is a run of its own."""
        if request.task_id is None:
            return self._next(request.tenant)
        tag = self._tags.get(request.task_id)
        if tag is None:
            tag = self._tags[request.task_id] = self._next(request.tenant)
            if len(self._tags) > _REMEMBERED:
                self._tags.popitem(last=False)
        return tag

    def record_served(self, rank: tuple[float, float]) -> None:
        """Note that a call of that rank was sent."""
        self._virtual = max(self._virtual, rank[0])
        if len(self._latest) > _REMEMBERED:
            self._latest = {tenant: last for tenant, last in self._latest.items() if last > self._virtual}

    def _next(self, tenant: str) -> float:
        tag = max(self._virtual, self._latest.get(tenant, 0.0)) + 1.0 / self._weights.get(tenant, 1.0)
        self._latest[tenant] = tag
        return tag
