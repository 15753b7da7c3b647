"""Processor sharing: how fast each call in flight proceeds, and when one of them reaches a mark.

All calls in flight proceed at one common speed, so one number, the work done *by each* since the clock was last idle,
tells the progress of all of them: a call that joined when it stood at w and needs s seconds of full speed is through
when it stands at w + s. Marks wait in one heap ordered by that number, whatever happens to the speed meanwhile, and
each event costs the logarithm of the calls in flight. (The virtual time of fair queueing: A. Demers, S. Keshav and
S. Shenker, "Analysis and Simulation of a Fair Queueing Algorithm", 1989.)
"""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from forebay.simulation.provider.provider_config import CapacityStep, Slowdown

T = TypeVar("T")

_FEW: Final = 64  # marks that are not worth a sweep


@dataclass(frozen=True, slots=True)
class CapacityPhase:
    """From second `at` until the next phase: `slots` slots, each at `speed` (1 is normal)."""

    at: float
    slots: int
    speed: float
    cut: bool = False


def capacity_phases(slots: int, steps: tuple[CapacityStep, ...], slow: tuple[Slowdown, ...]) -> list[CapacityPhase]:
    """The schedule of capacity as phases in order of time, the first at 0; overlapping slow spells multiply."""
    times = {0.0, *(step.at for step in steps), *(s.at for s in slow), *(s.at + s.seconds for s in slow)}
    schedule = []
    for at in sorted(times):
        past = [step for step in steps if step.at <= at]
        factors = (spell.factor for spell in slow if spell.at <= at < spell.at + spell.seconds)
        cut = bool(past) and past[-1].at == at and past[-1].cut
        schedule.append(CapacityPhase(at, past[-1].slots if past else slots, 1.0 / math.prod(factors), cut))
    return schedule


class ProcessorSharing(Generic[T]):
    """A set of marks, each reached when every call in flight has been given enough work.

    `population` is how many calls share; the owner keeps it. A mark whose owner has lost interest stays where it is
    and is reported like any other, unless it is swept away.
    """

    def __init__(self, slots: int, speed: float = 1.0) -> None:
        self.slots = slots
        self.speed = speed
        self.population = 0
        self.work = 0.0  # seconds of full speed given to each call
        self.busy_slot_seconds = 0.0  # the same, summed over the calls: slot-seconds
        self._at = 0.0
        self._marks: list[tuple[float, int, T]] = []
        self._order = itertools.count()

    @property
    def rate(self) -> float:
        """Seconds of full speed that each call is given in a second."""
        if self.population <= self.slots:
            return self.speed
        return self.speed * self.slots / self.population

    def mark(self, work: float, item: T) -> None:
        """Report `item` once `work` stands there; items of one moment in the order in which they were marked."""
        heapq.heappush(self._marks, (work, next(self._order), item))

    def next_at(self) -> float:
        """When the next mark is reached if nothing changes; infinity for never. Not before the present."""
        if not self._marks:
            return math.inf
        missing = self._marks[0][0] - self.work
        if missing <= 0:
            return self._at
        return self._at + missing / self.rate if self.rate > 0 else math.inf

    def advance_to(self, now: float) -> None:
        """Give everyone the work of the time until `now`, which is not after `next_at()`."""
        if self.population:
            given = (now - self._at) * self.rate
            self.work += given
            self.busy_slot_seconds += given * self.population
        self._at = now

    def pop(self) -> T:
        """Run to the next mark and take it."""
        self.advance_to(self.next_at())
        work, _, item = heapq.heappop(self._marks)
        self.work = max(self.work, work)  # exactly: rounding must not leave a mark just out of reach
        return item

    def discard_unwanted(self, wanted: Callable[[T], bool]) -> None:
        """Once most marks must be unwanted (each call in flight has one), drop those that are."""
        if len(self._marks) > 2 * self.population + _FEW:
            self._marks = [mark for mark in self._marks if wanted(mark[2])]
            heapq.heapify(self._marks)

    def reset(self) -> None:
        """Nothing is in flight: forget every mark and start counting anew, where numbers are most precise."""
        self._marks.clear()
        self.work = 0.0
