"""Asking the ledger after tasks that this process has no ticket of: by id, by key."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay.errors import ForebayError, StoreUnavailable, UnknownTask
from forebay.interfaces import RecordState
from forebay.supervisor.ticket import Ticket
from forebay.task import Task, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.spill.spill import Spill


class StoreLookup:
    """Tickets for what only the ledger may know."""

    def __init__(self, dispatcher: Dispatcher, spill: Spill) -> None:
        self._dispatcher = dispatcher
        self._spill = spill

    def by_id(self, task_id: str) -> Ticket:
        """A ticket for a stored task. Awaiting it raises UnknownTask if there is none."""
        if (known := self._spill.weak_tickets.get(task_id)) is not None:
            return known
        ticket = Ticket(self._dispatcher, Task("(stored)", task_id=task_id), None, None)
        ticket.verdict = Verdict.SPILLED
        ticket.status = TaskStatus.SPILLED
        ticket.stored = True
        ticket.pending_store_calls += 1
        self._dispatcher.tickets[task_id] = ticket
        self._dispatcher.run_in_background(self._find(ticket))
        return ticket

    async def by_key(self, key: str) -> Ticket | None:
        """A ticket for the stored task of an idempotency key."""
        task_id = await self._spill.store.find_key(key)
        if task_id is None:
            return None
        return (
            self._dispatcher.tickets.get(task_id) or self._dispatcher.ended_tickets.get(task_id) or self.by_id(task_id)
        )

    async def _find(self, ticket: Ticket) -> None:
        task_id = ticket.task_id
        missing: ForebayError = UnknownTask(task_id=task_id)
        try:
            found = await self._spill.store.find(task_id)
        except StoreUnavailable as exc:
            found, missing = None, exc
        ticket.pending_store_calls -= 1
        if ticket.done():
            return
        if found is None:
            del self._dispatcher.tickets[task_id]
            ticket.resolve(missing)
            return
        state, row, completion = found
        if completion is not None:
            self._spill.apply_stored_completion(ticket, state, row, completion)
        elif self._spill.refill_stopped:
            self._spill.release(ticket)
        elif state is RecordState.LEASED and ticket.lease is None:
            self._spill.leased_elsewhere[task_id] = ticket
        else:
            self._spill.hold_weakly(ticket)
        if ticket.cancel_reason is not None:
            ticket.cancel(ticket.cancel_reason)
