"""A pool: everything of one task type, that is its workers, its line, its pace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from forebay.admission import BookedSeats, LetThrough, Line, ServiceTimes
from forebay.overflow import Pacing
from forebay.supervisor.router import Router
from forebay.supervisor.worker import WorkerAgent
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.supervisor.ticket import Ticket
    from forebay.typing import Source

DEFAULT_LINE = 100
_CALLS_GAIN = 0.1  # weight of the newest run in how often runs call
_POOL_FLOOR = 20  # dequeues of a shared worker after which a pool that was passed over is served


class Pool:
    """The workers and the line of one task type, and what is known of its pace. Pure: it is told, and answers."""

    __slots__ = (
        "arriving", "calls", "door", "held", "holding", "line", "max_queue_size", "nested", "pacing", "parked",
        "passed", "paths", "reserved", "resource", "router", "running", "seats", "slots", "task_type", "times",
        "workers",
    )  # fmt: skip

    def __init__(self, task_type: str, max_queue_size: int | None) -> None:
        self.task_type = task_type
        self.resource = f"pool:{task_type}"
        self.max_queue_size = max_queue_size
        self.workers: list[WorkerAgent] = []
        self.nested: list[WorkerAgent] = []  # those whose handler is a supervisor with a load of its own
        self.paths: dict[tuple[Source, ...], int] = {}  # how many workers draw on the same; empty if none draws on any
        self.calls: dict[Source, float] = {}  # how often a run calls each of what it draws on
        self.line: Line[Ticket] = Line()
        self.parked = 0  # waiting behind another task of their thread: they take room in the line, but not a turn yet
        self.passed = 0  # times that a shared worker served another pool while someone waited here
        self.reserved = 0  # seats kept for rows that are being leased from the overflow
        self.running = 0  # slots taken on workers that are not FAILED
        self.slots = 0  # slots of workers that are not FAILED
        self.held: dict[WorkerAgent, None] = {}  # workers that the start gate keeps from using all their slots
        self.arriving = dict.fromkeys(Priority, 0)  # rows on their way out to the overflow, by rung
        self.holding = dict.fromkeys(Priority, 0)  # rows of this type that wait in the overflow, by rung
        self.pacing = Pacing()
        self.times = ServiceTimes()
        self.seats = BookedSeats()
        self.door = LetThrough()
        self.router = Router(task_type, lambda: self.times.median() or 1.0)

    @property
    def bound(self) -> int:
        """How many may wait: `max_queue_size`; if that was not given 100, or the slots if they are more."""
        return self.max_queue_size if self.max_queue_size is not None else max(DEFAULT_LINE, self.usable)

    @property
    def usable(self) -> int:
        """Slots that are of use now: what a run would draw on may bear no more of them."""
        idle = sum(worker.slots - worker.current_tasks for worker in self.held if worker.slots)
        return self.slots - max(0, idle)

    @property
    def waiting(self) -> int:
        """Tasks in the line, parked behind their thread, or on their way in from the overflow."""
        return len(self.line) + self.parked + self.reserved

    @property
    def contested(self) -> bool:
        """Whether somebody waits, inside or outside."""
        return self.line.length > 0 or any(self.holding.values())

    def load(self) -> float:
        """What the pool holds against what it may hold, waiting room included; 1.0 without a slot."""
        if not self.slots:
            return 1.0
        waiting = self.line.length + self.parked + self.reserved
        bound, slots = self.max_queue_size, self.usable if self.held else self.slots
        return (self.running + waiting) / (slots + (max(DEFAULT_LINE, slots) if bound is None else bound))

    def held_outside(self, rung: Priority) -> int:
        """Rows of `rung` or better that wait in the overflow: nothing of that rung may overtake them."""
        return sum(self.holding[better] + self.arriving[better] for better in Priority if better <= rung)

    def reckon(self) -> None:
        """Sort the workers by what they draw on."""
        paths: dict[tuple[Source, ...], int] = {}
        for worker in self.workers:
            path = tuple(worker.sources)
            paths[path] = paths.get(path, 0) + 1
        self.paths = paths if any(paths) else {}

    def expected_wait(self, rung: Priority, *, outside: bool = False) -> float | None:
        """Seconds until a newcomer of `rung` would start; None if unknown. `outside`: behind the overflow."""
        ahead = self.line.ahead(rung) + self.parked + (self.held_outside(rung) if outside else 0)
        if not ahead and self.running < self.slots:
            return 0.0
        rate = self.times.drain_rate(self.usable)
        return None if rate is None else ahead / rate if rate else math.inf

    def hopeless(self, now: float, wait: float, remaining: float, *, time: float | None = None) -> bool:
        """Whether a task that waits `wait` seconds comes too late to end within `remaining`, as far as one may say so.

        If nearly any task would fit into what is left after the wait it is judged kindly, by what the fastest quarter
        took. `time`: that it had in all, if others wait who have more than remains: then it has to be likely.
        """
        times = self.times
        service = times.optimistic() if time is None else times.needed(time)
        if wait > times.bearable(remaining):
            service = remaining
        return bool(service) and self.door.hopeless(now, needed=wait + service, remaining=remaining)

    def book_seat(self, now: float, chance: float, *, room: tuple[float, float]) -> float | None:
        """Seconds after which someone who is refused now would find a seat, or None if unknown.

        Args:
            now: the present.
            chance: a draw from [0, 1).
            room: when what a worker draws on has some, and how far apart runs fit in then: see `Pressure.room`. Runs
                that ended before it began to bind say nothing of that.
        """
        early, each = room
        rate = self.times.drain_rate(self.usable)
        if early == math.inf or (early and not each):
            return None if early == math.inf else early
        if each:
            rate = min(1 / each, rate or math.inf)
        seat = self.seats.book(now + early, rate, chance)
        return None if seat is None else early + seat

    def ended(self, seconds: float, calls: dict[Source, int] | None, *, success: bool) -> None:
        """A run has ended after so many seconds, and has called what it draws on so often."""
        self.times.ended(seconds, success=success)
        if calls is not None and success:
            for source, count in calls.items():
                mean = self.calls.get(source, float(count))
                self.calls[source] = mean + _CALLS_GAIN * (count - mean)


def next_pool(worker: WorkerAgent) -> Pool | None:
    """The pool whose head goes first: by priority, rank and turn; one that was passed over too often goes before."""
    if len(worker.pools) == 1:
        pool = worker.pools[0]
        return pool if pool.line.length else None
    waiting = [pool for pool in worker.pools if pool.line]
    if not waiting:
        return None
    chosen = min(waiting, key=_urgency)
    for pool in waiting:
        pool.passed = 0 if pool is chosen else pool.passed + 1
    return chosen


def _urgency(pool: Pool) -> tuple[int, Any, int]:
    place = pool.line.head()
    assert place is not None  # noqa: S101 - only asked of lines in which someone waits
    rank, turn, _, rung = place
    return (-1 if pool.passed >= _POOL_FLOOR else rung), rank, turn
