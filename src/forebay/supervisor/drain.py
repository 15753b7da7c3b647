"""Drain: stop admitting, finish, and report what did not finish."""

from __future__ import annotations

import asyncio
import contextlib
import math
from typing import TYPE_CHECKING

import msgspec

from forebay.errors import InvalidSetting, LedgerUnusable, NotPortable, PayloadTooLarge
from forebay.events import log
from forebay.supervisor import records
from forebay.supervisor.run import Run
from forebay.task import TaskStatus
from forebay.typing import Put

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.refill import Overflow
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

    def __init__(self, house: Dispatcher, *, grace: float) -> None:
        self._house = house
        self._grace = grace  # seconds that a cancelled handler has to stop
        self._stirred = asyncio.Event()

    async def run(self, timeout: float | None) -> DrainReport:  # noqa: ASYNC109 - it cuts off, not raises
        """Finish what is inside, for at most `timeout` seconds, then cancel."""
        self._house.watchers.append(self._stirred.set)
        try:
            return await self._run(timeout)
        finally:
            self._house.watchers.remove(self._stirred.set)

    async def _run(self, timeout: float | None) -> DrainReport:  # noqa: ASYNC109 - as above
        house = self._house
        spilled = 0
        if house.overflow is not None and house.overflow.durable:
            house.overflow.stop_pulling()
            spilled = await self._take_out(house.overflow)
        inside = self._inside()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._until_empty()
        left = self._inside()
        spilled += self._cut(left)
        await self._settle()
        if late := self._inside():  # on their way in or out when the rest was cut
            spilled += self._cut(late)
            await self._settle()
        orphans = tuple(run.task.task_id for run in self._runs())
        cancelled = sum(1 for ticket in left if ticket.status is TaskStatus.CANCELLED and ticket.task_id not in orphans)
        return DrainReport(finished=len(inside) - len(left), spilled=spilled, cancelled=cancelled, orphans=orphans)

    async def _take_out(self, overflow: Overflow) -> int:
        """Spill what waits inside; return how many went out."""
        out = 0
        for ticket in self._waiting():
            if ticket.status is not TaskStatus.WAITING or ticket.undecided:
                continue  # it has ended, or is about to, while others were put out
            if ticket.occupant or not (ticket.task.spill or ticket.stored):
                continue
            if isinstance(ticket.parent, Run) and not ticket.parent.ended:
                continue  # what runs inside may wait for it
            self._house.leave_line(ticket)  # first, or a worker might start it meanwhile
            ticket.status = TaskStatus.SPILLED
            if ticket.stored:
                overflow.leave(ticket)
            else:
                ticket.undecided += 1
                await asyncio.shield(self._house.finish_anyway(self._put_out(ticket, overflow)))
            out += ticket.stored
        return out

    async def _put_out(self, ticket: Ticket, overflow: Overflow) -> None:
        try:
            put = await overflow.ledger.put(records.row(ticket, overflow.encode(ticket.task)))
            ticket.stored = put is Put.STORED
        except (LedgerUnusable, NotPortable, PayloadTooLarge) as exc:  # a payload may have changed since it was checked
            log.error("task %r could not be spilled at the end: %s", ticket.task_id, exc)
        ticket.undecided -= 1
        if ticket.done():
            return
        if ticket.unwanted is not None:
            overflow.give_up(ticket, ticket.unwanted)
        elif ticket.stored:
            overflow.leave(ticket)
        else:
            pool = self._house.pools[ticket.task.task_type]
            self._house.enter(ticket, pool, self._house.start_gate.pick(pool, ticket.task.priority))

    def cut(self) -> None:
        """Cancel everything inside, at once."""
        self._cut(self._inside())

    def _cut(self, tickets: list[Ticket]) -> int:
        """Cancel these; what is stored for good goes back to the overflow instead. Return how many did."""
        back = 0
        for ticket in tickets:
            if ticket.done():
                continue
            if ticket.lease is not None and self._house.overflow is not None and self._house.overflow.durable:
                self._house.overflow.put_back(ticket)
                back += 1
            else:
                ticket.cancel("the supervisor stopped before it was done")
        return back

    async def _settle(self) -> None:
        """Wait for handlers to stop and for the store to hear of it, as long as the grace."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                while self._runs() or self._house.chores:
                    await self._next_stir()

    async def _until_empty(self) -> None:
        while (inside := self._inside()) and (self._runs() or any(self._may_run(ticket) for ticket in inside)):
            await self._next_stir()

    async def _next_stir(self) -> None:
        self._stirred.clear()
        await self._stirred.wait()

    def _may_run(self, ticket: Ticket) -> bool:
        """Whether a worker could still take it: one that stays FAILED until revived would hold up the end for ever."""
        pool = self._house.pools.get(ticket.task.task_type)
        now = self._house.loop.time()
        return pool is not None and any(worker.breaker.remaining(now) is not None for worker in pool.workers)

    def _inside(self) -> list[Ticket]:
        """Tickets that have not ended and are this house's to end."""
        overflow = self._house.overflow
        tickets = self._house.tickets.values()
        if overflow is None or not overflow.durable:
            return list(tickets)
        return [ticket for ticket in tickets if ticket.status is not TaskStatus.SPILLED]

    def _waiting(self) -> list[Ticket]:
        tickets = self._house.tickets.values()
        return [ticket for ticket in tickets if ticket.status is TaskStatus.WAITING and not ticket.undecided]

    def _runs(self) -> list[Run]:
        return [run for worker in self._house.workers.values() for run in worker.runs]


def check_limit(timeout: float | None) -> None:
    """Pass `timeout` if it can be meant.

    Raises:
        InvalidSetting: it cannot.
    """
    if timeout is not None and not (isinstance(timeout, int | float) and 0 <= timeout < math.inf):
        raise InvalidSetting(owner="drain", name="timeout", value=timeout, expected="None or seconds, at least 0")
