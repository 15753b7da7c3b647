"""Detection of an outage: a provider that throttles every call for longer than any call may wait."""

from __future__ import annotations

import math
from typing import Final

from forebay.limit import Limit

_SPREAD: Final = 10.0  # seconds over which rejected calls come back
_FORGET: Final = 60.0  # seconds without a throttled call after which the outage counts as over


class OutageDetector:
    """The time for which the provider has throttled every call.

    A throttled call is not a fault, so no breaker opens. Meanwhile the limit sends a single trial call now and then.

    Args:
        limit: of the account; it is 0 between two trial calls.
        patience: seconds after which no call should wait any longer.
    """

    __slots__ = ("_latest", "_limit", "_patience", "_since")

    def __init__(self, limit: Limit, patience: float) -> None:
        self._limit = limit
        self._patience = patience
        self._since = math.inf
        self._latest = -math.inf  # when the latest call was throttled

    def record_throttled(self, now: float) -> None:
        """Note that a call was throttled."""
        self._since = now if now - self._latest > _FORGET else min(self._since, now)
        self._latest = now

    def record_accepted(self) -> None:
        """Note that a call was accepted: its answer has begun."""
        self._since = math.inf

    @property
    def is_throttled(self) -> bool:
        """True if the latest call that was throttled or accepted was throttled."""
        return self._since < math.inf

    def duration(self, now: float, *, paused: bool = False) -> float | None:
        """Return the seconds that an outage has lasted; None if that is short, or the next trial call is due.

        Args:
            now: the time.
            paused: no call is sent now because calls were refused.
        """
        seconds = now - self._since
        return seconds if seconds >= self._patience and (paused or self._limit.limit(now) == 0) else None

    def retry_after(self, now: float, draw: float, *, pause: float = 0.0) -> float:
        """Return the seconds after which a rejected call may try again.

        Args:
            now: the time.
            draw: a random number in [0, 1).
            pause: seconds until a call may be sent, by other rules than the limit.
        """
        return max(pause, (self._limit.reopens_at(now) or now) - now) + draw * _SPREAD
