"""Tending the overflow: keeping leases, taking in what lapsed, hearing of what other processes finished."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import LedgerUnusable
from forebay.supervisor.leases import Heartbeat
from forebay.task import Priority, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.refill import Overflow

_KEEP = 86_400.0  # seconds for which results are kept
_ASK_AFTER = 1000  # tickets at a time


class Tending:
    """What has to be done for a ledger that is shared with other processes, three times in each lease."""

    def __init__(self, house: Dispatcher, overflow: Overflow, *, lease: float, max_attempts: int) -> None:
        self._house = house
        self._overflow = overflow
        self._lease = lease  # seconds
        self._max_attempts = max_attempts
        self._tending = False
        self._stopped = False
        self._heartbeat = Heartbeat(house.loop, interval=lease / 3, beat=self._renew, beaten=self._beaten)

    def start(self) -> None:
        """Tend from now on."""
        self._heartbeat.start()

    def stop(self) -> None:
        """Tend no more."""
        self._stopped = True
        self._heartbeat.stop()

    def _renew(self) -> None:
        self._overflow.leases.renew(self._overflow.ledger, until=clock.wall_time() + self._lease)

    def _beaten(self) -> None:
        if not self._tending:  # else it takes longer than a third of a lease, and the next beat will do
            self._tending = True
            self._house.background(self._tend())

    async def _tend(self) -> None:
        overflow = self._overflow
        try:
            await self.reap()
            await self.recount(list(self._house.pools.values()))
            await self._hear()
            await overflow.ledger.prune(before=clock.wall_time() - _KEEP)
        except LedgerUnusable:
            if not self._stopped:  # else it was closed in the midst of this
                raise
        finally:
            self._tending = False
        for pool in self._house.pools.values():
            overflow.pull(pool)

    async def reap(self) -> None:
        """Take in rows whose holder has let its lease lapse."""
        for dead in await self._overflow.ledger.reap(now=clock.wall_time(), max_attempts=self._max_attempts):
            self._overflow.died(dead.row, dead.completion)

    async def recount(self, pools: Iterable[Pool], *, pulling: Pool | None = None) -> None:
        """Believe the ledger on how much waits for `pools`: other processes put and lease too."""
        depths = dict(await self._overflow.ledger.depths())
        for pool in pools:
            if pool in self._overflow.intake.pulling and pool is not pulling:
                continue  # what it has leased meanwhile may be counted in `depths`, or not
            for rung in Priority:
                pool.holding[rung] = depths.get((pool.task_type, rung), 0)
        self._overflow.depths = {key: depth for key, depth in depths.items() if key[0] not in self._house.pools}

    async def _hear(self) -> None:
        """Ask after tasks that others may have run: those that lost their lease here, and those that are awaited."""
        elsewhere = self._overflow.elsewhere
        outside = (ticket for ticket in self._house.tickets.values() if ticket.status is TaskStatus.SPILLED)
        awaited = (ticket for ticket in outside if ticket.awaited or ticket.listened)
        for ticket in [*elsewhere.values(), *itertools.islice(awaited, _ASK_AFTER)]:
            found = await self._overflow.ledger.find(ticket.task_id)
            if found is None or found[2] is not None:
                elsewhere.pop(ticket.task_id, None)
            if found is not None and found[2] is not None and not ticket.done():
                self._overflow.hear(ticket, found[0], found[1], found[2])
