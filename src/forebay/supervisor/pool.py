"""Pools: the workers, the queue and the measured times of each task type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from forebay.admission import RANK_LAST, EstimateBypass, PriorityQueue, RetryAfterSchedule, ServiceTimes
from forebay.overflow import RefillPolicy
from forebay.supervisor.slot_counts import SlotCounts
from forebay.supervisor.worker import WorkerAgent
from forebay.supervisor.worker_selection import WorkerSelector
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.admission import QueueEntry
    from forebay.interfaces import LoadSource
    from forebay.supervisor.ticket import Ticket

DEFAULT_QUEUE_SIZE = 100
POOL_PREFIX = "pool:"  # of the name of a pool as a resource; its task type follows
# The first part of a task's rank in its priority: nested in a run that has not ended, of this supervisor or another.
NESTED, NESTED_ELSEWHERE, NOT_NESTED = 0, 1, RANK_LAST[0]
_CALLS_GAIN = 0.1  # weight of the newest run in the average number of its calls
_MIN_PARKED = 10  # tasks that may wait behind their conversation however many wait behind others


class PoolObserver(Protocol):
    """The `PoolGroup` of workers that serve many pools, as far as a pool needs it."""

    own_slots: int
    own_running: int
    own_suspended: int

    @property
    def own_idle_blocked(self) -> int:
        """The free slots that the start gate keeps free."""

    def head_changed(self, pool: Pool) -> None:
        """Take the head of the queue of `pool` into account, which may be another one."""

    def spilled(self, pool: Pool) -> None:
        """Remember that records of `pool` may wait in the overflow."""


class Pool(SlotCounts):
    """The workers, the queue and the measured times of one task type. Pure: it reads no clock and awaits nothing.

    Its own counts are of workers with few task types; the groups that it has joined count the others.
    """

    __slots__ = (
        "_groups", "_paths", "_timeouts", "calls_per_run", "delayed", "delayed_nested", "estimate_bypass", "finishing",
        "max_queue_size", "max_timeout", "nested", "nested_spilled", "nested_supervisors", "parked", "paused", "queue",
        "refill_policy",
        "reserved", "resource", "retry_schedule", "selector", "service_times", "source_paths", "spilled", "spilling",
        "task_type", "times_passed_over", "workers",
    )  # fmt: skip

    def __init__(self, task_type: str, max_queue_size: int | None) -> None:
        super().__init__()
        self._groups: list[PoolObserver] = []  # of workers that serve many pools
        self.task_type = task_type
        self.resource = POOL_PREFIX + task_type
        self.max_queue_size = max_queue_size
        self._timeouts: dict[float, int] = {}  # how many of its workers have which
        self.max_timeout = 0.0  # the longest of its workers, in seconds
        self.workers: dict[WorkerAgent, None] = {}  # by registration
        self.nested_supervisors: dict[WorkerAgent, None] = {}  # those that are a supervisor with a load of its own
        self.finishing = 0  # workers that are leaving, and on which nested tasks may still run
        self.paused = False  # nothing begins
        self._paths: dict[tuple[LoadSource, ...], int] = {}  # how many workers use the same load sources
        self.source_paths: dict[tuple[LoadSource, ...], int] = {}  # the same; empty if no worker uses any
        self.calls_per_run: dict[LoadSource, float] = {}
        self.queue: PriorityQueue[Ticket] = PriorityQueue()
        self.nested = 0  # nested tasks in the queue, where they have room of their own
        self.nested_spilled: set[str] = set()  # ids of nested tasks that wait in the overflow
        self.parked = 0  # tasks behind another one of their conversation: they take no room in the queue
        self.times_passed_over = 0  # by a shared worker that served another pool while a task waited here
        self.delayed = 0  # tasks that wait for their next attempt; they count as if they were queued
        self.delayed_nested = 0  # nested ones of them
        self.reserved = 0  # room kept for records that are being leased from the overflow
        self.spilling = dict.fromkeys(Priority, 0)  # tasks on their way to the overflow, by priority
        self.spilled = dict.fromkeys(Priority, 0)  # records of this type that wait in the overflow, by priority
        self.refill_policy = RefillPolicy()
        self.service_times = ServiceTimes()
        self.retry_schedule = RetryAfterSchedule()
        self.estimate_bypass = EstimateBypass()
        self.selector = WorkerSelector(task_type, lambda: self.service_times.median() or 1.0)

    # --- room and load ---

    @property
    def slots(self) -> int:
        """The slots of its workers that are not FAILED."""
        return self.own_slots + sum(group.own_slots for group in self._groups) if self._groups else self.own_slots

    @property
    def running(self) -> int:
        """The slots taken on its workers that are not FAILED."""
        return self.own_running + sum(group.own_running for group in self._groups) if self._groups else self.own_running

    @property
    def suspended(self) -> int:
        """The runs on its workers that have lent their slot."""
        if not self._groups:
            return self.own_suspended
        return self.own_suspended + sum(group.own_suspended for group in self._groups)

    @property
    def queue_bound(self) -> int:
        """The number of tasks that may wait: `max_queue_size`; by default 100, or the number of slots if larger."""
        return self.max_queue_size if self.max_queue_size is not None else max(DEFAULT_QUEUE_SIZE, self.usable_slots)

    @property
    def usable_slots(self) -> int:
        """The slots that a run could take now, without those that the start gate keeps free, or all while paused."""
        if self.paused:
            return self.running
        idle = self.own_idle_blocked if self.own_blocked else 0
        return self.slots - idle - sum(group.own_idle_blocked for group in self._groups)

    @property
    def queued(self) -> int:
        """Tasks in the queue, being leased from the overflow, or waiting for their next attempt."""
        return self.queue.length + self.reserved + self.delayed

    @property
    def waiting(self) -> int:
        """The tasks in `queued`, and those parked behind their conversation."""
        return self.queued + self.parked

    def may_park(self, parked: int) -> bool:
        """Return whether one more task may wait behind its conversation, behind which `parked` tasks wait already.

        The tasks that are parked share twice the room of the queue, and a conversation may have as much of it as it
        leaves free: one at most half, two a third each. Whatever the others have, it may have ten tasks (fewer in a
        queue with less room), since no more conversations are inside than tasks run and are queued.

        Source: A. Choudhury and E. Hahne, "Dynamic Queue Length Thresholds for Shared-Memory Packet Switches", 1998.
        """
        bound = self.queue_bound
        return parked < max(min(_MIN_PARKED, bound), 2 * bound - self.parked)

    @property
    def has_waiting(self) -> bool:
        """True if a task waits, in the queue or in the overflow."""
        return self.queue.length > 0 or any(self.spilled.values())

    def load(self, *, nested: bool = False) -> float:
        """Return the tasks inside over the tasks that fit, room in the queue included; 1.0 without a slot.

        While it is paused, a free slot is no room, and a pool without slots has that of its queue.
        A suspended run is inside, in a place of its own. For a `nested` task only nested ones count as waiting: what
        has begun is not to be rejected because of work that has not.
        """
        simple = not (self.own_blocked or self._groups or self.paused)
        bound, slots = self.max_queue_size, self.own_slots if simple else self.usable_slots
        if not slots and not (self.paused or self.slots):
            return 1.0
        room = slots + (max(DEFAULT_QUEUE_SIZE, slots) if bound is None else bound)
        if nested:
            return (self.running + self.nested + self.delayed_nested) / room if room else 1.0
        suspended = self.suspended
        inside = self.running + suspended + self.queue.length + self.reserved + self.delayed
        return inside / (room + suspended) if room else 1.0

    # --- estimates ---

    def expected_wait(self, priority: Priority, *, nested: bool = False, spilled: bool = False) -> float | None:
        """Return the seconds until a new task of `priority` would start, or None if unknown.

        With `spilled`, it would wait behind what is in the overflow, unless it is `nested`.
        """
        if self.paused:
            return None
        ahead = self.queue.ahead(priority) + (self.spilled_ahead(priority) if spilled else 0)
        if nested:
            ahead = self.nested
        if not ahead and self.running < self.slots:
            return 0.0
        rate = self.service_times.drain_rate(self.usable_slots)
        return None if rate is None else ahead / rate if rate else math.inf

    def cannot_meet_deadline(self, now: float, wait: float, remaining: float, *, time: float | None = None) -> bool:
        """Return whether a task that waits `wait` seconds would end too late, by the measured times.

        It is expected to take as long as the fastest quarter did, or longer if `time` is given. If it waits longer than
        `ServiceTimes.max_wait`, it ends too late in any case.

        Args:
            now: loop time, in seconds.
            wait: seconds until it would start.
            remaining: seconds until its deadline.
            time: the seconds from its submission to its deadline, if other tasks wait: they may have more time left, so
                this one must be likely to end in time.
        """
        times = self.service_times
        service = times.optimistic() if time is None else times.required_time(time)
        if wait > times.max_wait(remaining):
            service = remaining
        return bool(service) and self.estimate_bypass.should_reject(now, needed=wait + service, remaining=remaining)

    def next_retry_slot(self, now: float, draw: float, *, source_wait: tuple[float, float]) -> float | None:
        """Reserve the next slot of the retry schedule; return the seconds until then, or None if unknown.

        Args:
            now: loop time, in seconds.
            draw: uniform in [0, 1).
            source_wait: the seconds until the sources of a worker allow another run, and those between two runs from
                then on: see `SystemLoad.time_until_below`. The pool's own rate may be from before they were the limit.
        """
        early, each = source_wait
        if early == math.inf:
            return None
        if early and not each:
            return early
        rate = self.service_times.drain_rate(self.usable_slots)
        if each:
            rate = min(1 / each, rate or math.inf)
        slot = self.retry_schedule.reserve(now + early, rate, draw)
        return None if slot is None else early + slot

    def record_calls(self, calls: Mapping[LoadSource, int]) -> None:
        """Record how often a successful run called each source."""
        for source, count in calls.items():
            mean = self.calls_per_run.get(source, float(count))
            self.calls_per_run[source] = mean + _CALLS_GAIN * (count - mean)

    # --- workers ---

    def add_worker(self, worker: WorkerAgent) -> None:
        """Add a worker. Its slots are added by `count_slots`, here or in a group that the pool joins."""
        self.workers[worker] = None
        self._timeouts[worker.timeout] = self._timeouts.get(worker.timeout, 0) + 1
        self.max_timeout = max(self.max_timeout, worker.timeout)
        self._add_path(self._paths, worker)
        self.source_paths = self._paths if any(self._paths) else {}
        if worker.handler.load is not None:
            self.nested_supervisors[worker] = None

    def remove_worker(self, worker: WorkerAgent) -> None:
        """Remove a worker that has no slots any more, and on which nothing runs."""
        del self.workers[worker]
        self.nested_supervisors.pop(worker, None)
        self.selector.forget(worker)
        self.own_blocked.pop(worker, None)
        self._timeouts[worker.timeout] -= 1
        if not self._timeouts[worker.timeout]:
            del self._timeouts[worker.timeout]
            self.max_timeout = max(self._timeouts, default=0.0)
        path = tuple(worker.sources)
        self._paths[path] -= 1
        if not self._paths[path]:
            del self._paths[path]
        self.source_paths = self._paths if any(self._paths) else {}

    @property
    def is_served(self) -> bool:
        """True if it has a worker that is not leaving."""
        return not all(worker.leaving for worker in self.workers)

    @property
    def is_known(self) -> bool:
        """True if its task type is known: it has a worker, or is to have one again when it is resumed."""
        return bool(self.workers) or self.paused

    def worker_leaves(self) -> None:
        """Count a worker that finishes what runs on it, for which nested tasks may still begin there."""
        self.finishing += 1

    def worker_left(self) -> None:
        """Stop counting a worker on which nothing begins any more."""
        self.finishing -= 1

    def begin_pause(self) -> None:
        """Begin nothing until `end_pause`."""
        self.paused = True
        self._head_changed()

    def end_pause(self) -> None:
        """Let tasks begin again. The workers are to be dispatched to next."""
        self.paused = False
        self._head_changed()

    def leave(self, group: PoolObserver) -> None:
        """Forget a group whose last worker is gone."""
        self._groups.remove(group)

    def join(self, group: PoolObserver) -> None:
        """Have `group` count the slots of its workers, which serve this pool and many others."""
        self._groups.append(group)
        self._head_changed()
        if any(self.spilled.values()):
            group.spilled(self)

    def score_fell(self, worker: WorkerAgent) -> None:
        """Take `worker` into account again, because it is new, finished a task, or can accept tasks again."""
        self.selector.update(worker)

    def update_source_paths(self) -> None:
        """Group the workers by the load sources that they use."""
        paths: dict[tuple[LoadSource, ...], int] = {}
        for worker in self.workers:
            self._add_path(paths, worker)
        self._paths = paths
        self.source_paths = paths if any(paths) else {}

    @staticmethod
    def _add_path(paths: dict[tuple[LoadSource, ...], int], worker: WorkerAgent) -> None:
        path = tuple(worker.sources)
        paths[path] = paths.get(path, 0) + 1

    def pass_over(self, *, served: bool) -> None:
        """Record whether a shared worker served this pool or another one, while a task waited here."""
        self.times_passed_over = 0 if served else self.times_passed_over + 1

    # --- the queue ---

    def enqueue(self, ticket: Ticket, rank: tuple[int, float], sequence: int) -> QueueEntry:
        """Add a ticket to the queue; return its entry. The first part of the rank of a nested one is NESTED."""
        if rank[0] == NESTED:
            self.nested += 1
        entry = self.queue.push(ticket, ticket.task.priority, rank, sequence)
        if self._groups:
            self._head_changed()
        return entry

    def _head_changed(self) -> None:
        for group in self._groups:
            group.head_changed(self)

    def pop(self) -> Ticket:
        """Return the head of the queue, and remove it."""
        ticket = self.queue.pop()
        self._removed(ticket)
        return ticket

    def remove(self, ticket: Ticket, entry: QueueEntry) -> None:
        """Remove a ticket from the queue; do nothing if it was served already."""
        before = self.queue.length
        self.queue.remove(entry)
        if self.queue.length < before:
            self._removed(ticket)

    def _removed(self, ticket: Ticket) -> None:
        if ticket.nested:
            self.nested -= 1
        if self._groups:
            self._head_changed()

    def first_for(self, worker: WorkerAgent) -> QueueEntry | None:
        """Return the first entry that `worker` may begin although it has many open runs, or None."""
        if self.paused:
            return None
        for priority in self.queue.serving_order():
            entry = self.queue.first_of(priority)
            if entry is not None and (entry[0][0] == NESTED or not worker.bars_new_runs(priority)):
                return entry
        return None

    def serve(self, entry: QueueEntry) -> Ticket:
        """Return the ticket of an entry that `first_for` returned, and remove it as served."""
        ticket: Ticket = entry[2]
        self.queue.serve(entry)
        self._removed(ticket)
        return ticket

    # --- tasks that wait outside the queue ---

    def park(self) -> None:
        """Count a task that waits behind another one of its conversation."""
        self.parked += 1

    def unpark(self) -> None:
        """Stop counting a task that waited behind another one of its conversation."""
        self.parked -= 1

    def delay(self, *, nested: bool) -> None:
        """Count a task that waits for its next attempt."""
        self.delayed += 1
        self.delayed_nested += nested

    def stop_delay(self, *, nested: bool) -> None:
        """Stop counting a task that waited for its next attempt."""
        self.delayed -= 1
        self.delayed_nested -= nested

    def reserve(self, room: int) -> None:
        """Keep room for records that are being leased."""
        self.reserved += room

    def unreserve(self, room: int) -> None:
        """Free the room that was kept for records."""
        self.reserved -= room

    def spilled_ahead(self, priority: Priority) -> int:
        """Return how many tasks of `priority` or better wait in the overflow, where no new task may overtake them."""
        return sum(self.spilled[better] + self.spilling[better] for better in Priority if better <= priority)

    def begin_spill(self, priority: Priority) -> None:
        """Count a task that is on its way to the overflow."""
        self.spilling[priority] += 1

    def end_spill(self, priority: Priority) -> None:
        """Stop counting a task as on its way to the overflow."""
        self.spilling[priority] -= 1

    def add_spilled(self, priority: Priority) -> None:
        """Count one more record that waits in the overflow."""
        self.spilled[priority] += 1
        self._spilled()

    def remove_spilled(self, priority: Priority) -> None:
        """Count one record less that waits in the overflow, but not less than none: the count may be out of date."""
        self.spilled[priority] = max(0, self.spilled[priority] - 1)

    def add_nested_spilled(self, task_id: str) -> None:
        """Remember that a nested task waits in the overflow, from where it goes before queued tasks that are not."""
        self.nested_spilled.add(task_id)

    def remove_nested_spilled(self, task_id: str) -> None:
        """Forget a nested task that has left the overflow."""
        self.nested_spilled.discard(task_id)

    def set_spilled(self, priority: Priority, count: int) -> None:
        """Replace the count of records that wait in the overflow by that of the store."""
        self.spilled[priority] = count
        if count:
            self._spilled()

    def _spilled(self) -> None:
        for group in self._groups:
            group.spilled(self)
