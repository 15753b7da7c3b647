"""A trial in a slow-down: is it our load? Lower the limit and see whether the calls get faster."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from dataclasses import dataclass
from enum import Enum
from typing import Final

_SLOW: Final = 1.5  # stretch over the norm from which calls are slow
_BRISK: Final = 1.2  # stretch over the norm up to which more may be tried
_FAST: Final = 2 / 3  # stretch under which an expectation is too long
_LEAST, _MOST = 8, 64  # answers that one median is taken of: half the limit, between these
_LOWEST: Final = 0.5  # a trial lowers the limit to half of it at most
_STEP: Final = 0.7  # ... or to this where it is doubtful that it is our load, or what is normal
_USED: Final = 0.75  # of the limit that has to be in flight: else it is hardly our load
_FIRST_PAUSE: Final = 30.0  # seconds from a trial in vain to the next
_LONGEST_PAUSE: Final = 240.0  # seconds; each trial in vain doubles the pause up to this
_UNEXPLAINED: Final = 0.8  # of what our load explains: calls that are faster than that are so for another reason
_PASSES: Final = 60.0  # seconds after which most slow-downs are over that are not ours
_PATIENCE: Final = 120.0  # seconds after which a stage that got no stretches is given up


class ExperimentStage(Enum):
    """Where a trial stands."""

    WATCHING = "watching"  # no trial
    CONFIRMING = "standing"  # calls are slow: keep still for one median, to be sure
    LOWERED = "lowered"  # with fewer in flight: do they get faster? If so, and not enough, once more


class ExperimentResult(Enum):
    """What the limit has to do; the first four begin a new epoch."""

    STOP_GROWTH = "stand"  # calls are slow: grow no further for now
    LOWER = "lower"  # go down to `SlowdownExperiment.target_limit`
    RESTORE = "undo"  # the slow-down was not ours, or has passed: back to `SlowdownExperiment.target_limit`
    KEEP = "keep"  # it was ours: what we went down to is the ceiling
    FALSE_ALARM = "calm"  # a false alarm


class _Window:
    """The latest stretches, kept in order too: to sort them for each answer was a tenth of what a call costs here.

    Attributes:
        used: the most calls that were in flight with one of these.
    """

    __slots__ = ("_latest", "_sorted", "used")

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []
        self.used = 0

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, stretch: float, in_flight: int, most: float) -> None:
        """One more; of more than `most` the oldest go."""
        while len(self._latest) >= most:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(stretch)
        insort(self._sorted, stretch)
        self.used = max(self.used, in_flight)

    def median(self) -> float:
        """Their median; there must be one."""
        half = len(self._sorted) // 2
        middle = self._sorted[half]
        return middle if len(self._sorted) % 2 else (self._sorted[half - 1] + middle) / 2

    def clear(self) -> None:
        """Forget them all."""
        self._latest.clear()
        self._sorted.clear()


@dataclass(frozen=True, slots=True)
class _Before:
    """What was before the limit was lowered."""

    limit: float
    used: int
    stretch: float


class SlowdownExperiment:
    """Tells a slow-down that our load causes from one that it does not.

    A call's stretch is its time over the time expected for its output tokens. If a provider shares its capacity among
    all that is in flight, fewer calls go faster in proportion; if it is slow for another reason, they do not.

    What is expected may have been learned while our own load slowed the calls: under a flood there is no other time.
    So where fewer calls in flight than then go faster, the limit goes on down until they do not. Too few cost more
    than too many there, so the calls have to be faster by most of what is to be expected.

    Attributes:
        stage: where it stands.
        level: the limit that the latest finding asks for.
    """

    def __init__(self) -> None:
        self.stage = ExperimentStage.WATCHING
        self.target_limit = 0.0
        self._norm = 1.0  # the stretch that is held to be nobody's fault; 1 unless a trial said otherwise
        self._stretches = _Window()
        self._before = _Before(0.0, 0, 0.0)
        self._began = 0.0  # of the stage, in the clock's seconds
        self._pause = _FIRST_PAUSE
        self._again_at = math.inf
        self._taught = math.inf  # in flight when stretches were first known; of fewer the norm says nothing
        self._passed = False  # the slow-down passed in the latest trial, as it seemed: not believed twice in a row
        self._ours = False  # this trial has found that calls got faster once

    @property
    def calls_are_fast(self) -> bool:
        """Calls are not slow, as far as is known."""
        return not self._stretches or self._stretches.median() <= _BRISK * self._norm

    def observe(
        self, now: float, level: float, in_flight: int, slowdown: float | None, *, proven: bool
    ) -> ExperimentResult | None:
        """One more success; what follows from it.

        Args:
            now: in the clock's seconds.
            level: the limit.
            in_flight: calls when it began or when it ended, whichever was more.
            stretch: of the call; None if not known.
            held: this level has held against a provider that refuses what is too much. If calls are slow there it is
                hardly through us, and is waited for to pass.
        """
        if slowdown is not None:
            self._stretches.add(slowdown, in_flight, min(_MOST, max(2 * _LEAST, level)))
            self._taught = in_flight if self._taught == math.inf else self._taught
        elif self.stage is ExperimentStage.LOWERED and self._ours:
            return self._untaught(level)
        if len(self._stretches) < min(_MOST, max(_LEAST, level / 2)):
            late = self.stage is not ExperimentStage.WATCHING and now - self._began > _PATIENCE
            return self._give_up(now, level) if late else None
        middle = self._stretches.median()
        self._norm = max(1.0, min(self._norm, middle))
        judge = self._judge if self.stage is ExperimentStage.LOWERED else self._watch
        return judge(now, level, middle, held=proven)

    def clear_samples(self) -> None:
        """A new epoch: stretches of the old one say nothing about it."""
        self._stretches = _Window()

    def abort(self) -> None:
        """A refusal speaks louder."""
        self.stage = ExperimentStage.WATCHING

    def _watch(self, now: float, level: float, middle: float, *, held: bool) -> ExperimentResult | None:
        again = self._norm > _BRISK and middle > _SLOW and now >= self._again_at
        slow = (middle > _SLOW * self._norm or again) and self._stretches.used >= max(2.0, _USED * int(level))
        if self.stage is ExperimentStage.WATCHING:
            return self._enter(ExperimentStage.CONFIRMING, now, ExperimentResult.STOP_GROWTH) if slow else None
        if not slow:
            self.stage = ExperimentStage.WATCHING
            return ExperimentResult.FALSE_ALARM
        if held and now - self._began < _PASSES:
            self._stretches.clear()
            return None
        self._ours = False
        return self._lower(now, level, middle, 1.0 if again else self._norm, held=held)

    def _lower(self, now: float, level: float, middle: float, norm: float, *, held: bool) -> ExperimentResult:
        """Go down to where calls would be brisk if it is our load; not as far where that is in doubt."""
        used = self._stretches.used
        share = max(_STEP if held else _LOWEST, min(1.0, _BRISK * norm / middle))
        share = _STEP if self._doubtful(middle) else share
        self._before = _Before(level, used, middle)
        self.target_limit = max(1.0, min(round(share * min(level, used)), used - 1.0))
        return self._enter(ExperimentStage.LOWERED, now, ExperimentResult.LOWER)

    def _doubtful(self, middle: float) -> bool:
        """Whether the norm may have been learned under our own load: is the stretch nearer to what that would make?"""
        used = self._stretches.used
        return used <= self._taught or middle > (1 + used / self._taught) / 2

    def _judge(self, now: float, level: float, middle: float, *, held: bool) -> ExperimentResult:
        """Had it been our load alone, the stretch would have fallen with the calls: was it nearer to that?"""
        before, used = self._before, self._stretches.used
        share = used / before.used
        self.stage = ExperimentStage.WATCHING
        self._passed = held and not self._passed and middle < _UNEXPLAINED * share * before.stretch
        if self._passed:
            self.target_limit = before.limit
            return ExperimentResult.RESTORE
        most = (1 + share) / 2 if used > self._taught else (1 + 3 * share) / 4
        if middle > before.stretch * most:
            self._taught = min(self._taught, used)
            return self._keep(before.limit, 1.0) if self._ours else self._vain(now, middle)
        self._ours = True
        self._pause = _FIRST_PAUSE
        if used > 1 and (middle > _SLOW or self._doubtful(middle)):
            return self._lower(now, level, middle, 1.0, held=held)
        return self._keep(level, 1.0 if middle <= _SLOW else self._norm)

    def _untaught(self, level: float) -> ExperimentResult:
        """What was expected has been given up, since calls got so much faster: that ends the way down."""
        self._taught = math.inf
        self.stage = ExperimentStage.WATCHING
        return self._keep(self._before.limit if self._before.stretch <= _FAST else level, 1.0)

    def _keep(self, level: float, norm: float) -> ExperimentResult:
        self.target_limit, self._norm = level, norm
        return ExperimentResult.KEEP

    def _vain(self, now: float, middle: float) -> ExperimentResult:
        self.target_limit = self._before.limit
        self._norm = max(1.0, middle)
        self._again_at = now + self._pause
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        return ExperimentResult.RESTORE

    def _give_up(self, now: float, level: float) -> ExperimentResult:
        if self.stage is ExperimentStage.CONFIRMING:
            self._before = _Before(level, 0, self._norm)
        self.stage = ExperimentStage.WATCHING
        return self._vain(now, self._norm)

    def _enter(self, stage: ExperimentStage, now: float, finding: ExperimentResult) -> ExperimentResult:
        self.stage, self._began = stage, now
        return finding
