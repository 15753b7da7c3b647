"""Spill and refill: out to the ledger, back from it, and the leases on what of it is inside."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import StillSpilled, UnknownTask
from forebay.events import Refilled, log
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_task, encode_task
from forebay.supervisor import records
from forebay.supervisor.endings import unsuccessful
from forebay.supervisor.ticket import Ticket
from forebay.task import Deadline, Priority, Task, TaskResult, TaskStatus, Verdict
from forebay.typing import Completion, Lease, Ledger, Put, RowState

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.pool import Pool

_KEEP = 86_400.0  # seconds for which results are kept
_RTT_GAIN = 0.2


class Overflow:
    """The house's side of the ledger.

    Pull, not push: seats are reserved first, and then exactly that many rows leased. A refilled task is not gated again.
    While rows of a rung or better wait outside, fresh work of that type and rung joins their tail: nothing overtakes.
    """

    def __init__(self, house: Dispatcher, ledger: Ledger, *, lease: float, max_payload: int, max_attempts: int) -> None:
        self._house = house
        self._ledger = ledger
        self._lease = lease  # seconds that a right to a row lasts unless renewed
        self._max_payload = max_payload  # bytes
        self._max_attempts = max_attempts
        self._pulling: set[Pool] = set()
        self._held: dict[str, Lease] = {}  # by task id
        self._elsewhere: dict[str, Ticket] = {}  # tickets whose rows another process holds
        self._puzzling: list[Lease] = []  # rows that this version cannot read: kept from others like it until close
        self._round_trip = 0.0  # seconds that a lease takes
        self._closing = False
        self.durable = ledger.durable
        self._depths: dict[tuple[str, Priority], int] = {}

    async def open(self) -> None:
        """Connect, and see what is there.

        Raises:
            LedgerUnusable: the ledger cannot be opened.
        """
        await self._ledger.open()
        await self._reap()
        self._depths = dict(await self._ledger.depths())
        if self.durable:
            self._arm()

    def know(self, pool: Pool) -> None:
        """A new task type is served: pull what waits for it."""
        for rung in Priority:
            pool.holding[rung] = self._depths.pop((pool.task_type, rung), 0)

    @property
    def outside(self) -> int:
        """How many rows wait, as far as is known."""
        return sum(self._depths.values()) + sum(sum(pool.holding.values()) for pool in self._house.pools.values())

    @property
    def holding(self) -> bool:
        """Whether rows that this house could run wait outside."""
        return any(any(pool.holding.values()) for pool in self._house.pools.values())

    # --- out ---

    def encode(self, task: Task) -> bytes:
        """The task as it will be stored.

        Raises:
            NotPortable, PayloadTooLarge: it cannot be.
        """
        return encode_task(task, bound=self._max_payload)

    async def spill(self, ticket: Ticket, envelope: bytes, pool: Pool) -> Put:
        """Store a task that was refused; on STORED the ticket is SPILLED."""
        # Counted before the await, or fresh work would overtake what is on its way out.
        pool.arriving[ticket.task.priority] += 1
        self._house.tickets[ticket.task_id] = ticket
        storing = asyncio.ensure_future(self._ledger.put(records.row(ticket, envelope)))
        try:
            await asyncio.shield(storing)
        except asyncio.CancelledError:
            self._house.background(self._unspill(storing, ticket, pool))
            raise
        finally:
            if storing.done():
                self._stored(storing, ticket, pool)
        return storing.result()

    def _stored(self, storing: asyncio.Future[Put], ticket: Ticket, pool: Pool) -> None:
        rung = ticket.task.priority
        pool.arriving[rung] -= 1
        if storing.cancelled() or storing.exception() is not None or storing.result() is not Put.STORED:
            if self._house.tickets.get(ticket.task_id) is ticket:
                del self._house.tickets[ticket.task_id]
            return
        ticket.verdict = Verdict.SPILLED
        ticket.stored = True
        if ticket.lease is None:  # else a pull was quicker than this
            pool.holding[rung] += 1
            ticket.status = TaskStatus.SPILLED
            self._watch_deadline(ticket)
        self.pull(pool)

    async def _unspill(self, storing: asyncio.Future[Put], ticket: Ticket, pool: Pool) -> None:
        """Whoever submitted it has gone while it was being stored."""
        await asyncio.wait((storing,))
        self._stored(storing, ticket, pool)
        if ticket.stored:
            ticket.cancel("its submitter has gone")

    async def record(self, ticket: Ticket, envelope: bytes) -> Put:
        """Store a durable task, already leased, before it is offered to the gate."""
        row = records.row(ticket, envelope)
        lease = Lease(row=row, fence=clock.new_id(), until=clock.wall_time() + self._lease)
        put = await self._ledger.put(row, fence=lease.fence, until=lease.until)
        if put is Put.STORED:
            ticket.stored = True
            self._hold(ticket, lease)
        return put

    async def unrecord(self, ticket: Ticket) -> None:
        """Take back the row of a durable task that was rejected."""
        completion = Completion(status=TaskStatus.REJECTED.value, finished_at=clock.wall_time())
        await self._ledger.finish(ticket.task_id, completion, fence=self._release(ticket))
        ticket.stored = False

    async def keep_outside(self, ticket: Ticket, pool: Pool) -> None:
        """Give the lease of a recorded task back, so that it waits outside."""
        pool.holding[ticket.task.priority] += 1
        ticket.verdict = Verdict.SPILLED
        ticket.status = TaskStatus.SPILLED
        self._house.tickets[ticket.task_id] = ticket
        lease = self._held.pop(ticket.task_id)
        ticket.lease = None
        await self._ledger.release([lease])
        self._watch_deadline(ticket)
        self.pull(pool)

    def _watch_deadline(self, ticket: Ticket) -> None:
        if ticket.deadline is not None and ticket.expiry is None:
            due = self._house.loop.time() + ticket.deadline.remaining()
            expired = unsuccessful(ticket, TaskStatus.EXPIRED, "its deadline passed while it waited in the overflow")
            ticket.expiry = self._house.timers.at(due, lambda: self._end_outside(ticket, expired))

    # --- back ---

    def pull(self, pool: Pool) -> None:
        """See whether rows should come in, and fetch them if so."""
        if not self._closing and pool not in self._pulling and any(pool.holding.values()) and self._seats(pool) > 0:
            self._pulling.add(pool)
            self._house.background(self._pull(pool))

    def _seats(self, pool: Pool) -> int:
        """How many rows to fetch: one for each free slot, and what drains in two round trips."""
        rate = pool.times.drain_rate(pool.slots) or 0.0
        ahead = min(math.ceil(2 * self._round_trip * rate), pool.bound)
        return min(max(0, pool.slots - pool.running) + ahead - pool.waiting, sum(pool.holding.values()))

    async def _pull(self, pool: Pool) -> None:
        loop = self._house.loop
        try:
            while not self._closing and (seats := self._seats(pool)) > 0:
                pool.reserved += seats
                asked = loop.time()
                try:
                    until = clock.wall_time() + self._lease
                    leases = await self._ledger.lease(pool.task_type, seats, until=until)
                finally:
                    pool.reserved -= seats
                self._round_trip += _RTT_GAIN * (loop.time() - asked - self._round_trip)
                for lease in leases:
                    await self._admit(lease, pool)
                if len(leases) < seats:
                    await self._recount([pool])
        finally:
            self._pulling.discard(pool)

    async def _admit(self, lease: Lease, pool: Pool) -> None:
        row = lease.row
        pool.holding[row.priority] = max(0, pool.holding[row.priority] - 1)
        ticket = self._house.tickets.get(row.task_id)
        if ticket is None or ticket.task.task_type != row.task_type or ticket.task.payload is None:
            try:
                task = decode_task(row.envelope)
            except EnvelopeTooNew:
                self._puzzling.append(lease)
                log.warning("task %r was stored by a newer version and is left for it", row.task_id)
                return
            except EnvelopeDamaged as exc:
                log.error("the stored task %r cannot be read and is given up: %s", row.task_id, exc)
                completion = Completion(status="failed", error=str(exc), finished_at=clock.wall_time())
                await self._ledger.finish(row.task_id, completion, fence=lease.fence)
                return
            if ticket is None:
                ticket = Ticket(self._house, task, None if row.deadline is None else Deadline(row.deadline), None)
                ticket.verdict = Verdict.SPILLED
                ticket.stored = True
            ticket.task = task
        ticket.attempts = row.attempts
        if ticket.expiry is not None:
            self._house.timers.cancel(ticket.expiry)
            ticket.expiry = None
        self._hold(ticket, lease)
        if ticket.done():  # ended meanwhile: its completion is on its way to the store
            return
        self._house.counts.refilled += 1
        if self._house.bus.active or ticket.listened:
            at = self._house.loop.time()
            self._house.tell(ticket, Refilled(at=at, task_id=row.task_id, task_type=row.task_type))
        if ticket.unwanted:
            self.complete(ticket, unsuccessful(ticket, TaskStatus.CANCELLED, "cancelled by its submitter"))
        elif ticket.deadline is not None and ticket.deadline.remaining() <= 0:
            self.complete(ticket, unsuccessful(ticket, TaskStatus.EXPIRED, "its deadline passed while it waited"))
        else:
            self._house.enter(ticket, pool, None if pool.line else pool.router.pick())

    def _hold(self, ticket: Ticket, lease: Lease) -> None:
        ticket.lease = lease
        self._held[ticket.task_id] = lease

    def _release(self, ticket: Ticket) -> str | None:
        lease = self._held.pop(ticket.task_id, None)
        ticket.lease = None
        return None if lease is None else lease.fence

    def may_start(self, ticket: Ticket) -> bool:
        """Whether this process still has the right to start a stored task, as far as its clock tells."""
        return ticket.lease is None or clock.wall_time() < self._held[ticket.task_id].until

    def started(self, lease: Lease) -> None:
        """Count a start of a stored task's handler."""
        self._house.background(self._ledger.start(lease))

    def let_go(self, ticket: Ticket) -> None:
        """The right to a task lapsed before its turn came: another process will have it."""
        self._release(ticket)
        self._house.next_of_thread(ticket)
        ticket.status = TaskStatus.SPILLED
        self._elsewhere[ticket.task_id] = ticket

    # --- endings ---

    def complete(self, ticket: Ticket, result: TaskResult) -> None:
        """Store how a task ended, and only then give its ticket the result."""
        if ticket.expiry is not None:
            self._house.timers.cancel(ticket.expiry)
            ticket.expiry = None
        self._house.background(self._complete(ticket, result))

    async def _complete(self, ticket: Ticket, result: TaskResult) -> None:
        completion = records.completion(result, bound=self._max_payload)
        fence = self._release(ticket)
        if await self._ledger.finish(ticket.task_id, completion, fence=fence):
            if fence is None:
                self._forget_row(ticket)
            self._house.settle(ticket, result)
        elif not ticket.done():
            ticket.status = TaskStatus.SPILLED
            self._elsewhere[ticket.task_id] = ticket

    def give_up(self, ticket: Ticket, reason: str) -> None:
        """Cancel a task that waits outside."""
        ticket.unwanted = True
        self._end_outside(ticket, unsuccessful(ticket, TaskStatus.CANCELLED, reason))

    def _end_outside(self, ticket: Ticket, result: TaskResult) -> None:
        if ticket.status is TaskStatus.SPILLED and not ticket.done():
            self.complete(ticket, result)

    def _forget_row(self, ticket: Ticket) -> None:
        pool = self._house.pools.get(ticket.task.task_type)
        if pool is not None:
            rung = ticket.task.priority
            pool.holding[rung] = max(0, pool.holding[rung] - 1)

    def look_up(self, task_id: str) -> Ticket:
        """A ticket for a task that only the ledger may know. Awaiting it raises UnknownTask if it does not."""
        ticket = Ticket(self._house, Task("(stored)", task_id=task_id), None, None)
        ticket.verdict = Verdict.SPILLED
        ticket.status = TaskStatus.SPILLED
        ticket.stored = True
        self._house.tickets[task_id] = ticket
        self._house.background(self._find(ticket))
        return ticket

    async def _find(self, ticket: Ticket) -> None:
        task_id = ticket.task_id
        found = await self._ledger.find(task_id)
        if ticket.done():
            return
        if found is None:
            del self._house.tickets[task_id]
            ticket.resolve(UnknownTask(task_id=task_id))
            return
        state, row, completion = found
        if ticket.lease is None:  # else a pull was quicker, and has read it
            ticket.task = Task(row.task_type, task_id=task_id, priority=row.priority, key=row.key)
        if completion is not None:
            self._house.settle(ticket, records.result(task_id, completion))
        elif state is RowState.LEASED and ticket.lease is None:
            self._elsewhere[task_id] = ticket

    async def find_key(self, key: str) -> Ticket | None:
        """A ticket for the stored task of an idempotency key."""
        task_id = await self._ledger.find_key(key)
        if task_id is None:
            return None
        return self._house.tickets.get(task_id) or self._house.kept.get(task_id) or self.look_up(task_id)

    # --- keeping house ---

    def _arm(self) -> None:
        due = self._house.loop.time() + self._lease / 3
        self._house.timers.at(due, lambda: self._house.background(self._tend()))

    async def _tend(self) -> None:
        """Renew what is held, take in what lapsed elsewhere, and hear of what others finished."""
        if self._closing:
            return
        try:
            until = clock.wall_time() + self._lease
            lost = await self._ledger.renew(list(self._held.values()), until=until)
            for lease in lost:
                log.warning("the lease on task %r was lost: its completion will be refused", lease.row.task_id)
            for task_id in self._held.keys() - {lease.row.task_id for lease in lost}:
                self._held[task_id] = Lease(row=self._held[task_id].row, fence=self._held[task_id].fence, until=until)
            await self._reap()
            await self._recount([pool for pool in self._house.pools.values() if pool not in self._pulling])
            await self._hear()
            await self._ledger.prune(before=clock.wall_time() - _KEEP)
        finally:
            if not self._closing:
                self._arm()
        for pool in self._house.pools.values():
            self.pull(pool)

    async def _reap(self) -> None:
        for row in await self._ledger.reap(now=clock.wall_time(), max_attempts=self._max_attempts):
            log.error("task %r was begun %d times and never ended: it is dead", row.task_id, row.attempts)

    async def _recount(self, pools: list[Pool]) -> None:
        """Believe the ledger on how much waits: other processes put and lease too."""
        depths = dict(await self._ledger.depths())
        for pool in pools:
            if pool not in self._pulling or len(pools) == 1:
                for rung in Priority:
                    pool.holding[rung] = depths.get((pool.task_type, rung), 0)
        self._depths = {key: depth for key, depth in depths.items() if key[0] not in self._house.pools}

    async def _hear(self) -> None:
        for task_id, ticket in list(self._elsewhere.items()):
            found = await self._ledger.find(task_id)
            if found is None or found[0] is RowState.WAITING:
                del self._elsewhere[task_id]
            elif found[2] is not None and not ticket.done():
                del self._elsewhere[task_id]
                self._house.settle(ticket, records.result(task_id, found[2]))

    # --- the end ---

    async def take_out(self, tickets: list[Ticket]) -> int:
        """Spill tasks that wait inside, at the end of the house; return how many went out."""
        out = 0
        for ticket in tickets:
            if ticket.status is not TaskStatus.WAITING or not (ticket.task.spill or ticket.stored) or ticket.occupant:
                continue
            self._house.leave_line(ticket)  # first, or a worker might start it meanwhile
            ticket.status = TaskStatus.SPILLED
            if not ticket.stored and not await self._put_at_end(ticket):
                pool = self._house.pools[ticket.task.task_type]
                self._house.enter(ticket, pool, pool.router.pick())
            else:
                out += 1
        return out

    async def _put_at_end(self, ticket: Ticket) -> bool:
        ticket.stored = await self._ledger.put(records.row(ticket, self.encode(ticket.task))) is Put.STORED
        return ticket.stored

    def put_back(self, ticket: Ticket) -> None:
        """Stop a stored task, so that it is run again by the next process; `close` returns its lease."""
        if ticket.run is not None:
            self._house.endings.set_aside(ticket.run)
        else:
            self._house.leave_line(ticket)
        ticket.status = TaskStatus.SPILLED

    def stop_pulling(self) -> None:
        """Fetch no more."""
        self._closing = True

    async def close(self) -> None:
        """Return every lease, end the tickets of what stays outside, and let the ledger go."""
        self._closing = True
        leases = [*self._held.values(), *self._puzzling]
        self._held.clear()
        if leases:
            await self._ledger.release(leases)
        for ticket in list(self._house.tickets.values()):
            if not ticket.done():
                self._house.tickets.pop(ticket.task_id)
                ticket.resolve(StillSpilled(task_id=ticket.task_id))
        await self._ledger.close()
