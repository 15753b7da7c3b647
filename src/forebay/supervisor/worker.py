"""WorkerAgent: a registered handler, its slots, its measured durations, and its circuit breaker."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from threading import Lock
from typing import Any, Final

from forebay._validate import check_whole, reject
from forebay.adapters import Handler
from forebay.breaker import Breaker, BreakerState
from forebay.interfaces import LoadSource, WorkerState
from forebay.retry import Retry
from forebay.supervisor.tree.worker_life import WorkerLife
from forebay.supervisor.worker_costs import AVERAGE_GAIN, WorkerCosts
from forebay.task import Priority, TaskStatus
from forebay.upstream.declared_upstream import DeclaredUpstream

URGENT = Priority.HIGH  # tasks of this priority or a better one go past the queue, and may take reserved slots
_PENALTY = 1.5  # a failure raises the score by half
_WORST_PENALTY = _PENALTY**5
_OTHER_ENDS = (TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED, TaskStatus.EXPIRED)

# What most of ten thousand workers share. None is changed: a worker that has something to record makes its own.
_NO_SOURCES: Final[Mapping[LoadSource, None]] = {}
_NO_OTHER_ENDS: Final[Mapping[TaskStatus, int]] = dict.fromkeys(_OTHER_ENDS, 0)


def _do_nothing(*_: object) -> None:
    """Do nothing: the worker belongs to no supervisor."""


class _Orphans:
    """The runs on a worker whose supervisor has closed: whether each holds a slot, and is a zombie."""

    __slots__ = ("lock", "runs")

    def __init__(self) -> None:
        self.runs: dict[object, tuple[bool, bool]] = {}
        self.lock = Lock()  # the supervisor may start again in another thread, before they have stopped


class WorkerAgent:
    """A registered handler with its own concurrency limit.

    Its state is FAILED while its circuit breaker is open, otherwise OVERLOADED when every slot is taken, BUSY when some
    are, IDLE when none is. ``supervisor.register_worker`` makes it; read it, `resize` it and `revive` it.
    """

    __slots__ = (
        "__weakref__", "_busy_seconds", "_declared", "_durations", "_max_concurrent", "_max_open", "_max_probes",
        "_on_resize", "_on_revive", "_orphans", "_probes_in_flight", "accepting", "breaker", "breaker_phase",
        "claims_held_back", "costs", "counted_slots", "counts_tasks", "current_tasks", "declared", "failed", "given_up",
        "handler", "leaving", "life", "max_open", "name", "other_ends", "penalty", "pending_claims", "probes",
        "probing", "ready", "reserve", "restarts", "retry", "sources", "start_failed", "started", "starting", "stuck",
        "succeeded", "suspended", "suspended_open", "task_types", "timeout", "urgent_tasks", "zombies",
        "zombies_found",
    )  # fmt: skip

    def __init__(  # noqa: PLR0913 - the arguments of register_worker, checked in `registration`
        self,
        name: str,
        handler: Handler,
        *,
        task_types: Sequence[str],
        max_concurrent: int,
        max_open: int | None = None,
        reserve: int = 0,
        timeout: float,
        retry: Retry | None = None,
        cost: float | Mapping[str, float] | None = None,
        breaker: Breaker,
        probes: int,
        declared: Sequence[DeclaredUpstream] = (),
        life: WorkerLife | None = None,
        on_revive: Callable[[WorkerAgent], None],
        on_resize: Callable[[WorkerAgent, int], None] = _do_nothing,
    ) -> None:
        self.name = name
        self.handler = handler
        self.task_types = tuple(task_types)
        self._max_concurrent = max_concurrent
        self._max_open = max_open  # as it was given
        self.max_open = 2 * max_concurrent if max_open is None else max_open
        self.reserve = reserve  # slots, the last free ones, that only CRITICAL and HIGH tasks take
        self.timeout = timeout
        self.retry = retry
        self.costs = None if cost is None else WorkerCosts(cost)  # None for most of ten thousand
        self.breaker = breaker
        self._max_probes = probes
        self.probes = min(probes, max_concurrent)
        self._declared = tuple(declared)
        self.life = WorkerLife(name, handler) if life is None else life
        self._on_revive = on_revive
        self._on_resize = on_resize
        self._orphans: _Orphans | None = None  # made for the first one; see `add_orphan`
        self._reset()

    def begin_run(self) -> None:
        """Forget what has happened to it, because a run of its supervisor begins."""
        orphans = self._orphans
        if orphans is None:
            self._reset()
            return
        with orphans.lock:
            orphans.runs.clear()
            self._reset()

    def _reset(self) -> None:
        self.breaker.reset()
        self.current_tasks = 0  # slots taken, zombies included
        self.urgent_tasks = 0  # those that CRITICAL and HIGH tasks hold; counted only if there is a reserve
        self.counts_tasks = False  # whether it matters whose tasks hold its slots: for a reserve, or tenants' bounds
        self.suspended = 0  # runs that have lent their slot and wait for tasks
        # Those of them that count towards `max_open`, by priority; made when there is one.
        self.suspended_open: list[int] | tuple[()] = ()
        self.zombies = 0
        self.stuck = False  # FAILED because zombies hold every slot
        self.start_failed = False  # FAILED because its start failed
        self.given_up = False  # FAILED until it is revived, as what waited for it
        self.failed = False  # the breaker is open; a copy, because every decision reads it
        self.probing = False  # the breaker is half-open: only as many slots as it allows probes
        self.breaker_phase = 0  # counts the changes of `failed` or `probing`; runs started in this phase are its probes
        self.counted_slots = 0  # the slots that its pools count for it
        self.pending_claims = 0  # runs that lent their slot and wait to have it back
        self.claims_held_back = False  # none of them may take a slot that is free, by the reserve or a tenant's bound
        # What the calls of its runs use.
        self.sources: Mapping[LoadSource, None] = dict.fromkeys(self._declared) if self._declared else _NO_SOURCES
        self.declared = self._declared  # those sources that no call has used yet
        self.penalty = 1.0
        self.restarts = 0  # how often it was started again
        self.life.begin_run()
        self.ready = not self.life.needs_start  # it has started, or need not be started
        self.leaving = False  # it is being unregistered: it begins no new run
        self.accepting = self.ready  # it is ready, and not leaving unless a run of its own waits for a nested task
        self.starting = False  # its handler is being started
        self.started = 0  # starts of its handler
        self.succeeded = 0  # attempts that did
        self.other_ends = _NO_OTHER_ENDS  # attempts that ended in another way
        self.zombies_found = 0  # handlers that outlived their end and the grace
        self._busy_seconds = 0.0  # times of the returns of slots, less those at which they were taken
        self._probes_in_flight = 0  # probes that hold their slot
        self._durations: dict[str, float] = {}  # average seconds of a success, by task type
        if self.costs is not None:
            self.costs.forget_learned()

    def __repr__(self) -> str:
        return f"WorkerAgent({self.name!r}, {self.state.name}, {self.current_tasks}/{self._max_concurrent})"

    @property
    def max_concurrent(self) -> int:
        """The number of tasks that it runs at a time; `resize` changes it."""
        return self._max_concurrent

    @property
    def state(self) -> WorkerState:
        """IDLE, BUSY, OVERLOADED or FAILED."""
        if self.failed:
            return WorkerState.FAILED
        if self.current_tasks >= self._max_concurrent:
            return WorkerState.OVERLOADED
        return WorkerState.BUSY if self.current_tasks else WorkerState.IDLE

    @property
    def load_factor(self) -> float:
        """``current_tasks / max_concurrent``; 1.0 while more tasks run, because it was made smaller."""
        return min(1.0, self.current_tasks / self._max_concurrent)

    @property
    def slots(self) -> int:
        """The number of tasks that may run now: none while FAILED or leaving, the breaker's probes while half-open."""
        if self.failed or self.leaving:
            return 0
        return self.probes if self.probing else self._max_concurrent

    @property
    def avg_duration_ms(self) -> float:
        """Recent milliseconds of a successful task, averaged over the task types; 0.0 before the first success."""
        durations = self._durations.values()
        return 1000 * sum(durations) / len(durations) if durations else 0.0

    def can_accept(self) -> bool:
        """Return whether a task could start on this worker now."""
        if self.failed or not self.accepting or self.current_tasks >= self._max_concurrent:
            return False
        if self.pending_claims and not self.claims_held_back:
            return False
        # A probe that lent its slot may await a task that needs to run here, so only probes with a slot count.
        return not self.probing or self._probes_in_flight < self.probes

    def may_begin(self, priority: Priority, *, nested: bool = False, overdue: bool = False) -> bool:
        """Return whether a run of `priority` may begin on a free slot: by the reserve and by `max_open`.

        Args:
            priority: of the task.
            nested: the task is a nested one, to which `max_open` does not apply.
            overdue: its priority was passed over so often that it is served next.
        """
        if self.reserve and not self.may_take_slot(priority, again=overdue):
            return False
        return nested or not self.suspended or not self.bars_new_runs(priority)

    def may_take_slot(self, priority: Priority, *, again: bool = False) -> bool:
        """Return whether a run of `priority` may take a slot, if one is free, although some are reserved.

        NORMAL and LOW leave the last `reserve` free slots. With `again`, for a run that has lent its slot, or a
        priority that was passed over too often, those that CRITICAL and HIGH hold count as left: else a flood of them
        would keep it waiting for good.
        """
        if priority <= URGENT:
            return True
        left = self.reserve - self.urgent_tasks if again else self.reserve
        return self._max_concurrent - self.current_tasks > left

    def slots_for(self, priority: Priority) -> int:
        """Return how many of its slots tasks of `priority` may take: all, or all but those that are reserved."""
        return self._max_concurrent if priority <= URGENT else max(0, self._max_concurrent - self.reserve)

    @property
    def open_slots(self) -> int:
        """The number of `slots` that tasks of any priority may take."""
        return min(self.counted_slots, self.slots_for(Priority.NORMAL))

    def bars_new_runs(self, priority: Priority) -> bool:
        """Return whether it begins no run of `priority` but nested ones, because too many have begun and not ended.

        Suspended runs of lower priorities do not count: they must not keep better work waiting. A leaving worker begins
        none at all.
        """
        return self.leaving or self.current_tasks + sum(self.suspended_open[: priority + 1]) >= self.max_open

    def revive(self) -> None:
        """Close the circuit breaker now, whatever opened it, and start the worker if it has stopped."""
        self._on_revive(self)

    def resize(self, max_concurrent: int) -> None:
        """Change how many tasks it runs at a time; in the supervisor's event loop.

        More slots take waiting tasks at once. Fewer end no run: nothing new begins until enough of them have ended.
        `max_open` stays twice as many, or what it was set to, and at least as many. A process engine starts or ends
        processes.

        Raises:
            InvalidSetting: `max_concurrent` is not a whole number of at least 1, or less than `reserve`.
        """
        owner = f"worker {self.name!r}"
        check_whole(owner, "max_concurrent", max_concurrent)
        if max_concurrent < self.reserve:
            reject(owner, "max_concurrent", max_concurrent, f"at least the slots that it reserves, {self.reserve}")
        before, self._max_concurrent = self._max_concurrent, max_concurrent
        self.max_open = 2 * max_concurrent if self._max_open is None else max(self._max_open, max_concurrent)
        self.probes = min(self._max_probes, max_concurrent)
        if self.handler.resize is not None:
            self.handler.resize(max_concurrent)
        if max_concurrent != before:
            self._on_resize(self, before)

    # --- handlers that outlive their supervisor ---

    def add_orphan(self, run: object, *, holds_slot: bool, zombie: bool) -> None:
        """Count a run whose supervisor has closed until it stops, but not in the supervisor's next run."""
        if self._orphans is None:
            self._orphans = _Orphans()
        self._orphans.runs[run] = holds_slot, zombie

    def orphan_stopped(self, run: object, now: float) -> None:
        """Stop counting a run whose supervisor has closed."""
        assert self._orphans is not None  # noqa: S101 - `add_orphan` was called for the run
        with self._orphans.lock:
            holds_slot, zombie = self._orphans.runs.pop(run, (False, False))
            if holds_slot:
                self.return_slot(now, probe=False)
            self.zombies -= zombie

    # --- the start of its handler ---

    def begin_start(self) -> None:
        """Record that its handler is being started: it takes no task yet."""
        self.starting = True

    def begin_restart(self) -> None:
        """Record that it is to be stopped and started again: it takes no task until then."""
        self.starting, self.ready = True, False
        self._update_accepting()

    def count_restart(self) -> None:
        """Count that it was started again."""
        self.restarts += 1

    def end_start(self, *, ready: bool) -> None:
        """Record that its handler has started, or that its start has failed."""
        self.starting = False
        self.ready = ready
        self._update_accepting()

    # --- its end ---

    def leave(self) -> None:
        """Begin no new run from now on, but for nested tasks while runs here wait for them. `count_slots` is next."""
        self.leaving = True
        self._update_accepting()

    def accept_nothing(self) -> None:
        """Begin no run at all any more."""
        self.ready = self.accepting = False

    def _update_accepting(self) -> None:
        self.accepting = self.ready and (not self.leaving or self.suspended > 0)

    # --- slots ---

    def start_run(self, now: float) -> None:
        """Count a start of its handler, which takes a slot; it is a probe if the breaker is half-open."""
        self.started += 1
        self.current_tasks += 1  # as `take_slot`, without another call for each task
        self._busy_seconds -= now
        if self.probing:
            self._probes_in_flight += 1

    def take_slot(self, now: float, *, probe: bool) -> None:
        """Count one more slot as taken."""
        self.current_tasks += 1
        self._busy_seconds -= now
        if probe:
            self._probes_in_flight += 1

    def return_slot(self, now: float, *, probe: bool) -> None:
        """Count one slot less as taken."""
        self.current_tasks -= 1
        self._busy_seconds += now
        if probe:
            self._probes_in_flight -= 1

    def count_tasks(self) -> None:
        """Have the dispatcher count whose tasks hold its slots."""
        self.counts_tasks = True

    def count_urgent(self, by: int) -> None:
        """Count `by` more slots as held by CRITICAL and HIGH tasks."""
        self.urgent_tasks += by

    def busy_seconds(self, now: float) -> float:
        """Return for how many seconds its slots were taken, summed over the slots."""
        return self._busy_seconds + self.current_tasks * now

    def abandon_probe(self) -> None:
        """Stop counting a probe whose run was abandoned; its slot stays taken."""
        self._probes_in_flight -= 1

    def count_slots(self) -> int:
        """Set `counted_slots` to the present number of slots; return the number before."""
        before, self.counted_slots = self.counted_slots, self.slots
        return before

    def has_free_slot(self) -> bool:
        """Return whether a slot is free for a run that has started already: the breaker does not stop it."""
        return self.current_tasks < self._max_concurrent

    def suspend(self, priority: Priority, *, exempt: bool) -> None:
        """Count a run that has lent its slot; it is `exempt` from `max_open` if a new run must begin first."""
        self.suspended += 1
        if not exempt:
            self._count_open(priority, 1)
        if self.leaving:
            self._update_accepting()

    def resume(self, priority: Priority, *, exempt: bool) -> None:
        """Stop counting a run that had lent its slot."""
        self.suspended -= 1
        if not exempt:
            self._count_open(priority, -1)
        if self.leaving:
            self._update_accepting()

    def change_exempt(self, priority: Priority, by: int) -> None:
        """Count `by` more of the suspended runs of a priority as exempt."""
        self._count_open(priority, -by)

    def _count_open(self, priority: Priority, by: int) -> None:
        if not self.suspended_open:
            self.suspended_open = [0] * len(Priority)
        self.suspended_open[priority] += by

    def add_claim(self) -> None:
        """Count a run that waits to have its slot back."""
        self.pending_claims += 1

    def remove_claim(self) -> None:
        """Stop counting a run that waited to have its slot back."""
        self.pending_claims -= 1

    def hold_back_claims(self, held_back: bool) -> None:  # noqa: FBT001 - a state
        """Record whether the free slots are such that no run which claims one may take it."""
        self.claims_held_back = held_back

    # --- its cost ---

    def cost(self, task_type: str) -> float | None:
        """Return the US dollars of a task of that type: given or learned; None if it is not known."""
        return None if self.costs is None else self.costs.of(task_type)

    def given_cost(self, task_type: str) -> float | None:
        """Return the US dollars that were given for a task of that type, or None."""
        return None if self.costs is None else self.costs.given(task_type)

    def record_cost(self, task_type: str, usd: float | None) -> None:
        """Record what the calls of a successful run cost, or None if none of them had a price."""
        if self.costs is None:
            self.costs = WorkerCosts()
        self.costs.record(task_type, usd)

    # --- its score ---

    def score(self, task_type: str, typical: float) -> float:
        """Return the expected seconds until one more task would finish.

        ``(current_tasks + 1) * average duration / max_concurrent``, raised by half for each recent failure: without
        the penalty, a worker that fails within ten milliseconds would attract all the work.

        Args:
            task_type: the type of the task.
            typical: the duration to assume, in seconds, while this worker has not finished a task of the type.
        """
        duration = self._durations.get(task_type, typical)
        return (self.current_tasks + 1) * duration / self._max_concurrent * self.penalty

    def duration(self, task_type: str, typical: float) -> float:
        """Return the average seconds of a success, or `typical` before the first."""
        return self._durations.get(task_type, typical)

    def has_duration(self, task_type: str) -> bool:
        """Return whether the worker has finished a task of that type."""
        return task_type in self._durations

    def record_success(self, task_type: str, seconds: float) -> None:
        """Count a success, and record how long it took."""
        self.succeeded += 1
        duration = self._durations.get(task_type)
        self._durations[task_type] = seconds if duration is None else duration + AVERAGE_GAIN * (seconds - duration)

    def record_other_end(self, status: TaskStatus) -> None:
        """Count an attempt that has ended without success."""
        self.other_ends = {**self.other_ends, status: self.other_ends[status] + 1}

    def raise_penalty(self) -> None:
        """Raise the score by half, up to a bound."""
        self.penalty = min(self.penalty * _PENALTY, _WORST_PENALTY)

    def lower_penalty(self) -> None:
        """Take one failure off the score."""
        self.penalty = max(1.0, self.penalty / _PENALTY)
        if math.isclose(self.penalty, 1.0):
            self.penalty = 1.0

    # --- its breaker and its zombies ---

    def update_from_breaker(self, now: float) -> None:
        """Set `failed` and `probing` by the breaker's state; a change of either begins a new breaker phase."""
        state = self.breaker.state(now)
        before = (self.failed, self.probing)
        self.failed = state is BreakerState.OPEN
        self.probing = state is BreakerState.HALF_OPEN
        if (self.failed, self.probing) != before:
            self.breaker_phase += 1
            self._probes_in_flight = 0

    def add_zombie(self) -> None:
        """Count a run that was abandoned and has not stopped yet."""
        self.zombies += 1

    def remove_zombie(self) -> None:
        """Stop counting an abandoned run, because it has stopped."""
        self.zombies -= 1

    def record_zombie(self) -> None:
        """Count a handler that has outlived the end of its attempt and the grace."""
        self.zombies_found += 1

    def mark_stuck(self) -> None:
        """Remember that the worker is FAILED only because zombies hold every slot."""
        self.stuck = True

    def mark_start_failed(self) -> None:
        """Remember that the worker is FAILED because its start failed."""
        self.start_failed = True

    def give_up(self) -> None:
        """Remember that nothing waits for it until it is revived."""
        self.given_up = True

    def close_breaker(self) -> None:
        """Close the breaker. `update_from_breaker` is to be called next."""
        self.stuck = self.start_failed = self.given_up = False
        self.breaker.reset()

    # --- the sources that its runs call ---

    def add_source(self, source: LoadSource) -> None:
        """Add a source that the calls of its runs use."""
        self.sources = {**self.sources, source: None}

    def remove_declared(self, declared: DeclaredUpstream) -> None:
        """Remove a declared upstream, because a run has called the real one."""
        self.declared = tuple(other for other in self.declared if other is not declared)
        self.sources = {source: None for source in self.sources if source is not declared}

    def replace_call(self, call: Any) -> None:
        """Replace the callable of its handler."""
        self.handler = replace(self.handler, call=call)
