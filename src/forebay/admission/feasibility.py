"""Whether a deadline can still be made, judged so that a bad estimate cannot lock the door."""

from __future__ import annotations

from collections import deque

_SAMPLES = 20
_LEAST_SAMPLES = 8
_OCCUPANCY_GAIN = 0.1
_LONGER = 1.5  # times as long as it lasted is what a task is taken to need that was cut off before it had ended


class ServiceTimes:
    """What running a task has lately taken, in seconds.

    Args:
        samples: how many of the latest are remembered: successes, and what was cut off.
    """

    __slots__ = ("_latest", "_sorted", "occupancy")

    def __init__(self, samples: int = _SAMPLES) -> None:
        self._latest: deque[float] = deque(maxlen=samples)
        self._sorted: list[float] = []  # the same, once somebody asks
        self.occupancy: float | None = None  # mean seconds that a task, however it ends, holds its slot

    def ended(self, seconds: float, *, success: bool) -> None:
        """Note a slot given back after `seconds`."""
        held = self.occupancy
        self.occupancy = seconds if held is None else held + _OCCUPANCY_GAIN * (seconds - held)
        if success:
            self._remember(seconds)

    def cut_off(self, seconds: float) -> None:
        """One was not done after so many seconds, when its time was up: it needs longer, as far as anybody knows.

        Were such left out, the long ones would be forgotten the sooner the fewer of them come to an end.
        """
        self._remember(_LONGER * seconds)

    def quantile(self, share: float) -> float:
        """Seconds that so large a share of the latest did not exceed; 0 while there are fewer than 8."""
        if len(self._latest) < _LEAST_SAMPLES:
            return 0.0
        return self._in_order()[int(share * len(self._latest))]

    def optimistic(self) -> float:
        """What the fastest quarter took, likewise: by this nobody is refused who could be in time."""
        return self.quantile(0.25)

    def median(self) -> float | None:
        """Their median, or None before the first."""
        return self._in_order()[len(self._latest) // 2] if self._latest else None

    def _remember(self, seconds: float) -> None:
        self._latest.append(seconds)
        self._sorted = []

    def _in_order(self) -> list[float]:
        if not self._sorted:
            self._sorted = sorted(self._latest)
        return self._sorted

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
