"""Maintenance of a task store that other processes share: lapsed leases, counts, and results of other processes."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.supervisor.spill.leases import Heartbeat
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.spill.refill import Refiller
    from forebay.supervisor.spill.stored_tasks import StoredTasks

_RESULT_RETENTION = 86_400.0  # seconds for which the store keeps results
_MAX_LOOKUPS = 1000  # tickets at a time


class StoreMaintenance:
    """The regular work on a shared store, done three times in the duration of a lease.

    Args:
        core: the objects that the parts of the supervisor share.
        stored: the tasks with a record in the store.
        refiller: counts the records that wait, and takes them in.
        lease: seconds that a lease lasts unless renewed.
        max_attempts: starts of a handler, over lost leases, after which a task is dead.
    """

    def __init__(
        self,
        core: Core,
        stored: StoredTasks,
        refiller: Refiller,
        *,
        lease: float,
        max_attempts: int,
    ) -> None:
        self._core = core
        self._stored = stored
        self._refiller = refiller
        self._lease = lease
        self._max_attempts = max_attempts
        self._running = False
        self._stopped = False
        self._heartbeat = Heartbeat(
            core.loop, interval=lease / 3, beat=self._renew_leases, after_beat=self._on_heartbeat
        )

    def start(self) -> None:
        """Start the heartbeat."""
        self._heartbeat.start()

    def stop(self) -> None:
        """Stop the heartbeat."""
        self._stopped = True
        self._heartbeat.stop()

    def _renew_leases(self) -> None:
        self._stored.leases.renew(self._stored.store, until=clock.wall_time() + self._lease)

    def _on_heartbeat(self) -> None:
        if not self._running:  # otherwise the last one takes longer than a third of a lease: leave it to the next beat
            self._running = True
            self._core.run_in_background(self._maintain())

    async def _maintain(self) -> None:
        pools = self._core.pools.by_type
        try:
            await self._refiller.recount_conversations()
            await self.reap()
            await self._refiller.recount(list(pools.values()))
            await self._check_tasks_elsewhere()
            await self._stored.store.prune(before=clock.wall_time() - _RESULT_RETENTION)
        except StoreUnavailable:
            if not self._stopped:  # otherwise the store was closed meanwhile
                raise
        finally:
            self._running = False
        for pool in pools.values():
            self._refiller.refill(pool)

    async def reap(self) -> None:
        """Take back records whose holder has let its lease lapse, and report those that are dead."""
        for dead in await self._stored.store.reap(now=clock.wall_time(), max_attempts=self._max_attempts):
            self._stored.report_dead(dead.record, dead.completion)

    async def _check_tasks_elsewhere(self) -> None:
        """Look up tasks that other processes may have run: those whose lease was lost here, and those observed here."""
        elsewhere = self._stored.leased_elsewhere
        spilled = (ticket for ticket in self._core.registry.live.values() if ticket.status is TaskStatus.SPILLED)
        observed = (ticket for ticket in spilled if ticket.is_observed)
        for ticket in [*elsewhere.values(), *itertools.islice(observed, _MAX_LOOKUPS)]:
            found = await self._stored.store.find(ticket.task_id)
            if found is None or found[2] is not None:
                self._stored.forget_elsewhere(ticket.task_id)
            if found is not None and found[2] is not None and not ticket.done():
                self._stored.apply_stored_completion(ticket, found[0], found[1], found[2])
