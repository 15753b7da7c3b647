"""The history of the adaptive limit."""

from __future__ import annotations

import math
from typing import Final

_STALE_AFTER: Final = 600.0  # seconds after which the best limit counts no more than the present one
_CLEARLY_MORE: Final = 1.1  # times the calls in flight that were refused


class LimitHistory:
    """The memory of the adaptive limit: the best level of late, and the one that did not hold.

    Attributes:
        best: the highest limit that held, to which the limit returns fast; infinity until something is known.
        ceiling: just below the limit that was refused last, above which the limit probes; infinity where no limit is
            known to be too high.
    """

    def __init__(self) -> None:
        self.best = math.inf
        self.ceiling = math.inf
        self._best_since = 0.0  # in the clock's seconds
        self._refused = 0.0  # the highest limit that was refused of late
        self._refused_at = 0.0  # in the clock's seconds
        self._provider_refuses = False  # excess calls are refused, rather than served slowly

    @property
    def known(self) -> bool:
        """True if there is a limit to return to."""
        return self.best < math.inf

    def is_proven(self, level: float) -> bool:
        """Return whether `level` has held at a provider that refuses excess calls."""
        return self._provider_refuses and level <= self.best

    def record_held(self, now: float, level: float) -> None:
        """Record a full round at `level`."""
        if level >= self.best or now - self._best_since > _STALE_AFTER:
            self.best, self._best_since = level, now

    def keep_best(self, now: float) -> None:
        """Count the age of the best limit from now: an outage is over, during which nothing could be learned."""
        self._best_since = now

    def assume(self, level: float) -> None:
        """Take `level` as the best limit, if none is known yet."""
        if not self.known:
            self.best = level

    def serves_more(self, in_flight: int) -> bool:
        """Return whether so many calls in flight, if accepted, are clearly more than the provider refused of late."""
        return self._provider_refuses and in_flight > _CLEARLY_MORE * self._refused

    def record_refusal(self, now: float, level: float) -> None:
        """Record that `level` was too high."""
        if level >= self._refused or now - self._refused_at > _STALE_AFTER:
            self._refused, self._refused_at = level, now
        self.ceiling = max(1.0, level - 1)
        self._provider_refuses = True

    def lower_best(self, level: float) -> None:
        """Lower the best limit to `level` if it is above: a probe that began near it was refused."""
        self.best = min(self.best, level)

    def raise_ceiling(self, in_flight: int) -> None:
        """Probe from above `in_flight` calls: that many were accepted."""
        self.ceiling = in_flight

    def forget_ceiling(self) -> None:
        """Count no limit as too high: every call is refused, so the limit is not the cause."""
        self.ceiling = math.inf

    def record_slowdown(self, level: float) -> None:
        """Record that our load slowed the calls above `level`: the provider shares its capacity."""
        self.best = min(self.best, level)
        self.ceiling = level
        self._provider_refuses = False
