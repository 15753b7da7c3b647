"""Spill: tasks go out to the task store instead of being rejected; durable ones are recorded there before admission."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol

from forebay import clock
from forebay.carried_context import capture_context
from forebay.errors import MessageTooLarge, NotSerializable, PayloadTooLarge, StoreUnavailable
from forebay.events import log
from forebay.interfaces import Completion, Lease, PutResult, TaskRecord, TaskStore
from forebay.overflow import encode_task
from forebay.supervisor.spill import records
from forebay.supervisor.spill.lookup import StoreLookup
from forebay.supervisor.spill.maintenance import StoreMaintenance
from forebay.supervisor.spill.refill import RefillDispatcher, Refiller
from forebay.supervisor.spill.store_changes import AwaitedResults, WaitingRecords
from forebay.supervisor.spill.stored_tasks import StoredTaskDispatcher, StoredTasks
from forebay.task import Task, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.codecs import TaskCodecs
    from forebay.supervisor.conversations import Conversations
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.run import ActiveRuns
    from forebay.supervisor.settings import SupervisorSettings
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent


class SpillDispatcher(StoredTaskDispatcher, RefillDispatcher, Protocol):
    """The dispatcher, as far as the spill and its parts need it."""


class Spill:
    """The task store of a supervisor: it puts tasks into it, and its parts take them back.

    While records of a better priority wait in the store, or of their own priority and tenant, new tasks of that type
    join them, so that no task overtakes another. The records of other tenants take turns with new tasks.

    Attributes:
        stored: the tasks of this process that have a record in the store.
        refiller: takes tasks back.
        lookup: makes tickets for tasks that only the store may know.
        changes: counts the records that other processes store.
        results: looks up the tasks that other processes end.
        codecs: the declared types of payloads and results.
    """

    def __init__(
        self,
        core: Core,
        dispatcher: SpillDispatcher,
        store: TaskStore,
        *,
        runs: ActiveRuns,
        settings: SupervisorSettings,
    ) -> None:
        self._core = core
        self.codecs: TaskCodecs = core.codecs
        # Seconds that a lease lasts unless renewed; infinity in a store that no other process can see.
        self._lease = settings.lease if store.durable else math.inf
        self.stored = StoredTasks(
            core, dispatcher, store, runs=runs, lease=self._lease, max_payload_bytes=settings.max_payload_bytes
        )
        self._max_payload_bytes = settings.max_payload_bytes
        self._max_envelope_bytes: int | None = None  # a store on a queue has one, which it knows once it is open
        self._store = store
        self._pools: Mapping[str, Pool] = core.pools.by_type
        self._conversations: Conversations = dispatcher.conversations
        self.refiller = Refiller(core, dispatcher, self.stored, lease=self._lease)
        self.stored.on_change(self.refiller.count_waiting)
        self.lookup = StoreLookup(core, dispatcher, self.stored)
        self.changes = WaitingRecords(core, self.stored, self.refiller)
        self.results = AwaitedResults(core, self.stored)
        self._maintenance = StoreMaintenance(core, self.stored, self.refiller, settings=settings)
        self._last_submitted_at = 0.0

    async def open(self) -> None:
        """Connect to the store, and count what waits there.

        Raises:
            StoreUnavailable: the store cannot be opened.
        """
        await self._store.open()
        self._max_envelope_bytes = getattr(self._store, "max_envelope_bytes", None)
        await self._maintenance.reap()
        await self.stored.delayed.wake()
        await self.refiller.recount([])
        await self.refiller.recount_conversations()
        if self.stored.durable:
            self._maintenance.start()
            self._store.subscribe(
                on_waiting=self.changes.notice,
                on_ended=self.results.notice,
                on_lost=self.stored.lost.notice,
                on_interrupted=self._maintenance.notice_interruption,
            )

    def slot_freed(self, worker: WorkerAgent, pools: Iterable[Pool]) -> None:
        """Take records of `pools` back, of which some are known to wait, and look for others if `worker` has a slot."""
        for pool in pools:
            self.refiller.refill(pool)
        if self.changes.stale and worker.can_accept():
            self.changes.room_appeared()

    def submission_time(self) -> float:
        """Return epoch seconds for a task that is submitted now. They order the store, so no two are the same."""
        self._last_submitted_at = max(clock.wall_time(), math.nextafter(self._last_submitted_at, math.inf))
        return self._last_submitted_at

    def encode(self, task: Task) -> bytes:
        """Return the task as it is stored, with what the present context has to carry.

        Raises:
            NotSerializable, PayloadTooLarge: it cannot be.
        """
        payload, carried = self.codecs.dump_payload(task), capture_context()
        envelope = encode_task(task, payload, bound=self._max_payload_bytes, context=carried)
        if self._max_envelope_bytes is not None and len(envelope) > self._max_envelope_bytes:
            raise MessageTooLarge(task_id=task.task_id, size=len(envelope), bound=self._max_envelope_bytes)
        return envelope

    async def spill(self, ticket: Ticket, envelope: bytes, pool: Pool) -> PutResult:
        """Store a task that was not admitted, or that waits for its time; once it is written, the ticket is SPILLED."""
        task = ticket.task
        if seconds := task.starts_in():
            return await self._schedule(ticket, envelope, pool, seconds)
        thread_id = task.thread_id
        # Counted before the await, or new work would overtake it; unless it will be parked, where it delays nobody.
        counts = thread_id is None or not self._conversations.waits_in_overflow(thread_id)
        if counts:
            pool.spilled.begin_spill(task.priority, task.tenant)
        try:
            put = await self._put(ticket, records.record_of_ticket(ticket, envelope))
        finally:
            if counts:
                pool.spilled.end_spill(task.priority, task.tenant)
        if put is PutResult.STORED and ticket.status is TaskStatus.SPILLED and not self.stored.stays_stored:
            self.refiller.add_spilled(pool, task)
        if put.written and ticket.status is TaskStatus.SPILLED:
            if ticket.nested:
                pool.add_nested_spilled(ticket)
            self._wait_in_store(ticket, pool)
        return put

    async def _schedule(self, ticket: Ticket, envelope: bytes, pool: Pool, seconds: float) -> PutResult:
        """Store a task that waits there for its `not_before`, `seconds` from now."""
        due_at = self._core.loop.time() + seconds
        put = await self._put(ticket, records.record_of_ticket(ticket, envelope))
        if put is PutResult.STORED:
            self.stored.delayed.add(ticket.task.not_before or 0.0, due_at - self._core.loop.time())
        if put is PutResult.STORED and ticket.status is TaskStatus.SPILLED:
            if self.stored.stays_stored:
                self.stored.release(ticket)
            else:
                if ticket.nested:
                    pool.add_nested_spilled(ticket)
                self.stored.wait_delayed(ticket, due_at=due_at)
        return put

    async def _put(self, ticket: Ticket, record: TaskRecord, lease: Lease | None = None) -> PutResult:
        """Store a record, under `lease` if it is given; without a lease of its own, the ticket is SPILLED then."""
        thread_id = ticket.task.thread_id
        self._conversations.begin_spill(thread_id)
        put = None
        try:
            if lease is None:
                put = await self.stored.load.measure(self._store.put(record, now=clock.wall_time()))
            else:
                put = await self.stored.load.measure(self._store.put(record, fence=lease.fence, until=lease.until))
        except StoreUnavailable:
            if not ticket.stored:
                raise
        finally:
            waits = put is not None and put.written and not ticket.stored
            leased = lease is not None and put is PutResult.STORED
            self._conversations.end_spill(thread_id, stored=waits and not leased)
        if ticket.stored:  # it was refilled before the answer arrived, so the record is there whatever the answer
            ticket.confirm_spilled()
            return PutResult.PARKED
        assert put is not None  # noqa: S101 - otherwise the store has raised
        if waits and not leased:
            ticket.spill()
        return put

    async def record(self, ticket: Ticket, envelope: bytes, pool: Pool) -> PutResult:
        """Store a task that is to be inside, already leased; on PARKED the ticket is SPILLED instead."""
        record = records.record_of_ticket(ticket, envelope)
        lease = Lease(record=record, fence=clock.new_id(), until=clock.wall_time() + self._lease)
        put = await self._put(ticket, record, lease)
        if put is PutResult.STORED:
            self.stored.hold_lease(ticket, lease)
        elif put is PutResult.PARKED and ticket.status is TaskStatus.SPILLED:
            self._wait_in_store(ticket, pool)
        return put

    async def remove_record(self, ticket: Ticket) -> None:
        """Remove the record of a durable task that was rejected, so that it may be submitted again."""
        # Ended at the epoch, so that pruning drops it.
        completion = Completion(status=TaskStatus.REJECTED.value, finished_at=0.0)
        ticket.forget_record()
        lease = self.stored.drop_lease(ticket)
        await self._store.finish(ticket.task_id, completion, fence=None if lease is None else lease.fence)
        await self._store.prune(before=1.0)
        self.stored.conversation_moved(ticket.task)

    async def spill_recorded(self, ticket: Ticket, pool: Pool) -> None:
        """Give the lease of a recorded task back, so that it waits in the store.

        While draining, the lease on a message is kept until this process closes if earlier messages of its conversation
        may only be known here: another process would run it before them.
        """
        ticket.spill()
        if self.stored.stays_stored:
            self.stored.release(ticket)  # at once: nobody need wait until its lease is returned
            if not self._conversations.is_ahead_here(ticket.task.thread_id):
                await self.stored.return_leases([ticket.task_id])
            return
        lease = ticket.lease
        assert lease is not None  # noqa: S101 - it was recorded under it
        self.stored.drop_lease(ticket)
        self.refiller.add_spilled(pool, ticket.task)
        self._conversations.add_stored(ticket.task.thread_id)
        await self.stored.lost.release([lease])
        self.stored.conversation_moved(ticket.task)
        if not ticket.done() and ticket.lease is None:  # otherwise it has come back meanwhile
            self._wait_in_store(ticket, pool)

    def return_to_store(self, ticket: Ticket) -> None:
        """Return a task that came inside to the store, from where it comes back to this process or to another one.

        It has left the queue, or its run was stopped. Its ticket stays: it gets the result whoever runs the task.
        """
        lease, task = ticket.lease, ticket.task
        assert lease is not None  # noqa: S101 - the caller has checked
        if self.stored.stays_stored:
            self.stored.release(ticket)
            return
        ticket.move_to_store()
        ticket.begin_store_call()
        self.stored.drop_lease(ticket)
        if (pool := self._pools.get(task.task_type)) is not None:
            self.refiller.add_spilled(pool, task)
        self._conversations.add_stored(task.thread_id)
        self._return_in_background(ticket, lease)

    def _return_in_background(self, ticket: Ticket, lease: Lease) -> None:
        again = partial(self._return_in_background, ticket, lease)
        self._core.run_in_background(self._return_to_store(ticket, lease), if_cancelled=again)

    async def _return_to_store(self, ticket: Ticket, lease: Lease) -> None:
        try:
            await self.stored.lost.release([lease])
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with the store, the lease lapses
            message = "the lease on task %r could not be returned, and lapses"
            self._core.failures.report(message, ticket.task_id, error=exc)
        ticket.end_store_call()
        self.stored.conversation_moved(ticket.task)
        if ticket.cancel_reason is not None:
            ticket.cancel(ticket.cancel_reason)
        elif not ticket.done() and ticket.lease is None:  # otherwise it has come back meanwhile
            self.stored.wait_in_store(ticket)
            if (pool := self._pools.get(ticket.task.task_type)) is not None:
                self.refiller.refill(pool)

    def _wait_in_store(self, ticket: Ticket, pool: Pool) -> None:
        """Leave a spilled task in the store: to the next process if this one takes nothing back any more."""
        if self.stored.stays_stored:
            self.stored.release(ticket)
        else:
            self.stored.wait_in_store(ticket)
            self.refiller.refill(pool)

    def encode_waiting(self, ticket: Ticket) -> bytes | None:
        """Return an admitted task as it is stored; None if it cannot be stored, since its payload has changed."""
        task = ticket.task
        try:
            return self.encode(task) if ticket.context is None else ticket.context.run(self.encode, task)
        except (NotSerializable, PayloadTooLarge) as exc:
            log.error("task %r could not be spilled when the supervisor drained: %s", task.task_id, exc)
            return None

    async def spill_waiting(self, envelopes: Mapping[Ticket, bytes]) -> StoreUnavailable | None:
        """Store tasks that have just left the queue, at once, so that they share a commit.

        A task that is not stored is not changed.

        Returns:
            Why the store failed, if it did for any of them.
        """
        puts = (self._put_waiting(ticket, envelope) for ticket, envelope in envelopes.items())
        failure = None
        for ticket, put in zip(envelopes, await asyncio.gather(*puts, return_exceptions=True), strict=True):
            if isinstance(put, PutResult) and put.written:
                ticket.mark_stored()
            elif isinstance(put, StoreUnavailable):
                failure = put
            else:
                why = "it is full" if put is PutResult.FULL else "it has that id or key already"
                log.error(
                    "task %r could not be moved to the overflow: %s",
                    ticket.task_id,
                    put if isinstance(put, BaseException) else why,
                )
        return failure

    async def _put_waiting(self, ticket: Ticket, envelope: bytes) -> PutResult:
        """Store a task; behind one of its conversation that still runs here, leased until this supervisor closes.

        One that waits for its time has not joined its conversation.
        """
        record = records.record_of_ticket(ticket, envelope)
        if self._conversations.get(ticket.task.thread_id) is None or ticket.task.starts_in():
            return await self._store.put(record, now=clock.wall_time())
        lease = Lease(record=record, fence=clock.new_id(), until=clock.wall_time() + self._lease)
        put = await self._store.put(record, fence=lease.fence, until=lease.until)
        if put is PutResult.STORED:
            self.stored.leases.hold(lease)
        return put

    # --- the end ---

    async def close(self) -> None:
        """Return every lease, and close the store."""
        self._stop()
        leases = [*self.stored.leases.take_all(), *self.refiller.unreadable.values()]
        try:
            if leases:
                await self.stored.lost.release(leases)
        finally:
            await self._store.close()

    def end_tickets(self) -> None:
        """End every ticket that is left."""
        self._stop()
        self.stored.end_tickets()

    def _stop(self) -> None:
        self._maintenance.stop()
        self.changes.stop()
        self.results.stop()
