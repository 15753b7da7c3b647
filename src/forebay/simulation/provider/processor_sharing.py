"""Processor sharing: how fast each call in flight proceeds, and when one of them reaches its next mark.

All calls in flight proceed at one common speed. So one number, the work given to *each* call since the provider was
last idle, describes the progress of all of them: a call that started when it was w and needs s seconds at full speed is
done when it is w + s. Marks are kept in one heap ordered by that number, independent of later changes of the speed, and
each event costs the logarithm of the number of calls in flight.

Source: the virtual time of fair queueing; A. Demers, S. Keshav and S. Shenker, "Analysis and Simulation of a Fair
Queueing Algorithm", 1989.
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

_MIN_MARKS: Final = 64  # fewer marks are never discarded


@dataclass(frozen=True, slots=True)
class CapacityPhase:
    """A period of constant capacity from second `at`: `slots` slots, each at `speed` (1 is normal)."""

    at: float
    slots: int
    speed: float
    cut: bool = False


def capacity_phases(
    slots: int, steps: tuple[CapacityStep, ...], slowdowns: tuple[Slowdown, ...]
) -> list[CapacityPhase]:
    """Return the schedule of capacity as phases in order of time, the first at 0; overlapping slowdowns multiply."""
    times = {0.0, *(step.at for step in steps), *(s.at for s in slowdowns), *(s.at + s.seconds for s in slowdowns)}
    phases = []
    for at in sorted(times):
        past = [step for step in steps if step.at <= at]
        factors = (slow.factor for slow in slowdowns if slow.at <= at < slow.at + slow.seconds)
        cut = bool(past) and past[-1].at == at and past[-1].cut
        phases.append(CapacityPhase(at, past[-1].slots if past else slots, 1.0 / math.prod(factors), cut))
    return phases


class ProcessorSharing(Generic[T]):
    """A set of marks, each reached when every call in flight has been given enough work.

    The owner sets `slots`, `speed` and `population`, the number of calls that share the capacity. A mark that nobody
    needs any more stays in the heap and is reported like any other, unless `discard_unwanted` removes it.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.speed = 1.0
        self.population = 0
        self.work = 0.0  # seconds at full speed given to each call
        self.busy_slot_seconds = 0.0  # the same, summed over the calls
        self._at = 0.0
        self._marks: list[tuple[float, int, T]] = []
        self._sequence = itertools.count()

    @property
    def rate(self) -> float:
        """The seconds at full speed that each call is given in one second."""
        if self.population <= self.slots:
            return self.speed
        return self.speed * self.slots / self.population

    def mark(self, work: float, item: T) -> None:
        """Report `item` once `work` is reached; items of the same moment in the order in which they were marked."""
        heapq.heappush(self._marks, (work, next(self._sequence), item))

    def next_at(self) -> float:
        """Return when the next mark is reached if nothing changes; infinity for never. It is never in the past."""
        if not self._marks:
            return math.inf
        missing = self._marks[0][0] - self.work
        if missing <= 0:
            return self._at
        return self._at + missing / self.rate if self.rate > 0 else math.inf

    def advance_to(self, now: float) -> None:
        """Give every call the work of the time until `now`, which must not be after `next_at()`."""
        if self.population:
            given = (now - self._at) * self.rate
            self.work += given
            self.busy_slot_seconds += given * self.population
        self._at = now

    def pop(self) -> T:
        """Advance to the next mark, and remove and return it."""
        self.advance_to(self.next_at())
        work, _, item = heapq.heappop(self._marks)
        self.work = max(self.work, work)  # exactly: rounding must not leave a mark just out of reach
        return item

    def discard_unwanted(self, wanted: Callable[[T], bool]) -> None:
        """Remove the marks that are not `wanted`, once they must be the majority (each call in flight has one mark)."""
        if len(self._marks) > 2 * self.population + _MIN_MARKS:
            self._marks = [mark for mark in self._marks if wanted(mark[2])]
            heapq.heapify(self._marks)

    def reset(self) -> None:
        """Drop every mark and count from 0 again, where numbers are most precise; only while nothing is in flight."""
        self._marks.clear()
        self.work = 0.0
