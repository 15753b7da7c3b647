"""The order of calls in an account's queue: runs that started earlier go first, and tenants take turns."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Final

from forebay.upstream.call_request import CallRequest

_HEAD: Final = -1.0  # before every tag
_REMEMBERED: Final = 10_000  # runs whose tag is kept


class FairOrder:
    """Start-time fair queueing over runs: a run gets a tag at its first call, and goes before newer runs.

    The tags of a tenant are one over its weight apart, and a tenant that was idle begins at the tag being served. So
    tenants take turns by weight, however many runs one of them has. Turns of calls that leave before them go to the
    tenant's other calls.

    Source: P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queueing", 1996, applied to runs instead of packets.

    Args:
        weights: tenants' shares of turns; for a tenant that is not named, the weight of its call counts.
    """

    __slots__ = ("_latest", "_tags", "_virtual", "_weights")

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self._weights = weights or {}
        self._virtual = 0.0  # the highest tag that was served
        self._latest: dict[str, float] = {}  # the last tag by tenant, where it is above that
        self._tags: OrderedDict[str, float] = OrderedDict()

    def rank(self, request: CallRequest) -> tuple[float, float]:
        """Return where a call stands within its priority, and take its tag.

        The lowest rank goes first. Retries go before all others, as do calls whose caller holds a slot until they end,
        and among themselves the call goes first that asked first.
        """
        if request.goes_first:
            return (_HEAD, request.asked_at)
        tag = self._tag(request)
        if tag is None:
            tag = self._latest[request.tenant] = self._next(request)
            if request.task_id is not None:
                self._set_tag(request.task_id, tag)
        return (tag, request.deadline)

    def serve(self, request: CallRequest) -> None:
        """Take the tag of a call that is sent as it arrives, because nobody waits: `rank`, and then `record_served`."""
        if request.task_id is not None or request.goes_first:
            self.record_served(self.rank(request))
            return
        # A run of its own, whose tag is the highest of its tenant, and with that the highest that was served.
        self._virtual = self._latest[request.tenant] = self._next(request)
        if len(self._latest) > _REMEMBERED:
            self._forget_idle()

    def expected_rank(self, request: CallRequest) -> tuple[float, float]:
        """Return the rank that a call would get now. It takes no tag."""
        if request.goes_first:
            return (_HEAD, request.asked_at)
        tag = self._tag(request)
        return (self._next(request) if tag is None else tag, request.deadline)

    def _tag(self, request: CallRequest) -> float | None:
        """Return the tag of the call's run, if it has one. A call outside of any task is a run of its own."""
        return None if request.task_id is None else self._tags.get(request.task_id)

    def _set_tag(self, task_id: str, tag: float) -> None:
        self._tags[task_id] = tag
        if len(self._tags) > _REMEMBERED:
            self._tags.popitem(last=False)

    def is_ahead(self, rank: tuple[float, float]) -> bool:
        """Return whether the turn of this rank is still to come."""
        return rank[0] > self._virtual

    def return_turn(self, request: CallRequest) -> None:
        """Note that a call has left before its turn: if its run comes back, it gets a new tag."""
        if request.task_id is not None:
            self._tags.pop(request.task_id, None)

    def close_gaps(self, tenant: str, waiting: Sequence[tuple[tuple[float, float], CallRequest]]) -> list[float]:
        """Return the tags of a tenant's waiting calls as if those that have left had never asked.

        Args:
            tenant: the tenant.
            waiting: rank and request of its calls whose turn is still to come, in order.
        """
        tag, before = self._virtual, 0.0
        tags = []
        for (old, _), request in waiting:
            if old != before:  # calls of one run share their tag
                before, tag = old, min(old, tag + self._step(request))
            tags.append(tag)
            if request.task_id is not None:
                self._set_tag(request.task_id, tag)
        self._latest[tenant] = tag
        return tags

    def record_served(self, rank: tuple[float, float]) -> None:
        """Note that a call of that rank was sent."""
        self._virtual = max(self._virtual, rank[0])
        if len(self._latest) > _REMEMBERED:
            self._forget_idle()

    def _forget_idle(self) -> None:
        """Forget the tenants whose next call begins at the tag being served anyway."""
        self._latest = {tenant: last for tenant, last in self._latest.items() if last > self._virtual}

    def _next(self, request: CallRequest) -> float:
        return max(self._virtual, self._latest.get(request.tenant, 0.0)) + self._step(request)

    def _step(self, request: CallRequest) -> float:
        return 1.0 / self._weights.get(request.tenant, request.weight)
