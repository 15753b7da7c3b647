"""Additive increase, multiplicative decrease, on a timeout or on refusals.

Sources: D.-M. Chiu and R. Jain, "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance in Computer
Networks", 1989; `AIMDLimit` of Netflix's concurrency-limits; for one answer per epoch, NewReno's "recover" (RFC 6582).
"""

from __future__ import annotations

import math

from forebay.interfaces import Grant, Outcome
from forebay.limit.bounds import check_between, check_bounds


class TimeoutAimdLimit:
    """Up by one for each answer in time while half of the limit is used, down by a factor for each that is late.

    For tools whose calls all cost the same. A call to a language model is late because its answer is long.

    Args:
        timeout: seconds after which an answer is late. A refusal counts as late.
        backoff: what is left of the limit then.
        start: calls in flight to begin with.
        largest: calls in flight at most.

    Raises:
        InvalidSetting: a number makes no sense; the message names it.
    """

    def __init__(
        self, *, timeout: float = 5.0, backoff_ratio: float = 0.9, initial_limit: int = 20, max_limit: int = 1000
    ) -> None:
        check_bounds("TimeoutAimdLimit", initial_limit, max_limit)
        check_between("TimeoutAimdLimit", "timeout", timeout, 0.0, math.inf)
        check_between("TimeoutAimdLimit", "backoff_ratio", backoff_ratio, 0.0, 1.0)
        self._timeout = timeout
        self._backoff = backoff_ratio
        self._largest = float(max_limit)
        self._level = float(initial_limit)

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
        """Its call has ended; FAULT and IGNORED say nothing, unless the call was late."""
        if outcome is Outcome.OVERLOAD or now - grant.granted_at > self._timeout:
            self._level = max(1.0, self._level * self._backoff)
        elif outcome is Outcome.SUCCESS and grant.at_limit:
            self._level = min(self._largest, self._level + 1)


class AimdLimit:
    """Down by a factor on a refusal, once for all that were sent before; up by a share for each round of successes.

    Until the first refusal the limit doubles each round.

    The least that does for a provider that refuses what is too much. A few refusals that our load did not cause keep it
    far too low (`AdaptiveLimit` tells them apart).

    Args:
        backoff: what is left of the limit after a refusal.
        growth: share of the limit that a round of successes adds.
        start: calls in flight to begin with.
        largest: calls in flight at most.

    Raises:
        InvalidSetting: a number makes no sense; the message names it.
    """

    def __init__(
        self, *, backoff_ratio: float = 0.85, growth: float = 0.03, initial_limit: int = 10, max_limit: int = 10_000
    ) -> None:
        check_bounds("AimdLimit", initial_limit, max_limit)
        check_between("AimdLimit", "backoff_ratio", backoff_ratio, 0.0, 1.0)
        check_between("AimdLimit", "growth", growth, 0.0, math.inf)
        self._backoff = backoff_ratio
        self._growth = growth
        self._largest = float(max_limit)
        self._level = float(initial_limit)
        self._epoch = 0

    def limit(self, now: float) -> int:  # noqa: ARG002 - the seam's
        """Calls that may be in flight."""
        return int(self._level)

    def reopens_at(self, now: float) -> float | None:  # noqa: ARG002 - the seam's
        """Never: the limit is never 0."""
        return None

    def grant(self, now: float, in_flight: int) -> Grant:
        """Mark a slot that is taken now."""
        return Grant(now, in_flight, self._epoch, at_limit=in_flight >= int(self._level))

    def accepted(self, now: float, grant: Grant) -> None:
        """Nothing follows from it."""

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Its call has ended; FAULT and IGNORED say nothing about the limit."""
        if grant.epoch != self._epoch:
            return
        if outcome is Outcome.OVERLOAD:
            self._level = max(1.0, self._level * self._backoff)
            self._epoch += 1
        elif outcome is Outcome.SUCCESS and grant.at_limit:
            self._level = min(self._largest, self._level + (self._growth if self._epoch else 1.0))
