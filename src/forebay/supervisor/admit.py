"""The door: a task's way from `submit` to its verdict."""

from __future__ import annotations

from enum import Enum
from typing import TYPE_CHECKING

from forebay import context
from forebay.context import RunningTask
from forebay.errors import (
    DeadlinePassed,
    DuplicateTask,
    InvalidTask,
    OverflowRequired,
    SupervisorClosed,
    UnknownTaskType,
)
from forebay.events import Submitted
from forebay.supervisor.dispatch import Dispatcher, Refusal
from forebay.supervisor.lend import held_slots
from forebay.supervisor.slot import Slot
from forebay.supervisor.ticket import Ticket
from forebay.task import Task, TaskStatus, Verdict
from forebay.typing import Put

if TYPE_CHECKING:
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.refill import Overflow


class _State(Enum):
    OPEN = "open"
    DRAINING = "draining"
    CLOSED = "closed"


class Door:
    """Checks what is submitted, asks the dispatcher, and sends the refused outside or away."""

    def __init__(self, house: Dispatcher) -> None:
        self._house = house
        self._state = _State.OPEN
        self._keys: dict[str, Ticket] = {}

    def shut(self) -> None:
        """Take work only from what is inside already."""
        if self._state is _State.OPEN:
            self._state = _State.DRAINING

    def close(self) -> None:
        """Take no more work."""
        self._state = _State.CLOSED

    async def submit(self, task: Task) -> Ticket:
        """As ``BackpressureSupervisor.submit``."""
        pool, parent = self._check(task)
        overflow = self._house.overflow
        if task.durable and overflow is None:
            advice = 'give the supervisor one, for example overflow="sqlite:///spill.db"'
            raise OverflowRequired(task_id=task.task_id, why="there is no overflow to record it in", advice=advice)
        if task.durable and overflow is not None and not overflow.durable:
            advice = 'use one that does, for example overflow="sqlite:///spill.db"'
            raise OverflowRequired(task_id=task.task_id, why="the overflow does not survive its process", advice=advice)
        if task.key is not None and (known := await self._known(task.key)) is not None:
            return known
        if overflow is None or not (task.spill or task.durable):
            return self._decide(self._ticket(task, parent), pool)
        envelope = overflow.encode(task)
        ticket = self._ticket(task, parent)
        if task.durable:
            return await self._durable(ticket, envelope, pool, overflow)
        refusal = self._house.offer(ticket, pool, may_spill=True)
        if refusal is not None and refusal.may_spill:
            return await self._spill(ticket, refusal, envelope, pool, overflow)
        return self._answer(ticket, pool, refusal)

    def submit_nowait(self, task: Task) -> Ticket:
        """As ``BackpressureSupervisor.submit_nowait``."""
        pool, parent = self._check(task)
        if task.durable:
            advice = "use `await submit(...)`"
            raise OverflowRequired(task_id=task.task_id, why="submit_nowait cannot wait for its record", advice=advice)
        if task.key is not None and (known := self._keys.get(task.key)) is not None:
            return known
        return self._decide(self._ticket(task, parent), pool)

    def slot(self, task: Task) -> Slot:
        """As ``BackpressureSupervisor.slot``."""
        pool, parent = self._check(task)

        def offer(ticket: Ticket) -> None:
            self._check(task)
            self._decide(ticket, pool)

        return Slot(self._house, self._ticket(task, parent), offer)

    def _check(self, task: Task) -> tuple[Pool, RunningTask | None]:
        if not isinstance(task, Task):
            raise InvalidTask(
                field="itself", value=type(task).__name__, expected='a Task, such as Task("research", {...})'
            )
        parent = context.current()
        if self._state is not _State.OPEN:
            inside = next(held_slots(parent, self._house), None) is not None
            if self._state is _State.CLOSED or not inside:
                raise SupervisorClosed(state=self._state.value)
        pool = self._house.pools.get(task.task_type)
        if pool is None:
            known = ", ".join(sorted(self._house.pools)) or "none yet"
            raise UnknownTaskType(task_type=task.task_type, known=known)
        if task.task_id in self._house.tickets:
            raise DuplicateTask(task_id=task.task_id)
        if task.deadline is not None and (remaining := task.deadline.remaining()) <= 0:
            raise DeadlinePassed(task_id=task.task_id, late=-remaining)
        return pool, parent

    async def _known(self, key: str) -> Ticket | None:
        """The ticket of the same work, if it was submitted before."""
        if key not in self._keys and self._house.overflow is not None:
            found = await self._house.overflow.find_key(key)
            if found is not None and key not in self._keys:
                self._keys[key] = found
        return self._keys.get(key)

    def _ticket(self, task: Task, parent: RunningTask | None) -> Ticket:
        deadline = task.deadline
        if parent is not None and parent.deadline is not None:
            deadline = parent.deadline if deadline is None else min(parent.deadline, deadline)
        ticket = Ticket(self._house, task, deadline, parent)
        if task.key is not None:
            self._remember(task.key, ticket)
        return ticket

    def _remember(self, key: str, ticket: Ticket) -> None:
        if len(self._keys) > 2 * (len(self._house.tickets) + self._house.keep) + 16:
            live = {**self._house.tickets, **self._house.kept}
            self._keys = {key: known for key, known in self._keys.items() if known.task_id in live}
        self._keys[key] = ticket

    def _decide(self, ticket: Ticket, pool: Pool) -> Ticket:
        return self._answer(ticket, pool, self._house.offer(ticket, pool, may_spill=False))

    def _answer(self, ticket: Ticket, pool: Pool, refusal: Refusal | None) -> Ticket:
        """Let in, or rejected."""
        if refusal is None:
            self._house.counts.admitted += 1
        else:
            self._reject(ticket, pool, refusal)
        self._tell(ticket)
        return ticket

    def _reject(self, ticket: Ticket, pool: Pool, refusal: Refusal) -> None:
        ticket.verdict = Verdict.REJECTED
        ticket.status = TaskStatus.REJECTED
        _explain(ticket, refusal)
        ticket.retry_after = self._house.retry_after(pool)
        if ticket.task.key is not None and self._keys.get(ticket.task.key) is ticket:
            del self._keys[ticket.task.key]
        self._house.counts.rejected += 1

    async def _spill(self, ticket: Ticket, refusal: Refusal, envelope: bytes, pool: Pool, overflow: Overflow) -> Ticket:
        _explain(ticket, refusal)
        put = await overflow.spill(ticket, envelope, pool)
        if put is Put.STORED:
            self._house.counts.spilled += 1
            self._tell(ticket)
            return ticket
        return await self._not_stored(ticket, put, pool, overflow)

    async def _durable(self, ticket: Ticket, envelope: bytes, pool: Pool, overflow: Overflow) -> Ticket:
        put = await overflow.record(ticket, envelope)
        if put is not Put.STORED:
            return await self._not_stored(ticket, put, pool, overflow)
        refusal = self._house.offer(ticket, pool, may_spill=ticket.task.spill)
        if refusal is None:
            return self._answer(ticket, pool, None)
        if not refusal.may_spill:
            await overflow.unrecord(ticket)
            return self._answer(ticket, pool, refusal)
        _explain(ticket, refusal)
        await overflow.keep_outside(ticket, pool)
        self._house.counts.spilled += 1
        self._tell(ticket)
        return ticket

    async def _not_stored(self, ticket: Ticket, put: Put, pool: Pool, overflow: Overflow) -> Ticket:
        if put is Put.FULL:
            refusal = Refusal("the overflow is full", "overflow", 1.0, may_spill=False)
            return self._answer(ticket, pool, refusal)
        if ticket.task.key is not None and (known := await overflow.find_key(ticket.task.key)) is not None:
            self._remember(ticket.task.key, known)
            return known
        raise DuplicateTask(task_id=ticket.task_id)

    def _tell(self, ticket: Ticket) -> None:
        self._house.counts.submitted += 1
        if not self._house.bus.active:
            return
        task = ticket.task
        self._house.bus.emit(
            Submitted(
                at=self._house.loop.time(),
                task_id=task.task_id,
                task_type=task.task_type,
                priority=task.priority,
                verdict=ticket.verdict,
                reason=ticket.reason,
                binding=ticket.binding,
                load=ticket.load,
            )
        )


def _explain(ticket: Ticket, refusal: Refusal) -> None:
    ticket.reason, ticket.binding, ticket.load = refusal.reason, refusal.binding, refusal.load
