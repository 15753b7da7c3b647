"""Asking the ledger after tasks that this process has no ticket of: by id, by key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.errors import ForebayError, LedgerUnusable, UnknownTask
from forebay.supervisor.ticket import Ticket
from forebay.task import Task, TaskStatus, Verdict
from forebay.typing import RowState

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.refill import Overflow


class Inquiry:
    """Tickets for what only the ledger may know."""

    def __init__(self, house: Dispatcher, overflow: Overflow) -> None:
        self._house = house
        self._overflow = overflow

    def by_id(self, task_id: str) -> Ticket:
        """A ticket for a stored task. Awaiting it raises UnknownTask if there is none."""
        if (known := self._overflow.loose.get(task_id)) is not None:
            return known
        ticket = Ticket(self._house, Task("(stored)", task_id=task_id), None, None)
        ticket.verdict = Verdict.SPILLED
        ticket.status = TaskStatus.SPILLED
        ticket.stored = True
        ticket.undecided += 1
        self._house.tickets[task_id] = ticket
        self._house.background(self._find(ticket))
        return ticket

    async def by_key(self, key: str) -> Ticket | None:
        """A ticket for the stored task of an idempotency key."""
        task_id = await self._overflow.ledger.find_key(key)
        if task_id is None:
            return None
        return self._house.tickets.get(task_id) or self._house.kept.get(task_id) or self.by_id(task_id)

    async def _find(self, ticket: Ticket) -> None:
        task_id = ticket.task_id
        missing: ForebayError = UnknownTask(task_id=task_id)
        try:
            found = await self._overflow.ledger.find(task_id)
        except LedgerUnusable as exc:
            found, missing = None, exc
        ticket.undecided -= 1
        if ticket.done():
            return
        if found is None:
            del self._house.tickets[task_id]
            ticket.resolve(missing)
            return
        state, row, completion = found
        if completion is not None:
            self._overflow.hear(ticket, state, row, completion)
        elif self._overflow.left_behind:
            self._overflow.leave(ticket)
        elif state is RowState.LEASED and ticket.lease is None:
            self._overflow.elsewhere[task_id] = ticket
        else:
            self._overflow.loosen(ticket)
        if ticket.unwanted is not None:
            ticket.cancel(ticket.unwanted)
