"""Deadline feasibility: estimates of whether a deadline can be met, which recover after a slow spell."""

from __future__ import annotations

import math
from collections import deque
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from forebay.task import Estimate

_SAMPLES = 20
_MIN_SAMPLES = 8
_OCCUPANCY_WEIGHT = 0.05  # of one task; with more, each dip would admit more than can be served in time
_LIKELY, _NEARLY_ALL = 0.75, 0.95  # shares of the latest service times
_SLACK = 1.25  # times as long as nearly all take, because a task may start later than expected
_MIN_WAIT_SHARE = 0.125  # of the time that remains
_TIMEOUT_FACTOR = 1.5  # a task that timed out is taken to need this many times its timeout
_MAX_FIGURE = 10**18  # of an estimate; a whole number may be larger than any float
_PREDICTS = 0.5  # of the variance of the times' logarithms: what a figure may leave unexplained to be used


class ServiceTimes:
    """The latest service times of a task type, in seconds, and the estimates that follow from them.

    Args:
        samples: how many are remembered, of successes and of timeouts.

    Attributes:
        occupancy: moving mean of the seconds for which a task holds its slot, however it ends; None before the first.
    """

    __slots__ = ("_latest", "_quartile", "_sorted", "_successes", "occupancy")

    def __init__(self, samples: int = _SAMPLES) -> None:
        self._successes: deque[float] = deque(maxlen=samples)
        self._latest: deque[float] = deque(maxlen=samples)  # successes and timeouts
        self._quartile: float | None = None  # of the successes, computed when asked for
        self._sorted: list[float] = []  # the latest, sorted when asked for
        self.occupancy: float | None = None

    def record(self, seconds: float, *, success: bool) -> None:
        """Record that a task gave its slot back after `seconds`."""
        held = self.occupancy
        self.occupancy = seconds if held is None else held + _OCCUPANCY_WEIGHT * (seconds - held)
        if success:
            self._successes.append(seconds)
            self._latest.append(seconds)
            self._quartile, self._sorted = None, []

    def record_timeout(self, seconds: float) -> None:
        """Record that a task was cut off after `seconds`: it needs longer, though it is not known how much.

        Without timeouts, the fewer long tasks finish, the less they would count.
        """
        self._latest.append(_TIMEOUT_FACTOR * seconds)
        self._sorted = []

    def quantile(self, share: float) -> float:
        """Return the seconds that this share of the latest did not exceed; 0 while there are fewer than 8."""
        if len(self._latest) < _MIN_SAMPLES:
            return 0.0
        if not self._sorted:
            self._sorted = sorted(self._latest)
        return self._sorted[int(share * len(self._sorted))]

    def max_wait(self, remaining: float) -> float:
        """Return the longest acceptable wait for a task with `remaining` seconds; it leaves time for nearly every task.

        It is at least an eighth of `remaining`, and infinity while nothing is known. After a longer wait a task would
        start with too little time left, and the slots would fill with tasks that time out. Rejection costs no slot.
        """
        ample = self._ample()
        return max(_MIN_WAIT_SHARE * remaining, remaining - ample) if ample else math.inf

    def required_time(self, time: float, *, crowded: bool = False) -> float:
        """Return the seconds that a task must have left to be served while tasks with more time wait.

        Three quarters of all tasks need no more; where it is `crowded`, nearly all: others are not admitted that would
        make better use of the slot. If `time`, the seconds that the task had in all, was short from the start, the
        optimistic estimate is enough, as if nobody waited. An eighth of `time` may pass in any case: see `max_wait`.
        """
        if crowded and time >= (needed := self.nearly_all()):
            return min(needed, (1.0 - _MIN_WAIT_SHARE) * time)
        return self.likely() if time >= self._ample() else self.optimistic()

    def likely(self) -> float:
        """Return the seconds that three quarters of the latest did not exceed; 0 while there are fewer than 8."""
        return self.quantile(_LIKELY)

    def nearly_all(self) -> float:
        """Return the seconds that 95 in a hundred of the latest did not exceed; 0 while there are fewer than 8."""
        return self.quantile(_NEARLY_ALL)

    def _ample(self) -> float:
        return _SLACK * self.nearly_all()

    def optimistic(self) -> float:
        """Return the 25th percentile of the latest successes; 0 while there are fewer than 8, to reject nothing."""
        if len(self._successes) < _MIN_SAMPLES:
            return 0.0
        if self._quartile is None:
            self._quartile = sorted(self._successes)[len(self._successes) // 4]
        return self._quartile

    def median(self) -> float | None:
        """Return the median of the latest successes, or None before the first."""
        return sorted(self._successes)[len(self._successes) // 2] if self._successes else None

    def drain_rate(self, slots: int) -> float | None:
        """Return the tasks a second that `slots` busy slots finish, or None while that is unknown."""
        return slots / self.occupancy if self.occupancy else None


class EstimatedTimes:
    """The latest service times of tasks of one type that have an Estimate, by the figure of it that predicts them best.

    Time is taken to be proportional to that figure, whatever the unit: an estimate that is always three times too high
    is as good as an exact one. If no figure halves at least the variance of the times' logarithms, none is used.

    Args:
        samples: how many are remembered, of successes and of timeouts.
    """

    __slots__ = ("_best", "_latest", "_per_unit")

    def __init__(self, samples: int = _SAMPLES) -> None:
        # Seconds, the figures, and whether it was a timeout.
        self._latest: deque[tuple[float, tuple[float, ...], bool]] = deque(maxlen=samples)
        self._best: int | None = None  # index of the figure that predicts best; found when asked for
        self._per_unit: ServiceTimes | None = None  # seconds for each unit of it; found with it

    def record(self, seconds: float, estimate: Estimate, *, timeout: bool = False) -> None:
        """Record that a task with `estimate` succeeded after `seconds`, or was cut off by its deadline."""
        if seconds > 0.0:
            self._latest.append((seconds, _figures(estimate), timeout))
            self._per_unit = None

    def of(self, estimate: Estimate) -> tuple[ServiceTimes, float] | None:
        """Return the service times for each unit and the units of a task with `estimate`; None if none predicts."""
        if self._per_unit is None:
            self._find_best()
        units = 0.0 if self._best is None else _figures(estimate)[self._best]
        return (self._per_unit, units) if units and self._per_unit is not None else None

    def _find_best(self) -> None:
        self._best, self._per_unit = None, ServiceTimes(self._latest.maxlen or _SAMPLES)
        if len(self._latest) < _MIN_SAMPLES:
            return
        logs = [math.log(seconds) for seconds, _, _ in self._latest]
        least = _PREDICTS * _variance(logs)
        for index in range(len(self._latest[0][1])):
            if not all(figures[index] for _, figures, _ in self._latest):
                continue
            sizes = [math.log(figures[index]) for _, figures, _ in self._latest]
            unexplained = _variance([log - size for log, size in zip(logs, sizes, strict=True)])
            if unexplained < least:
                self._best, least = index, unexplained
        if self._best is not None:
            for seconds, figures, timeout in self._latest:
                if timeout:
                    self._per_unit.record_timeout(seconds / figures[self._best])
                else:
                    self._per_unit.record(seconds / figures[self._best], success=True)


def _variance(values: list[float]) -> float:
    mean = sum(values) / len(values)  # `statistics.pvariance` is exact, and thirty times as slow
    return sum((value - mean) ** 2 for value in values) / len(values)


def _figures(estimate: Estimate) -> tuple[float, ...]:
    figures = estimate.calls, estimate.output_tokens, estimate.input_tokens
    return tuple(float(min(figure, _MAX_FIGURE)) for figure in figures)


class EstimateBypass:
    """An exception to the estimate: one task in every `period` seconds passes whatever the estimate says.

    Only running tasks can correct an estimate. Without the exception, an average from a slow spell would reject every
    task forever.

    Args:
        period: seconds.
    """

    __slots__ = ("_last", "_period")

    def __init__(self, period: float = 10.0) -> None:
        self._period = period
        self._last: float | None = None

    def should_reject(self, now: float, *, needed: float, remaining: float) -> bool:
        """Return whether to reject a task that needs `needed` seconds and has `remaining`."""
        if needed <= remaining:
            return False
        if self._last is None or now - self._last >= self._period:
            self._last = now
            return False
        return True
