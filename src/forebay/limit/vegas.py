"""A limit that estimates the queue at the other side from latency, for calls that all cost the same.

Sources: L. S. Brakmo and L. L. Peterson, "TCP Vegas: End to End Congestion Avoidance on a Global Internet", 1995;
`VegasLimit` of Netflix's concurrency-limits, from which the steps are taken. Theirs draws when to measure the least
latency anew; here that is at fixed intervals, since a limit has no chance of its own.
"""

from __future__ import annotations

import math
from typing import Final

from forebay.interfaces import Grant, Outcome
from forebay.limit.bounds import check_bounds

_RENEWS: Final = 30  # times the limit: after so many answers the least latency is measured anew


class VegasLimit:
    """Keeps the calls that wait at the other side, estimated as ``limit * (1 - least latency / latency)``, at a few.

    Not for language models: there the least latency is that of the shortest answer, and every other looks like a queue.

    Args:
        start: calls in flight to begin with.
        largest: calls in flight at most.

    Raises:
        InvalidSetting: not 1 <= start <= largest, whole numbers.
    """

    def __init__(self, *, initial_limit: int = 20, max_limit: int = 1000) -> None:
        check_bounds("VegasLimit", initial_limit, max_limit)
        self._largest = float(max_limit)
        self._level = float(initial_limit)
        self._least = math.inf  # seconds of the fastest call
        self._answers = 0  # since it was measured

    def limit(self, now: float) -> int:  # noqa: ARG002 - the seam's
        """Calls that may be in flight."""
        return int(self._level)

    def reopens_at(self, now: float) -> float | None:  # noqa: ARG002 - the seam's
        """Never: the limit is never 0."""
        return None

    def grant(self, now: float, in_flight: int) -> Grant:
        """Mark a slot that is taken now."""
        return Grant(now, in_flight, at_limit=2 * in_flight >= int(self._level))

    def accepted(self, now: float, grant: Grant) -> None:
        """Nothing follows from it."""

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Its call has ended: a refusal lowers the limit a little, the time of a success either way."""
        unit = max(1.0, math.log10(self._level))
        if outcome is Outcome.OVERLOAD:
            self._move(-unit)
        elif outcome is Outcome.SUCCESS:
            self._answered(now - grant.granted_at, unit, full=grant.at_limit)

    def _answered(self, took: float, unit: float, *, full: bool) -> None:
        self._answers += 1
        if self._answers >= _RENEWS * self._level or took < self._least:
            self._least, self._answers = took, 0
            return
        if not full:
            return
        queue = math.ceil(self._level * (1 - self._least / took)) if took > 0 else 0
        if queue <= unit:
            self._move(6 * unit)
        elif queue < 3 * unit:
            self._move(unit)
        elif queue > 6 * unit:
            self._move(-unit)

    def _move(self, by: float) -> None:
        self._level = max(1.0, min(self._largest, self._level + by))
