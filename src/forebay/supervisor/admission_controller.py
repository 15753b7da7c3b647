"""Admission control: a task from `submit` to its verdict."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from contextvars import Context, copy_context
from enum import Enum
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from forebay import clock, context
from forebay._text import format_duration
from forebay.admission import PriorityThresholds
from forebay.context import NO_VARIABLES, DetachedTask, RunningTask
from forebay.errors import (
    DeadlinePassed,
    DuplicateTask,
    ForebayError,
    InvalidTask,
    NestedTooDeep,
    OverflowRequired,
    StoreAnswerLost,
    StoreUnavailable,
    SupervisorClosed,
    UnknownTaskType,
    WouldDeadlock,
    fresh_copy,
)
from forebay.events import TaskSubmitted
from forebay.interfaces import PutResult
from forebay.supervisor.room import RoomQueue, RoomTurn
from forebay.supervisor.runs.run import Run
from forebay.supervisor.runs.slot_loans import active_runs, depth, run_and_ancestors
from forebay.supervisor.slot import Slot
from forebay.supervisor.spill import store_load
from forebay.supervisor.tenants import RESOURCE_PREFIX
from forebay.supervisor.ticket import Reclaim, Refusal, Ticket, TicketOwner
from forebay.supervisor.worker import URGENT, WorkerAgent
from forebay.task import Deadline, Priority, Task, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.conversations import Conversation, Conversations
    from forebay.supervisor.core import Core
    from forebay.supervisor.load import SystemLoad
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.retries import TaskRetries
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.start_gate import StartGate

T = TypeVar("T")

_ABANDONED = "its submitter has gone"
# Runs above a task that have not ended: each await costs time for each of them.
_MAX_NESTING = 1000
# Runs above a task, ended ones included, from which a nested submission gives the loop a turn. A handler that runs its
# own task type goes down one run a turn, and so does its cancellation, which would never reach the deepest run.
_DEEP = 100


class TryAdmit(Protocol):
    """Starts or queues a task, or returns why it is not admitted."""

    def __call__(self, ticket: Ticket, pool: Pool, *, may_spill: bool) -> Refusal | None: ...  # noqa: D102 - above


class AdmissionDispatcher(TicketOwner, Protocol):
    """The dispatcher, as far as admission needs it."""

    @property
    def load(self) -> SystemLoad:
        """The load of each resource."""

    @property
    def start_gate(self) -> StartGate:
        """The gate that lets runs start."""

    @property
    def conversations(self) -> Conversations:
        """The conversations of its tasks."""

    @property
    def retries(self) -> TaskRetries:
        """The tasks that wait for their next attempt, and the budget of all retries."""

    @property
    def spill(self) -> Spill | None:
        """The overflow, if there is one."""

    def start_or_queue(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None) -> None:
        """Start a task on `worker`, or queue it."""


class _State(Enum):
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


_OPEN = _State.OPEN  # attribute access on an enum is slow on the hot path


class AdmissionController:
    """Checks each submitted task, and admits it, stores it in the overflow, or rejects it.

    Attributes:
        thresholds: the loads from which each priority is rejected.
        submitted, spilled, rejected: how many tasks, since the start.
        room: the producers that wait for room.
    """

    def __init__(
        self, core: Core, dispatcher: AdmissionDispatcher, *, threshold: float, draw: Callable[[], float]
    ) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._registry = core.registry
        self._live: Mapping[str, Ticket] = core.registry.live
        self._pools: Mapping[str, Pool] = core.pools.by_type
        self._load = dispatcher.load
        self._tenants = core.tenants
        self._codecs = core.codecs
        self._bus = core.bus
        self._draw = draw
        self.loop = core.loop
        self.thresholds = PriorityThresholds(threshold)
        self.submitted = self.spilled = self.rejected = 0
        self._state = _OPEN
        self.room = RoomQueue(core.loop, core.timers, core.registry)
        self._keys = core.registry.by_key
        self._undecided: dict[str, _Undecided] = {}  # by key
        self._key_lookups: dict[str, int] = {}  # callers that wait until the store has looked for their key
        self.try_admit: TryAdmit = self._try_admit  # forebay.testing replaces it

    @property
    def admitted(self) -> int:
        """The number of tasks that have been admitted since the start."""
        return self.submitted - self.spilled - self.rejected

    def stop_admitting(self) -> None:
        """Admit only tasks that are submitted by tasks inside."""
        if self._state is _State.OPEN:
            self._state = _State.DRAINING
        self.room.wake_all()

    def close(self) -> None:
        """Admit nothing any more."""
        self._state = _State.CLOSED
        self.room.wake_all()

    @property
    def may_ask_store(self) -> bool:
        """True if submitting a task may take time, because there is an overflow."""
        return self._dispatcher.spill is not None

    # --- the ways to submit ---

    async def submit(self, task: Task, *, wait: float | None = None) -> Ticket:
        """Submit a task: see ``BackpressureSupervisor.submit``."""
        task = self._codecs.fit_payload(task)
        return await (self._submit(task) if wait is None else self._submit_in_line(task, wait))

    async def run(self, task: Task, *, wait: float | None = None) -> Any:
        """Submit a task and return its value: see ``BackpressureSupervisor.run``."""
        task = self._codecs.fit_payload(task)
        ticket = await (self._submit(task) if wait is None else self._submit_in_line(task, wait))
        return await ticket.value(cancel_task=ticket.task is task)  # not what someone else submitted under the same key

    async def submit_once(self, task: Task) -> Ticket:
        """Submit a task whose submitter will wait for room: unless that would not help, a rejection is not counted."""
        return await self._submit(self._codecs.fit_payload(task), in_line=True)

    def submit_hedge(self, task: Task, original: Ticket) -> Ticket | None:
        """Start a second attempt at the task of `original`, which runs, on another worker.

        It is started at once or not at all: it takes a retry from the budget, and room from nobody. Draining must end,
        so then there are no hedges.
        """
        if self._state is not _State.OPEN:
            return None
        task = self._codecs.fit_payload(task)
        pool, parent = self._check(task)
        priority, run = task.priority, original.run
        if (
            run is None
            or pool.queue
            or task.tenant in self._tenants.blocked
            or self.thresholds.rejects(priority, self._load.on_path(pool, priority)[0])
        ):
            return None
        worker = self._dispatcher.start_gate.pick(pool, priority, nested=original.nested, avoid=run.worker)
        if worker is None or not self._dispatcher.retries.take():
            return None
        ticket = self._new_ticket(task, parent)
        ticket.admit(self._load.on_path(pool, priority)[0])
        self._submitted(ticket)
        self._dispatcher.start_or_queue(ticket, pool, worker)
        return ticket

    def resume(self, task: Task, *, submitted_at: float, own: Context | None) -> Ticket:
        """Start or queue a task that goes on with what was admitted before: it is not admitted again.

        Args:
            task: the task.
            submitted_at: epoch seconds of that submission.
            own: the context of its handler; None: that of the start of the supervisor.

        Raises:
            SupervisorClosed: nothing is admitted any more.
            UnknownTaskType: no worker is registered for it.
        """
        if self._state is not _OPEN:
            raise SupervisorClosed(state=self._state.value)
        pool = self.pool_of(task.task_type)
        ticket = Ticket(self._dispatcher, task, None, None, submitted_at, own)
        ticket.admit(self._load.on_path(pool, task.priority)[0])
        self._submitted(ticket)
        self._dispatcher.start_or_queue(ticket, pool, self._free_worker(ticket, pool))
        return ticket

    def enter_line(
        self, task: Task, on_turn: Callable[[], object], *, is_waiting: Callable[[], bool] | None = None
    ) -> RoomTurn:
        """Put the submitter of a task in line for room.

        It lets others pass while the conversation of the task takes no more, and unless `is_waiting`.

        Args:
            task: the task.
            on_turn: called whenever its submitter is to try again.
            is_waiting: returns whether it would then; None: it always would.
        """
        is_full = self._conversation_check(task)
        if is_full is None and is_waiting is None:
            return self.room.enter(task, on_turn)

        def is_blocked() -> bool:
            return (is_waiting is not None and not is_waiting()) or (is_full is not None and is_full())

        return self.room.enter(task, on_turn, is_blocked, group=(task.thread_id, is_waiting))

    def _conversation_check(self, task: Task) -> Callable[[], bool] | None:
        """Return a function that returns whether the conversation of a task takes no more; None if it always does."""
        if task.thread_id is None:
            return None
        pool, nested = self.pool_of(task.task_type), self._is_nested()
        return partial(self._is_conversation_full, task.thread_id, pool, nested=nested)

    def lend_slots(self, running: RunningTask | None, awaited: Ticket | None) -> Reclaim | None:
        """Lend the slot of `running` while it awaits a task, or room for one."""
        return self._dispatcher.lend_slots(running, awaited)

    def submit_nowait(self, task: Task) -> Ticket:
        """Submit a task without waiting: see ``BackpressureSupervisor.submit_nowait``."""
        if self._codecs.active:
            task = self._codecs.fit_payload(task)
        pool, parent = self._check(task)
        if task.durable:
            advice = "use `await submit(...)`"
            raise OverflowRequired(task_id=task.task_id, why="submit_nowait cannot wait for its record", advice=advice)
        if task.key is not None and (known := self._keys.get(task.key)) is not None:
            known.share()
            return known
        spill = self._dispatcher.spill
        if spill is not None and task.spill:
            spill.encode(task)  # draining may store it, so a task that cannot be stored is an error now
        ticket = self._new_ticket(task, parent)
        refusal = self.try_admit(ticket, pool, may_spill=False)
        return ticket if refusal is None else self._reject(ticket, pool, refusal)

    def slot(self, task: Task) -> Slot:
        """Return a slot for the caller's own code: see ``BackpressureSupervisor.slot``."""
        _, parent = self._check(task)

        def try_admit(ticket: Ticket) -> None:
            pool, _ = self._check(task)  # its workers may be others by now
            refusal = self.try_admit(ticket, pool, may_spill=False)
            if refusal is not None:
                self._reject(ticket, pool, refusal)

        return Slot(self._dispatcher, self._new_ticket(task, parent), try_admit)

    async def _submit_in_line(self, task: Task, wait: float) -> Ticket:
        """Submit a task; while it would be rejected, wait for room, for at most `wait` seconds."""
        pool, parent = self._check(task)
        until = self.loop.time() + wait
        ready = asyncio.Event()
        turn: RoomTurn | None = None
        reclaim: Reclaim | None = None
        try:
            while (left := min(until - self.loop.time(), _time_left(task, parent))) > 0:
                may_try = not self.room.is_behind(task) if turn is None else self.room.is_first(turn)
                if may_try and ((ticket := await self._submit(task, in_line=True)) or not ticket.in_line):
                    return ticket
                if turn is None:
                    turn = self.enter_line(task, ready.set)
                    # The caller may be a run, and the room come with the end of tasks that need its slot.
                    reclaim = self._dispatcher.lend_slots(parent, None)
                elif may_try:
                    self.room.pass_turn(turn)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left if left < math.inf else None):
                        await ready.wait()
                ready.clear()
                self._check_open(parent)
            if _time_left(task, parent) > 0:
                return await self._submit(task)
            why = "its deadline passed while it waited for room"
            refusal = Refusal(why, pool.resource, pool.load(), may_spill=False)
            return self._reject(self._new_ticket(task, parent), pool, refusal)
        finally:
            if turn is not None:
                self.room.leave(turn)
            if reclaim is not None:
                await reclaim()

    async def _submit(self, task: Task, *, in_line: bool = False) -> Ticket:
        spill = self._dispatcher.spill
        pool, parent = self._check(task)
        if parent is not None and depth(parent) >= _DEEP:
            await asyncio.sleep(0)
            pool, parent = self._check(task)  # again, because anything may have happened during the await
        if task.durable:
            _check_durable(task, spill)
        if task.key is not None:
            known = await self._answer_in_time(task, task.deadline, pool, self._find_by_key(task.key))
            if known is not None:
                known.share()
                return known
            pool, parent = self._check(task)  # again, as above
        if spill is None or not (task.spill or task.durable):
            ticket = self._new_ticket(task, parent, in_line=in_line)
            refusal = self.try_admit(ticket, pool, may_spill=False)
            return ticket if refusal is None else self._reject(ticket, pool, refusal)
        envelope = spill.encode(task)
        ticket = self._new_ticket(task, parent, in_line=in_line)
        deciding = self._store_first(ticket, envelope, pool, spill)
        if deciding is None:
            refusal = self.try_admit(ticket, pool, may_spill=_may_spill(ticket, spill))
            if refusal is None:
                return ticket
            if not refusal.may_spill:
                return self._reject(ticket, pool, refusal)
            deciding = self._spill(ticket, refusal, envelope, pool, spill)
        return await self._answer_in_time(task, ticket.deadline, pool, self._await_store(ticket, deciding))

    def _store_first(
        self, ticket: Ticket, envelope: bytes, pool: Pool, spill: Spill
    ) -> Coroutine[Any, Any, Ticket] | None:
        """Return what decides about a task that is stored before it may be admitted; None if it is not."""
        if ticket.task.not_before is not None and self._waits_in_overflow(ticket, spill):
            return self._schedule(ticket, envelope, pool, spill)
        return self._admit_durable(ticket, envelope, pool, spill) if ticket.task.durable else None

    def _waits_in_overflow(self, ticket: Ticket, spill: Spill) -> bool:
        """Return whether a task waits in the overflow for its `not_before`.

        It waits here if tasks of its conversation are here: another process would not know of them. A durable one is to
        survive this process all the same.
        """
        task = ticket.task
        is_alone = self._dispatcher.conversations.get(task.thread_id) is None
        return task.starts_in() > 0 and (task.durable or is_alone) and _may_spill(ticket, spill)

    # --- checks ---

    def _check(self, task: Task) -> tuple[Pool, RunningTask | None]:
        """Return the pool and the parent of a task that may be submitted now."""
        if not isinstance(task, Task):
            raise InvalidTask(
                field="itself", value=type(task).__name__, expected='a Task, such as Task("research", {...})'
            )
        parent = context.running_task()
        if self._state is not _OPEN:
            self._check_open(parent)
        pool = self._pools.get(task.task_type) or self.pool_of(task.task_type)
        twin = self._live.get(task.task_id)
        if twin is None and self._dispatcher.spill is not None:
            twin = self._registry.weak.get(task.task_id)
        if twin is not None and (task.key is None or self._keys.get(task.key) is not twin):
            raise DuplicateTask(task_id=task.task_id)
        if task.deadline is not None and (remaining := task.deadline.remaining()) <= 0:
            raise DeadlinePassed(task_id=task.task_id, late=-remaining)
        if parent is not None and (task.key is not None or task.thread_id is not None):
            self._check_deadlock(task, parent)
        return pool, parent

    def pool_of(self, task_type: str) -> Pool:
        """Return the pool of a task type.

        Raises:
            UnknownTaskType: there is none.
        """
        pool = self._pools.get(task_type)
        if pool is None:
            known = ", ".join(sorted(self._pools)) or "none yet"
            raise UnknownTaskType(task_type=task_type, known=known)
        return pool

    def _check_open(self, parent: RunningTask | None) -> None:
        """Raise SupervisorClosed if nothing that `parent` submits is admitted any more."""
        if self._state is _OPEN:
            return
        inside = isinstance(parent, DetachedTask) or next(active_runs(parent, self._dispatcher), None) is not None
        if self._state is _State.CLOSED or not inside:
            raise SupervisorClosed(state=self._state.value)

    def _check_deadlock(self, task: Task, parent: RunningTask) -> None:
        """Raise WouldDeadlock if a task has the conversation or the key of a run above it that has not ended."""
        for run in active_runs(parent, self._dispatcher):
            for field, what in (("thread_id", "the conversation"), ("key", "the key")):
                name = getattr(task, field)
                if name is not None and name == getattr(run.task, field):
                    raise WouldDeadlock(
                        what=f"Task {task.task_id!r} has {what} {name!r} of the run of task {run.task.task_id!r}, in"
                        " which it is nested: it",
                        advice=f"give it another {field}, or let the handler return what comes next, and submit that"
                        " from where its result is awaited",
                    )

    # --- keys ---

    async def _find_by_key(self, key: str) -> Ticket | None:
        """Return the ticket that was submitted under `key` before, if any."""
        while (undecided := self._undecided.get(key)) is not None:
            await undecided.wait()  # then look again: it may have been rejected
        if key not in self._keys and self._dispatcher.spill is not None:
            self._key_lookups[key] = self._key_lookups.get(key, 0) + 1
            try:
                found = await self._dispatcher.spill.lookup.by_key(key)
            finally:
                self._key_lookups[key] -= 1
                if not self._key_lookups[key]:
                    del self._key_lookups[key]
            if key in self._keys:
                return await self._find_by_key(key)  # submitted meanwhile
            if found is not None and (found.result is None or found.result.success):  # else it has failed meanwhile
                self._keys[key] = found
        return self._keys.get(key)

    # --- the decision ---

    def _new_ticket(self, task: Task, parent: RunningTask | None, *, in_line: bool = False) -> Ticket:
        deadline = task.deadline
        if parent is not None and parent.deadline is not None:
            deadline = parent.deadline if deadline is None else min(parent.deadline, deadline, key=Deadline.remaining)
        active = None
        if parent is not None:
            if sum(1 for _ in run_and_ancestors(parent)) > _MAX_NESTING:
                raise NestedTooDeep(task_id=task.task_id, bound=_MAX_NESTING)
            active = [*active_runs(parent, self._dispatcher)]
        spill = self._dispatcher.spill
        submitted_at = clock.wall_time() if deadline is not None and spill is None else None
        if spill is not None:
            submitted_at = spill.submission_time()
        own = copy_context() or NO_VARIABLES
        ticket = Ticket(self._dispatcher, task, deadline, parent, submitted_at, own)
        if in_line:
            ticket.stand_in_line(waits=True)
        if parent is not None:
            ticket.descend(depth(parent))
        if active:
            ticket.nest(order_time=active[-1].ticket.place_in_store)
        if task.key is not None:
            self._keys[task.key] = ticket
            if task.key in self._key_lookups:
                ticket.share()
        return ticket

    def _try_admit(  # noqa: PLR0911 - one for each reason
        self, ticket: Ticket, pool: Pool, *, may_spill: bool
    ) -> Refusal | None:
        """Start or queue a task, or return why it is not admitted. Both are done when this returns."""
        if isinstance(ticket.parent, DetachedTask):
            self._admit_detached(ticket, pool)
            return None
        priority = ticket.task.priority
        if ticket.task.not_before is not None and ticket.task.starts_in():
            return self._try_hold(ticket, pool)
        remaining = math.inf if ticket.deadline is None else ticket.deadline.remaining()
        tenant = ticket.task.tenant
        path_load, resource = self._load.on_path(pool, priority, nested=ticket.nested, tenant=tenant)
        if ticket.task.thread_id is not None and ticket.lease is None:  # one with a lease is the first of those stored
            refusal = self._conversation_refusal(ticket, pool, path_load, remaining, may_spill=may_spill)
            if refusal is not None:
                return refusal
        if may_spill and not ticket.nested and pool.spilled_ahead(priority, tenant):
            pool.record_not_admitted(self.loop.time(), ticket.task, remaining)
            worth = self._worth_storing(ticket, pool, remaining)
            cause = self._load.limiting_resource(resource)
            return Refusal("earlier tasks of its type wait in the overflow", cause, path_load, may_spill=worth)
        load = path_load
        worker = self._free_worker(ticket, pool)
        if worker is not None:
            load, resource = self._load_at_free_slot(ticket, pool)
        elif pool.takes_turns and not ticket.nested and (own := self._tenants.load(tenant)) and own >= load:
            load, resource = own, RESOURCE_PREFIX + tenant
        if self.thresholds.rejects(priority, load) and not self._finishes_a_run(ticket, pool):
            pool.record_not_admitted(self.loop.time(), ticket.task, remaining)
            worth = may_spill and self._worth_storing(ticket, pool, remaining)
            return self._refusal(priority, pool, resource, load, may_spill=worth, slot_is_free=worker is not None)
        if remaining < math.inf and self._misses_deadline(ticket, pool, worker, remaining):
            pool.record_not_admitted(self.loop.time(), ticket.task, remaining)
            why = f"its deadline in {format_duration(remaining)} cannot be met"
            return Refusal(why, resource, load, may_spill=False, final=True)
        self._admit(ticket, pool, worker, path_load)
        return None

    def _admit_detached(self, ticket: Ticket, pool: Pool) -> None:
        """Admit a task that a compensation has submitted, ahead of all others: it is never shed."""
        ticket.raise_priority(Priority.CRITICAL)
        self._admit(ticket, pool, self._free_worker(ticket, pool), self._load.on_path(pool, Priority.CRITICAL)[0])

    def _admit(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None, load: float) -> None:
        ticket.admit(load)
        if ticket.in_line:
            ticket.stand_in_line(waits=False)
        self.submitted += 1
        self._registry.types.of(pool.task_type).submitted += 1
        if self._bus.active:
            self._emit_submitted(ticket)  # before it starts, which is the next event
        self._dispatcher.start_or_queue(ticket, pool, worker)
        if ticket.task.thread_id is not None:
            self._interrupt_conversation(ticket)

    def _try_hold(self, ticket: Ticket, pool: Pool) -> Refusal | None:
        """Hold a task here until its `not_before`, or return why it is not admitted.

        The load of now says nothing about then. It is judged by how many wait so.
        """
        if (late := self._misses_deadline_after_start(ticket, pool)) is not None:
            return late
        priority, tenant, resource = ticket.task.priority, ticket.task.tenant, pool.resource
        load = pool.delayed_load(tenant, nested=ticket.nested) if pool.is_served else 1.0
        if not ticket.nested and (own := self._tenants.load(tenant)) and own >= load:
            load, resource = own, RESOURCE_PREFIX + tenant
        if self.thresholds.rejects(priority, load) and not self._finishes_a_run(ticket, pool):
            return self._refusal(priority, pool, resource, load, may_spill=False, slot_is_free=True)
        self._admit(ticket, pool, None, load)
        return None

    def _load_at_free_slot(self, ticket: Ticket, pool: Pool) -> tuple[float, str]:
        """Return the load at which a task is judged that would start at once, and the resource that limits it.

        Its pool counts only for tasks that wait for their next attempt.
        """
        load, resource = self._load.beyond_pool(pool, ticket.task.priority)
        if pool.delayed and (own := pool.delayed_load(ticket.task.tenant, nested=ticket.nested)) > load:
            return own, pool.resource
        return load, resource

    def _finishes_a_run(self, ticket: Ticket, pool: Pool) -> bool:
        """Return whether a run needs a task to finish while the supervisor drains, or while its last worker leaves.

        Such a task may not wait in the overflow, from which nothing comes back now, and its rejection would make the
        run fail for good, though nothing is wrong with it.
        """
        if not ticket.nested:
            return False
        if not pool.is_served:
            return pool.finishing > 0
        return self._state is not _OPEN and pool.ever_serves(ticket.task.priority)

    def _free_worker(self, ticket: Ticket, pool: Pool) -> WorkerAgent | None:
        """Return the worker that would run a task at once, or None if it would wait."""
        task = ticket.task
        if task.thread_id is not None and self._dispatcher.conversations.get(task.thread_id) is not None:
            return None
        priority = task.priority
        if pool.takes_turns:
            if pool.must_wait(priority, task.tenant):
                return None
        elif pool.queue.ahead(priority) if priority <= URGENT else pool.queue.length:
            return None
        gate = self._dispatcher.start_gate
        return gate.pick(pool, priority, nested=ticket.nested, idle_first=priority <= URGENT, ticket=ticket)

    def _misses_deadline(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None, remaining: float) -> bool:
        """Return whether a task that would start on `worker`, or wait, is expected to end after its deadline."""
        task, wait = ticket.task, 0.0
        if worker is None:
            wait = pool.expected_wait(task.priority, task.tenant, nested=ticket.nested) or 0.0
        conversation = self._dispatcher.conversations.get(ticket.task.thread_id)
        if conversation is not None:
            wait = max(wait, len(conversation.tickets) * (pool.service_times.median() or 0.0))
        now, estimate = self.loop.time(), task.estimate
        if remaining <= 0:
            return True
        if not wait:
            return pool.cannot_meet_deadline(now, remaining, estimate=estimate)
        return pool.would_wait_too_long(now, wait, remaining, task.priority, estimate=estimate)

    def _misses_deadline_after_start(self, ticket: Ticket, pool: Pool) -> Refusal | None:
        """Return why a task that starts at its `not_before` would miss its deadline, or None if it would not."""
        if ticket.deadline is None:
            return None
        remaining = ticket.deadline.remaining() - ticket.task.starts_in()
        if remaining > 0 and not pool.cannot_meet_deadline(self.loop.time(), remaining, estimate=ticket.task.estimate):
            return None
        how = f"{format_duration(abs(remaining))} {'after' if remaining > 0 else 'before'} its not_before"
        load = self._load.on_path(pool, ticket.task.priority)[0]
        return Refusal(f"its deadline, {how}, cannot be met", None, load, may_spill=False, final=True)

    def _conversation_refusal(
        self, ticket: Ticket, pool: Pool, load: float, remaining: float, *, may_spill: bool
    ) -> Refusal | None:
        """Return why a task may not come inside because of its conversation, or None if it may."""
        thread_id, conversations = ticket.task.thread_id or "", self._dispatcher.conversations
        if ticket.task.on_busy == "reject":
            is_busy = conversations.get(thread_id) is not None or conversations.waits_in_overflow(thread_id)
            return self._busy_refusal(ticket, pool, load) if is_busy else None
        if not self._is_conversation_full(thread_id, pool, nested=ticket.nested):
            return None
        if ticket.task.on_busy == "interrupt" and not conversations.waits_in_overflow(thread_id):
            return None  # those that wait are about to be cancelled
        may_spill = may_spill and self._worth_storing(ticket, pool, remaining)
        conversation = conversations.get(thread_id)
        if not ticket.nested and conversations.waits_in_overflow(thread_id):
            reason = "earlier tasks of its conversation wait in the overflow"
        else:
            reason = f"{0 if conversation is None else conversation.parked} tasks of its conversation wait already"
        retry_after = None if may_spill else self._conversation_retry_after(pool, conversation)
        return Refusal(reason, f"conversation:{thread_id}", load, may_spill=may_spill, retry_after=retry_after)

    def _busy_refusal(self, ticket: Ticket, pool: Pool, load: float) -> Refusal:
        """Return why a task is rejected that is not to wait behind its conversation."""
        thread_id = ticket.task.thread_id or ""
        retry_after = self._conversation_retry_after(pool, self._dispatcher.conversations.get(thread_id))
        reason, limited_by = "another task of its conversation has not ended", f"conversation:{thread_id}"
        return Refusal(reason, limited_by, load, may_spill=False, retry_after=retry_after)

    def _interrupt_conversation(self, ticket: Ticket) -> None:
        """Cancel what was in the conversation before a task that interrupts it."""
        if ticket.task.on_busy != "interrupt":
            return
        conversation = self._dispatcher.conversations.get(ticket.task.thread_id)
        for earlier in list(() if conversation is None else conversation.tickets):
            if earlier is ticket:
                return
            earlier.cancel(f"interrupted by task {ticket.task_id!r} of its conversation")

    def _is_conversation_full(self, thread_id: str, pool: Pool, *, nested: bool) -> bool:
        """Return whether a task may not come inside because of its conversation."""
        conversations = self._dispatcher.conversations
        if not nested and conversations.waits_in_overflow(thread_id):
            return True
        conversation = conversations.get(thread_id)
        return conversation is not None and not pool.may_park(conversation.parked)

    def _is_nested(self) -> bool:
        """Return whether what the present context submits is a nested task."""
        return next(active_runs(context.running_task(), self._dispatcher), None) is not None

    def _conversation_retry_after(self, pool: Pool, conversation: Conversation | None) -> float:
        """Return the seconds after which a conversation takes another task; infinity if unknown.

        It takes one in each service time.
        """
        seconds = pool.service_times.median()
        if conversation is None or not seconds:
            return math.inf
        return conversation.retry_schedule.reserve(self.loop.time(), 1 / seconds, self._draw()) or math.inf

    def _refusal(  # noqa: PLR0913 - what it says, by name
        self, priority: Priority, pool: Pool, resource: str, load: float, *, may_spill: bool, slot_is_free: bool
    ) -> Refusal:
        """Return why a task is not admitted at a load of `resource`."""
        cause = self._load.limiting_resource(resource)
        reason = self._refusal_reason(pool, resource, cause, load, priority)
        # What waits for its next attempt does not leave at the rate of the slots.
        retry_after = math.inf if slot_is_free and resource == pool.resource else None
        final = pool.is_given_up
        return Refusal(reason, cause, load, may_spill=may_spill, retry_after=retry_after, final=final)

    def _refusal_reason(self, pool: Pool, resource: str, cause: str, load: float, priority: Priority) -> str:
        if pool.paused:
            return f"{pool.task_type!r} is paused, and {resource} is at {load:.0%}"
        if not pool.slots:
            return self._no_slots(pool)
        if pool.reserved_slots(priority)[0] >= pool.slots:
            others = "all its slots are" if not pool.ever_serves(priority) else "all slots that are not FAILED are"
            return f"{priority.name} has no slot for {pool.task_type!r}: {others} reserved for CRITICAL and HIGH"
        full = f"{resource} is at {load:.0%}"
        if cause != resource:
            full += f" because of {cause}"
        return f"{full}, and {priority.name} is rejected from {self.thresholds.threshold_for(priority):.0%}"

    def _no_slots(self, pool: Pool) -> str:
        """Return why a pool has no slots."""
        workers = f"every worker for {pool.task_type!r}"
        if not pool.is_served:
            return f"{workers} was unregistered"
        now = self.loop.time()
        if any(worker.breaker.retry_after(now) is not None for worker in pool.workers):
            return f"{workers} is FAILED"
        name = next(iter(pool.workers)).name
        return f"{workers} is FAILED until it is revived, by supervisor.workers[{name!r}].revive(); the log says why"

    def _worth_storing(self, ticket: Ticket, pool: Pool, remaining: float) -> bool:
        """Return whether a task with `remaining` seconds could meet its deadline if it waits in the overflow."""
        if remaining == math.inf:
            return True
        task = ticket.task
        wait = pool.expected_wait(task.priority, task.tenant, nested=ticket.nested, spilled=True)
        return wait is None or wait < min(remaining, pool.max_wait(remaining, task.estimate))

    # --- the verdict ---

    def _reject(self, ticket: Ticket, pool: Pool, refusal: Refusal) -> Ticket:
        if ticket.in_line and not refusal.final:  # no slot of the retry schedule: it comes back by itself
            ticket.reject(refusal, None)
            self._registry.forget_key(ticket)
            return ticket
        ticket.stand_in_line(waits=False)
        retry_after = refusal.retry_after
        if retry_after is None:
            retry_after = self._retry_after(pool, ticket.task)
        ticket.reject(refusal, None if retry_after == math.inf else retry_after)
        self._registry.forget_key(ticket)
        self.rejected += 1
        self._registry.types.of(pool.task_type).rejected += 1
        if refusal.limited_by in (None, pool.resource, store_load.RESOURCE):
            pool.count_refused(ticket.task.priority)
        self._submitted(ticket)
        return ticket

    def _retry_after(self, pool: Pool, task: Task) -> float | None:
        """Return the seconds after which a rejected task would be admitted, or None if unknown."""
        now = self.loop.time()
        if not pool.slots:
            known = (worker.breaker.retry_after(now) for worker in pool.workers)
            return min((seconds for seconds in known if seconds is not None), default=None)
        threshold = self.thresholds.threshold_for(task.priority)
        source_wait = self._load.time_until_below(pool, task.priority, threshold)
        return pool.next_retry_slot(now, self._draw(), task.priority, task.tenant, source_wait=source_wait)

    def _submitted(self, ticket: Ticket) -> None:
        """Count and report a verdict."""
        self.submitted += 1
        self._registry.types.of(ticket.task.task_type).submitted += 1
        if self._bus.active:
            self._emit_submitted(ticket)
            self._bus.limit_backlog()  # a caller that goes on when it is rejected may never give the loop a turn

    def _emit_submitted(self, ticket: Ticket) -> None:
        task = ticket.task
        self._bus.emit(
            TaskSubmitted(
                at=self.loop.time(),
                task_id=task.task_id,
                task_type=task.task_type,
                priority=task.priority,
                verdict=ticket.verdict,
                reason=ticket.reason,
                limited_by=ticket.limited_by,
                load=ticket.load,
            )
        )

    # --- the overflow ---

    async def _answer_in_time(self, task: Task, deadline: Deadline | None, pool: Pool, answer: Awaitable[T]) -> T:
        """Wait for what the store decides, for no longer than the task may take.

        Raises:
            StoreUnavailable: it has not answered in time.
        """
        seconds = task.timeout or pool.max_timeout
        if deadline is not None:
            seconds = min(seconds, deadline.remaining())
        try:
            async with asyncio.timeout(seconds) as limit:
                return await answer
        except TimeoutError:
            if not limit.expired():
                raise
            why = f"it has not answered about task {task.task_id!r} within {format_duration(max(seconds, 0.0))}"
            advice = (
                "Look at its disk. If it stores the task after all, the task is cancelled, unless others wait for it."
            )
            raise StoreUnavailable(where="the overflow", why=why, advice=advice) from None

    async def _await_store(self, ticket: Ticket, deciding: Coroutine[Any, Any, Ticket]) -> Ticket:
        """Wait for the store even if the caller is cancelled; then cancel the task, unless others wait for its key."""
        ticket.begin_store_call()
        self._registry.add(ticket)  # before any await, so that no other task takes its id

        def answered(answer: asyncio.Future[Ticket]) -> None:
            ticket.end_store_call()
            self._undecided.pop(ticket.task.key or "", None)
            self._resolve_key_waiters(ticket, answer)
            if answer.cancelled() or answer.exception() is not None or answer.result() is not ticket or not ticket:
                self._registry.discard(ticket)
            elif ticket.cancel_reason is not None:
                ticket.cancel(ticket.cancel_reason)
            elif undecided.callers > 1:
                ticket.share()
            elif undecided.is_abandoned():
                ticket.cancel(_ABANDONED)
            if (spill := self._dispatcher.spill) is not None and ticket:
                spill.stored.release_if_left(ticket)  # draining may have begun while it was decided

        answer = self._core.run_to_completion(deciding)
        undecided = _Undecided(ticket, answer)
        if ticket.task.key:
            self._undecided[ticket.task.key] = undecided
        answer.add_done_callback(answered)
        await undecided.wait()
        if answer.cancelled():
            raise _store_failed(asyncio.CancelledError())
        return answer.result()

    def _resolve_key_waiters(self, ticket: Ticket, answer: asyncio.Future[Ticket]) -> None:
        """If the task was not stored, answer the callers that got its ticket by its key meanwhile."""
        error = asyncio.CancelledError() if answer.cancelled() else answer.exception()
        if error is not None:
            self._registry.forget_key(ticket)
            if not ticket.done():
                ticket.resolve(fresh_copy(error) if isinstance(error, ForebayError) else _store_failed(error))
        elif not ticket:
            ticket.wake_waiters()
        elif (other := answer.result()) is not ticket and not ticket.done():
            cancelled = partial(ticket.resolve, _store_failed(asyncio.CancelledError()))
            self._core.run_in_background(ticket.follow(other), if_cancelled=cancelled)

    async def _schedule(self, ticket: Ticket, envelope: bytes, pool: Pool, spill: Spill) -> Ticket:
        if (late := self._misses_deadline_after_start(ticket, pool)) is not None:
            return self._reject(ticket, pool, late)
        why = "it waits in the overflow for its not_before"
        refusal = Refusal(why, None, self._load.on_path(pool, ticket.task.priority)[0], may_spill=True)
        return await self._spill(ticket, refusal, envelope, pool, spill)

    async def _spill(self, ticket: Ticket, refusal: Refusal, envelope: bytes, pool: Pool, spill: Spill) -> Ticket:
        ticket.explain(refusal)
        if self.thresholds.rejects(ticket.task.priority, load := spill.stored.load.slowness()):
            refusal = Refusal(f"{refusal.reason}, and the overflow is slow", store_load.RESOURCE, load, may_spill=False)
            return self._reject(ticket, pool, refusal)
        # Behind tasks of its conversation that only this process knows, it is held here, or another would run it now.
        held = not ticket.task.starts_in() and self._dispatcher.conversations.get(ticket.task.thread_id) is not None
        try:
            put = await (spill.record(ticket, envelope, pool) if held else spill.spill(ticket, envelope, pool))
        except StoreUnavailable as exc:
            self._core.failures.report("task %r could not be spilled", ticket.task_id, error=exc)
            why = "the overflow cannot store it"
            if isinstance(exc, StoreAnswerLost):
                why += ", or has it although it gave no answer: then it may run"
            refusal = Refusal(why, store_load.RESOURCE, 1.0, may_spill=False)
            return self._reject(ticket, pool, refusal)
        if not put.written:
            return await self._not_stored(ticket, put, pool, spill)
        if put is PutResult.PARKED and ticket.task.on_busy == "reject" and ticket.status is not TaskStatus.SPILLED:
            return self._reject(ticket, pool, self._busy_refusal(ticket, pool, refusal.load))
        if held and put is PutResult.STORED:
            if self._state is not _State.CLOSED and not spill.stored.stays_stored and pool.is_known:
                return self._admit_held(ticket, pool, refusal.load)
            await spill.spill_recorded(ticket, pool)
        self._count_spilled(ticket)
        return ticket

    def _admit_held(self, ticket: Ticket, pool: Pool, load: float) -> Ticket:
        """Admit a task that has its record and its lease, behind its conversation."""
        ticket.forget_refusal()
        ticket.admit(load)
        self._submitted(ticket)
        self._dispatcher.start_or_queue(ticket, pool, self._free_worker(ticket, pool))
        self._interrupt_conversation(ticket)
        return ticket

    def _count_spilled(self, ticket: Ticket) -> None:
        self.spilled += 1
        self._registry.types.of(ticket.task.task_type).spilled += 1
        self._submitted(ticket)
        self._interrupt_conversation(ticket)

    async def _admit_durable(self, ticket: Ticket, envelope: bytes, pool: Pool, spill: Spill) -> Ticket:
        put = await spill.record(ticket, envelope, pool)
        if put is PutResult.PARKED and ticket.task.on_busy == "reject" and ticket.status is not TaskStatus.SPILLED:
            return self._reject(ticket, pool, self._busy_refusal(ticket, pool, self._load.on_path(pool)[0]))
        if put is PutResult.PARKED:
            reason = "earlier tasks of its conversation are in the overflow"
            limited_by = f"conversation:{ticket.task.thread_id}"
            ticket.explain(Refusal(reason, limited_by, self._load.on_path(pool)[0], may_spill=True))
            self._count_spilled(ticket)
            return ticket
        if put is not PutResult.STORED:
            return await self._not_stored(ticket, put, pool, spill)
        if self._state is _State.CLOSED:
            refusal: Refusal | None = Refusal("the supervisor has closed", None, 1.0, may_spill=True)
        elif _is_left(ticket, spill):
            # Draining moves what waits to the overflow, and a message must not run before those of its conversation.
            refusal = Refusal("the supervisor is draining", None, 1.0, may_spill=True)
        else:
            refusal = self.try_admit(ticket, pool, may_spill=ticket.task.spill and _may_spill(ticket, spill))
        if refusal is None:
            return ticket
        if not refusal.may_spill:
            await spill.remove_record(ticket)
            return self._reject(ticket, pool, refusal)
        ticket.explain(refusal)
        await spill.spill_recorded(ticket, pool)
        self._count_spilled(ticket)
        return ticket

    async def _not_stored(self, ticket: Ticket, put: PutResult, pool: Pool, spill: Spill) -> Ticket:
        if put is PutResult.FULL:
            refusal = Refusal("the overflow is full", store_load.RESOURCE, 1.0, may_spill=False)
            return self._reject(ticket, pool, refusal)
        self._registry.forget_key(ticket)
        if ticket.task.key is not None and (known := await spill.lookup.by_key(ticket.task.key)) is not None:
            self._keys[ticket.task.key] = known
            return known
        raise DuplicateTask(task_id=ticket.task_id)


