"""How long a retry waits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forebay.errors import InvalidSetting

_SPREAD = 0.2  # of what a provider asks for: those whom it told the same come back apart


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often something that failed is tried again, and how long each retry waits: full-jitter exponential backoff.

    Source: M. Brooker, "Exponential Backoff And Jitter", 2015.

    Attributes:
        max_attempts: how often it is tried, the first time included, while it fails. Where a provider answers *not now*
            (429, 529) no attempt is used up; the deadline and `longest_wait` bound those.
        base: seconds; the first retry waits for at most so long.
        ceiling: seconds that any backoff is at most, what a provider asks for apart.
        longest_wait: seconds that one call waits for all its retries together, at most. A provider that asks for more
            is not waited for.

    Raises:
        InvalidSetting: a number makes no sense.
    """

    max_attempts: int = 6
    base_delay: float = 0.5
    max_delay: float = 60.0
    max_total_delay: float = 60.0

    def __post_init__(self) -> None:
        if not isinstance(self.max_attempts, int) or isinstance(self.max_attempts, bool) or self.max_attempts < 1:
            self._refuse("max_attempts", "a whole number of at least 1; 1 is no retry")
        if not 0 < self.base_delay < math.inf:
            self._refuse("base_delay", "a positive number of seconds")
        if not self.base_delay <= self.max_delay < math.inf:
            self._refuse("max_delay", "a number of seconds, not below base_delay")
        if not self.max_total_delay >= 0:
            self._refuse("max_total_delay", "a number of seconds of at least 0; 0 waits for nothing")

    def _refuse(self, name: str, expected: str) -> None:
        raise InvalidSetting(owner="Retry", name=name, value=getattr(self, name), expected=expected)

    def delay(
        self, retry: int, *, draw: float, retry_after: float | None = None, time_left: float = math.inf
    ) -> float | None:
        """Seconds to wait before retry number `retry` (1 is the first); None is to give up, for it would be too late.

        Drawn uniformly from zero to ``min(ceiling, base * 2**(retry - 1))``. Where the provider asked for a wait, the
        draw comes on top of that, and spreads over at least a fifth of it: everybody was told the same, and must not
        come back as a herd.

        Args:
            retry: its number.
            chance: a draw from [0, 1).
            retry_after: seconds that the provider asked for, or None.
            left: seconds until the result is worthless. A shorter rest draws from what is left, so that the retry is
                in time, if only just.
        """
        asked = max(0.0, retry_after or 0.0)
        bound = min(time_left, self.max_total_delay)
        if not asked < bound:
            return None
        spread = max(min(self.max_delay, self.base_delay * 2.0 ** min(retry - 1, 64)), _SPREAD * asked)
        return asked + draw * min(spread, bound - asked)
