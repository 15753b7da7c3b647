"""A pool: everything of one task type, that is its workers, its line, its pace."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from forebay.admission import EstimateBypass, PriorityQueue, RetryAfterSchedule, ServiceTimes
from forebay.overflow import RefillPolicy
from forebay.supervisor.worker import WorkerAgent
from forebay.supervisor.worker_selection import WorkerSelector
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.interfaces import LoadSource
    from forebay.supervisor.ticket import Ticket

DEFAULT_QUEUE_SIZE = 100
_CALLS_GAIN = 0.1  # weight of the newest run in how often runs call
_MAX_PASSED_OVER = 20  # dequeues of a shared worker after which a pool that was passed over is served


class Pool:
    """The workers and the line of one task type, and what is known of its pace. Pure: it is told, and answers."""

    __slots__ = (
        "blocked_workers",
        "calls_per_run",
        "estimate_bypass",
        "max_queue_size",
        "nested_supervisors",
        "parked",
        "queue",
        "refill_pacing",
        "reserved",
        "resource",
        "retry_schedule",
        "running",
        "selector",
        "service_times",
        "slots",
        "source_paths",
        "spilled",
        "spilling",
        "task_type",
        "times_passed_over",
        "workers",
    )  # fmt: skip

    def __init__(self, task_type: str, max_queue_size: int | None) -> None:
        self.task_type = task_type
        self.resource = f"pool:{task_type}"
        self.max_queue_size = max_queue_size
        self.workers: list[WorkerAgent] = []
        self.nested_supervisors: list[WorkerAgent] = []  # those whose handler is a supervisor with a load of its own
        self.source_paths: dict[
            tuple[LoadSource, ...], int
        ] = {}  # how many workers draw on the same; empty if none draws on any
        self.calls_per_run: dict[LoadSource, float] = {}  # how often a run calls each of what it draws on
        self.queue: PriorityQueue[Ticket] = PriorityQueue()
        self.parked = 0  # waiting behind another task of their thread: they take room in the line, but not a turn yet
        self.times_passed_over = 0  # times that a shared worker served another pool while someone waited here
        self.reserved = 0  # seats kept for rows that are being leased from the overflow
        self.running = 0  # slots taken on workers that are not FAILED
        self.slots = 0  # slots of workers that are not FAILED
        self.blocked_workers: dict[
            WorkerAgent, None
        ] = {}  # workers that the start gate keeps from using all their slots
        self.spilling = dict.fromkeys(Priority, 0)  # rows on their way out to the overflow, by rung
        self.spilled = dict.fromkeys(Priority, 0)  # rows of this type that wait in the overflow, by rung
        self.refill_pacing = RefillPolicy()
        self.service_times = ServiceTimes()
        self.retry_schedule = RetryAfterSchedule()
        self.estimate_bypass = EstimateBypass()
        self.selector = WorkerSelector(task_type, lambda: self.service_times.median() or 1.0)

    @property
    def queue_bound(self) -> int:
        """How many may wait: `max_queue_size`; if that was not given 100, or the slots if they are more."""
        return self.max_queue_size if self.max_queue_size is not None else max(DEFAULT_QUEUE_SIZE, self.usable_slots)

    @property
    def usable_slots(self) -> int:
        """Slots that are of use now: what a run would draw on may bear no more of them."""
        idle = sum(worker.slots - worker.current_tasks for worker in self.blocked_workers if worker.slots)
        return self.slots - max(0, idle)

    @property
    def waiting(self) -> int:
        """Tasks in the line, parked behind their thread, or on their way in from the overflow."""
        return len(self.queue) + self.parked + self.reserved

    @property
    def has_waiting(self) -> bool:
        """Whether somebody waits, inside or outside."""
        return self.queue.length > 0 or any(self.spilled.values())

    def load(self) -> float:
        """What the pool holds against what it may hold, waiting room included; 1.0 without a slot."""
        if not self.slots:
            return 1.0
        waiting = self.queue.length + self.parked + self.reserved
        bound, slots = self.max_queue_size, self.usable_slots if self.blocked_workers else self.slots
        return (self.running + waiting) / (slots + (max(DEFAULT_QUEUE_SIZE, slots) if bound is None else bound))

    def spilled_ahead(self, priority: Priority) -> int:
        """Rows of `rung` or better that wait in the overflow: nothing of that rung may overtake them."""
        return sum(self.spilled[better] + self.spilling[better] for better in Priority if better <= priority)

    def update_source_paths(self) -> None:
        """Sort the workers by what they draw on."""
        paths: dict[tuple[LoadSource, ...], int] = {}
        for worker in self.workers:
            path = tuple(worker.sources)
            paths[path] = paths.get(path, 0) + 1
        self.source_paths = paths if any(paths) else {}

    def expected_wait(self, priority: Priority, *, spilled: bool = False) -> float | None:
        """Seconds until a newcomer of `rung` would start; None if unknown. `outside`: behind the overflow."""
        ahead = self.queue.ahead(priority) + self.parked + (self.spilled_ahead(priority) if spilled else 0)
        if not ahead and self.running < self.slots:
            return 0.0
        rate = self.service_times.drain_rate(self.usable_slots)
        return None if rate is None else ahead / rate if rate else math.inf

    def cannot_meet_deadline(self, now: float, wait: float, remaining: float, *, time: float | None = None) -> bool:
        """Whether a task that waits `wait` seconds comes too late to end within `remaining`, as far as one may say so.

        If nearly any task would fit into what is left after the wait it is judged kindly, by what the fastest quarter
        took. `time`: that it had in all, if others wait who have more than remains: then it has to be likely.
        """
        times = self.service_times
        service = times.optimistic() if time is None else times.required_time(time)
        if wait > times.max_wait(remaining):
            service = remaining
        return bool(service) and self.estimate_bypass.should_reject(now, needed=wait + service, remaining=remaining)

    def next_retry_slot(self, now: float, draw: float, *, source_wait: tuple[float, float]) -> float | None:
        """Seconds after which someone who is refused now would find a seat, or None if unknown.

        Args:
            now: the present.
            chance: a draw from [0, 1).
            room: when what a worker draws on has some, and how far apart runs fit in then: see `SystemLoad.time_until_below`. Runs
                that ended before it began to bind say nothing of that.
        """
        early, each = source_wait
        rate = self.service_times.drain_rate(self.usable_slots)
        if early == math.inf or (early and not each):
            return None if early == math.inf else early
        if each:
            rate = min(1 / each, rate or math.inf)
        seat = self.retry_schedule.reserve(now + early, rate, draw)
        return None if seat is None else early + seat

    def record_run(self, seconds: float, calls: dict[LoadSource, int] | None, *, success: bool) -> None:
        """A run has ended after so many seconds, and has called what it draws on so often."""
        self.service_times.record(seconds, success=success)
        if calls is not None and success:
            for source, count in calls.items():
                mean = self.calls_per_run.get(source, float(count))
                self.calls_per_run[source] = mean + _CALLS_GAIN * (count - mean)


def next_pool(worker: WorkerAgent) -> Pool | None:
    """The pool whose head goes first: by priority, rank and turn; one that was passed over too often goes before."""
    if len(worker.pools) == 1:
        pool = worker.pools[0]
        return pool if pool.queue.length else None
    waiting = [pool for pool in worker.pools if pool.queue]
    if not waiting:
        return None
    chosen = min(waiting, key=_urgency)
    for pool in waiting:
        pool.times_passed_over = 0 if pool is chosen else pool.times_passed_over + 1
    return chosen


def _urgency(pool: Pool) -> tuple[int, Any, int]:
    place = pool.queue.head()
    assert place is not None  # noqa: S101 - only asked of lines in which someone waits
    rank, turn, _, rung = place
    return (-1 if pool.times_passed_over >= _MAX_PASSED_OVER else rung), rank, turn