def _time_left(task: Task, parent: RunningTask | None) -> float:
    """Return the seconds until the deadline of a task, its own or its parent's."""
    deadlines = (task.deadline, None if parent is None else parent.deadline)
    return min((deadline.remaining() for deadline in deadlines if deadline is not None), default=math.inf)


def _store_failed(error: BaseException) -> StoreUnavailable:
    """Return the error for those who wait for a task that its submitter could not store."""
    if isinstance(error, asyncio.CancelledError):  # by the end of the supervisor, or a program that cancels everything
        why, advice = "the wait for its answer was cancelled", "It may have the task: ask for it by its id or its key."
        return StoreUnavailable(where="the overflow", why=why, advice=advice)
    why = f"it raised {type(error).__name__}"
    return StoreUnavailable(where="the overflow", why=why, advice="The submitter has the error.")


class _Undecided:
    """A ticket on which the store has not answered, and its callers: the submitter, and those who came by its key.

    The task is cancelled if all of them leave.
    """

    __slots__ = ("_answer", "_ticket", "callers")

    def __init__(self, ticket: Ticket, answer: asyncio.Future[Ticket]) -> None:
        self._ticket = ticket
        self._answer = answer
        self.callers = 0

    async def wait(self) -> None:
        """Wait for the answer as one more caller."""
        self.callers += 1
        try:
            await asyncio.wait((self._answer,))
        except asyncio.CancelledError:
            self.callers -= 1
            if self.is_abandoned() and self._answer.done():  # otherwise the answer may find another caller
                self._ticket.cancel(_ABANDONED)
            raise

    def is_abandoned(self) -> bool:
        """Return whether all callers have left, and nobody else got the ticket by its key or awaits it by its id."""
        return not (self.callers or self._ticket.shared or self._ticket.is_observed)


def _check_durable(task: Task, spill: Spill | None) -> None:
    """Raise OverflowRequired unless `spill` can record a durable task."""
    if spill is not None and spill.stored.durable:
        return
    why = "there is no overflow to record it in"
    advice = 'give the supervisor one, for example overflow="sqlite:///spill.db"'
    if spill is not None:
        why = "the overflow does not survive its process"
        advice = 'use one that does, for example overflow="sqlite:///spill.db"'
    raise OverflowRequired(task_id=task.task_id, why=why, advice=advice)


def _is_left(ticket: Ticket, spill: Spill) -> bool:
    """Return whether a task that has its record is left to the next process, since this one drains."""
    return spill.stored.stays_stored and _may_spill(ticket, spill)


def _may_spill(ticket: Ticket, spill: Spill) -> bool:
    """Return whether a task may wait in the overflow.

    While draining, nothing comes back from there, so a task whose parent still runs, and may await it, stays inside.
    """
    return not spill.stored.stays_stored or not isinstance(ticket.parent, Run) or ticket.parent.ended
