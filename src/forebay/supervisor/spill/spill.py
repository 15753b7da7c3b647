"""Spill and refill: out to the ledger, back from it, and the leases on what of it is inside."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary, ref

from forebay import clock
from forebay.errors import StillSpilled, StoreUnavailable
from forebay.events import TaskDeadLettered, log
from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskRecord, TaskStore
from forebay.overflow import encode_task
from forebay.supervisor.runs.completion import unsuccessful_result
from forebay.supervisor.runs.run import Run
from forebay.supervisor.spill import records
from forebay.supervisor.spill.leases import HeldLeases
from forebay.supervisor.spill.lookup import StoreLookup
from forebay.supervisor.spill.maintenance import StoreMaintenance
from forebay.supervisor.spill.refill import Refiller
from forebay.task import Priority, Task, TaskResult, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.settings import SupervisorSettings
    from forebay.supervisor.ticket import Ticket


class Spill:
    """The house's side of the ledger.

    While rows of a rung or better wait outside, fresh work of that type and rung joins their tail: nothing overtakes.
    """

    def __init__(self, dispatcher: Dispatcher, store: TaskStore, settings: SupervisorSettings) -> None:
        self._dispatcher = dispatcher
        self.store = store
        # Seconds that a right to a row lasts unless renewed. What nobody else can see, nobody else can take over.
        self._lease = settings.lease if store.durable else math.inf
        self._max_payload = settings.max_payload_bytes
        self.leases = HeldLeases()
        self._last_submitted_at = 0.0  # the last
        # Tickets of what waits outside and that nobody here waits for: the row has all of them, so that a million tasks
        # outside take no memory. Whoever still has one gets its result.
        self.weak_tickets: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
        self.leased_elsewhere: dict[str, Ticket] = {}  # tickets whose rows another process holds
        self.durable = store.durable
        self.unserved_depths: dict[tuple[str, Priority], int] = {}  # rows of types that nobody here serves
        self.lookup = StoreLookup(dispatcher, self)
        self.refiller = Refiller(dispatcher, self, lease=self._lease)
        self._maintenance = StoreMaintenance(dispatcher, self, lease=settings.lease, max_attempts=settings.max_attempts)

    async def open(self) -> None:
        """Connect, and see what is there.

        Raises:
            LedgerUnusable: the ledger cannot be opened.
        """
        await self.store.open()
        await self._maintenance.reap()
        self.unserved_depths = dict(await self.store.depths())
        if self.durable:
            self._maintenance.start()

    def add_pool(self, pool: Pool) -> None:
        """A new task type is served: pull what waits for it."""
        for rung in Priority:
            pool.spilled[rung] = self.unserved_depths.pop((pool.task_type, rung), 0)

    @property
    def stored_tasks(self) -> int:
        """How many rows wait, as far as is known."""
        return sum(self.unserved_depths.values()) + sum(
            sum(pool.spilled.values()) for pool in self._dispatcher.pools.values()
        )

    @property
    def has_spilled(self) -> bool:
        """Whether rows that this house could run wait outside."""
        return any(any(pool.spilled.values()) for pool in self._dispatcher.pools.values())

    # --- out ---

    def submission_time(self) -> float:
        """Epoch seconds at which a task comes: its place outside, should it get there. No two are the same."""
        self._last_submitted_at = max(clock.wall_time(), math.nextafter(self._last_submitted_at, math.inf))
        return self._last_submitted_at

    def encode(self, task: Task) -> bytes:
        """The task as it will be stored; NotPortable or PayloadTooLarge if it cannot be."""
        return encode_task(task, self._dispatcher.codecs.dump_payload(task), bound=self._max_payload)

    async def spill(self, ticket: Ticket, envelope: bytes, pool: Pool) -> PutResult:
        """Store a refused task; on STORED the ticket is SPILLED."""
        rung = ticket.task.priority
        # Counted before the await, or fresh work would overtake what is on its way out.
        pool.spilling[rung] += 1
        put = PutResult.STORED
        try:
            put = await self.store.put(records.record_of_ticket(ticket, envelope))
        except StoreUnavailable:
            if not ticket.stored:
                raise
        finally:
            pool.spilling[rung] -= 1
        if ticket.stored:  # a pull was quicker than this: whatever the answer, the row is there
            ticket.verdict = Verdict.SPILLED
            put = PutResult.STORED
        elif put is PutResult.STORED:
            ticket.verdict = Verdict.SPILLED
            ticket.stored = True
            if self.refill_stopped:
                self.release(ticket)
            else:
                pool.spilled[rung] += 1
                ticket.status = TaskStatus.SPILLED
                self._arm_expiry(ticket)
                self.hold_weakly(ticket)
            self.refill(pool)
        return put

    async def record(self, ticket: Ticket, envelope: bytes) -> PutResult:
        """Store a durable task, already leased, before it is offered to the gate."""
        row = records.record_of_ticket(ticket, envelope)
        lease = Lease(record=row, fence=clock.new_id(), until=clock.wall_time() + self._lease)
        put = await self.store.put(row, fence=lease.fence, until=lease.until)
        if put is PutResult.STORED:
            ticket.stored = True
            ticket.lease = lease
            self.leases.hold(lease)
        return put

    async def remove_record(self, ticket: Ticket) -> None:
        """Take back the row of a durable task that was rejected, so that it may be submitted again."""
        long_ago = Completion(status=TaskStatus.REJECTED.value, finished_at=0.0)  # so that pruning drops it
        ticket.stored = False
        await self.store.finish(ticket.task_id, long_ago, fence=self._drop_lease(ticket))
        await self.store.prune(before=1.0)

    async def spill_recorded(self, ticket: Ticket, pool: Pool) -> None:
        """Give the lease of a recorded task back, so that it waits outside."""
        pool.spilled[ticket.task.priority] += 1
        ticket.verdict = Verdict.SPILLED
        ticket.status = TaskStatus.SPILLED
        lease = ticket.lease
        assert lease is not None  # noqa: S101 - recorded under it
        self._drop_lease(ticket)
        await self.store.release([lease])
        if self.refill_stopped:
            self.release(ticket)
        else:
            self._arm_expiry(ticket)
            self.hold_weakly(ticket)
            self.refill(pool)

    def hold_weakly(self, ticket: Ticket) -> None:
        """Hold a ticket whose task waits outside no longer than somebody else does.

        But in a ledger that goes with this process nothing is left to others, and who is awaited is held; so is the
        child of a run, whose place among its ancestors no row knows.
        """
        outside = ticket.status is TaskStatus.SPILLED and ticket.lease is None
        if self.durable and outside and ticket.parent is None and not (ticket.has_waiters or ticket.has_listeners):
            self.weak_tickets[ticket.task_id] = ticket
            self._dispatcher.tickets.pop(ticket.task_id, None)

    def hold_strongly(self, task_id: str) -> Ticket | None:
        """The ticket of a task that was outside, if anybody has it; held from now on."""
        ticket = self.weak_tickets.pop(task_id, None)
        if ticket is not None:
            self._dispatcher.tickets[task_id] = ticket
        return ticket

    def _arm_expiry(self, ticket: Ticket) -> None:
        if ticket.deadline is not None and ticket.expiry_timer is None:
            due = self._dispatcher.loop.time() + ticket.deadline.remaining()
            expired = unsuccessful_result(
                ticket, TaskStatus.EXPIRED, "its deadline passed while it waited in the overflow"
            )
            # By a weak reference: nobody is to hold it for the sake of its end.
            ticket.expiry_timer = self._dispatcher.timers.at(due, self._end_spilled, ref(ticket), expired)

    # --- back ---

    def refill(self, pool: Pool) -> None:
        """See whether rows should come in, and fetch them if so."""
        self.refiller.refill(pool)

    async def recount(self, pool: Pool) -> None:
        """Believe the ledger on how much waits for a pool that is being pulled for."""
        await self._maintenance.recount([pool], refilling=pool)

    async def refresh(self) -> None:
        """See what is outside now, and whether it should come in."""
        pools = list(self._dispatcher.pools.values())
        await self._maintenance.recount(pools)
        for pool in pools:
            self.refill(pool)

    def report_dead(self, record: TaskRecord, completion: Completion) -> None:
        """Tell of a stored task that nobody will try again."""
        log.error("task %r is dead, and kept among the dead letters: %s", record.task_id, completion.error)
        if self._dispatcher.bus.active:
            at, error = self._dispatcher.loop.time(), completion.error or ""
            died = TaskDeadLettered(
                at=at, task_id=record.task_id, task_type=record.task_type, attempts=record.attempts, error=error
            )
            self._dispatcher.bus.emit(died)

    # --- starts ---

    def lease_is_valid(self, ticket: Ticket) -> bool:
        """Whether this process still has the right to start a stored task, as far as its clock tells."""
        return ticket.lease is None or self.leases.is_valid(ticket.task_id, clock.wall_time())

    def record_start(self, run: Run) -> None:
        """Let the handler of a stored task begin once its start is on record.

        Not before: a task that kills its process would be tried for ever.
        """
        lease = run.ticket.lease
        assert lease is not None  # noqa: S101 - it is stored, and its lease still good
        self._dispatcher.run_in_background(self._record_start(run, lease))

    async def _record_start(self, run: Run, lease: Lease) -> None:
        house, ticket = self._dispatcher, run.ticket
        try:
            held = await self.store.begin_attempt(lease)
        except StoreUnavailable as exc:
            log.error("the start of task %r could not be recorded, and it runs all the same: %s", ticket.task_id, exc)
            held = True
        if run.abandoned_at is None and held:
            run.started_at = house.loop.time()
            run.worker.runs[run] = run.worker.runs.pop(run)  # in the order in which they began
            house.start_handler(run)
            return
        if run.abandoned_at is None:  # another process has it
            ticket.attempts -= 1
            house.completion.abandon(run)
            self._drop_lease(ticket)
            ticket.status = TaskStatus.SPILLED
            self.leased_elsewhere[ticket.task_id] = ticket
        house.handler_ended(run, None, asyncio.CancelledError())

    def _drop_lease(self, ticket: Ticket) -> str | None:
        ticket.lease = None
        return self.leases.drop(ticket.task_id)

    def lease_lapsed(self, ticket: Ticket) -> None:
        """The right to a task lapsed before its turn came: another process will have it."""
        self._drop_lease(ticket)
        self._dispatcher.next_in_conversation(ticket)
        ticket.status = TaskStatus.SPILLED
        self.leased_elsewhere[ticket.task_id] = ticket

    # --- endings ---

    def complete(self, ticket: Ticket, result: TaskResult) -> None:
        """Store how a task ended, and only then give its ticket the result."""
        self.hold_strongly(ticket.task_id)
        if ticket.expiry_timer is not None:
            self._dispatcher.timers.cancel(ticket.expiry_timer)
            ticket.expiry_timer = None
        ticket.pending_store_calls += 1
        self._dispatcher.run_in_background(self._complete(ticket, result, self._drop_lease(ticket)))

    async def _complete(self, ticket: Ticket, result: TaskResult, fence: str | None) -> None:
        codec = self._dispatcher.codecs.result_codec(ticket.task.task_type)
        result, completion = records.completion_of_result(result, codec, bound=self._max_payload)
        try:
            stored = await self.store.finish(ticket.task_id, completion, fence=fence)
        except Exception:  # noqa: BLE001 - whatever ails the store, the ticket must end
            log.exception("how task %r ended could not be stored: it may be run again", ticket.task_id)
            stored = True
        ticket.pending_store_calls -= 1
        if ticket.done():
            return
        if stored:
            if fence is None:
                self._uncount_spilled(ticket)
            self._dispatcher.settle(ticket, result)
        elif ticket.pending_store_calls or ticket.lease is not None:
            pass  # it came in meanwhile, and ends there
        elif self.refill_stopped:
            self.release(ticket)
        else:
            ticket.status = TaskStatus.SPILLED
            self.leased_elsewhere[ticket.task_id] = ticket

    def apply_stored_completion(
        self, ticket: Ticket, state: RecordState, record: TaskRecord, completion: Completion
    ) -> None:
        """End a ticket as the ledger says."""
        self._dispatcher.settle(ticket, records.result_of_record(record, completion, self._dispatcher.codecs))
        if state is RecordState.DEAD:
            self._dispatcher.ended_tickets.pop(ticket.task_id, None)  # it may yet be requeued, and end otherwise

    def complete_again(self, ended: Ticket, result: TaskResult, lease: Lease) -> None:
        """Store under a new lease how a task ended, of which the store did not hear the first time."""
        ended.pending_store_calls += 1
        self._dispatcher.run_in_background(self._complete(ended, result, lease.fence))

    def adopt(self, ticket: Ticket, lease: Lease) -> None:
        """Take a row back whose task still waits or runs here, though the right to it was lost meanwhile."""
        self.leased_elsewhere.pop(ticket.task_id, None)
        ticket.stored = True
        ticket.lease = lease
        self.leases.hold(lease)
        ticket.status = TaskStatus.WAITING if ticket.run is None else TaskStatus.RUNNING

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """Cancel a task that waits outside, or was to."""
        ticket.cancel_reason = reason
        result = unsuccessful_result(ticket, TaskStatus.CANCELLED, reason)
        if ticket.stored:
            self._end_spilled(ref(ticket), result)
        else:
            self._dispatcher.settle(ticket, result)

    def _end_spilled(self, known: ref[Ticket], result: TaskResult) -> None:
        ticket = known()
        if ticket is not None and ticket.status is TaskStatus.SPILLED and not ticket.done():
            self.complete(ticket, result)

    def _uncount_spilled(self, ticket: Ticket) -> None:
        pool = self._dispatcher.pools.get(ticket.task.task_type)
        if pool is not None:
            rung = ticket.task.priority
            pool.spilled[rung] = max(0, pool.spilled[rung] - 1)

    # --- the end ---

    def requeue(self, ticket: Ticket) -> None:
        """Stop a stored task, so that it is run again by the next process; `close` returns its lease."""
        if ticket.run is not None:
            self._dispatcher.completion.abandon(ticket.run)
        else:
            self._dispatcher.dequeue(ticket)
        self.release(ticket)

    def release(self, ticket: Ticket) -> None:
        """End the ticket of a task that is left to the next process: nobody must wait for it here."""
        if ticket.expiry_timer is not None:
            self._dispatcher.timers.cancel(ticket.expiry_timer)
            ticket.expiry_timer = None
        ticket.status = TaskStatus.SPILLED
        self._dispatcher.tickets.pop(ticket.task_id, None)
        self.weak_tickets.pop(ticket.task_id, None)
        ticket.resolve(StillSpilled(task_id=ticket.task_id))
        self._dispatcher.notify_progress()

    @property
    def refill_stopped(self) -> bool:
        """Whether what is outside will not come in any more, and survives."""
        return self.durable and not self.refiller.open

    def stop_refilling(self) -> None:
        """Fetch no more, and leave what is outside. What has been fetched is still tended."""
        self.refiller.open = False
        for ticket in [*self._dispatcher.tickets.values(), *self.weak_tickets.values()]:
            if (
                self.durable
                and ticket.stored
                and ticket.status is TaskStatus.SPILLED
                and not ticket.pending_store_calls
            ):
                self.release(ticket)

    async def close(self) -> None:
        """Return every lease, and let the ledger go."""
        self._maintenance.stop()
        leases = [*self.leases.take_all(), *self.refiller.unreadable.values()]
        try:
            if leases:
                await self.store.release(leases)
        finally:
            await self.store.close()

    def end_tickets(self) -> None:
        """End the tickets of what stays outside."""
        self._maintenance.stop()
        for ticket in [*self._dispatcher.tickets.values(), *self.weak_tickets.values()]:
            if ticket.stored and self.durable:
                self.release(ticket)
            else:
                self._dispatcher.settle(
                    ticket, unsuccessful_result(ticket, TaskStatus.CANCELLED, "the supervisor stopped")
                )
