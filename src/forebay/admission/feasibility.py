"""Whether a deadline can still be made, judged so that a bad estimate cannot lock the door."""

from __future__ import annotations

from collections import deque

_SAMPLES = 20
_LEAST_SAMPLES = 8
_OCCUPANCY_GAIN = 0.1


class ServiceTimes:
    """What running a task has lately taken, in seconds."""

    __slots__ = ("_quartile", "_successes", "occupancy")

    def __init__(self) -> None:
        self._successes: deque[float] = deque(maxlen=_SAMPLES)
        self._quartile: float | None = None
        self.occupancy: float | None = None  # mean seconds that a task, however it ends, holds its slot

    def ended(self, seconds: float, *, success: bool) -> None:
        """Note a slot given back after `seconds`."""
        held = self.occupancy
        self.occupancy = seconds if held is None else held + _OCCUPANCY_GAIN * (seconds - held)
        if success:
            self._successes.append(seconds)
            self._quartile = None

    def optimistic(self) -> float:
        """The 25th percentile of the last 20 successes; 0 while there are fewer than 8: then nobody is refused."""
        if len(self._successes) < _LEAST_SAMPLES:
            return 0.0
        if self._quartile is None:
            self._quartile = sorted(self._successes)[len(self._successes) // 4]
        return self._quartile

    def median(self) -> float | None:
        """The median of the last 20 successes, or None before the first."""
        return sorted(self._successes)[len(self._successes) // 2] if self._successes else None

    def drain_rate(self, slots: int) -> float | None:
        """Tasks a second that `slots` busy slots finish, or None before the first ending."""
        return slots / self.occupancy if self.occupancy else None


class LetThrough:
    """One in every `period` seconds passes whatever the estimate says: only running tasks can correct it.

    Without it, an average taken in a slow spell refuses for ever.
    """

    __slots__ = ("_last", "_period")

    def __init__(self, period: float = 10.0) -> None:
        self._period = period
        self._last: float | None = None

    def hopeless(self, now: float, *, needed: float, remaining: float) -> bool:
        """Whether to refuse a task that needs `needed` seconds and has `remaining`."""
        if needed <= remaining:
            return False
        if self._last is None or now - self._last >= self._period:
            self._last = now
            return False
        return True
