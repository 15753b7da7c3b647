"""An experiment on slow calls: lower the limit, and see whether our load was the cause."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

_SLOW: Final = 1.5  # slowdown over the norm from which calls are slow
_FAST: Final = 1.2  # slowdown over the norm up to which the limit may rise
_TOO_FAST: Final = 2 / 3  # slowdown below which the expected duration is too long
_MIN_SAMPLES, _MAX_SAMPLES = 8, 64  # slowdowns that make one median: half the limit, between these
_LOWEST_SHARE: Final = 0.5  # an experiment lowers the limit to half of it at most
_CAUTIOUS_SHARE: Final = 0.7  # ... or to this where it is doubtful that our load is the cause, or what is normal
_MIN_USE: Final = 0.75  # share of the limit that has to be in flight: else our load is hardly the cause
_FIRST_PAUSE: Final = 30.0  # seconds from an experiment that found nothing to the next
_MAX_PAUSE: Final = 240.0  # seconds; each experiment that found nothing doubles the pause up to this
_UNEXPLAINED: Final = 0.8  # of the slowdown that our load explains: faster calls have another reason
_PASSES_AFTER: Final = 60.0  # seconds after which most slowdowns that we do not cause are over
_STAGE_TIMEOUT: Final = 120.0  # seconds after which a stage without samples is given up


class ExperimentStage(Enum):
    """The stage of an experiment."""

    WATCHING = "watching"  # no experiment runs
    CONFIRMING = "confirming"  # calls are slow: the limit stays for one more median, to be sure
    LOWERED = "lowered"  # the limit is lower: do calls get faster? If so, and not enough, lower it once more


class ExperimentResult(Enum):
    """The step that the limit has to take; each but the last begins a new epoch."""

    STOP_GROWTH = "stop_growth"  # calls are slow: do not grow for now
    LOWER = "lower"  # go down to `SlowdownExperiment.target_limit`
    RESTORE = "restore"  # our load was not the cause, or it has passed: go back to `target_limit`
    KEEP = "keep"  # our load was the cause: the lowered limit is the ceiling
    FALSE_ALARM = "false_alarm"  # calls are not slow after all


class _SlowdownSamples:
    """The latest slowdowns, also in sorted order: sorting them for each answer took a tenth of the time of a call.

    Attributes:
        max_in_flight: the most calls that were in flight with one of these.
    """

    __slots__ = ("_latest", "_sorted", "max_in_flight")

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        self.max_in_flight = 0

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, slowdown: float, in_flight: int, bound: float) -> None:
        """Add one, and drop the oldest beyond `bound`."""
        while len(self._latest) >= bound:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(slowdown)
        insort(self._sorted, slowdown)
        self.max_in_flight = max(self.max_in_flight, in_flight)

    def median(self) -> float:
        """Return their median; there must be at least one."""
        half = len(self._sorted) // 2
        middle = self._sorted[half]
        return middle if len(self._sorted) % 2 else (self._sorted[half - 1] + middle) / 2

    def clear(self) -> None:
        """Drop all samples, but not `max_in_flight`."""
        self._latest.clear()
        self._sorted.clear()


@dataclass(frozen=True, slots=True)
class _BeforeLowering:
    """The state before the limit was lowered."""

    limit: float
    in_flight: int
    slowdown: float


class SlowdownExperiment:
    """An experiment that tells a slowdown that our load causes from one that it does not.

    The slowdown of a call is its duration over the duration expected for its output tokens. If a provider shares its
    capacity among the calls in flight, fewer calls get faster in proportion; if it is slow for another reason, they do
    not.

    The expected duration may have been learned while our own load slowed the calls: under a flood there is no other
    time to learn it. So if calls get faster with fewer in flight than at that time, the limit goes on down until they
    no longer do. Too low a limit costs more there than too high a one, so calls have to get faster by most of what our
    load explains.

    Attributes:
        stage: the present stage.
        target_limit: the limit that the latest result asks for.
    """

    def __init__(self) -> None:
        self.stage = ExperimentStage.WATCHING
        self.target_limit = 0.0
        self._norm = 1.0  # the slowdown that counts as normal; 1 unless an experiment found another
        self._samples = _SlowdownSamples()
        self._before = _BeforeLowering(0.0, 0, 0.0)
        self._stage_start = 0.0  # in the clock's seconds
        self._pause = _FIRST_PAUSE
        self._next_at = math.inf
        self._learned_in_flight = math.inf  # calls in flight at the first slowdown; with fewer the norm says nothing
        self._passed = False  # the latest experiment ended with "it has passed": not believed twice in a row
        self._our_load = False  # this experiment has found calls to be faster once

    @property
    def calls_are_fast(self) -> bool:
        """True if calls are not slow, as far as is known."""
        return not self._samples or self._samples.median() <= _FAST * self._norm

    def observe(
        self, now: float, level: float, in_flight: int, slowdown: float | None, *, proven: bool
    ) -> ExperimentResult | None:
        """Take one success; return what the limit has to do, or None for nothing.

        Args:
            now: in the clock's seconds.
            level: the limit.
            in_flight: calls in flight when the call began or when it ended, whichever was more.
            slowdown: of the call; None if not known.
            proven: whether this limit has held at a provider that refuses excess calls. If calls are slow there, our
                load is hardly the cause, and the experiment first waits for the slowdown to pass.
        """
        if slowdown is not None:
            self._samples.add(slowdown, in_flight, min(_MAX_SAMPLES, max(2 * _MIN_SAMPLES, level)))
            self._learned_in_flight = in_flight if self._learned_in_flight == math.inf else self._learned_in_flight
        elif self.stage is ExperimentStage.LOWERED and self._our_load:
            return self._keep_without_expectation(level)
        if len(self._samples) < min(_MAX_SAMPLES, max(_MIN_SAMPLES, level / 2)):
            late = self.stage is not ExperimentStage.WATCHING and now - self._stage_start > _STAGE_TIMEOUT
            return self._time_out(now, level) if late else None
        median = self._samples.median()
        self._norm = max(1.0, min(self._norm, median))
        judge = self._judge if self.stage is ExperimentStage.LOWERED else self._watch
        return judge(now, level, median, proven=proven)

    def clear_samples(self) -> None:
        """Drop the slowdowns of the old epoch: they say nothing about the new one."""
        self._samples = _SlowdownSamples()

    def abort(self) -> None:
        """End the experiment: a refusal is the stronger signal."""
        self.stage = ExperimentStage.WATCHING

    def _watch(self, now: float, level: float, median: float, *, proven: bool) -> ExperimentResult | None:
        again = self._norm > _FAST and median > _SLOW and now >= self._next_at
        used = self._samples.max_in_flight >= max(2.0, _MIN_USE * int(level))
        slow = (median > _SLOW * self._norm or again) and used
        if self.stage is ExperimentStage.WATCHING:
            return self._enter(ExperimentStage.CONFIRMING, now, ExperimentResult.STOP_GROWTH) if slow else None
        if not slow:
            self.stage = ExperimentStage.WATCHING
            return ExperimentResult.FALSE_ALARM
        if proven and now - self._stage_start < _PASSES_AFTER:
            self._samples.clear()
            return None
        self._our_load = False
        return self._lower(now, level, median, 1.0 if again else self._norm, proven=proven)

    def _lower(self, now: float, level: float, median: float, norm: float, *, proven: bool) -> ExperimentResult:
        """Go down to where calls would be fast if our load is the cause; less far where that is in doubt."""
        used = self._samples.max_in_flight
        share = max(_CAUTIOUS_SHARE if proven else _LOWEST_SHARE, min(1.0, _FAST * norm / median))
        share = _CAUTIOUS_SHARE if self._norm_is_doubtful(median) else share
        self._before = _BeforeLowering(level, used, median)
        self.target_limit = max(1.0, min(round(share * min(level, used)), used - 1.0))
        return self._enter(ExperimentStage.LOWERED, now, ExperimentResult.LOWER)

    def _norm_is_doubtful(self, median: float) -> bool:
        """Return whether the norm may have been learned under our own load: the slowdown is nearer to that."""
        used = self._samples.max_in_flight
        return used <= self._learned_in_flight or median > (1 + used / self._learned_in_flight) / 2

    def _judge(self, now: float, level: float, median: float, *, proven: bool) -> ExperimentResult:
        """Compare the slowdown with the one that our load alone would leave, and with no change at all."""
        before, used = self._before, self._samples.max_in_flight
        share = used / before.in_flight
        self.stage = ExperimentStage.WATCHING
        self._passed = proven and not self._passed and median < _UNEXPLAINED * share * before.slowdown
        if self._passed:
            self.target_limit = before.limit
            return ExperimentResult.RESTORE
        most = (1 + share) / 2 if used > self._learned_in_flight else (1 + 3 * share) / 4
        if median > before.slowdown * most:
            self._learned_in_flight = min(self._learned_in_flight, used)
            return self._keep(before.limit, 1.0) if self._our_load else self._restore(now, median)
        self._our_load = True
        self._pause = _FIRST_PAUSE
        if used > 1 and (median > _SLOW or self._norm_is_doubtful(median)):
            return self._lower(now, level, median, 1.0, proven=proven)
        return self._keep(level, 1.0 if median <= _SLOW else self._norm)

    def _keep_without_expectation(self, level: float) -> ExperimentResult:
        """End the way down: calls got so much faster that the expected duration was dropped."""
        self._learned_in_flight = math.inf
        self.stage = ExperimentStage.WATCHING
        return self._keep(self._before.limit if self._before.slowdown <= _TOO_FAST else level, 1.0)

    def _keep(self, level: float, norm: float) -> ExperimentResult:
        self.target_limit, self._norm = level, norm
        return ExperimentResult.KEEP

    def _restore(self, now: float, median: float) -> ExperimentResult:
        """Go back to the limit from before, and wait longer for the next experiment: this one found nothing."""
        self.target_limit = self._before.limit
        self._norm = max(1.0, median)
        self._next_at = now + self._pause
        self._pause = min(_MAX_PAUSE, 2 * self._pause)
        return ExperimentResult.RESTORE

    def _time_out(self, now: float, level: float) -> ExperimentResult:
        if self.stage is ExperimentStage.CONFIRMING:
            self._before = _BeforeLowering(level, 0, self._norm)
        self.stage = ExperimentStage.WATCHING
        return self._restore(now, self._norm)

    def _enter(self, stage: ExperimentStage, now: float, result: ExperimentResult) -> ExperimentResult:
        self.stage, self._stage_start = stage, now
        return result
