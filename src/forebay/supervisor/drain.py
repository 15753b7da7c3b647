"""Drain: stop admitting, finish, and report what did not finish."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING

import msgspec

from forebay.errors import InvalidSetting, NotSerializable, PayloadTooLarge, StoreUnavailable
from forebay.events import log
from forebay.interfaces import PutResult
from forebay.supervisor.runs.run import Run
from forebay.supervisor.spill import records
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.ticket import Ticket


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """What became of the tasks that were inside when draining began.

    Attributes:
        finished: how many ended by themselves: succeeded, failed, timed out or expired.
        spilled: how many went out to the overflow, to be run later.
        cancelled: how many were cancelled at the limit, and stopped.
        orphans: ids of those whose handler did not stop and may still be running.
    """

    finished: int
    spilled: int
    cancelled: int
    orphans: tuple[str, ...]


class Drain:
    """One draining of a house that admits nothing any more. There may be several at a time."""

    def __init__(self, dispatcher: Dispatcher, *, grace: float) -> None:
        self._dispatcher = dispatcher
        self._grace = grace  # seconds that a cancelled handler has to stop
        self._progress = asyncio.Event()

    async def run(self, timeout: float | None) -> DrainReport:  # noqa: ASYNC109 - it cuts off, not raises
        """Finish what is inside, for at most `timeout` seconds, then cancel."""
        self._dispatcher.progress_listeners.append(self._progress.set)
        try:
            return await self._run(timeout)
        finally:
            self._dispatcher.progress_listeners.remove(self._progress.set)

    async def _run(self, timeout: float | None) -> DrainReport:  # noqa: ASYNC109 - as above
        house = self._dispatcher
        spilled = 0
        if house.spill is not None and house.spill.durable:
            house.spill.stop_refilling()
            spilled = await self._spill_waiting(house.spill)
        inside = self._unfinished_tickets()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wait_until_empty()
        left = self._unfinished_tickets()
        spilled += self._cancel(left)
        await self._wait_for_handlers()
        if late := self._unfinished_tickets():  # on their way in or out when the rest was cut
            spilled += self._cancel(late)
            await self._wait_for_handlers()
        orphans = tuple(run.task.task_id for run in self._active_runs())
        cancelled = sum(1 for ticket in left if ticket.status is TaskStatus.CANCELLED and ticket.task_id not in orphans)
        return DrainReport(finished=len(inside) - len(left), spilled=spilled, cancelled=cancelled, orphans=orphans)

    async def _spill_waiting(self, overflow: Spill) -> int:
        """Spill what waits inside; return how many went out."""
        out = 0
        for ticket in self._waiting_tickets():
            if ticket.status is not TaskStatus.WAITING or ticket.pending_store_calls:
                continue  # it has ended, or is about to, while others were put out
            if ticket.slot or not (ticket.task.spill or ticket.stored):
                continue
            if isinstance(ticket.parent, Run) and not ticket.parent.ended:
                continue  # what runs inside may wait for it
            self._dispatcher.dequeue(ticket)  # first, or a worker might start it meanwhile
            ticket.status = TaskStatus.SPILLED
            if ticket.stored:
                overflow.release(ticket)
            else:
                ticket.pending_store_calls += 1
                await asyncio.shield(self._dispatcher.run_to_completion(self._spill_one(ticket, overflow)))
            out += ticket.stored
        return out

    async def _spill_one(self, ticket: Ticket, overflow: Spill) -> None:
        try:
            put = await overflow.store.put(records.record_of_ticket(ticket, overflow.encode(ticket.task)))
            ticket.stored = put is PutResult.STORED
        except (
            StoreUnavailable,
            NotSerializable,
            PayloadTooLarge,
        ) as exc:  # a payload may have changed since it was checked
            log.error("task %r could not be spilled at the end: %s", ticket.task_id, exc)
        ticket.pending_store_calls -= 1
        if ticket.done():
            return
        if ticket.cancel_reason is not None:
            overflow.cancel(ticket, ticket.cancel_reason)
        elif ticket.stored:
            overflow.release(ticket)
        else:
            pool = self._dispatcher.pools[ticket.task.task_type]
            self._dispatcher.start_or_queue(ticket, pool, self._dispatcher.start_gate.pick(pool, ticket.task.priority))

    def cancel_all(self) -> None:
        """Cancel everything inside, at once."""
        self._cancel(self._unfinished_tickets())

    def _cancel(self, tickets: list[Ticket]) -> int:
        """Cancel these; what is stored for good goes back to the overflow instead. Return how many did."""
        back = 0
        for ticket in tickets:
            if ticket.done():
                continue
            if ticket.lease is not None and self._dispatcher.spill is not None and self._dispatcher.spill.durable:
                self._dispatcher.spill.requeue(ticket)
                back += 1
            else:
                ticket.cancel("the supervisor stopped before it was done")
        return back

    async def _wait_for_handlers(self) -> None:
        """Wait for handlers to stop and for the store to hear of it, as long as the grace."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                while self._active_runs() or self._dispatcher.background_tasks:
                    await self._wait_for_progress()

    async def _wait_until_empty(self) -> None:
        while (inside := self._unfinished_tickets()) and (
            self._active_runs() or any(self._may_run(ticket) for ticket in inside)
        ):
            await self._wait_for_progress()

    async def _wait_for_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    def _may_run(self, ticket: Ticket) -> bool:
        """Whether a worker could still take it: one that stays FAILED until revived would hold up the end for ever."""
        pool = self._dispatcher.pools.get(ticket.task.task_type)
        now = self._dispatcher.loop.time()
        return pool is not None and any(worker.breaker.retry_after(now) is not None for worker in pool.workers)

    def _unfinished_tickets(self) -> list[Ticket]:
        """Tickets that have not ended and are this house's to end."""
        overflow = self._dispatcher.spill
        tickets = self._dispatcher.tickets.values()
        if overflow is None or not overflow.durable:
            return list(tickets)
        return [ticket for ticket in tickets if ticket.status is not TaskStatus.SPILLED]

    def _waiting_tickets(self) -> list[Ticket]:
        tickets = self._dispatcher.tickets.values()
        return [ticket for ticket in tickets if ticket.status is TaskStatus.WAITING and not ticket.pending_store_calls]

    def _active_runs(self) -> list[Run]:
        return [run for worker in self._dispatcher.workers.values() for run in worker.runs]


def check_drain_timeout(timeout: float | None) -> None:
    """Pass `timeout` if it can be meant.

    Raises:
        InvalidSetting: it cannot.
    """
    if timeout is not None and not (isinstance(timeout, int | float) and 0 <= timeout < math.inf):
        raise InvalidSetting(owner="drain", name="timeout", value=timeout, expected="None or seconds, at least 0")
