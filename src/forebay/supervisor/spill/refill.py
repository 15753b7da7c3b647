"""Refill: back from the ledger into the line, as seats fall free."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import InvalidPayload
from forebay.events import TaskRefilled, log
from forebay.interfaces import Completion, Lease
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew
from forebay.supervisor.runs.completion import describe_error, unsuccessful_result
from forebay.supervisor.spill import records
from forebay.supervisor.ticket import Ticket
from forebay.task import Deadline, Priority, TaskStatus, Verdict

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.spill.spill import Spill

_RTT_GAIN = 0.2


class Refiller:
    """Pull, not push: seats are reserved first, and then exactly that many rows leased.

    A refilled task is not gated again.
    """

    def __init__(self, dispatcher: Dispatcher, spill: Spill, *, lease: float) -> None:
        self._dispatcher = dispatcher
        self._spill = spill
        self._lease = lease  # seconds
        self.refilling: set[Pool] = set()
        self.open = True
        self.unreadable: dict[
            str, Lease
        ] = {}  # rows that this version cannot read: kept from others like it until close
        self._round_trip = 0.0  # seconds that a lease takes

    def refill(self, pool: Pool) -> None:
        """See whether rows should come in, and fetch them if so."""
        if self.open and pool not in self.refilling and self._demand(pool) is not None:
            self.refilling.add(pool)
            self._dispatcher.run_in_background(self._refill(pool))

    def _demand(self, pool: Pool) -> tuple[Priority, int] | None:
        """What to fetch: for each free slot one, and as many as drain in two round trips."""
        if not any(pool.spilled.values()):
            return None
        rate = pool.service_times.drain_rate(pool.usable_slots) or 0.0
        free = pool.usable_slots - pool.running
        return pool.refill_pacing.next_batch(
            slots=max(0, free) + min(math.ceil(2 * self._round_trip * rate), pool.queue_bound),
            capacity=pool.queue_bound + free - pool.waiting,
            queued=pool.queue.lengths,
            stored=pool.spilled,
        )

    async def _refill(self, pool: Pool) -> None:
        loop, ledger = self._dispatcher.loop, self._spill.store
        try:
            while self.open and (wish := self._demand(pool)) is not None:
                rung, seats = wish
                pool.reserved += seats
                asked = loop.time()
                try:
                    until = clock.wall_time() + self._lease
                    leases = await ledger.lease(pool.task_type, seats, until=until, priority=rung)
                finally:
                    pool.reserved -= seats
                if not self.open:
                    await ledger.release(leases)
                    break
                self._round_trip += _RTT_GAIN * (loop.time() - asked - self._round_trip)
                pool.refill_pacing.record_fetch(rung, len(leases), pool.spilled)
                for lease in leases:
                    await self._take_in(lease, pool)
                if len(leases) < seats:
                    await self._spill.recount(pool)
        finally:
            self.refilling.discard(pool)

    async def _take_in(self, lease: Lease, pool: Pool) -> None:
        row, overflow = lease.record, self._spill
        ticket = self._dispatcher.tickets.get(row.task_id) or overflow.hold_strongly(row.task_id)
        if ticket is None or ticket.stored:  # else it is still counted as arriving
            pool.spilled[row.priority] = max(0, pool.spilled[row.priority] - 1)
        if (
            ticket is None
            and (ended := self._dispatcher.ended_tickets.get(row.task_id)) is not None
            and ended.result is not None
        ):
            overflow.complete_again(ended, ended.result, lease)
        elif ticket is not None and self._is_inside(ticket):
            overflow.adopt(ticket, lease)
        else:
            if ticket is None or ticket.task.task_type != row.task_type:
                ticket = await self._read_ticket(lease, ticket)
            if ticket is not None:
                self._start_or_queue(ticket, lease, pool)

    def _is_inside(self, ticket: Ticket) -> bool:
        """Whether a task waits here or runs here; one that was told to stop no longer counts."""
        if ticket.run is not None:
            return ticket.run.abandoned_at is None
        return ticket.queue_entry is not None or ticket in self._dispatcher.conversations.get(
            ticket.task.thread_id or "", ()
        )

    def _start_or_queue(self, ticket: Ticket, lease: Lease, pool: Pool) -> None:
        row, overflow = lease.record, self._spill
        ticket.stored = True
        ticket.attempts = row.attempts
        if ticket.expiry_timer is not None:
            self._dispatcher.timers.cancel(ticket.expiry_timer)
            ticket.expiry_timer = None
        ticket.lease = lease
        overflow.leases.hold(lease)
        if ticket.done():  # ended meanwhile: its completion is on its way to the store
            return
        self._dispatcher.counts.refilled += 1
        if self._dispatcher.bus.active or ticket.has_listeners:
            at = self._dispatcher.loop.time()
            self._dispatcher.emit(ticket, TaskRefilled(at=at, task_id=row.task_id, task_type=row.task_type))
        if ticket.cancel_reason is not None:
            overflow.complete(ticket, unsuccessful_result(ticket, TaskStatus.CANCELLED, ticket.cancel_reason))
        elif (error := self._dispatcher.expiry_reason(ticket, pool)) is not None:
            overflow.complete(ticket, unsuccessful_result(ticket, TaskStatus.EXPIRED, error))
        else:
            start_gate = self._dispatcher.start_gate
            self._dispatcher.start_or_queue(
                ticket, pool, None if pool.queue else start_gate.pick(pool, ticket.task.priority)
            )

    async def _read_ticket(self, lease: Lease, ticket: Ticket | None) -> Ticket | None:
        """The ticket of a row that another process stored, or None if this one cannot read it."""
        row = lease.record
        try:
            task = records.task_of_record(row, self._dispatcher.codecs)
        except EnvelopeTooNew:
            if row.task_id not in self.unreadable:  # else its lease had lapsed, and nobody newer was quicker
                log.warning("task %r was stored by a newer version and is left for it", row.task_id)
            self.unreadable[row.task_id] = lease
            return None
        except (EnvelopeDamaged, InvalidPayload) as exc:
            completion = Completion(
                status=TaskStatus.FAILED.value,
                error=describe_error(exc),
                attempts=row.attempts,
                finished_at=clock.wall_time(),
            )
            if await self._spill.store.mark_dead(lease, completion):
                self._spill.report_dead(row, completion)
            return None
        if ticket is None:
            ticket = Ticket(self._dispatcher, task, None, None)
            ticket.verdict = Verdict.SPILLED
            ticket.stored = True
            ticket.submitted_at = row.enqueued_at
        ticket.task = task
        ticket.deadline = None if row.deadline is None else Deadline(row.deadline)
        return ticket
