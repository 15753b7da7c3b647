"""Restart intensity: how many restarts in a period are too many. Pure."""

from __future__ import annotations

from collections import deque


class RestartIntensity:
    """The restarts of the last seconds, of all workers of one supervisor together.

    Args:
        max_restarts: how many are allowed within the period.
        within: the period, in seconds.
    """

    def __init__(self, max_restarts: int, within: float) -> None:
        self.max_restarts = max_restarts
        self.within = within
        self._restarts: deque[float] = deque(maxlen=max_restarts + 1)

    def allow(self, now: float) -> bool:
        """Count a restart at `now`; return False if it is one too many, so that it must not happen."""
        self._restarts.append(now)
        return len(self._restarts) <= self.max_restarts or now - self._restarts[0] > self.within

    def clear(self) -> None:
        """Forget the restarts so far."""
        self._restarts.clear()
