"""An experiment on slow calls: lower the limit, and see whether calls get faster by more than chance allows."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Collection
from enum import Enum
from typing import Final

from forebay.limit.base import Grant

_MIN_SAMPLE, _MAX_SAMPLE = 8, 128  # calls in a sample: as many as the limit, between these
_CHECKS: Final = 4  # comparisons while a sample is replaced: each takes microseconds
_CERTAIN: Final = 3.0  # standard deviations from which calls are slow by more than chance allows
_SURE: Final = 4.0  # ... and from which they are faster: else the norm would be the fastest of many samples
_LIKELY: Final = 2.5  # ... and from which they have got faster, once they were slow for certain
_PROBABLE: Final = 1.0  # ... where few are in flight: samples take long there, and too low a limit is soon corrected
_FEW: Final = 20  # calls in flight
_SLOW: Final = 1.3  # times the norm from which calls are slow; fewer are not worth an experiment
_LOWERED: Final = 0.7  # share of the calls in flight that an experiment leaves
_LOWEST, _LEAST = 0.5, 0.8  # ... once our load is known to be the cause: at least, at most
_USED: Final = 0.5  # of the limit: while less is in use, our load is hardly the cause if calls are slow
_NOISY: Final = 2.0  # upper quartile of the slowdowns over the lower one, from which latency varies much by chance
_HALF_EXPLAINED: Final = 0.5  # exponent: calls get faster by at least half of what fewer calls in flight explain
_UNEXPLAINED: Final = 0.8  # of the slowdown that our load explains: still faster calls have another reason
_TINY: Final = 1e-9  # of a slowdown
_FIRST_PAUSE: Final = 30.0  # seconds from an experiment that found nothing to the next
_MAX_PAUSE: Final = 240.0  # seconds; each experiment that found nothing doubles the pause up to this
_PASSES_AFTER: Final = 60.0  # seconds after which most slowdowns that we do not cause are over
_STAGE_TIMEOUT: Final = 120.0  # seconds without a slowdown after which an experiment is given up


def rank_z(values: Collection[float], others: list[float], factor: float, *, missing: int = 0) -> float:
    """Return by how many standard deviations `values` rank above `factor` times `others` (Mann and Whitney's test).

    Args:
        values: one sample.
        others: the other sample, sorted.
        factor: scales the other sample.
        missing: more values of the first sample, which rank above all others.
    """
    n, m = len(values) + missing, len(others)
    if not n or not m:
        return 0.0
    above = float(missing * m)
    for value in values:
        above += (bisect_left(others, value / factor) + bisect_right(others, value / factor)) / 2
    return (above - n * m / 2) / math.sqrt(n * m * (n + m + 1) / 12)


def _median(values: Collection[float]) -> float:
    return sorted(values)[len(values) // 2]


def _size(level: float) -> int:
    """Return how many calls make a sample at a limit of `level`."""
    return min(_MAX_SAMPLE, max(_MIN_SAMPLE, int(level)))


class StartedCalls:
    """A sample of calls that were started one after the other.

    They are chosen as they start, because the first calls to end are the fast ones; those still under way are known to
    be missing.

    Attributes:
        number: of the sample; calls that belong to it carry it in their grant.
        slowdowns: of the calls that have ended.
        running: calls that have not ended.
        in_flight: calls in flight with one of them, on average.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.slowdowns: list[float] = []
        self.running = 0
        self.in_flight = 0.0
        self._places = size
        self._spare = size  # places for calls that replace one whose slowdown is not known

    @property
    def complete(self) -> bool:
        """True once nine in ten of the calls have ended."""
        return not self._places and self.running <= len(self.slowdowns) // 9

    def start(self, grant: Grant) -> None:
        """Take a call that starts, while there is a place."""
        if self._places:
            self._places -= 1
            self.running += 1
            grant.sample = self.number

    def end(self, slowdown: float | None, in_flight: float) -> None:
        """Take the slowdown of one of the calls; if it is not known, another call replaces this one."""
        self.running -= 1
        if slowdown is not None:
            self.slowdowns.append(slowdown)
            self.in_flight += (in_flight - self.in_flight) / len(self.slowdowns)
        elif self._spare:
            self._spare -= 1
            self._places += 1


class ExperimentStage(Enum):
    """The stage of an experiment."""

    WATCHING = "watching"  # no experiment runs
    LOWERED = "lowered"  # the limit is lower: do calls get faster?


class ExperimentResult(Enum):
    """The step that the limit has to take; each begins a new epoch."""

    LOWER = "lower"  # go down to `SlowdownExperiment.target_limit`
    RESTORE = "restore"  # our load was not the cause, or it has passed: go back to `target_limit`
    KEEP = "keep"  # our load was the cause: `target_limit` is the ceiling


class SlowdownExperiment:
    """An experiment that tells a slowdown that our load causes from one that it does not.

    The slowdown of a call is its duration over the duration expected for its output tokens. If a provider shares its
    capacity among the calls in flight, fewer calls get faster in proportion, and as much work is done; if calls are
    slow for another reason, or by chance, they do not. So the limit is lowered a little, and stays there only if calls
    have got faster by more than half of that proportion, beyond doubt: the ranks of two samples of calls are compared.
    Then it is lowered again, until calls get no faster, because the norm may have been learned under a flood.

    Source: H. B. Mann and D. R. Whitney, "On a Test of Whether one of Two Random Variables is Stochastically Larger
    than the Other", Annals of Mathematical Statistics 18, 1947.

    Attributes:
        stage: the present stage.
        slow: whether calls are slower than the norm; then the limit does not grow.
        target_limit: the limit that the latest result asks for.
        tried: the most calls in flight, on average of a sample, with which they were not slow.
    """

    def __init__(self) -> None:
        self.tried = 0.0
        self.stage = ExperimentStage.WATCHING
        self.slow = False
        self.target_limit = 0.0
        self._norm = [1.0] * (2 * _MIN_SAMPLE)  # slowdowns that are normal, sorted
        self._norm_verified = False  # fewer calls in flight are known to be no faster
        self._latest: deque[float] = deque(maxlen=_MAX_SAMPLE)  # slowdowns of the latest calls that have ended
        self._in_flight = 0.0  # calls in flight with one of them, on average
        self._unchecked = 0  # calls since the latest were compared with the norm
        self._used = 0  # the most calls in flight when one of them started
        self._lowered = StartedCalls(0, 0)  # calls under the lowered limit
        self._before: list[float] = []  # slowdowns before the limit was lowered, sorted
        self._limit_before, self._in_flight_before = 0.0, 0.0
        self._known_at = 0.0  # when a slowdown was known last, in the clock's seconds
        self._slow_since = math.inf
        self._pause = _FIRST_PAUSE
        self._next_at = -math.inf
        self._passed = False  # the latest experiment ended with "it has passed": not believed twice in a row
        self._our_load = False  # this experiment has found calls to be faster once

    def start(self, grant: Grant) -> None:
        """Note a call that starts."""
        if self.stage is ExperimentStage.LOWERED:
            self._lowered.start(grant)

    def observe(  # noqa: PLR0913 - what the end of a call tells
        self, now: float, grant: Grant, level: float, in_flight: int, slowdown: float | None, *, proven: bool
    ) -> ExperimentResult | None:
        """Take one call that has ended; return what the limit has to do, or None for nothing.

        Args:
            now: in the clock's seconds.
            grant: of the call.
            level: the limit.
            in_flight: calls in flight when it ended, itself included.
            slowdown: of the call; None if it is not known, the call did not succeed or was sent in another epoch.
            proven: whether this limit has held at a provider that refuses excess calls. If calls are slow there, our
                load is hardly the cause, and the experiment first waits for the slowdown to pass.
        """
        mean = (grant.in_flight + in_flight) / 2
        if slowdown is not None:
            self._known_at = now
        if self.stage is ExperimentStage.LOWERED:
            if grant.sample == self._lowered.number:
                self._used = max(self._used, grant.in_flight)
                self._lowered.end(slowdown, mean)
                return self._judge(now, level)
            return self._restore(now) if now - self._known_at > _STAGE_TIMEOUT else None
        if slowdown is None:
            self.slow = self.slow and now - self._known_at <= _STAGE_TIMEOUT
            return None
        self._used = max(self._used, grant.in_flight)
        return self._watch(now, level, mean, slowdown, proven=proven)

    def clear(self) -> None:
        """Drop the slowdowns of the old epoch: they say nothing about the new one."""
        self._latest.clear()
        self._in_flight, self._used = 0.0, 0

    def abort(self) -> None:
        """End the experiment: a refusal is the stronger signal."""
        self.stage = ExperimentStage.WATCHING

    def _watch(
        self, now: float, level: float, in_flight: float, slowdown: float, *, proven: bool
    ) -> ExperimentResult | None:
        latest, size = self._latest, _size(level)
        latest.append(slowdown)
        while len(latest) > size:
            latest.popleft()
        self._in_flight += (in_flight - self._in_flight) / len(latest)
        self._unchecked += 1
        if self._unchecked < size // _CHECKS:
            return None
        self._unchecked = 0
        slow = self._used >= _USED * level and self._in_flight > 1 and rank_z(latest, self._norm, _SLOW) >= _CERTAIN
        if not slow:
            self.slow, self._slow_since = False, math.inf
            if len(latest) >= _MIN_SAMPLE:
                self.tried = max(self.tried, self._in_flight)
            if len(latest) == size and rank_z(self._norm, sorted(latest), _SLOW) >= _SURE:
                self._norm = sorted(latest)
            return None
        self.slow, self._slow_since = True, min(self._slow_since, now)
        if 2 * len(latest) < size or len(latest) < _MIN_SAMPLE or now < self._next_at:
            return None
        if proven and now - self._slow_since < _PASSES_AFTER:
            return None
        self._our_load = False
        return self._lower(now, level, list(latest), self._in_flight, proven=proven)

    def _lower(
        self, now: float, level: float, slowdowns: list[float], in_flight: float, *, proven: bool
    ) -> ExperimentResult:
        self._before, self._limit_before, self._in_flight_before = sorted(slowdowns), level, in_flight
        fast = self._norm[len(self._norm) // 2] / max(self._before[len(self._before) // 2], _TINY)
        bold = self._our_load or (in_flight <= _FEW and not proven)
        if self._before[3 * len(self._before) // 4] > _NOISY * self._before[len(self._before) // 4]:
            share = _LOWEST  # a smaller step would be lost among the differences between calls
        else:
            share = max(_LOWEST, min(_LEAST, fast)) if bold else _LOWERED
        self.target_limit = max(1.0, float(round(share * min(level, self._used))))
        self.stage, self._known_at = ExperimentStage.LOWERED, now
        self._lowered = StartedCalls(self._lowered.number + 1, _size(self.target_limit))
        return ExperimentResult.LOWER

    def _judge(self, now: float, level: float) -> ExperimentResult | None:
        """Compare the calls under the lower limit with those before."""
        calls, before = self._lowered, self._before
        share = min(1.0, calls.in_flight / self._in_flight_before)
        enough = _PROBABLE if self._in_flight_before <= _FEW and calls.complete else _LIKELY
        if rank_z(calls.slowdowns, before, share**_HALF_EXPLAINED, missing=calls.running) > -enough:
            return self._restore(now) if calls.complete else None
        median = _median(calls.slowdowns)
        self._passed = median < _UNEXPLAINED * share * before[len(before) // 2] and not self._passed
        if self._passed:
            return self._restore(now)
        self._our_load, self._pause = True, _FIRST_PAUSE
        still_slow = median > _SLOW * self._norm[len(self._norm) // 2]
        if calls.in_flight > 1 and (still_slow or not self._norm_verified):
            return self._lower(now, level, calls.slowdowns, calls.in_flight, proven=False)
        return self._end(ExperimentResult.KEEP, level, [] if self._norm_verified else calls.slowdowns)

    def _restore(self, now: float) -> ExperimentResult:
        """Go back to the limit from before, which is the ceiling if calls had got faster on the way there.

        Otherwise this experiment found nothing: calls are as slow as they are, and the next one waits longer.
        """
        if self._our_load:
            return self._end(ExperimentResult.KEEP, self._limit_before, self._before)
        self._next_at = now + self._pause
        self._pause = min(_MAX_PAUSE, 2 * self._pause)
        slowdowns = self._lowered.slowdowns
        # With fewer in flight calls are not slower, unless the provider stood still meanwhile.
        stalled = bool(slowdowns) and _median(slowdowns) > _SLOW * _median(self._before)
        norm = [] if self._passed or stalled else slowdowns
        return self._end(ExperimentResult.RESTORE, self._limit_before, norm)

    def _end(self, result: ExperimentResult, limit: float, norm: list[float]) -> ExperimentResult:
        self.stage, self.slow, self._slow_since = ExperimentStage.WATCHING, False, math.inf
        self.target_limit = limit
        if len(norm) >= _MIN_SAMPLE:
            self._norm, self._norm_verified = sorted(norm), result is ExperimentResult.KEEP
        return result
