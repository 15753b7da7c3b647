"""A limit that estimates the provider's queue from latency, for calls that all cost the same.

Sources: L. S. Brakmo and L. L. Peterson, "TCP Vegas: End to End Congestion Avoidance on a Global Internet", 1995;
`VegasLimit` of Netflix's concurrency-limits, from which the steps are taken. Theirs measures the least latency again at
random intervals; here the intervals are fixed, because a limit draws no random numbers.
"""

from __future__ import annotations

import math
from typing import Final

from forebay.interfaces import Outcome
from forebay.limit.base import Grant, Limit

_REMEASURE_AFTER: Final = 30  # times the limit: after this many answers the least latency is measured again


class VegasLimit(Limit):
    """A limit that keeps the provider's queue, ``limit * (1 - least latency / latency)``, at a few calls.

    It does not suit language models: the least latency is that of the shortest answer, and every longer answer looks
    like a queue.

    Args:
        initial_limit: calls in flight to begin with.
        max_limit: most calls that may ever be in flight.

    Raises:
        InvalidSetting: not two whole numbers with 1 <= initial_limit <= max_limit.
    """

    def __init__(self, *, initial_limit: int = 20, max_limit: int = 1000) -> None:
        super().__init__(initial_limit=initial_limit, max_limit=max_limit)
        self._least_latency = math.inf  # seconds
        self._answers = 0  # since the least latency was measured

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now; `in_flight` includes it."""
        return Grant(now, in_flight, at_limit=2 * in_flight >= int(self._level))

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Lower the limit a little for a refusal, and move it by the estimated queue for a success."""
        step = max(1.0, math.log10(self._level))
        if outcome is Outcome.OVERLOAD:
            self._set_level(self._level - step)
        elif outcome is Outcome.SUCCESS:
            self._record_success(now - grant.granted_at, step, at_limit=grant.at_limit)

    def _record_success(self, latency: float, step: float, *, at_limit: bool) -> None:
        self._answers += 1
        if self._answers >= _REMEASURE_AFTER * self._level or latency < self._least_latency:
            self._least_latency, self._answers = latency, 0
            return
        if not at_limit:
            return
        queue = math.ceil(self._level * (1 - self._least_latency / latency)) if latency > 0 else 0
        if queue <= step:
            self._set_level(self._level + 6 * step)
        elif queue < 3 * step:
            self._set_level(self._level + step)
        elif queue > 6 * step:
            self._set_level(self._level - step)
