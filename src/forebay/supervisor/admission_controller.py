"""The door: a task's way from `submit` to its verdict."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Coroutine
from enum import Enum
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from forebay import clock, context
from forebay.context import RunningTask
from forebay.errors import (
    DeadlinePassed,
    DuplicateTask,
    ForebayError,
    InvalidTask,
    OverflowRequired,
    StoreUnavailable,
    SupervisorClosed,
    UnknownTaskType,
)
from forebay.events import TaskSubmitted, log
from forebay.interfaces import PutResult
from forebay.supervisor.dispatcher import Dispatcher
from forebay.supervisor.runs.nested import active_runs
from forebay.supervisor.runs.run import Run
from forebay.supervisor.slot import Slot
from forebay.supervisor.ticket import Ticket
from forebay.task import Priority, Task, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.worker import WorkerAgent


_WATERFALL_PRIORITY = Priority.HIGH  # it and better go to an idle worker first


class Refusal(NamedTuple):
    """Why a task was not let in."""

    reason: str
    limited_by: str | None
    load: float
    may_spill: bool
    retry_after: float | None = None  # seconds, infinity where that is not known; None: ask the house for a seat


class TryAdmit(Protocol):
    """Lets a task in, to run or to wait, or says why not."""

    def __call__(self, ticket: Ticket, pool: Pool, *, may_spill: bool) -> Refusal | None: ...  # noqa: D102 - above


class _State(Enum):
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


_OPEN = _State.OPEN  # an enum's attribute is dear on the hot path


class AdmissionController:
    """Checks what is submitted, asks the dispatcher, and sends the refused outside or away."""

    def __init__(self, dispatcher: Dispatcher) -> None:
        self._dispatcher = dispatcher
        self.loop = dispatcher.loop
        self._state = _OPEN
        self._keys: dict[str, Ticket] = {}
        self._store_answers: dict[str, asyncio.Future[Ticket]] = {}  # by key, while the store has not answered
        self.try_admit: TryAdmit = self._try_admit  # forebay.testing stands in front of it

    @property
    def dispatcher(self) -> Dispatcher:
        """What it is the door of."""
        return self._dispatcher

    def stop_admitting(self) -> None:
        """Take work only from what is inside already."""
        if self._state is _State.OPEN:
            self._state = _State.DRAINING

    def close(self) -> None:
        """Take no more work."""
        self._state = _State.CLOSED

    async def submit(self, task: Task) -> Ticket:
        """As ``BackpressureSupervisor.submit``."""
        return await self._submit(self._with_typed_payload(task))

    async def run(self, task: Task) -> Any:
        """As ``BackpressureSupervisor.run``."""
        task = self._with_typed_payload(task)
        ticket = await self._submit(task)
        return await ticket.value(abandon=ticket.task is task)  # not what another submitted under the same key

    def _with_typed_payload(self, task: Task) -> Task:
        """The task with a payload of the declared type, if one is declared."""
        return self._dispatcher.codecs.fit_payload(task) if isinstance(task, Task) else task

    async def _submit(self, task: Task) -> Ticket:
        pool, parent = self._check(task)
        overflow = self._dispatcher.spill
        if task.durable and overflow is None:
            advice = 'give the supervisor one, for example overflow="sqlite:///spill.db"'
            raise OverflowRequired(task_id=task.task_id, why="there is no overflow to record it in", advice=advice)
        if task.durable and overflow is not None and not overflow.durable:
            advice = 'use one that does, for example overflow="sqlite:///spill.db"'
            raise OverflowRequired(task_id=task.task_id, why="the overflow does not survive its process", advice=advice)
        if task.key is not None:
            if (known := await self._find_by_key(task.key)) is not None:
                return known
            self._check(task)  # again: much may have happened during the await
        if overflow is None or not (task.spill or task.durable):
            ticket = self._new_ticket(task, parent)
            return self._conclude(ticket, pool, self.try_admit(ticket, pool, may_spill=False))
        envelope = overflow.encode(task)
        ticket = self._new_ticket(task, parent)
        if task.durable:
            return await self._await_store(ticket, self._admit_durable(ticket, envelope, pool, overflow))
        refusal = self.try_admit(ticket, pool, may_spill=_may_spill(ticket, overflow))
        if refusal is not None and refusal.may_spill:
            return await self._await_store(ticket, self._spill(ticket, refusal, envelope, pool, overflow))
        return self._conclude(ticket, pool, refusal)

    async def _await_store(self, ticket: Ticket, deciding: Coroutine[Any, Any, Ticket]) -> Ticket:
        """Let the store answer, though whoever waits for it may leave; then the task is cancelled once that may be."""
        ticket.pending_store_calls += 1
        self._dispatcher.tickets[ticket.task_id] = ticket  # before any await, so that no other takes its id

        def decided(answer: asyncio.Future[Ticket]) -> None:
            ticket.pending_store_calls -= 1
            self._store_answers.pop(ticket.task.key or "", None)
            self._resolve_key_waiters(ticket, answer)
            if answer.cancelled() or answer.exception() is not None or answer.result() is not ticket or not ticket:
                if self._dispatcher.tickets.get(ticket.task_id) is ticket:
                    del self._dispatcher.tickets[ticket.task_id]
            elif ticket.cancel_reason is not None:
                ticket.cancel(ticket.cancel_reason)

        answer = self._dispatcher.run_to_completion(deciding)
        if ticket.task.key:
            self._store_answers[ticket.task.key] = answer
        answer.add_done_callback(decided)
        try:
            return await asyncio.shield(answer)
        except asyncio.CancelledError:
            ticket.cancel("its submitter has gone")
            raise

    def _resolve_key_waiters(self, ticket: Ticket, answer: asyncio.Future[Ticket]) -> None:
        """Answer those who got the ticket by its key before it was decided, if it is not to be."""
        if answer.cancelled():
            return
        error = answer.exception()
        if error is not None:
            self._forget_key(ticket)
            if isinstance(error, ForebayError) and not ticket.done():
                ticket.resolve(error)
        elif not ticket:
            ticket.wake_waiters()
        elif (other := answer.result()) is not ticket and not ticket.done():
            self._dispatcher.run_in_background(ticket.follow(other))

    def submit_nowait(self, task: Task) -> Ticket:
        """As ``BackpressureSupervisor.submit_nowait``."""
        task = self._with_typed_payload(task)
        pool, parent = self._check(task)
        if task.durable:
            advice = "use `await submit(...)`"
            raise OverflowRequired(task_id=task.task_id, why="submit_nowait cannot wait for its record", advice=advice)
        if task.key is not None and (known := self._keys.get(task.key)) is not None:
            return known
        if self._dispatcher.spill is not None and task.spill:
            self._dispatcher.spill.encode(task)  # draining may put it there: what cannot travel is refused now
        ticket = self._new_ticket(task, parent)
        return self._conclude(ticket, pool, self.try_admit(ticket, pool, may_spill=False))

    def slot(self, task: Task) -> Slot:
        """As ``BackpressureSupervisor.slot``."""
        pool, parent = self._check(task)

        def offer(ticket: Ticket) -> None:
            self._check(task)
            self._conclude(ticket, pool, self.try_admit(ticket, pool, may_spill=False))

        return Slot(self._dispatcher, self._new_ticket(task, parent), offer)

    def _check(self, task: Task) -> tuple[Pool, RunningTask | None]:
        if not isinstance(task, Task):
            raise InvalidTask(
                field="itself", value=type(task).__name__, expected='a Task, such as Task("research", {...})'
            )
        parent = context.running_task()
        if self._state is not _OPEN:
            inside = next(active_runs(parent, self._dispatcher), None) is not None
            if self._state is _State.CLOSED or not inside:
                raise SupervisorClosed(state=self._state.value)
        pool = self._dispatcher.pools.get(task.task_type)
        if pool is None:
            known = ", ".join(sorted(self._dispatcher.pools)) or "none yet"
            raise UnknownTaskType(task_type=task.task_type, known=known)
        twin = self._dispatcher.tickets.get(task.task_id)
        if twin is None and self._dispatcher.spill is not None:
            twin = self._dispatcher.spill.weak_tickets.get(task.task_id)
        if twin is not None and (task.key is None or self._keys.get(task.key) is not twin):
            raise DuplicateTask(task_id=task.task_id)
        if task.deadline is not None and (remaining := task.deadline.remaining()) <= 0:
            raise DeadlinePassed(task_id=task.task_id, late=-remaining)
        return pool, parent

    async def _find_by_key(self, key: str) -> Ticket | None:
        """The ticket of the same work, if it was submitted before."""
        while (deciding := self._store_answers.get(key)) is not None:
            await asyncio.wait([deciding])  # it may be refused
        if key not in self._keys and self._dispatcher.spill is not None:
            found = await self._dispatcher.spill.lookup.by_key(key)
            if key in self._keys:
                return await self._find_by_key(key)  # submitted meanwhile
            if found is not None:
                self._keys[key] = found
        return self._keys.get(key)

    def _new_ticket(self, task: Task, parent: RunningTask | None) -> Ticket:
        deadline = task.deadline
        if parent is not None and parent.deadline is not None:
            deadline = parent.deadline if deadline is None else min(parent.deadline, deadline)
        ticket = Ticket(self._dispatcher, task, deadline, parent)
        if self._dispatcher.spill is not None:
            ticket.submitted_at = self._dispatcher.spill.submission_time()
        elif deadline is not None:
            ticket.submitted_at = clock.wall_time()
        if task.key is not None:
            self._remember_key(task.key, ticket)
        return ticket

    def _remember_key(self, key: str, ticket: Ticket) -> None:
        if len(self._keys) > 2 * (len(self._dispatcher.tickets) + self._dispatcher.keep_results) + 16:
            live = {**self._dispatcher.tickets, **self._dispatcher.ended_tickets}
            self._keys = {key: known for key, known in self._keys.items() if known.task_id in live}
        self._keys[key] = ticket

    def _forget_key(self, ticket: Ticket) -> None:
        if ticket.task.key is not None and self._keys.get(ticket.task.key) is ticket:
            del self._keys[ticket.task.key]

    def _conclude(self, ticket: Ticket, pool: Pool, refusal: Refusal | None) -> Ticket:
        """Let in, or rejected."""
        if refusal is None:
            self._dispatcher.counts.admitted += 1
        else:
            self._reject(ticket, pool, refusal)
            self._emit_submitted(ticket)
        return ticket

    def _reject(self, ticket: Ticket, pool: Pool, refusal: Refusal) -> None:
        ticket.verdict = Verdict.REJECTED
        ticket.status = TaskStatus.REJECTED
        _explain(ticket, refusal)
        known = refusal.retry_after
        if known is None:
            known = self._dispatcher.retry_after(pool, ticket.task.priority)
        ticket.retry_after = None if known == math.inf else known
        self._forget_key(ticket)
        self._dispatcher.counts.rejected += 1

    def _try_admit(self, ticket: Ticket, pool: Pool, *, may_spill: bool) -> Refusal | None:
        """Let the task in, to run or to wait; or say why not. Whatever is decided has happened on return."""
        priority = ticket.task.priority
        remaining = math.inf if ticket.deadline is None else ticket.deadline.remaining()
        load, binding = self._dispatcher.load.on_path(pool, priority)
        ticket.load = load
        if may_spill and pool.spilled_ahead(priority):
            worth = self._worth_storing(pool, priority, remaining)
            cause = self._dispatcher.load.limiting_resource(binding)
            return Refusal("earlier work of its kind waits in the overflow", cause, load, may_spill=worth)
        worker = self._free_worker(ticket, pool)
        if worker is not None:
            load, binding = self._dispatcher.load.beyond_pool(pool, priority)
        if self._dispatcher.thresholds.rejects(priority, load):
            cause = self._dispatcher.load.limiting_resource(binding)
            reason = self._refusal_reason(pool, binding, cause, load, priority)
            worth = may_spill and self._worth_storing(pool, priority, remaining)
            return Refusal(reason, cause, load, may_spill=worth)
        if remaining < math.inf:
            wait = 0.0 if worker is not None else pool.expected_wait(priority) or 0.0
            if remaining <= 0 or pool.cannot_meet_deadline(self.loop.time(), wait, remaining):
                return Refusal(f"its deadline in {remaining:.3g} s cannot be met", binding, load, may_spill=False)
        self._emit_submitted(ticket)  # first that it came in, then that it started
        self._dispatcher.start_or_queue(ticket, pool, worker)
        return None

    def _free_worker(self, ticket: Ticket, pool: Pool) -> WorkerAgent | None:
        """The worker that would run it at once."""
        if ticket.task.thread_id is not None and ticket.task.thread_id in self._dispatcher.conversations:
            return None
        priority = ticket.task.priority
        waterfall = priority <= _WATERFALL_PRIORITY
        before = pool.queue.ahead(priority) if waterfall else pool.queue.length
        return None if before else self._dispatcher.start_gate.pick(pool, priority, idle_first=waterfall)

    def _refusal_reason(self, pool: Pool, binding: str, cause: str, load: float, priority: Priority) -> str:
        if not pool.slots:
            return f"every worker for {pool.task_type!r} is FAILED"
        full = f"{binding} is at {load:.0%}" if cause == binding else f"{binding} is at {load:.0%} for want of {cause}"
        return f"{full}, and {priority.name} is refused from {self._dispatcher.thresholds.threshold_for(priority):.0%}"

    def _worth_storing(self, pool: Pool, priority: Priority, remaining: float) -> bool:
        if remaining == math.inf:
            return True
        wait = pool.expected_wait(priority, spilled=True)
        return wait is None or wait < min(remaining, pool.service_times.max_wait(remaining))

    async def _spill(self, ticket: Ticket, refusal: Refusal, envelope: bytes, pool: Pool, overflow: Spill) -> Ticket:
        _explain(ticket, refusal)
        try:
            put = await overflow.spill(ticket, envelope, pool)
        except StoreUnavailable as exc:
            log.error("task %r could not be spilled: %s", ticket.task_id, exc)
            return self._conclude(
                ticket, pool, Refusal("the overflow cannot store it", "overflow", 1.0, may_spill=False)
            )
        if put is PutResult.STORED:
            self._dispatcher.counts.spilled += 1
            self._emit_submitted(ticket)
            return ticket
        return await self._not_stored(ticket, put, pool, overflow)

    async def _admit_durable(self, ticket: Ticket, envelope: bytes, pool: Pool, overflow: Spill) -> Ticket:
        put = await overflow.record(ticket, envelope)
        if put is not PutResult.STORED:
            return await self._not_stored(ticket, put, pool, overflow)
        if self._state is _State.CLOSED:
            refusal: Refusal | None = Refusal("the supervisor has closed", None, 1.0, may_spill=True)
        else:
            refusal = self.try_admit(ticket, pool, may_spill=ticket.task.spill and _may_spill(ticket, overflow))
        if refusal is None:
            return self._conclude(ticket, pool, None)
        if not refusal.may_spill:
            await overflow.remove_record(ticket)
            return self._conclude(ticket, pool, refusal)
        _explain(ticket, refusal)
        await overflow.spill_recorded(ticket, pool)
        self._dispatcher.counts.spilled += 1
        self._emit_submitted(ticket)
        return ticket

    async def _not_stored(self, ticket: Ticket, put: PutResult, pool: Pool, overflow: Spill) -> Ticket:
        if put is PutResult.FULL:
            refusal = Refusal("the overflow is full", "overflow", 1.0, may_spill=False)
            return self._conclude(ticket, pool, refusal)
        self._forget_key(ticket)
        if ticket.task.key is not None and (known := await overflow.lookup.by_key(ticket.task.key)) is not None:
            self._remember_key(ticket.task.key, known)
            return known
        raise DuplicateTask(task_id=ticket.task_id)

    def _emit_submitted(self, ticket: Ticket) -> None:
        self._dispatcher.counts.submitted += 1
        if not self._dispatcher.bus.active:
            return
        task = ticket.task
        self._dispatcher.bus.emit(
            TaskSubmitted(
                at=self._dispatcher.loop.time(),
                task_id=task.task_id,
                task_type=task.task_type,
                priority=task.priority,
                verdict=ticket.verdict,
                reason=ticket.reason,
                limited_by=ticket.limited_by,
                load=ticket.load,
            )
        )


def _may_spill(ticket: Ticket, overflow: Spill) -> bool:
    """Whether it may wait outside: once nothing comes back in, what a task inside may wait for stays inside."""
    return not overflow.refill_stopped or not isinstance(ticket.parent, Run) or ticket.parent.ended


def _explain(ticket: Ticket, refusal: Refusal) -> None:
    ticket.reason, ticket.limited_by, ticket.load = refusal.reason, refusal.limited_by, refusal.load
