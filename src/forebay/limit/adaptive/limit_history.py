"""What is remembered of levels: the highest that held, and the one that did not."""

from __future__ import annotations

import math
from typing import Final

_STALE: Final = 600.0  # seconds after which a level that held is no longer better than the present one


class LimitHistory:
    """The level that held, to which the limit returns at once after trouble, and the ceiling, above which it probes.

    Attributes:
        good: the highest level that got through a round without a refusal; infinity until something is known.
        ceiling: just below the level that was refused last; infinity where nothing is known to be too much.
    """

    def __init__(self) -> None:
        self.best = math.inf
        self.ceiling = math.inf
        self._since = 0.0
        self._refuses = False  # the provider says what is too much

    @property
    def known(self) -> bool:
        """Whether there is a level to return to."""
        return self.best < math.inf

    @property
    def safe(self) -> float:
        """Up to here the limit may go without feeling its way."""
        return min(self.best, self.ceiling)

    def is_proven(self, level: float) -> bool:
        """Whether `level` has held at a provider that refuses what is too much."""
        return self._refuses and level <= self.best

    def record_held(self, now: float, level: float) -> None:
        """A full round at `level` went well."""
        if level >= self.best or now - self._since > _STALE:
            self.best, self._since = level, now

    def assume(self, level: float) -> None:
        """Nothing is known yet, and `level` is the best to go by."""
        if not self.known:
            self.best = level

    def record_refusal(self, level: float) -> None:
        """`level` was too much."""
        self.ceiling = max(1.0, level - 1)
        self._refuses = True

    def record_slowdown(self, level: float) -> None:
        """With more than `level` calls were slow, and through us: the provider shares what it has."""
        self.best = min(self.best, level)
        self.ceiling = level
        self._refuses = False
