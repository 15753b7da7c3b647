"""Pools: the workers, the queue and the measured times of each task type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from forebay.admission import (
    RANK_LAST,
    EstimateBypass,
    EstimatedTimes,
    PriorityQueue,
    ServiceTimes,
    StandingQueue,
    TenantQueue,
    TenantRetrySchedules,
)
from forebay.overflow import RefillPolicy
from forebay.supervisor.cost_selection import CostSelector, compared_cost
from forebay.supervisor.slot_counts import SlotCounts
from forebay.supervisor.spilled_counts import SpilledCounts
from forebay.supervisor.worker import URGENT, WorkerAgent
from forebay.supervisor.worker_selection import WorkerSelector
from forebay.task import Estimate, Priority, Task

if TYPE_CHECKING:
    from forebay.admission import QueueEntry
    from forebay.interfaces import LoadSource
    from forebay.supervisor.tenants import Tenants
    from forebay.supervisor.ticket import Ticket

DEFAULT_QUEUE_SIZE = 100
POOL_PREFIX = "pool:"  # of the name of a pool as a resource; its task type follows
# The first part of a task's rank in its priority: nested in a run that has not ended, of this supervisor or another.
NESTED, NESTED_ELSEWHERE, NOT_NESTED = 0, 1, RANK_LAST[0]
_CALLS_GAIN = 0.1  # weight of the newest run in the average number of its calls
_CROWDED_FOR = 4  # times the mean time between two ends, after a task was not admitted
_MIN_PARKED = 10  # tasks that may wait behind their conversation however many wait behind others


class PoolObserver(Protocol):
    """The `PoolGroup` of workers that serve many pools, as far as a pool needs it."""

    own_slots: int
    own_running: int
    own_suspended: int
    own_reserved: int
    own_reserved_taken: int
    own_blocked: dict[WorkerAgent, None]

    @property
    def own_idle_blocked(self) -> int:
        """The free slots that the start gate keeps free."""

    def head_changed(self, pool: Pool) -> None:
        """Take the head of the queue of `pool` into account, which may be another one."""

    def expect_all(self, pool: Pool) -> None:
        """Have the selector of `pool`, a new one, ask for the score of each worker of the group."""

    def spilled(self, pool: Pool) -> None:
        """Remember that records of `pool` may wait in the overflow."""


class Pool(SlotCounts):
    """The workers, the queue and the measured times of one task type. Pure: it reads no clock and awaits nothing.

    Its own counts are of workers with few task types; the groups that it has joined count the others.
    """

    __slots__ = (
        "_bounded", "_delayed_of", "_given_cost", "_groups", "_not_admitted_at", "_paths", "_returned",
        "_sole_tenant", "_standing", "_tenants", "_timeouts", "_turns", "_watched", "by_cost", "calls_per_run",
        "delayed", "delayed_nested", "estimate_bypass", "estimated_times", "expects_records", "finishing", "held",
        "max_queue_size", "max_timeout", "nested", "nested_spilled", "nested_supervisors", "parked", "paused",
        "queue", "refill_policy", "refused", "reserved", "resource", "retry_schedules", "selector", "service_times",
        "source_paths", "spilled", "takes_turns", "task_type", "times_passed_over", "tracks_costs", "workers",
    )  # fmt: skip

    def __init__(self, task_type: str, max_queue_size: int | None, tenants: Tenants) -> None:
        super().__init__()
        self._tenants = tenants
        self._bounded = tenants.bounded
        self._watched = tenants.bounded  # whether anybody has to know what joins and leaves the queue
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
        # A TenantQueue while tasks of several tenants wait, or a tenant may be blocked: it costs more.
        self.queue: PriorityQueue[Ticket] = PriorityQueue()
        self._turns: TenantQueue[Ticket] | None = None  # `queue`, if it is one
        self.takes_turns = False  # tasks of several tenants wait, here or in the overflow, or a tenant may be blocked
        # The only one whose tasks wait, here or in the overflow, unless it is a TenantQueue.
        self._sole_tenant: str | None = None
        self.spilled = SpilledCounts(tenants.weight)  # what waits in the overflow
        self._returned: list[tuple[Priority, str]] = []  # whose last record has come back, and takes its turn now
        if tenants.bounded:
            self._take_turns()
        self.nested = 0  # nested tasks in the queue, where they have room of their own
        self.nested_spilled: dict[str, str] = {}  # nested tasks that wait in the overflow: the tenant of each by its id
        self.parked = 0  # tasks behind another one of their conversation: they take no room in the queue
        self.times_passed_over = 0  # by a shared worker that served another pool while a task waited here
        self.delayed = 0  # tasks that wait for a time, as for their next attempt; they count as if they were queued
        self.delayed_nested = 0  # nested ones of them
        self._delayed_of: dict[tuple[str, bool], int] = {}  # the same by tenant, and whether they are nested
        self.held = 0  # tasks that wait for a cheaper worker though a slot is free
        self.refused = 0  # tasks that were rejected because its slots are taken
        self.reserved = 0  # room kept for held tasks, and for records that are being leased from the overflow
        self.expects_records = False  # whether a free slot is kept until records have come back from the overflow
        self.refill_policy = RefillPolicy()
        self.service_times = ServiceTimes()
        self.estimated_times: EstimatedTimes | None = None  # of tasks with an estimate, if there have been any
        self._standing: tuple[StandingQueue, ...] = ()  # by priority, once a task with a deadline has waited
        self._not_admitted_at = [-math.inf] * len(Priority)  # loop times, of tasks with enough time, by priority
        self.retry_schedules = TenantRetrySchedules(tenants.weight)
        self.estimate_bypass = EstimateBypass()
        self.selector: WorkerSelector | CostSelector = WorkerSelector(
            task_type, lambda: self.service_times.median() or 1.0
        )
        self.by_cost: CostSelector | None = None  # `selector`, once the costs of two workers differ
        self.tracks_costs = False  # a worker has learned a cost, or costs differ
        self._given_cost: float | None = None  # that of the first worker; all have the same unless they differ

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

    def reserved_slots(self, priority: Priority) -> tuple[int, int]:
        """Return how many slots tasks of `priority` may not take, and how many of these count as taken."""
        if priority <= URGENT:
            return 0, 0
        if not self._groups:
            return self.own_reserved, self.own_reserved_taken
        reserved = self.own_reserved + sum(group.own_reserved for group in self._groups)
        return reserved, self.own_reserved_taken + sum(group.own_reserved_taken for group in self._groups)

    def free_slots(self, priority: Priority) -> int:
        """Return how many slots a task of `priority` could take now; negative if more are taken than there are."""
        reserved, taken = self.reserved_slots(priority)
        return self.usable_slots - reserved - (self.running - taken)

    def ever_serves(self, priority: Priority) -> bool:
        """Return whether a task of `priority` may take a slot of some worker, FAILED or not."""
        return priority <= URGENT or any(worker.reserve < worker.max_concurrent for worker in self.workers)

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
        """Tasks in the queue, being leased from the overflow, or waiting here for a time."""
        return self.queue.length + self.reserved + self.delayed

    def waiting_by_tenant(self) -> Mapping[str, int]:
        """Return how many tasks of the queue wait for a slot, by tenant; all as those of one unless it matters."""
        if self.paused:
            return {}
        return {"": self.queue.length} if self._turns is None else self._turns.lengths_by_tenant()

    def held_back_workers(self) -> list[WorkerAgent]:
        """Return the workers with a free slot on which the start gate lets nothing begin."""
        blocked = [*self.own_blocked, *(worker for group in self._groups for worker in group.own_blocked)]
        return [worker for worker in blocked if worker.slots > worker.current_tasks]

    def count_refused(self, priority: Priority) -> None:
        """Count a task that was rejected, if no slot is free for its priority."""
        if self.free_slots(priority) <= 0:
            self.refused += 1

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
    def has_head(self) -> bool:
        """True if a task waits in the queue, and not only such whose tenant is blocked."""
        if not self.queue.length:
            return False
        return self._turns is None or self._turns.head() is not None

    def must_wait(self, priority: Priority, tenant: str) -> bool:
        """Return whether a new task of `tenant` waits though a slot is free, while tenants take turns.

        It does so for the bound of its tenant, for a task that it may not overtake, or for records on their way back.
        """
        if tenant in self._tenants.blocked:
            return True
        head = None if self._turns is None else self._turns.head()
        if head is None or (priority <= URGENT and head[3] > priority):
            return self._is_promised(priority)
        return True

    def _is_promised(self, priority: Priority) -> bool:
        """Return whether records are on their way back, so that a new task waits for its turn even at a free slot."""
        return self.expects_records and any(self.spilled.totals[better] for better in Priority if better <= priority)

    @property
    def has_waiting(self) -> bool:
        """True if a task waits, in the queue or in the overflow."""
        return self.queue.length > 0 or bool(self.spilled)

    def load(self, priority: Priority = Priority.CRITICAL, *, nested: bool = False, tenant: str | None = None) -> float:
        """Return the tasks inside over the tasks that fit, room in the queue included; 1.0 without a slot.

        While it is paused, a free slot is no room, and a pool without slots has that of its queue. A suspended run is
        inside, in a place of its own. Slots that are reserved do not count for a `priority` that may not take them. For
        a `nested` task only nested ones count as waiting: what has begun is not to be rejected because of work that has
        not.

        Of a `tenant`, its own tasks count as waiting, and it has as much of twice the room of the queue as the others
        leave free: one at most half, two a third each. So the flood of one keeps no other out. See `may_park`.
        """
        bound, waiting = self.max_queue_size, self.queue.length + self.reserved + self.delayed
        same = not waiting or tenant is None
        if not same and tenant == self._sole_tenant:
            same = not self.delayed or not self._delays_others(tenant)
        simple = not (self.own_blocked or self.own_reserved or self._groups or self.paused)
        slots = self.own_slots if simple else self.usable_slots
        if not (slots or self.slots or self.paused):
            return 1.0
        room: float = max(DEFAULT_QUEUE_SIZE, slots) if bound is None else bound
        if same and simple and not nested:  # nearly always
            return (self.own_running + waiting + self.own_suspended) / (slots + room + self.own_suspended)
        if nested:
            waiting = self.nested + self.delayed_nested
        running = self.running
        if not (simple or self.paused):
            reserved, taken = self.reserved_slots(priority)
            if reserved >= self.slots:
                return 1.0
            slots, running = max(0, slots - reserved), running - taken
        if not (same or tenant is None):
            own = self._waiting_of(tenant, nested=nested)
            room, waiting = max(0.0, room - (waiting - own) / 2), own
        inside, room = running + waiting, room + slots
        if not nested:
            inside, room = inside + self.suspended, room + self.suspended
        return inside / room if room else 1.0  # the start gate may keep every slot free of a pool without a queue

    def _waiting_of(self, tenant: str, *, nested: bool = False) -> int:
        """Return how many tasks of a tenant wait in the queue or for their next attempt, or how many nested ones."""
        delayed = self._delayed_of.get((tenant, True), 0) if self.delayed else 0
        if self._turns is None:
            queued = (self.nested if nested else self.queue.length) if tenant == self._sole_tenant else 0
        else:
            queued = self._turns.length_in_group(tenant, NESTED) if nested else self._turns.length_of(tenant)
        if not nested and self.delayed:
            delayed += self._delayed_of.get((tenant, False), 0)
        return queued + delayed

    def _delays_others(self, tenant: str | None) -> bool:
        """Return whether tasks of other tenants than `tenant` wait for their next attempt."""
        return any(name != tenant for name, _ in self._delayed_of)

    def delayed_load(self, tenant: str, *, nested: bool = False) -> float:
        """Return the tasks of a tenant that wait for their next attempt over those of it that fit.

        A free slot is no room for more of them: tasks that fail at once would otherwise pile up without a bound. Of
        all tenants there are at most twice as many as there is room for, slots included.
        """
        own = self._delayed_of.get((tenant, True), 0)
        if not nested:
            own += self._delayed_of.get((tenant, False), 0)
        room = self.slots + self.queue_bound - (self.delayed - own) / 2
        return own / room if room > 0 else 1.0

    # --- estimates ---

    def ahead(self, priority: Priority, tenant: str, *, nested: bool = False, spilled: bool = False) -> int:
        """Return how many tasks would be served before a new one of `tenant`.

        With `spilled`, it would wait behind what is in the overflow, unless it is `nested`.
        """
        if nested and self._turns is not None:
            return self._turns.ahead_of(tenant, priority, NESTED)
        if nested:
            return self.nested if tenant == self._sole_tenant else min(self.nested, 1)
        better = self.spilled.better(priority) if spilled else 0
        own = self.spilled.own(priority, tenant) if spilled else 0
        if self._turns is not None:
            elsewhere, tenants = self.spilled.of(priority), self.spilled.tenants(priority)
            return better + self._turns.ahead_of(
                tenant, priority, NOT_NESTED, elsewhere=elsewhere, tenants_elsewhere=tenants, behind=own
            )
        queued, here = self.queue.ahead(priority), self.queue.lengths[priority]
        if tenant == self._sole_tenant:
            return queued + better + own
        turns = self._tenants.weight(self._sole_tenant or "") / self._tenants.weight(tenant) + 1
        return queued - here + better + int(min(here + self.spilled.totals[priority], self.nested + turns))

    def expected_wait(
        self, priority: Priority, tenant: str, *, nested: bool = False, spilled: bool = False
    ) -> float | None:
        """Return the seconds until a new task of `tenant` and `priority` would start, or None if unknown.

        With `spilled`, it would wait behind what is in the overflow, unless it is `nested`.
        """
        if self.paused:
            return None
        ahead = self.ahead(priority, tenant, nested=nested, spilled=spilled)
        reserved, taken = self.reserved_slots(priority)
        if not ahead and self.running - taken < self.slots - reserved:
            return 0.0
        ahead += self.held
        rate = self.service_times.drain_rate(max(0, self.usable_slots - reserved))
        wait = None if rate is None else ahead / rate if rate else math.inf
        if wait is None or (most := self._max_rate(tenant)) == math.inf:
            return wait
        return max(wait, self._own_ahead(priority, tenant, nested=nested, spilled=spilled) / most)

    def _max_rate(self, tenant: str) -> float:
        """Return how many tasks of a tenant a second can leave at most, for its bound; infinity without one."""
        bound = self._tenants.max_running(tenant) if self._bounded else None
        return math.inf if bound is None else self.service_times.drain_rate(bound) or math.inf

    def _own_ahead(self, priority: Priority, tenant: str, *, nested: bool, spilled: bool) -> int:
        """Return how many tasks of a tenant would be served before a new one of it."""
        if self._turns is None:
            return 0
        if nested:
            return self._turns.length_in_group(tenant, NESTED)
        return self._turns.length_of(tenant, priority) + (self.spilled.own(priority, tenant) if spilled else 0)

    def record_estimated(self, seconds: float, estimate: Estimate) -> None:
        """Record that a task with `estimate` succeeded after `seconds`."""
        self._estimated().record(seconds, estimate)

    def record_timeout(self, seconds: float, estimate: Estimate | None) -> None:
        """Record that a task was cut off by its deadline after `seconds`."""
        self.service_times.record_timeout(seconds)
        if estimate is not None:
            self._estimated().record(seconds, estimate, timeout=True)

    def _estimated(self) -> EstimatedTimes:
        if self.estimated_times is None:
            self.estimated_times = EstimatedTimes()
        return self.estimated_times

    def times_of(self, estimate: Estimate | None) -> tuple[ServiceTimes, float]:
        """Return the service times for each unit of a task's work, and how many units the task has.

        The unit is the figure of its estimate that predicts the time; else the task is one unit like any other.
        """
        known = None if estimate is None or self.estimated_times is None else self.estimated_times.of(estimate)
        return known or (self.service_times, 1.0)

    def relative_size(self, estimate: Estimate | None) -> float:
        """Return how many times as long as an average task one with `estimate` takes, if estimates predict that."""
        return self._relative_size(*self.times_of(estimate))

    def max_wait(self, remaining: float, estimate: Estimate | None) -> float:
        """Return the longest acceptable wait for a task: see `ServiceTimes.max_wait`."""
        times, units = self.times_of(estimate)
        return units * times.max_wait(remaining / units)

    def cannot_meet_deadline(
        self,
        now: float,
        remaining: float,
        *,
        time: float | None = None,
        estimate: Estimate | None = None,
        crowded: bool = False,
    ) -> bool:
        """Return whether a task that starts now would end too late, by the measured times.

        It is expected to take as long as the fastest quarter did, or longer if `time` is given.

        Args:
            now: loop time, in seconds.
            remaining: seconds until its deadline.
            time: the seconds from its submission to its deadline, if other tasks wait: they may have more time left, so
                this one must be likely to end in time.
            estimate: of the task: it is compared with tasks of its size then, if estimates have predicted their times.
            crowded: whether others are not admitted: see `is_crowded`.
        """
        times, units = self.times_of(estimate)
        if time is None:
            service = self._optimistic(times, units)
        else:
            service = units * times.required_time(time / units, crowded=crowded)
        return bool(service) and self.estimate_bypass.should_reject(now, needed=service, remaining=remaining)

    def _optimistic(self, times: ServiceTimes, units: float) -> float:
        """Return the seconds that the fastest quarter of tasks like one took, or all at the cost that is fastest.

        Most tasks may run on cheap workers, which are slow; one that is in a hurry goes to the others.
        """
        service = units * times.optimistic()
        fastest = None if self.by_cost is None else self.by_cost.fastest()
        return service if fastest is None else min(service, fastest * self._relative_size(times, units))

    def _relative_size(self, times: ServiceTimes, units: float) -> float:
        """Return how many times as long a task takes as tasks of this type do on average, by its estimate."""
        if times is self.service_times or not (usual := self.service_times.likely()):
            return 1.0
        return units * times.likely() / usual

    def would_wait_too_long(
        self, now: float, wait: float, remaining: float, priority: Priority, *, estimate: Estimate | None = None
    ) -> bool:
        """Return whether a task that is expected to wait for `wait` seconds would end too late, by the measured times.

        While the queue of its priority stands, it may wait for `ServiceTimes.max_wait`; otherwise for as long as most
        tasks would end in time. Where tenants take turns, the waits of one say nothing about those of another, and the
        queue counts as standing.
        """
        times, units = self.times_of(estimate)
        service = self._optimistic(times, units)
        if wait > units * times.max_wait(remaining / units):
            queue = self._standing_queue(priority)
            if self.takes_turns or queue.stands(now):
                service = remaining
                queue.rejected(now, remaining)
            else:
                service = units * times.likely()
        return bool(service) and self.estimate_bypass.should_reject(now, needed=wait + service, remaining=remaining)

    def record_not_admitted(self, now: float, task: Task, remaining: float) -> None:
        """Record that a task with `remaining` seconds to its deadline was rejected or stored, because others wait.

        It counts if it had nearly certainly ended in time in a slot that was free.
        """
        if self._standing:  # otherwise no task with a deadline has waited
            times, units = self.times_of(task.estimate)
            if remaining >= units * times.nearly_all():
                self._not_admitted_at[task.priority] = now

    def is_crowded(self, now: float, ticket: Ticket) -> bool:
        """Return whether tasks that would make better use of a slot are not admitted, as long as `ticket` waits.

        Then the slot of one that may be cut off by its deadline is lost to them. After a burst, when nobody comes any
        more, it is not. The flood of one tenant takes no turn from another, and what has begun goes on.
        """
        if self.takes_turns or ticket.nested or ticket.retries is not None:
            return False
        rate = self.service_times.drain_rate(self.usable_slots)
        return (
            rate is not None and rate > 0 and now - self._not_admitted_at[ticket.task.priority] <= _CROWDED_FOR / rate
        )

    def turn_came(self, now: float, ticket: Ticket, remaining: float) -> None:
        """Record how long a task has waited whose turn came `remaining` seconds before its deadline."""
        deadline, submitted_at = ticket.deadline, ticket.submitted_at
        if deadline is None or submitted_at is None or ticket.nested or ticket.retries is not None or ticket.held:
            return  # nested tasks go before the others, and the time of these was not spent in the queue alone
        if ticket.task.thread_id is None:
            time, bound = deadline.at - submitted_at, self.max_wait(deadline.at - submitted_at, ticket.task.estimate)
            self._standing_queue(ticket.task.priority).observe(now, time - remaining, bound=bound, time=time)

    def _standing_queue(self, priority: Priority) -> StandingQueue:
        if not self._standing:
            self._standing = tuple(StandingQueue() for _ in Priority)
        return self._standing[priority]

    def next_retry_slot(
        self, now: float, draw: float, priority: Priority, tenant: str, *, source_wait: tuple[float, float]
    ) -> float | None:
        """Reserve the next slot of the retry schedule; return the seconds until then, or None if unknown.

        Args:
            now: loop time, in seconds.
            draw: uniform in [0, 1).
            priority: of the task, which may not take reserved slots.
            tenant: whose it is.
            source_wait: the seconds until the sources of a worker allow another run, and those between two runs from
                then on: see `SystemLoad.time_until_below`. The pool's own rate may be from before they were the limit.
        """
        early, each = source_wait
        if early == math.inf:
            return None
        if early and not each:
            return early
        rate = self.service_times.drain_rate(max(0, self.usable_slots - self.reserved_slots(priority)[0]))
        if each:
            rate = min(1 / each, rate or math.inf)
        slot = self.retry_schedules.reserve(tenant, now + early, rate, draw, most=self._max_rate(tenant))
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
        self._compare_cost(worker)

    def _compare_cost(self, new: WorkerAgent) -> None:
        """Select by cost from now on if that of a new worker differs from that of another one."""
        given = new.given_cost(self.task_type)
        cost = None if given is None else compared_cost(given)
        if len(self.workers) == 1:
            self._given_cost = cost
        elif self.tracks_costs or cost != self._given_cost:
            self._select_by_cost()

    def _select_by_cost(self) -> None:
        self.tracks_costs = True
        if self.by_cost is None:
            self.selector = self.by_cost = CostSelector(self.task_type, self.service_times.median)
            for worker in self.workers:
                self.by_cost.update(worker)
            for group in self._groups:
                group.expect_all(self)

    def record_cost(self, now: float, worker: WorkerAgent, seconds: float, usd: float | None) -> None:
        """Record what a successful run cost, or None if none of its calls had a price, and how long it took."""
        if worker.given_cost(self.task_type) is None:
            worker.record_cost(self.task_type, usd)
            if usd is not None and not self.tracks_costs:
                self.tracks_costs = True
                if len(self.workers) > 1:  # whose costs are given, or not learned yet
                    self._select_by_cost()
        if self.by_cost is not None:
            self.by_cost.record(now, worker, seconds)

    def remove_worker(self, worker: WorkerAgent) -> None:
        """Remove a worker that has no slots any more, and on which nothing runs."""
        del self.workers[worker]
        self.nested_supervisors.pop(worker, None)
        self.selector.forget(worker)
        self.forget_worker(worker)
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
    def is_to_be_served(self) -> bool:
        """True if its tasks may begin, now or later: none that comes waits for workers that are gone."""
        return self.is_served or self.paused or self.finishing > 0

    @property
    def is_given_up(self) -> bool:
        """True if nothing may wait for a slot: its workers are FAILED until one is revived, and so is what waited."""
        if self.slots or self.paused or not self.is_served:
            return False
        return all(worker.given_up or worker.leaving for worker in self.workers)

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
        self._watched = True
        self._head_changed()
        if self.spilled:
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
        if ticket.task.tenant != self._sole_tenant:
            self._meet(ticket.task.tenant)
        entry = self.queue.push(ticket, ticket.task.priority, rank, sequence)
        if self._watched:
            self._changed(ticket, 1)
        return entry

    def _changed(self, ticket: Ticket, by: int) -> None:
        """Count `by` more tasks like `ticket` in the queue, for the bound of its tenant and for groups of pools."""
        if self._bounded:
            self._tenants.count_waiting(ticket.task.tenant, self.task_type, by)
        if self._groups:
            self._head_changed()

    def _meet(self, tenant: str) -> None:
        """Have tenants take turns if tasks of another one than `tenant` wait, and otherwise no longer."""
        if self._bounded:
            return
        if not (self.queue.length or self.spilled):
            self._sole_tenant, self._turns, self.takes_turns = tenant, None, False
            if isinstance(self.queue, TenantQueue):
                self.queue = PriorityQueue()
        elif self._turns is None:
            self._take_turns()

    def _take_turns(self) -> None:
        tenants, waiting = self._tenants, self.queue
        self.queue = self._turns = TenantQueue(_tenant_of, tenants.weights, blocked=tenants.blocked)
        self._turns.take_over(waiting)
        self._sole_tenant, self.takes_turns = None, True
        for priority in Priority:
            for tenant in self.spilled.of(priority):
                self._turns.begin_elsewhere(tenant, priority)

    def tenant_blocked(self, tenant: str, *, blocked: bool) -> None:
        """Serve no waiting tasks of `tenant` while it is blocked."""
        if self._turns is not None:
            if blocked:
                self._turns.block(tenant)
            else:
                self._turns.unblock(tenant)
            self._head_changed()

    def _head_changed(self) -> None:
        for group in self._groups:
            group.head_changed(self)

    def pop(self) -> Ticket:
        """Return the head of the queue, and remove it."""
        ticket = self.queue.pop()
        if ticket.nested or self._watched:
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
        if self._watched:
            self._changed(ticket, -1)

    def first_for(self, worker: WorkerAgent) -> QueueEntry | None:
        """Return the first entry that `worker` may begin, though it has many open runs or a reserve; or None."""
        if self.paused:
            return None
        for priority in self.queue.serving_order():
            entry = self.queue.first_of(priority)
            if entry is not None and worker.may_begin(
                priority, nested=entry[0][0] == NESTED, overdue=self.queue.is_overdue(priority)
            ):
                return entry
        return None

    def serve(self, entry: QueueEntry) -> Ticket:
        """Return the ticket of an entry that `first_for` returned, and remove it as served."""
        ticket: Ticket = entry[2]
        self.queue.serve(entry)
        self._removed(ticket)
        return ticket

    # --- tasks that wait outside the queue ---

    def park(self, ticket: Ticket) -> None:
        """Count a task that waits behind another one of its conversation."""
        self.parked += 1
        if self._bounded:
            self._tenants.count_waiting(ticket.task.tenant, self.task_type, 1)

    def unpark(self, ticket: Ticket) -> None:
        """Stop counting a task that waited behind another one of its conversation."""
        self.parked -= 1
        if self._bounded:
            self._tenants.count_waiting(ticket.task.tenant, self.task_type, -1)

    def delay(self, ticket: Ticket) -> None:
        """Count a task that waits here for its next attempt, or for its `not_before`."""
        self.delayed += 1
        self.delayed_nested += ticket.nested
        whose = ticket.task.tenant, ticket.nested
        self._delayed_of[whose] = self._delayed_of.get(whose, 0) + 1
        if self._bounded:
            self._tenants.count_waiting(ticket.task.tenant, self.task_type, 1)

    def stop_delay(self, ticket: Ticket) -> None:
        """Stop counting a task that waited for a time."""
        self.delayed -= 1
        self.delayed_nested -= ticket.nested
        whose = ticket.task.tenant, ticket.nested
        self._delayed_of[whose] -= 1
        if not self._delayed_of[whose]:
            del self._delayed_of[whose]
        if self._bounded:
            self._tenants.count_waiting(ticket.task.tenant, self.task_type, -1)

    def hold(self) -> None:
        """Count a task that waits for a cheaper worker; it has room in the queue, where it may have to wait next."""
        self.held += 1
        self.reserved += 1

    def stop_hold(self) -> None:
        """Stop counting a task that waited for a cheaper worker."""
        self.held -= 1
        self.reserved -= 1

    def reserve(self, room: int) -> None:
        """Keep room for records that are being leased."""
        self.reserved += room

    def unreserve(self, room: int) -> None:
        """Free the room that was kept for records."""
        self.reserved -= room

    # --- the overflow ---

    def spilled_ahead(self, priority: Priority, tenant: str) -> int:
        """Return how many tasks wait in the overflow, or are on their way, that no new task of `tenant` may overtake.

        These are its own of `priority`, with which those of other tenants take turns, and all of better priorities.
        """
        return self.spilled.better(priority) + self.spilled.own(priority, tenant)

    def set_spilled(self, priority: Priority, counts: Mapping[str, int]) -> None:
        """Replace the counts of records that wait in the overflow, by tenant, by those of the store."""
        for tenant in [tenant for tenant in self.spilled.of(priority) if tenant not in counts]:
            self._set_spilled(priority, tenant, 0)
        for tenant, count in counts.items():
            self._set_spilled(priority, tenant, count)

    def add_spilled(self, priority: Priority, tenant: str) -> None:
        """Count one more record that waits in the overflow."""
        self._set_spilled(priority, tenant, self.spilled.of(priority).get(tenant, 0) + 1)

    def remove_spilled(self, priority: Priority, tenant: str, *, returns: bool = False) -> None:
        """Count one record less that waits in the overflow, but not less than none: the count may be out of date.

        If it `returns` to the queue, call `forget_returned` when it is there.
        """
        count = self.spilled.of(priority).get(tenant, 0)
        if count > 1 or not returns:
            self._set_spilled(priority, tenant, max(0, count - 1))
        elif count:
            self.spilled.set(priority, tenant, 0)
            self._returned.append((priority, tenant))

    def forget_returned(self) -> None:
        """Forget the turns of tenants that have nothing in the overflow any more."""
        for priority, tenant in self._returned:
            if self._turns is not None and tenant not in self.spilled.of(priority):
                self._turns.end_elsewhere(tenant, priority)
        self._returned.clear()

    def _set_spilled(self, priority: Priority, tenant: str, count: int) -> None:
        if count and tenant != self._sole_tenant:
            self._meet(tenant)
        self.spilled.set(priority, tenant, count)
        if count:
            for group in self._groups:
                group.spilled(self)
        if self._turns is not None and count:
            self._turns.begin_elsewhere(tenant, priority)
        elif self._turns is not None:
            self._turns.end_elsewhere(tenant, priority)

    def add_nested_spilled(self, ticket: Ticket) -> None:
        """Remember that a nested task waits in the overflow, from where it goes before queued tasks that are not."""
        self.nested_spilled[ticket.task_id] = ticket.task.tenant

    def remove_nested_spilled(self, task_id: str) -> None:
        """Forget a nested task that has left the overflow."""
        self.nested_spilled.pop(task_id, None)

    def expect_records(self, *, expected: bool) -> None:
        """Have new tasks wait for their turns even at a free slot, since records are on their way back; or not."""
        self.expects_records = expected

    def refill_demand(self, round_trip: float) -> tuple[Priority, Mapping[str, int]] | None:
        """Return the priority of the records to take back now, and how many of each tenant; None if none.

        That is one for each free slot, and as many more as start within two times the `round_trip` to the store. While
        the upstreams would have their calls wait, it is one at a time: the others stay where a process with more room
        may take them. If several tenants wait, they are those whose turns come meanwhile.
        """
        blocked = self._tenants.blocked
        stored = self.spilled.servable(blocked)
        best = next((priority for priority in Priority if stored[priority]), None)
        if best is None:
            return None
        rate, free = self.service_times.drain_rate(self.usable_slots) or 0.0, self.free_slots(best)
        bound, startable = self.queue_bound, max(0, free)
        if self.source_paths and self._calls_wait(best):
            startable = min(1, startable)
        slots = startable + min(math.ceil(2 * round_trip * rate), bound)
        queued = [*(self.queue.lengths if self._turns is None else self._turns.lengths_without_blocked())]
        capacity = bound + free - self.queued
        if self._turns is not None:  # which also say how many of this priority go first
            slots, capacity = max(slots, min(1, sum(queued))), capacity + bound
            queued[best] = 0
        if self.nested_spilled:  # they are to be served before what is queued and has not begun, as in the store
            slots, capacity = max(slots, self.usable_slots), capacity + bound
            queued = [self.nested, 0, 0, 0]
        batch = self.refill_policy.next_batch(slots=slots, capacity=capacity, queued=queued, stored=stored)
        if batch is None:
            return None
        priority, count = batch
        shares = self._shares(priority, count, overdue=priority is not best)
        return (priority, shares) if shares else None

    def _calls_wait(self, priority: Priority) -> bool:
        """Return whether the next call of a run of `priority` would have to wait, on whatever worker."""
        return all(any(source.load(priority)[0] > 0.0 for source in path) for path in self.source_paths)

    def _shares(self, priority: Priority, count: int, *, overdue: bool) -> Mapping[str, int]:
        """Return how many of `count` records of a priority to take back of each tenant."""
        waiting = self.spilled.of(priority)
        if self._turns is None:
            return {tenant: min(count, number) for tenant, number in waiting.items()}  # there is only one
        shares: dict[str, int] = {}
        for tenant in dict.fromkeys(self.nested_spilled.values()):
            share = min(count - sum(shares.values()), waiting.get(tenant, 0))
            if share and tenant not in self._tenants.blocked:
                shares[tenant] = share
        return shares or self._turns.shares(priority, count, waiting, overdue=overdue)


def _tenant_of(ticket: Ticket) -> str:
    return ticket.task.tenant
