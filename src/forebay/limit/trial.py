"""A trial in a slow-down: is it our load? Lower the limit and see whether the calls get faster."""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections import deque
from enum import Enum
from typing import Final

_SLOW: Final = 1.5  # stretch over the norm from which calls are slow
_BRISK: Final = 1.2  # stretch over the norm up to which more may be tried
_LEAST, _MOST = 8, 64  # answers that one median is taken of: half the limit, between these
_LOWEST: Final = 0.5  # a trial lowers the limit to half of it at most
_FIRST_PAUSE: Final = 30.0  # seconds from a trial in vain to the next
_LONGEST_PAUSE: Final = 240.0  # seconds; each trial in vain doubles the pause up to this
_PATIENCE: Final = 120.0  # seconds after which a stage that got no stretches is given up


class Stage(Enum):
    """Where a trial stands."""

    WATCHING = "watching"  # no trial
    STANDING = "standing"  # calls are slow: keep still for one median, to be sure
    LOWERED = "lowered"  # with fewer in flight: do they get faster?


class Finding(Enum):
    """What the limit has to do; the first four begin a new epoch."""

    STAND = "stand"  # calls are slow: grow no further for now
    LOWER = "lower"  # go down to `Trial.level`
    UNDO = "undo"  # the slow-down was not ours: back to `Trial.level`
    KEEP = "keep"  # it was ours: what we went down to is the ceiling
    CALM = "calm"  # a false alarm


class _Window:
    """The latest stretches, kept in order too: to sort them for each answer was a tenth of what a call costs here."""

    __slots__ = ("_latest", "_sorted")

    def __init__(self) -> None:
        self._latest: deque[float] = deque()
        self._sorted: list[float] = []

    def __len__(self) -> int:
        return len(self._sorted)

    def add(self, stretch: float) -> None:
        """One more; the oldest goes when there are too many."""
        if len(self._latest) == _MOST:
            del self._sorted[bisect_left(self._sorted, self._latest.popleft())]
        self._latest.append(stretch)
        insort(self._sorted, stretch)

    def median(self) -> float:
        """Their median; there must be one."""
        half = len(self._sorted) // 2
        middle = self._sorted[half]
        return middle if len(self._sorted) % 2 else (self._sorted[half - 1] + middle) / 2

    def clear(self) -> None:
        """Forget them all."""
        self._latest.clear()
        self._sorted.clear()


class Trial:
    """Tells a slow-down that our load causes from one that it does not.

    A call's stretch is its time over the time expected for its output tokens. If a provider shares its capacity among
    all that is in flight, fewer calls go faster in proportion; if it is slow for another reason, they do not.

    Attributes:
        stage: where it stands.
        level: the limit that the latest finding asks for.
    """

    def __init__(self) -> None:
        self.stage = Stage.WATCHING
        self.level = 0.0
        self._norm = 1.0  # the stretch that is held to be nobody's fault; 1 unless a trial said otherwise
        self._stretches = _Window()
        self._before = (0.0, 0.0)  # the limit and the median before it was lowered
        self._began = 0.0  # of the stage, in the clock's seconds
        self._pause = _FIRST_PAUSE
        self._again_at = math.inf

    @property
    def brisk(self) -> bool:
        """Calls are not slow, as far as is known."""
        return not self._stretches or self._stretches.median() <= _BRISK * self._norm

    def feel(self, now: float, level: float, stretch: float | None) -> Finding | None:
        """One more success under the limit `level`; what follows from it."""
        if stretch is not None:
            self._stretches.add(stretch)
        if len(self._stretches) < min(_MOST, max(_LEAST, level / 2)):
            late = self.stage is not Stage.WATCHING and now - self._began > _PATIENCE
            return self._give_up(now, level) if late else None
        middle = self._stretches.median()
        self._norm = max(1.0, min(self._norm, middle))
        if self.stage is Stage.LOWERED:
            return self._judge(now, level, middle)
        again = self._norm > _BRISK and middle > _SLOW and now >= self._again_at
        slow = middle > _SLOW * self._norm or again
        if self.stage is Stage.WATCHING:
            return self._enter(Stage.STANDING, now, Finding.STAND) if slow else None
        if not slow:
            self.stage = Stage.WATCHING
            return Finding.CALM
        self._before = (level, middle)
        self.level = level * max(_LOWEST, min(1.0, _BRISK * (1.0 if again else self._norm) / middle))
        return self._enter(Stage.LOWERED, now, Finding.LOWER)

    def forget(self) -> None:
        """A new epoch: stretches of the old one say nothing about it."""
        self._stretches.clear()

    def abort(self) -> None:
        """A refusal speaks louder."""
        self.stage = Stage.WATCHING

    def _judge(self, now: float, level: float, middle: float) -> Finding:
        """Had it been our load alone, the stretch would have fallen with the limit: was it nearer to that?"""
        limit, stretch = self._before
        self.stage = Stage.WATCHING
        if middle > stretch * (1 + level / limit) / 2:
            return self._vain(now, middle)
        self._pause = _FIRST_PAUSE
        if middle <= _SLOW:
            self._norm = 1.0
        self.level = level
        return Finding.KEEP

    def _vain(self, now: float, middle: float) -> Finding:
        self.level = self._before[0]
        self._norm = max(1.0, middle)
        self._again_at = now + self._pause
        self._pause = min(_LONGEST_PAUSE, 2 * self._pause)
        return Finding.UNDO

    def _give_up(self, now: float, level: float) -> Finding:
        if self.stage is Stage.STANDING:
            self._before = (level, self._norm)
        self.stage = Stage.WATCHING
        return self._vain(now, self._norm)

    def _enter(self, stage: Stage, now: float, finding: Finding) -> Finding:
        self.stage, self._began = stage, now
        return finding
