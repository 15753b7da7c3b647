"""The order of calls in an account's line: by rung; on a rung runs begun earlier go first, tenants in turns."""

from __future__ import annotations

from collections import OrderedDict

from forebay.upstream.call_request import CallRequest

_HEAD = -1.0  # before every tag
_RUNS = 10_000  # runs whose place is remembered


class FairOrder:
    """Gives each run a tag when it makes its first call, and keeps it: what has begun goes before what is newer.

    Tags of one tenant are a step apart, and a tenant that comes anew begins at what is being served: so tenants take
    turns, however many runs one of them has. A step is one over the tenant's weight.

    Source: P. Goyal, H. Vin, H. Cheng, "Start-time Fair Queueing", 1996, applied to runs instead of packets.
    """

    __slots__ = ("_latest", "_tags", "_virtual", "weights")

    def __init__(self) -> None:
        self._virtual = 0.0  # the highest tag that was served
        self._latest: dict[str, float] = {}  # by tenant, where it is past that
        self._tags: OrderedDict[str, float] = OrderedDict()
        self.weights: dict[str, float] = {}

    def rank(self, ask: CallRequest) -> tuple[float, float]:
        """Where a call stands on its rung; the lowest goes first."""
        if ask.retries:
            return (_HEAD, ask.deadline)
        return (self.tag(ask), ask.deadline)

    def tag(self, ask: CallRequest) -> float:
        """The tag of its run; a call that belongs to none is a run of its own."""
        if ask.task_id is None:
            return self._next(ask.tenant)
        tag = self._tags.get(ask.task_id)
        if tag is None:
            tag = self._tags[ask.task_id] = self._next(ask.tenant)
            if len(self._tags) > _RUNS:
                self._tags.popitem(last=False)
        return tag

    def record_served(self, rank: tuple[float, float]) -> None:
        """A call of that rank has been sent."""
        self._virtual = max(self._virtual, rank[0])
        if len(self._latest) > _RUNS:
            self._latest = {tenant: last for tenant, last in self._latest.items() if last > self._virtual}

    def _next(self, tenant: str) -> float:
        tag = max(self._virtual, self._latest.get(tenant, 0.0)) + 1.0 / self.weights.get(tenant, 1.0)
        self._latest[tenant] = tag
        return tag
