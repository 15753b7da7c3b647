"""Tending the overflow: keeping leases, taking in what lapsed, hearing of what other processes finished."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.supervisor.spill.leases import Heartbeat
from forebay.task import Priority, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.spill.spill import Spill

_RESULT_RETENTION = 86_400.0  # seconds for which results are kept
_MAX_LOOKUPS = 1000  # tickets at a time


class StoreMaintenance:
    """What has to be done for a ledger that is shared with other processes, three times in each lease."""

    def __init__(self, dispatcher: Dispatcher, spill: Spill, *, lease: float, max_attempts: int) -> None:
        self._dispatcher = dispatcher
        self._spill = spill
        self._lease = lease  # seconds
        self._max_attempts = max_attempts
        self._running = False
        self._stopped = False
        self._heartbeat = Heartbeat(
            dispatcher.loop, interval=lease / 3, beat=self._renew_leases, after_beat=self._on_heartbeat
        )

    def start(self) -> None:
        """Tend from now on."""
        self._heartbeat.start()

    def stop(self) -> None:
        """Tend no more."""
        self._stopped = True
        self._heartbeat.stop()

    def _renew_leases(self) -> None:
        self._spill.leases.renew(self._spill.store, until=clock.wall_time() + self._lease)

    def _on_heartbeat(self) -> None:
        if not self._running:  # else it takes longer than a third of a lease, and the next beat will do
            self._running = True
            self._dispatcher.run_in_background(self._maintain())

    async def _maintain(self) -> None:
        overflow = self._spill
        try:
            await self.reap()
            await self.recount(list(self._dispatcher.pools.values()))
            await self._check_tasks_elsewhere()
            await overflow.store.prune(before=clock.wall_time() - _RESULT_RETENTION)
        except StoreUnavailable:
            if not self._stopped:  # else it was closed in the midst of this
                raise
        finally:
            self._running = False
        for pool in self._dispatcher.pools.values():
            overflow.refill(pool)

    async def reap(self) -> None:
        """Take in rows whose holder has let its lease lapse."""
        for dead in await self._spill.store.reap(now=clock.wall_time(), max_attempts=self._max_attempts):
            self._spill.report_dead(dead.record, dead.completion)

    async def recount(self, pools: Iterable[Pool], *, refilling: Pool | None = None) -> None:
        """Believe the ledger on how much waits for `pools`: other processes put and lease too."""
        depths = dict(await self._spill.store.depths())
        for pool in pools:
            if pool in self._spill.refiller.refilling and pool is not refilling:
                continue  # what it has leased meanwhile may be counted in `depths`, or not
            for rung in Priority:
                pool.spilled[rung] = depths.get((pool.task_type, rung), 0)
        self._spill.unserved_depths = {
            key: depth for key, depth in depths.items() if key[0] not in self._dispatcher.pools
        }

    async def _check_tasks_elsewhere(self) -> None:
        """Ask after tasks that others may have run: those that lost their lease here, and those that are awaited."""
        elsewhere = self._spill.leased_elsewhere
        outside = (ticket for ticket in self._dispatcher.tickets.values() if ticket.status is TaskStatus.SPILLED)
        awaited = (ticket for ticket in outside if ticket.has_waiters or ticket.has_listeners)
        for ticket in [*elsewhere.values(), *itertools.islice(awaited, _MAX_LOOKUPS)]:
            found = await self._spill.store.find(ticket.task_id)
            if found is None or found[2] is not None:
                elsewhere.pop(ticket.task_id, None)
            if found is not None and found[2] is not None and not ticket.done():
                self._spill.apply_stored_completion(ticket, found[0], found[1], found[2])
