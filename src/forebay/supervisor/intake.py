"""Refill: back from the ledger into the line, as seats fall free."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import InvalidPayload
from forebay.events import Refilled, log
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew
from forebay.supervisor import records
from forebay.supervisor.endings import describe, unsuccessful
from forebay.supervisor.ticket import Ticket
from forebay.task import Deadline, Priority, TaskStatus, Verdict
from forebay.typing import Completion, Lease

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.refill import Overflow

_RTT_GAIN = 0.2


class Intake:
    """Pull, not push: seats are reserved first, and then exactly that many rows leased.

    A refilled task is not gated again.
    """

    def __init__(self, house: Dispatcher, overflow: Overflow, *, lease: float) -> None:
        self._house = house
        self._overflow = overflow
        self._lease = lease  # seconds
        self.pulling: set[Pool] = set()
        self.open = True
        self.puzzling: dict[str, Lease] = {}  # rows that this version cannot read: kept from others like it until close
        self._round_trip = 0.0  # seconds that a lease takes

    def pull(self, pool: Pool) -> None:
        """See whether rows should come in, and fetch them if so."""
        if self.open and pool not in self.pulling and self._wish(pool) is not None:
            self.pulling.add(pool)
            self._house.background(self._pull(pool))

    def _wish(self, pool: Pool) -> tuple[Priority, int] | None:
        """What to fetch: for each free slot one, and as many as drain in two round trips."""
        if not any(pool.holding.values()):
            return None
        rate = pool.times.drain_rate(pool.usable) or 0.0
        free = pool.usable - pool.running
        return pool.pacing.wish(
            seats=max(0, free) + min(math.ceil(2 * self._round_trip * rate), pool.bound),
            room=pool.bound + free - pool.waiting,
            inside=pool.line.lengths,
            outside=pool.holding,
        )

    async def _pull(self, pool: Pool) -> None:
        loop, ledger = self._house.loop, self._overflow.ledger
        try:
            while self.open and (wish := self._wish(pool)) is not None:
                rung, seats = wish
                pool.reserved += seats
                asked = loop.time()
                try:
                    until = clock.wall_time() + self._lease
                    leases = await ledger.lease(pool.task_type, seats, until=until, rung=rung)
                finally:
                    pool.reserved -= seats
                if not self.open:
                    await ledger.release(leases)
                    break
                self._round_trip += _RTT_GAIN * (loop.time() - asked - self._round_trip)
                pool.pacing.fetched(rung, len(leases), pool.holding)
                for lease in leases:
                    await self._admit(lease, pool)
                if len(leases) < seats:
                    await self._overflow.recount(pool)
        finally:
            self.pulling.discard(pool)

    async def _admit(self, lease: Lease, pool: Pool) -> None:
        row, overflow = lease.row, self._overflow
        ticket = self._house.tickets.get(row.task_id) or overflow.tighten(row.task_id)
        if ticket is None or ticket.stored:  # else it is still counted as arriving
            pool.holding[row.priority] = max(0, pool.holding[row.priority] - 1)
        if ticket is None and (ended := self._house.kept.get(row.task_id)) is not None and ended.result is not None:
            overflow.complete_again(ended, ended.result, lease)
        elif ticket is not None and self._is_inside(ticket):
            overflow.adopt(ticket, lease)
        else:
            if ticket is None or ticket.task.task_type != row.task_type:
                ticket = await self._read(lease, ticket)
            if ticket is not None:
                self._bring_in(ticket, lease, pool)

    def _is_inside(self, ticket: Ticket) -> bool:
        """Whether a task waits here or runs here; one that was told to stop no longer counts."""
        if ticket.run is not None:
            return ticket.run.abandoned_at is None
        return ticket.place is not None or ticket in self._house.talks.get(ticket.task.thread or "", ())

    def _bring_in(self, ticket: Ticket, lease: Lease, pool: Pool) -> None:
        row, overflow = lease.row, self._overflow
        ticket.stored = True
        ticket.attempts = row.attempts
        if ticket.expiry is not None:
            self._house.timers.cancel(ticket.expiry)
            ticket.expiry = None
        ticket.lease = lease
        overflow.leases.hold(lease)
        if ticket.done():  # ended meanwhile: its completion is on its way to the store
            return
        self._house.counts.refilled += 1
        if self._house.bus.active or ticket.listened:
            at = self._house.loop.time()
            self._house.tell(ticket, Refilled(at=at, task_id=row.task_id, task_type=row.task_type))
        if ticket.unwanted is not None:
            overflow.complete(ticket, unsuccessful(ticket, TaskStatus.CANCELLED, ticket.unwanted))
        elif (error := self._house.too_late(ticket, pool)) is not None:
            overflow.complete(ticket, unsuccessful(ticket, TaskStatus.EXPIRED, error))
        else:
            start_gate = self._house.start_gate
            self._house.enter(ticket, pool, None if pool.line else start_gate.pick(pool, ticket.task.priority))

    async def _read(self, lease: Lease, ticket: Ticket | None) -> Ticket | None:
        """The ticket of a row that another process stored, or None if this one cannot read it."""
        row = lease.row
        try:
            task = records.task(row, self._house.codecs)
        except EnvelopeTooNew:
            if row.task_id not in self.puzzling:  # else its lease had lapsed, and nobody newer was quicker
                log.warning("task %r was stored by a newer version and is left for it", row.task_id)
            self.puzzling[row.task_id] = lease
            return None
        except (EnvelopeDamaged, InvalidPayload) as exc:
            completion = Completion(
                status=TaskStatus.FAILED.value,
                error=describe(exc),
                attempts=row.attempts,
                finished_at=clock.wall_time(),
            )
            if await self._overflow.ledger.bury(lease, completion):
                self._overflow.died(row, completion)
            return None
        if ticket is None:
            ticket = Ticket(self._house, task, None, None)
            ticket.verdict = Verdict.SPILLED
            ticket.stored = True
            ticket.came_at = row.enqueued_at
        ticket.task = task
        ticket.deadline = None if row.deadline is None else Deadline(row.deadline)
        return ticket
