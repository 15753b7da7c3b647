"""An experiment on slow calls: lower the limit, and see whether calls get faster by more than chance allows."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from enum import Enum
from typing import Final

from forebay.limit.base import Grant

_MIN_SAMPLE, _MAX_SAMPLE = 8, 64  # calls in a sample: as many as the limit, between these
_CERTAIN: Final = 3.0  # standard deviations from which a difference is taken for more than chance
_SLOW: Final = 1.3  # times the norm from which calls are slow; fewer are not worth an experiment
_LOWERED_SHARE: Final = 0.7  # of the calls in flight, in an experiment ...
_LOWERED_MORE: Final = 0.5  # ... once calls have got faster, and where there are few
_FEW: Final = 20  # calls in flight up to which an experiment costs little
_HALF_EXPLAINED: Final = 0.5  # exponent: calls get faster by at least half of what fewer calls in flight explain
_UNEXPLAINED: Final = 0.8  # of the slowdown that our load explains: still faster calls have another reason
_MIN_USE: Final = 0.75  # share of the limit that has to be in flight: else our load is hardly the cause
_FIRST_PAUSE: Final = 30.0  # seconds from an experiment that found nothing to the next
_MAX_PAUSE: Final = 240.0  # seconds; each experiment that found nothing doubles the pause up to this
_PASSES_AFTER: Final = 60.0  # seconds after which most slowdowns that we do not cause are over
_STAGE_TIMEOUT: Final = 120.0  # seconds after which a sample that does not fill is given up


def rank_z(values: list[float], others: list[float], factor: float, *, missing: int = 0) -> float:
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


class CallSample:
    """The slowdowns of some calls that were started one after the other.

    They are chosen as they start, because the first calls to end are the fast ones. Those still under way are known to
    be missing.

    Attributes:
        slowdowns: of the calls that have ended, sorted.
        running: calls that have not ended.
        max_in_flight: the most calls that were in flight when one of them started.
    """

    def __init__(self, number: int, size: int) -> None:
        self.number = number
        self.slowdowns: list[float] = []
        self.running = 0
        self.max_in_flight = 0
        self._free = size  # places

    @property
    def complete(self) -> bool:
        """True once nine in ten of the calls have ended."""
        return not self._free and self.running <= len(self.slowdowns) // 9

    def join(self, grant: Grant) -> None:
        """Take a call that starts, while there is a place."""
        if self._free:
            self._free -= 1
            self.running += 1
            self.max_in_flight = max(self.max_in_flight, grant.in_flight)
            grant.sample = self.number

    def end(self, slowdown: float | None) -> None:
        """Take the slowdown of one of the calls; None frees its place for another."""
        self.running -= 1
        if slowdown is None:
            self._free += 1
        else:
            insort(self.slowdowns, slowdown)

    def median(self) -> float:
        """Return the median of those that have ended."""
        return self.slowdowns[len(self.slowdowns) // 2]


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
    """

    def __init__(self) -> None:
        self.stage = ExperimentStage.WATCHING
        self.slow = False
        self.target_limit = 0.0
        self._norm = [1.0] * _MIN_SAMPLE  # slowdowns that are normal, sorted
        self._sample = CallSample(1, _MIN_SAMPLE)
        self._before = self._sample  # the sample before the limit was lowered
        self._limit_before = 0.0
        self._stage_start = 0.0  # in the clock's seconds
        self._slow_since = math.inf
        self._pause = _FIRST_PAUSE
        self._next_at = -math.inf
        self._passed = False  # the latest experiment ended with "it has passed": not believed twice in a row
        self._our_load = False  # this experiment has found calls to be faster once

    def join(self, grant: Grant) -> None:
        """Take a call that starts into the present sample, if there is a place."""
        self._sample.join(grant)

    def observe(
        self, now: float, grant: Grant, level: float, slowdown: float | None, *, proven: bool
    ) -> ExperimentResult | None:
        """Take one call that has ended; return what the limit has to do, or None for nothing.

        Args:
            now: in the clock's seconds.
            grant: of the call.
            level: the limit.
            slowdown: of the call; None if it is not known, or the call did not succeed.
            proven: whether this limit has held at a provider that refuses excess calls. If calls are slow there, our
                load is hardly the cause, and the experiment first waits for the slowdown to pass.
        """
        sample = self._sample
        if grant.sample == sample.number:
            sample.end(slowdown)
            result = self._judge(now, level) if self.stage is ExperimentStage.LOWERED else self._watch(now, level, proven=proven)
            if result is not None or sample is not self._sample:
                return result
        if self.stage is ExperimentStage.LOWERED and now - self._stage_start > _STAGE_TIMEOUT:
            return self._restore(now)
        return None

    def clear_samples(self, level: float) -> None:
        """Begin a new sample: calls of the old epoch say nothing about the new one."""
        size = min(_MAX_SAMPLE, max(_MIN_SAMPLE, int(level)))
        self._sample = CallSample(self._sample.number + 1, size)

    def abort(self) -> None:
        """End the experiment: a refusal is the stronger signal."""
        self.stage = ExperimentStage.WATCHING

    def _watch(self, now: float, level: float, *, proven: bool) -> ExperimentResult | None:
        sample = self._sample
        slow = rank_z(sample.slowdowns, self._norm, _SLOW) >= _CERTAIN
        if slow and sample.max_in_flight >= max(2.0, _MIN_USE * int(level)):
            self.slow = True
            self._slow_since = min(self._slow_since, now)
        if not sample.complete:
            return None
        if self.slow and slow:
            if now >= self._next_at and (not proven or now - self._slow_since >= _PASSES_AFTER):
                self._our_load = False
                return self._lower(now, level, proven=proven)
        else:
            self.slow, self._slow_since = False, math.inf
            if rank_z(self._norm, sample.slowdowns, _SLOW) >= _CERTAIN:
                self._norm = sample.slowdowns
        self.clear_samples(level)
        return None

    def _lower(self, now: float, level: float, *, proven: bool) -> ExperimentResult:
        used = self._sample.max_in_flight
        bold = not proven and (self._our_load or used <= _FEW)
        share = _LOWERED_MORE if bold else _LOWERED_SHARE
        self._before, self._limit_before = self._sample, level
        self.target_limit = max(1.0, min(round(share * min(level, used)), used - 1.0))
        self.stage, self._stage_start = ExperimentStage.LOWERED, now
        return ExperimentResult.LOWER

    def _judge(self, now: float, level: float) -> ExperimentResult | None:
        """Compare the calls under the lower limit with those before."""
        sample, before = self._sample, self._before
        share = min(1.0, sample.max_in_flight / before.max_in_flight)
        scale = share**_HALF_EXPLAINED
        if rank_z(sample.slowdowns, before.slowdowns, scale, missing=sample.running) > -_CERTAIN:
            return self._restore(now) if sample.complete else None
        unexplained = sample.median() < _UNEXPLAINED * share * before.median()
        self._passed = unexplained and not self._passed
        if self._passed:
            return self._restore(now)
        self._our_load, self._pause = True, _FIRST_PAUSE
        if sample.max_in_flight > 1:
            return self._lower(now, level, proven=False)
        return self._keep(level, sample)

    def _keep(self, level: float, norm: CallSample) -> ExperimentResult:
        self.stage, self.slow, self._slow_since = ExperimentStage.WATCHING, False, math.inf
        self.target_limit, self._norm = level, norm.slowdowns or self._norm
        return ExperimentResult.KEEP

    def _restore(self, now: float) -> ExperimentResult:
        """Go back to the limit from before, which is the ceiling if calls had got faster on the way there.

        Otherwise this experiment found nothing: calls are as slow as they are, and the next one waits longer.
        """
        if self._our_load:
            return self._keep(self._limit_before, self._before)
        self.stage, self.slow, self._slow_since = ExperimentStage.WATCHING, False, math.inf
        self.target_limit = self._limit_before
        if not self._passed:
            self._norm = self._before.slowdowns
        self._next_at = now + self._pause
        self._pause = min(_MAX_PAUSE, 2 * self._pause)
        return ExperimentResult.RESTORE
