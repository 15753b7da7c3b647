"""What a breaker has seen lately, and when that is enough to open it."""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass
from typing import Protocol

from forebay.errors import InvalidSetting

_Z = 1.96  # standard deviations: 95 %, two-sided


class FaultWindow:
    """Counts calls and faults, by the second and by the call.

    A success costs one comparison and one addition: calls are only numbered, a bucket is a note of where the numbering
    stood when its second began, and a fault is the number of its call. So nothing has to be kept for each call.

    Args:
        seconds: how many one-second buckets to keep; 0 if nobody asks `recent`.
        span: how many calls back faults are remembered; 0 if nobody asks `faults_among`.
    """

    __slots__ = ("_faulty", "_marks", "_seconds", "_span", "bucket_ends", "calls", "faults")

    def __init__(self, *, seconds: int, span: int) -> None:
        self._seconds = seconds
        self._span = span
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.calls = 0
        self.faults = 0
        self.bucket_ends = -math.inf if self._seconds else math.inf
        self._marks: list[tuple[int, int, int]] = []  # a bucket's second; the calls and faults before it
        self._faulty: list[int] = []  # the numbers of the faulty calls, within the span

    def add_success(self, now: float) -> None:
        """Count a call that succeeded at `now`."""
        if now >= self.bucket_ends:
            self.begin_bucket(now)
        self.calls += 1

    def add_fault(self, now: float) -> None:
        """Count a call that failed at `now`."""
        if now >= self.bucket_ends:
            self.begin_bucket(now)
        self.calls += 1
        self.faults += 1
        if self._span:
            self._faulty.append(self.calls)
            if self._faulty[0] <= self.calls - self._span:
                del self._faulty[: bisect_right(self._faulty, self.calls - self._span)]

    def begin_bucket(self, now: float) -> None:
        """Begin the bucket of `now`, and drop those that have left the window."""
        second = math.floor(now)
        self.bucket_ends = second + 1.0
        self._marks.append((second, self.calls, self.faults))
        oldest = second - self._seconds + 1
        if self._marks[0][0] < oldest:
            del self._marks[: bisect_right(self._marks, oldest - 1, key=lambda mark: mark[0])]

    def recent(self) -> tuple[int, int]:
        """Calls and faults in the window's seconds, up to the latest call."""
        if not self._marks:
            return self.calls, self.faults
        _, calls, faults = self._marks[0]
        return self.calls - calls, self.faults - faults

    def faults_among(self, calls: int) -> int:
        """How many of the last `calls` calls were faults."""
        return len(self._faulty) - bisect_right(self._faulty, self.calls - calls)


class Trigger(Protocol):
    """One rule for opening. It is asked after a fault only, so a success must never be what makes it true."""

    @property
    def seconds(self) -> int:
        """How many seconds back it looks; 0 for none."""

    @property
    def calls(self) -> int:
        """How many calls back it looks; 0 for none."""

    def should_open(self, window: FaultWindow) -> bool:
        """Whether what the window holds is enough."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MinimumSampleTrigger:
    """Opens on few calls: so many of the recent ones are faults that chance does not explain it.

    There must be `least_calls` and `least_faults` in the last `seconds`, and the Wilson lower bound (95 %) of the share
    of faults must lie above `share`. So 5 of 5 opens, 4 of 31 too; 1 of 20 does not, nor does 4 of 32.

    A minute rather than ten seconds, since a run of agents makes few calls and each is slow: at four calls a minute a
    window of ten seconds would never hold five. It also opens less often for nothing: at 3 % faults and two calls a
    second 0.5 times an hour instead of 4. A busy upstream loses nothing, for there the last 1,000 calls speak sooner.

    Source: E. B. Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", 1927.
    """

    min_calls: int = 5
    min_faults: int = 4
    share: float = 0.05
    seconds: int = 60
    calls: int = 0

    def __post_init__(self) -> None:
        _check_count("MinimumSampleTrigger", "min_calls", self.min_calls)
        _check_count("MinimumSampleTrigger", "min_faults", self.min_faults)
        _check_count("MinimumSampleTrigger", "seconds", self.seconds)
        if not 0 <= self.share < 1:
            raise InvalidSetting(
                owner="MinimumSampleTrigger", name="share", value=self.share, expected="a share of at least 0, below 1"
            )

    def should_open(self, window: FaultWindow) -> bool:
        """Whether the recent faults are too many for chance."""
        calls, faults = window.recent()
        return calls >= self.min_calls and faults >= self.min_faults and wilson_lower_bound(faults, calls) > self.share


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultCountTrigger:
    """Opens when at least `faults` of the last `calls` calls were faults, however long ago that was.

    50 of 1,000 is the arm for many calls: it finds a share of 6 % within about 800 calls. `n` of `n` is `n` in a row.
    """

    faults: int
    calls: int
    seconds: int = 0

    def __post_init__(self) -> None:
        _check_count("FaultCountTrigger", "calls", self.calls)
        if not isinstance(self.faults, int) or not 1 <= self.faults <= self.calls:
            expected = f"a whole number from 1 to calls, which is {self.calls}"
            raise InvalidSetting(owner="FaultCountTrigger", name="faults", value=self.faults, expected=expected)

    def should_open(self, window: FaultWindow) -> bool:
        """Whether enough of the last calls were faults."""
        return window.faults_among(self.calls) >= self.faults


def consecutive_faults(faults: int = 5) -> FaultCountTrigger:
    """The arm that opens on so many faults in a row.

    Raises:
        InvalidSetting: `faults` is not a whole number of at least 1.
    """
    return FaultCountTrigger(faults=faults, calls=faults)


def wilson_lower_bound(faults: int, calls: int) -> float:
    """The lower end of the 95 % Wilson score interval for a share of `faults` in `calls`."""
    share = faults / calls
    square = _Z * _Z / calls
    middle = share + square / 2
    reach = math.sqrt(square * (share * (1 - share) + square / 4))
    return (middle - reach) / (1 + square)


def _check_count(owner: str, name: str, value: object) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InvalidSetting(owner=owner, name=name, value=value, expected="a whole number of at least 1")
