"""The recent calls and faults of a circuit breaker, as counts."""

from __future__ import annotations

import math
from bisect import bisect_right

import msgspec


class FaultWindow(msgspec.Struct, gc=False, eq=False, kw_only=True):  # it holds only numbers: nothing to collect
    """Counts of calls and faults, by the second and by the call.

    A success costs one comparison and one addition: calls are only numbered, a bucket notes the number at which its
    second began, and a fault is the number of its call. So nothing is kept per call.

    Attributes:
        seconds: one-second buckets to keep; 0 if `recent` is not used.
        span: calls for which faults are remembered; 0 if `faults_among` is not used.
        calls: how many there have been.
        faults: how many of them failed.
        bucket_ends: seconds at which the newest bucket is over.
    """

    seconds: int
    span: int
    calls: int = 0
    faults: int = 0
    bucket_ends: float = math.inf
    _buckets: list[tuple[int, int, int]] | tuple[()] = ()  # a second, and the calls and faults before it
    _faulty: list[int] | tuple[()] = ()  # the numbers of the faulty calls, within the span

    def __post_init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.calls = 0
        self.faults = 0
        self.bucket_ends = -math.inf if self.seconds else math.inf
        self._buckets = self._faulty = ()  # lists are made when they are needed: of most breakers never

    def add_success(self, now: float) -> None:
        """Count a call that succeeded at `now`."""
        if now >= self.bucket_ends:
            self.begin_bucket(now)
        self.calls += 1

    def add_successes(self, now: float, calls: int) -> None:
        """Count calls that succeeded until `now`."""
        if now >= self.bucket_ends:
            self.begin_bucket(now)
        self.calls += calls

    def add_fault(self, now: float) -> None:
        """Count a call that failed at `now`."""
        if now >= self.bucket_ends:
            self.begin_bucket(now)
        self.calls += 1
        self.faults += 1
        if self.span:
            if not self._faulty:
                self._faulty = []
            self._faulty.append(self.calls)
            if self._faulty[0] <= self.calls - self.span:
                del self._faulty[: bisect_right(self._faulty, self.calls - self.span)]

    def begin_bucket(self, now: float) -> None:
        """Begin the bucket of `now`, and drop those that have left the window."""
        second = math.floor(now)
        self.bucket_ends = second + 1.0
        if not self._buckets:
            self._buckets = []
        self._buckets.append((second, self.calls, self.faults))
        oldest = second - self.seconds + 1
        if self._buckets[0][0] < oldest:
            del self._buckets[: bisect_right(self._buckets, oldest - 1, key=lambda bucket: bucket[0])]

    def recent(self) -> tuple[int, int]:
        """Return the calls and faults of the window's seconds, up to the latest call."""
        if not self._buckets:
            return self.calls, self.faults
        _, calls, faults = self._buckets[0]
        return self.calls - calls, self.faults - faults

    def faults_among(self, calls: int) -> int:
        """Return how many of the last `calls` calls were faults."""
        return len(self._faulty) - bisect_right(self._faulty, self.calls - calls)
