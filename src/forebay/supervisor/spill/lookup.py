"""Lookup in the task store, by id or idempotency key, of tasks without a ticket in this process."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TYPE_CHECKING, TypeVar

from forebay.errors import ForebayError, InvalidPayload, StoreUnavailable
from forebay.interfaces import Completion, RecordState, TaskRecord
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew
from forebay.supervisor.spill import records
from forebay.supervisor.ticket import Ticket, TicketOwner, found_ticket
from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.spill.stored_tasks import StoredTasks

T = TypeVar("T")


class StoreLookup:
    """Tickets for tasks that only the store may know."""

    def __init__(self, core: Core, dispatcher: TicketOwner, stored: StoredTasks) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._registry = core.registry
        self._stored = stored

    async def by_id(self, task_id: str) -> Ticket | None:
        """Return a ticket for the stored task of an id, or None if there is none.

        Raises:
            StoreUnavailable: the store cannot be asked.
        """
        found = await self._ask(self._stored.store.find(task_id))
        if (known := self._registry.find(task_id)) is not None:  # it was submitted or came back meanwhile
            if found is not None:  # otherwise it may have been stored since
                self._stored.found(task_id, found)
            return known
        return None if found is None else self._new_ticket(*found)

    async def by_key(self, key: str) -> Ticket | None:
        """Return a ticket for the stored task of an idempotency key, or None if there is none.

        Raises:
            StoreUnavailable: the store cannot be asked.
        """
        task_id = await self._ask(self._stored.store.find_key(key))
        if task_id is None:
            return None
        # Not found by its id: its record was removed meanwhile.
        return self._registry.find(task_id) or await self.by_id(task_id)

    async def _ask(self, question: Awaitable[T]) -> T:
        """Return the answer of the store; closing the supervisor ends the wait for it."""
        answer = self._core.run_to_completion(question)
        try:
            await asyncio.wait((answer,))
        finally:
            answer.cancel()  # its caller has gone; no effect once it is done
        if answer.cancelled():
            why, advice = "the search for the task was cancelled", "Ask for it again."
            raise StoreUnavailable(where="the overflow", why=why, advice=advice)
        try:
            return answer.result()
        except ForebayError:
            raise
        except Exception as exc:
            why, advice = f"it raised {type(exc).__name__}", "Look into the log of the store."
            raise StoreUnavailable(where="the overflow", why=why, advice=advice) from exc

    def _new_ticket(self, state: RecordState, record: TaskRecord, completion: Completion | None) -> Ticket:
        deadline = None if record.deadline is None else Deadline(record.deadline)
        ticket = found_ticket(
            self._dispatcher,
            self._task(record),
            deadline,
            submitted_at=record.enqueued_at,
            attempts=record.attempts,
        )
        self._registry.add(ticket)
        if completion is not None:
            self._stored.apply_stored_completion(ticket, state, record, completion)
        elif self._stored.stays_stored:
            self._stored.release(ticket)
        elif state is RecordState.LEASED:
            self._stored.leave_to_other_process(ticket)
        elif state is RecordState.DELAYED:
            self._stored.wait_delayed(ticket)
        else:
            self._stored.wait_in_store(ticket)
        return ticket

    def _task(self, record: TaskRecord) -> Task:
        """Return the task of a record; one that has ended has no payload any more, and others cannot be read here."""
        try:
            return records.read_record(record, self._core.codecs)[0]
        except (EnvelopeDamaged, EnvelopeTooNew, InvalidPayload):
            return Task(
                record.task_type,
                task_id=record.task_id,
                priority=record.priority,
                key=record.key,
                tenant=record.tenant,
                thread_id=record.thread_id,
            )
