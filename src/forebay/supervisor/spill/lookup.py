"""Lookup in the task store, by id or idempotency key, of tasks without a ticket in this process."""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TYPE_CHECKING

from forebay.errors import ForebayError, StoreUnavailable, UnknownTask
from forebay.interfaces import Completion, RecordState, TaskRecord
from forebay.supervisor.ticket import Ticket, TicketOwner, spilled_ticket
from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.spill.stored_tasks import StoredTasks


class StoreLookup:
    """Tickets for tasks that only the store may know."""

    def __init__(self, core: Core, dispatcher: TicketOwner, stored: StoredTasks) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._registry = core.registry
        self._stored = stored
        self._searches: dict[str, asyncio.Event] = {}  # by id, set once the store has answered

    def by_id(self, task_id: str) -> Ticket:
        """Return a ticket for a stored task. Awaiting it raises UnknownTask if there is none."""
        if (known := self._registry.weak.get(task_id)) is not None:
            return known
        ticket = self._new_ticket(task_id)
        ticket.begin_store_call()
        self._searches[task_id] = asyncio.Event()
        self._core.run_in_background(self._find(ticket), if_cancelled=partial(self._give_up, ticket))
        return ticket

    def _new_ticket(self, task_id: str) -> Ticket:
        ticket = spilled_ticket(self._dispatcher, Task("(stored)", task_id=task_id))
        ticket.move_to_store()
        self._registry.add(ticket)
        return ticket

    async def by_key(self, key: str) -> Ticket | None:
        """Return a ticket for the stored task of an idempotency key, or None if there is none."""
        task_id = await self._stored.store.find_key(key)
        if task_id is None:
            return None
        await self.wait_for_search(task_id)
        if (known := self._registry.get(task_id) or self._registry.weak.get(task_id)) is not None:
            return known
        found = await self._stored.store.find(task_id)
        if found is None:  # its record was removed meanwhile
            return None
        if (known := self._registry.get(task_id) or self._registry.weak.get(task_id)) is not None:
            return known
        ticket = self._new_ticket(task_id)
        self._apply(ticket, *found)
        return ticket

    def is_searching(self, task_id: str) -> bool:
        """Return whether the store looks for the id."""
        return task_id in self._searches

    async def wait_for_search(self, task_id: str) -> None:
        """Wait while the store looks for the id: until then nobody knows whether there is such a task."""
        while (search := self._searches.get(task_id)) is not None:
            await search.wait()

    async def _find(self, ticket: Ticket) -> None:
        task_id = ticket.task_id
        missing: ForebayError = UnknownTask(task_id=task_id)
        try:
            found = await self._stored.store.find(task_id)
        except Exception as exc:  # noqa: BLE001 - whatever a store raises, the ticket must end
            why, advice = f"it raised {type(exc).__name__}", "Look into the log of the store."
            failed = StoreUnavailable(where="the overflow", why=why, advice=advice)
            found, missing = None, exc if isinstance(exc, StoreUnavailable) else failed
        if found is None:
            self._not_found(ticket, missing)
            return
        self._end_search(ticket)
        if not ticket.done():
            self._apply(ticket, *found)

    def _apply(self, ticket: Ticket, state: RecordState, record: TaskRecord, completion: Completion | None) -> None:
        if ticket.lease is None:  # otherwise it has come back meanwhile, and has its task
            ticket.restore(ticket.task, None if record.deadline is None else Deadline(record.deadline))
        if completion is not None:
            self._stored.apply_stored_completion(ticket, state, record, completion)
        elif self._stored.stays_stored:
            self._stored.release(ticket)
        elif state is RecordState.LEASED and ticket.lease is None:
            self._stored.leave_to_other_process(ticket)
        elif state is RecordState.DELAYED:
            self._stored.wait_delayed(ticket)
        else:
            self._stored.wait_in_store(ticket)
        if ticket.cancel_reason is not None:
            ticket.cancel(ticket.cancel_reason)

    def _not_found(self, ticket: Ticket, why: ForebayError) -> None:
        self._end_search(ticket)
        if not ticket.done():
            self._registry.discard(ticket)
            ticket.resolve(why)

    def _end_search(self, ticket: Ticket) -> None:
        ticket.end_store_call()
        self._searches.pop(ticket.task_id).set()

    def _give_up(self, ticket: Ticket) -> None:
        """End a ticket whose search was cancelled."""
        why, advice = "the search for the task was cancelled", "Ask for its ticket again."
        self._not_found(ticket, StoreUnavailable(where="the overflow", why=why, advice=advice))
