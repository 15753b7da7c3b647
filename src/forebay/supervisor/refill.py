"""Spill and refill: out to the ledger, back from it, and the leases on what of it is inside."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary, ref

from forebay import clock
from forebay.errors import LedgerUnusable, StillSpilled
from forebay.events import Died, log
from forebay.overflow import encode_task
from forebay.supervisor import records
from forebay.supervisor.endings import unsuccessful
from forebay.supervisor.inquiry import Inquiry
from forebay.supervisor.intake import Intake
from forebay.supervisor.leases import Leases
from forebay.supervisor.run import Run
from forebay.supervisor.tend import Tending
from forebay.task import Priority, Task, TaskResult, TaskStatus, Verdict
from forebay.typing import Completion, Lease, Ledger, Put, Row, RowState

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.settings import Settings
    from forebay.supervisor.ticket import Ticket


class Overflow:
    """The house's side of the ledger.

    While rows of a rung or better wait outside, fresh work of that type and rung joins their tail: nothing overtakes.
    """

    def __init__(self, house: Dispatcher, ledger: Ledger, settings: Settings) -> None:
        self._house = house
        self.ledger = ledger
        # Seconds that a right to a row lasts unless renewed. What nobody else can see, nobody else can take over.
        self._lease = settings.lease if ledger.durable else math.inf
        self._max_payload = settings.max_payload_bytes
        self.leases = Leases()
        self._stamped = 0.0  # the last
        # Tickets of what waits outside and that nobody here waits for: the row has all of them, so that a million tasks
        # outside take no memory. Whoever still has one gets its result.
        self.loose: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
        self.elsewhere: dict[str, Ticket] = {}  # tickets whose rows another process holds
        self.durable = ledger.durable
        self.depths: dict[tuple[str, Priority], int] = {}  # rows of types that nobody here serves
        self.inquiry = Inquiry(house, self)
        self.intake = Intake(house, self, lease=self._lease)
        self._tending = Tending(house, self, lease=settings.lease, max_attempts=settings.max_attempts)

    async def open(self) -> None:
        """Connect, and see what is there.

        Raises:
            LedgerUnusable: the ledger cannot be opened.
        """
        await self.ledger.open()
        await self._tending.reap()
        self.depths = dict(await self.ledger.depths())
        if self.durable:
            self._tending.start()

    def know(self, pool: Pool) -> None:
        """A new task type is served: pull what waits for it."""
        for rung in Priority:
            pool.holding[rung] = self.depths.pop((pool.task_type, rung), 0)

    @property
    def outside(self) -> int:
        """How many rows wait, as far as is known."""
        return sum(self.depths.values()) + sum(sum(pool.holding.values()) for pool in self._house.pools.values())

    @property
    def holding(self) -> bool:
        """Whether rows that this house could run wait outside."""
        return any(any(pool.holding.values()) for pool in self._house.pools.values())

    # --- out ---

    def stamp(self) -> float:
        """Epoch seconds at which a task comes: its place outside, should it get there. No two are the same."""
        self._stamped = max(clock.wall_time(), math.nextafter(self._stamped, math.inf))
        return self._stamped

    def encode(self, task: Task) -> bytes:
        """The task as it will be stored; NotPortable or PayloadTooLarge if it cannot be."""
        return encode_task(task, self._house.codecs.plain(task), bound=self._max_payload)

    async def spill(self, ticket: Ticket, envelope: bytes, pool: Pool) -> Put:
        """Store a refused task; on STORED the ticket is SPILLED."""
        rung = ticket.task.priority
        # Counted before the await, or fresh work would overtake what is on its way out.
        pool.arriving[rung] += 1
        put = Put.STORED
        try:
            put = await self.ledger.put(records.row(ticket, envelope))
        except LedgerUnusable:
            if not ticket.stored:
                raise
        finally:
            pool.arriving[rung] -= 1
        if ticket.stored:  # a pull was quicker than this: whatever the answer, the row is there
            ticket.verdict = Verdict.SPILLED
            put = Put.STORED
        elif put is Put.STORED:
            ticket.verdict = Verdict.SPILLED
            ticket.stored = True
            if self.left_behind:
                self.leave(ticket)
            else:
                pool.holding[rung] += 1
                ticket.status = TaskStatus.SPILLED
                self._watch_deadline(ticket)
                self.loosen(ticket)
            self.pull(pool)
        return put

    async def record(self, ticket: Ticket, envelope: bytes) -> Put:
        """Store a durable task, already leased, before it is offered to the gate."""
        row = records.row(ticket, envelope)
        lease = Lease(row=row, fence=clock.new_id(), until=clock.wall_time() + self._lease)
        put = await self.ledger.put(row, fence=lease.fence, until=lease.until)
        if put is Put.STORED:
            ticket.stored = True
            ticket.lease = lease
            self.leases.hold(lease)
        return put

    async def unrecord(self, ticket: Ticket) -> None:
        """Take back the row of a durable task that was rejected, so that it may be submitted again."""
        long_ago = Completion(status=TaskStatus.REJECTED.value, finished_at=0.0)  # so that pruning drops it
        ticket.stored = False
        await self.ledger.finish(ticket.task_id, long_ago, fence=self._let_lease_go(ticket))
        await self.ledger.prune(before=1.0)

    async def keep_outside(self, ticket: Ticket, pool: Pool) -> None:
        """Give the lease of a recorded task back, so that it waits outside."""
        pool.holding[ticket.task.priority] += 1
        ticket.verdict = Verdict.SPILLED
        ticket.status = TaskStatus.SPILLED
        lease = ticket.lease
        assert lease is not None  # noqa: S101 - recorded under it
        self._let_lease_go(ticket)
        await self.ledger.release([lease])
        if self.left_behind:
            self.leave(ticket)
        else:
            self._watch_deadline(ticket)
            self.loosen(ticket)
            self.pull(pool)

    def loosen(self, ticket: Ticket) -> None:
        """Hold a ticket whose task waits outside no longer than somebody else does.

        But in a ledger that goes with this process nothing is left to others, and who is awaited is held; so is the
        child of a run, whose place among its ancestors no row knows.
        """
        outside = ticket.status is TaskStatus.SPILLED and ticket.lease is None
        if self.durable and outside and ticket.parent is None and not (ticket.awaited or ticket.listened):
            self.loose[ticket.task_id] = ticket
            self._house.tickets.pop(ticket.task_id, None)

    def tighten(self, task_id: str) -> Ticket | None:
        """The ticket of a task that was outside, if anybody has it; held from now on."""
        ticket = self.loose.pop(task_id, None)
        if ticket is not None:
            self._house.tickets[task_id] = ticket
        return ticket

    def _watch_deadline(self, ticket: Ticket) -> None:
        if ticket.deadline is not None and ticket.expiry is None:
            due = self._house.loop.time() + ticket.deadline.remaining()
            expired = unsuccessful(ticket, TaskStatus.EXPIRED, "its deadline passed while it waited in the overflow")
            # By a weak reference: nobody is to hold it for the sake of its end.
            ticket.expiry = self._house.timers.at(due, self._end_outside, ref(ticket), expired)

    # --- back ---

    def pull(self, pool: Pool) -> None:
        """See whether rows should come in, and fetch them if so."""
        self.intake.pull(pool)

    async def recount(self, pool: Pool) -> None:
        """Believe the ledger on how much waits for a pool that is being pulled for."""
        await self._tending.recount([pool], pulling=pool)

    async def look(self) -> None:
        """See what is outside now, and whether it should come in."""
        pools = list(self._house.pools.values())
        await self._tending.recount(pools)
        for pool in pools:
            self.pull(pool)

    def died(self, row: Row, completion: Completion) -> None:
        """Tell of a stored task that nobody will try again."""
        log.error("task %r is dead, and kept among the dead letters: %s", row.task_id, completion.error)
        if self._house.bus.active:
            at, error = self._house.loop.time(), completion.error or ""
            died = Died(at=at, task_id=row.task_id, task_type=row.task_type, attempts=row.attempts, error=error)
            self._house.bus.emit(died)

    # --- starts ---

    def may_start(self, ticket: Ticket) -> bool:
        """Whether this process still has the right to start a stored task, as far as its clock tells."""
        return ticket.lease is None or self.leases.valid(ticket.task_id, clock.wall_time())

    def begin(self, run: Run) -> None:
        """Let the handler of a stored task begin once its start is on record.

        Not before: a task that kills its process would be tried for ever.
        """
        lease = run.ticket.lease
        assert lease is not None  # noqa: S101 - it is stored, and its lease still good
        self._house.background(self._begin(run, lease))

    async def _begin(self, run: Run, lease: Lease) -> None:
        house, ticket = self._house, run.ticket
        try:
            held = await self.ledger.start(lease)
        except LedgerUnusable as exc:
            log.error("the start of task %r could not be recorded, and it runs all the same: %s", ticket.task_id, exc)
            held = True
        if run.abandoned_at is None and held:
            run.began_at = house.loop.time()
            run.worker.runs[run] = run.worker.runs.pop(run)  # in the order in which they began
            house.begin(run)
            return
        if run.abandoned_at is None:  # another process has it
            ticket.attempts -= 1
            house.endings.set_aside(run)
            self._let_lease_go(ticket)
            ticket.status = TaskStatus.SPILLED
            self.elsewhere[ticket.task_id] = ticket
        house.ended(run, None, asyncio.CancelledError())

    def _let_lease_go(self, ticket: Ticket) -> str | None:
        ticket.lease = None
        return self.leases.drop(ticket.task_id)

    def let_go(self, ticket: Ticket) -> None:
        """The right to a task lapsed before its turn came: another process will have it."""
        self._let_lease_go(ticket)
        self._house.next_of_thread(ticket)
        ticket.status = TaskStatus.SPILLED
        self.elsewhere[ticket.task_id] = ticket

    # --- endings ---

    def complete(self, ticket: Ticket, result: TaskResult) -> None:
        """Store how a task ended, and only then give its ticket the result."""
        self.tighten(ticket.task_id)
        if ticket.expiry is not None:
            self._house.timers.cancel(ticket.expiry)
            ticket.expiry = None
        ticket.undecided += 1
        self._house.background(self._complete(ticket, result, self._let_lease_go(ticket)))

    async def _complete(self, ticket: Ticket, result: TaskResult, fence: str | None) -> None:
        codec = self._house.codecs.result(ticket.task.task_type)
        result, completion = records.completion(result, codec, bound=self._max_payload)
        try:
            stored = await self.ledger.finish(ticket.task_id, completion, fence=fence)
        except Exception:  # noqa: BLE001 - whatever ails the store, the ticket must end
            log.exception("how task %r ended could not be stored: it may be run again", ticket.task_id)
            stored = True
        ticket.undecided -= 1
        if ticket.done():
            return
        if stored:
            if fence is None:
                self._forget_row(ticket)
            self._house.settle(ticket, result)
        elif ticket.undecided or ticket.lease is not None:
            pass  # it came in meanwhile, and ends there
        elif self.left_behind:
            self.leave(ticket)
        else:
            ticket.status = TaskStatus.SPILLED
            self.elsewhere[ticket.task_id] = ticket

    def hear(self, ticket: Ticket, state: RowState, row: Row, completion: Completion) -> None:
        """End a ticket as the ledger says."""
        self._house.settle(ticket, records.result(row, completion, self._house.codecs))
        if state is RowState.DEAD:
            self._house.kept.pop(ticket.task_id, None)  # it may yet be requeued, and end otherwise

    def complete_again(self, ended: Ticket, result: TaskResult, lease: Lease) -> None:
        """Store under a new lease how a task ended, of which the store did not hear the first time."""
        ended.undecided += 1
        self._house.background(self._complete(ended, result, lease.fence))

    def adopt(self, ticket: Ticket, lease: Lease) -> None:
        """Take a row back whose task still waits or runs here, though the right to it was lost meanwhile."""
        self.elsewhere.pop(ticket.task_id, None)
        ticket.stored = True
        ticket.lease = lease
        self.leases.hold(lease)
        ticket.status = TaskStatus.WAITING if ticket.run is None else TaskStatus.RUNNING

    def give_up(self, ticket: Ticket, reason: str) -> None:
        """Cancel a task that waits outside, or was to."""
        ticket.unwanted = reason
        result = unsuccessful(ticket, TaskStatus.CANCELLED, reason)
        if ticket.stored:
            self._end_outside(ref(ticket), result)
        else:
            self._house.settle(ticket, result)

    def _end_outside(self, known: ref[Ticket], result: TaskResult) -> None:
        ticket = known()
        if ticket is not None and ticket.status is TaskStatus.SPILLED and not ticket.done():
            self.complete(ticket, result)

    def _forget_row(self, ticket: Ticket) -> None:
        pool = self._house.pools.get(ticket.task.task_type)
        if pool is not None:
            rung = ticket.task.priority
            pool.holding[rung] = max(0, pool.holding[rung] - 1)

    # --- the end ---

    def put_back(self, ticket: Ticket) -> None:
        """Stop a stored task, so that it is run again by the next process; `close` returns its lease."""
        if ticket.run is not None:
            self._house.endings.set_aside(ticket.run)
        else:
            self._house.leave_line(ticket)
        self.leave(ticket)

    def leave(self, ticket: Ticket) -> None:
        """End the ticket of a task that is left to the next process: nobody must wait for it here."""
        if ticket.expiry is not None:
            self._house.timers.cancel(ticket.expiry)
            ticket.expiry = None
        ticket.status = TaskStatus.SPILLED
        self._house.tickets.pop(ticket.task_id, None)
        self.loose.pop(ticket.task_id, None)
        ticket.resolve(StillSpilled(task_id=ticket.task_id))
        self._house.stirred()

    @property
    def left_behind(self) -> bool:
        """Whether what is outside will not come in any more, and survives."""
        return self.durable and not self.intake.open

    def stop_pulling(self) -> None:
        """Fetch no more, and leave what is outside. What has been fetched is still tended."""
        self.intake.open = False
        for ticket in [*self._house.tickets.values(), *self.loose.values()]:
            if self.durable and ticket.stored and ticket.status is TaskStatus.SPILLED and not ticket.undecided:
                self.leave(ticket)

    async def close(self) -> None:
        """Return every lease, and let the ledger go."""
        self._tending.stop()
        leases = [*self.leases.take_all(), *self.intake.puzzling.values()]
        try:
            if leases:
                await self.ledger.release(leases)
        finally:
            await self.ledger.close()

    def let_tickets_go(self) -> None:
        """End the tickets of what stays outside."""
        self._tending.stop()
        for ticket in [*self._house.tickets.values(), *self.loose.values()]:
            if ticket.stored and self.durable:
                self.leave(ticket)
            else:
                self._house.settle(ticket, unsuccessful(ticket, TaskStatus.CANCELLED, "the supervisor stopped"))
