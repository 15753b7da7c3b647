"""Additive increase, multiplicative decrease (AIMD), driven by timeouts or by refusals.

Sources: D.-M. Chiu and R. Jain, "Analysis of the Increase and Decrease Algorithms for Congestion Avoidance in Computer
Networks", 1989; `AIMDLimit` of Netflix's concurrency-limits; one decrease per epoch as in NewReno's "recover" (RFC
6582).
"""

from __future__ import annotations

import math

from forebay._validate import check_between
from forebay.interfaces import Outcome
from forebay.limit.base import Grant, Limit


class TimeoutAimdLimit(Limit):
    """An AIMD limit that treats a late answer as congestion.

    It rises by one for each answer in time while at least half of the limit is used, and falls by a factor for each
    late one. Use it for tools whose calls all cost the same. It does not suit language models, where a call is late
    because its answer is long.

    Args:
        timeout: seconds after which an answer is late. A refusal counts as late.
        backoff_ratio: what is left of the limit after a late answer, between 0 and 1.
        initial_limit: calls in flight to begin with.
        max_limit: most calls that may ever be in flight.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    def __init__(
        self, *, timeout: float = 5.0, backoff_ratio: float = 0.9, initial_limit: int = 20, max_limit: int = 1000
    ) -> None:
        super().__init__(initial_limit=initial_limit, max_limit=max_limit)
        check_between("TimeoutAimdLimit", "timeout", timeout, 0.0, math.inf)
        check_between("TimeoutAimdLimit", "backoff_ratio", backoff_ratio, 0.0, 1.0)
        self._timeout = timeout
        self._backoff_ratio = backoff_ratio

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now; `in_flight` includes it."""
        return Grant(now, in_flight, at_limit=2 * in_flight >= int(self._level))

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Lower the limit for a late or refused call, and raise it for a success at the limit."""
        if outcome is Outcome.OVERLOAD or now - grant.granted_at > self._timeout:
            self._set_level(self._level * self._backoff_ratio)
        elif outcome is Outcome.SUCCESS and grant.at_limit:
            self._set_level(self._level + 1)


class AimdLimit(Limit):
    """An AIMD limit that treats a refusal as congestion, with one decrease per epoch.

    A refusal lowers the limit by a factor and begins a new epoch, so the other calls that were sent before it cannot
    lower the limit again. Each round of successes raises the limit by a share of one call per success; until the first
    refusal it doubles each round.

    This is the simplest limit that suits a provider that refuses excess calls. A few refusals that your load did not
    cause keep it far too low; `AdaptiveLimit` recognizes those.

    Args:
        backoff_ratio: what is left of the limit after a refusal, between 0 and 1.
        growth: share of the limit that a round of successes adds.
        initial_limit: calls in flight to begin with.
        max_limit: most calls that may ever be in flight.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    def __init__(
        self, *, backoff_ratio: float = 0.85, growth: float = 0.03, initial_limit: int = 10, max_limit: int = 10_000
    ) -> None:
        super().__init__(initial_limit=initial_limit, max_limit=max_limit)
        check_between("AimdLimit", "backoff_ratio", backoff_ratio, 0.0, 1.0)
        check_between("AimdLimit", "growth", growth, 0.0, math.inf)
        self._backoff_ratio = backoff_ratio
        self._growth = growth
        self._epoch = 0

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now; `in_flight` includes it."""
        return Grant(now, in_flight, self._epoch, at_limit=in_flight >= int(self._level))

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Lower the limit at the first refusal of an epoch, and raise it for a success at the limit."""
        if grant.epoch != self._epoch:
            return
        if outcome is Outcome.OVERLOAD:
            self._set_level(self._level * self._backoff_ratio)
            self._epoch += 1
        elif outcome is Outcome.SUCCESS and grant.at_limit:
            self._set_level(self._level + (self._growth if self._epoch else 1.0))

    def adopt(self, now: float, level: float, *, cut: bool) -> None:  # noqa: ARG002 - the interface's
        """Take over the limit that several processes have learned. A cut begins an epoch, as one of its own does."""
        if int(level) < int(self._level) or (cut and not self._epoch):
            self._epoch += 1
        self._set_level(level)
