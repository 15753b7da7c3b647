"""Whether a deadline can still be made, judged so that a bad estimate cannot lock the door."""

from __future__ import annotations

import math
from collections import deque

_SAMPLES = 20
_LEAST_SAMPLES = 8
_OCCUPANCY_GAIN = 0.05  # were it larger, each dip would let more in than can be served in time
_LIKELY, _NEARLY_ALL = 0.75, 0.95  # shares of the latest
_SLACK = 1.25  # times as long as nearly all take: what is expected may come later
_LEAST_WAIT = 0.125  # of the time that remains
_LONGER = 1.5  # times as long as it lasted is what a task is taken to need that was cut off before it had ended


class ServiceTimes:
    """What running a task has lately taken, in seconds.

    Args:
        samples: how many of the latest are remembered: successes, and what was cut off.
    """

    __slots__ = ("_latest", "_quartile", "_sorted", "_successes", "occupancy")

    def __init__(self, samples: int = _SAMPLES) -> None:
        self._successes: deque[float] = deque(maxlen=samples)
        self._latest: deque[float] = deque(maxlen=samples)  # ... and what was cut off
        self._quartile: float | None = None  # of the first, once somebody asks
        self._sorted: list[float] = []  # the second
        self.occupancy: float | None = None  # mean seconds that a task, however it ends, holds its slot

    def record(self, seconds: float, *, success: bool) -> None:
        """Note a slot given back after `seconds`."""
        held = self.occupancy
        self.occupancy = seconds if held is None else held + _OCCUPANCY_GAIN * (seconds - held)
        if success:
            self._successes.append(seconds)
            self._latest.append(seconds)
            self._quartile, self._sorted = None, []

    def record_timeout(self, seconds: float) -> None:
        """One was not done after so many seconds, when its time was up: it needs longer, as far as anybody knows.

        Were such left out, the long ones would be forgotten the sooner the fewer of them come to an end.
        """
        self._latest.append(_LONGER * seconds)
        self._sorted = []

    def quantile(self, share: float) -> float:
        """Seconds that so large a share of the latest did not exceed; 0 while there are fewer than 8."""
        if len(self._latest) < _LEAST_SAMPLES:
            return 0.0
        if not self._sorted:
            self._sorted = sorted(self._latest)
        return self._sorted[int(share * len(self._sorted))]

    def max_wait(self, remaining: float) -> float:
        """Seconds of those that remain which one may be expected to wait: nearly any fits into the rest; or an eighth.

        Were it longer than that, those whose turn it is would have too little time left, and the slots would be full of
        what is cut off. Who is refused before costs nobody a slot. Infinity while nothing is known.
        """
        ample = self._ample()
        return max(_LEAST_WAIT * remaining, remaining - ample) if ample else math.inf

    def required_time(self, time: float) -> float:
        """Seconds that must be left of so much `time`, where others wait who have more: three quarters took no longer.

        Where the time was short from the first, it is judged as kindly as if nobody waited.
        """
        return self.quantile(_LIKELY) if time >= self._ample() else self.optimistic()

    def _ample(self) -> float:
        return _SLACK * self.quantile(_NEARLY_ALL)

    def optimistic(self) -> float:
        """The 25th percentile of the latest successes; 0 while there are fewer than 8: then nobody is refused."""
        if len(self._successes) < _LEAST_SAMPLES:
            return 0.0
        if self._quartile is None:
            self._quartile = sorted(self._successes)[len(self._successes) // 4]
        return self._quartile

    def median(self) -> float | None:
        """The median of the latest successes, or None before the first."""
        return sorted(self._successes)[len(self._successes) // 2] if self._successes else None

    def drain_rate(self, slots: int) -> float | None:
        """Tasks a second that `slots` busy slots finish, or None before the first ending."""
        return slots / self.occupancy if self.occupancy else None


class EstimateBypass:
    """One in every `period` seconds passes whatever the estimate says: only running tasks can correct it.

    Without it, an average taken in a slow spell refuses for ever.
    """

    __slots__ = ("_last", "_period")

    def __init__(self, period: float = 10.0) -> None:
        self._period = period
        self._last: float | None = None

    def should_reject(self, now: float, *, needed: float, remaining: float) -> bool:
        """Whether to refuse a task that needs `needed` seconds and has `remaining`."""
        if needed <= remaining:
            return False
        if self._last is None or now - self._last >= self._period:
            self._last = now
            return False
        return True
