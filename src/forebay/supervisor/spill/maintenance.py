"""Maintenance of a task store that other processes share: lapsed leases, counts, and results of other processes."""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.events import log
from forebay.supervisor.settings import MAX_LEASE
from forebay.supervisor.spill.leases import Heartbeat

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.settings import SupervisorSettings
    from forebay.supervisor.spill.refill import Refiller
    from forebay.supervisor.spill.stored_tasks import StoredTasks

_LONGEST_AHEAD = 1.1 * MAX_LEASE  # seconds from now to the end of a lease; a longer one was given by another clock
_RENEWED_WITHIN = MAX_LEASE / 2  # seconds in which every holder that lives has renewed its leases
_FOUND_WITHIN = 5.0  # seconds in which every process finds a store that is back: some wait for a server that hangs
_MAX_LOOKUPS = 1000  # tickets in each third of a lease


class StoreMaintenance:
    """The regular work on a shared store, done three times in the duration of a lease.

    Args:
        core: the objects that the parts of the supervisor share.
        stored: the tasks with a record in the store.
        refiller: counts the records that wait, and takes them in.
        settings: the settings of the supervisor.
    """

    def __init__(
        self,
        core: Core,
        stored: StoredTasks,
        refiller: Refiller,
        *,
        settings: SupervisorSettings,
    ) -> None:
        self._core = core
        self._stored = stored
        self._refiller = refiller
        self._lease = settings.lease
        self._max_attempts = settings.max_attempts
        self._retention = settings.result_retention
        self._running = False
        self._stopped = False
        self._store_failed = False
        self._to_look_up: list[str] = []  # ids
        self._clock_offset: float | None = None  # seconds from `clock.now` to the wall clock, when leases were reaped
        self._reaps_from = 0.0  # by `clock.now`: before that, live leases may look expired
        self._judges_from = 0.0  # by `clock.now`: before that, live leases may look longer than any can be
        self._heartbeat = Heartbeat(
            core.loop,
            interval=self._lease / 3,
            beat=self._renew_leases,
            after_beat=self._on_heartbeat,
            failures=core.failures,
        )

    def start(self) -> None:
        """Start the heartbeat."""
        self._heartbeat.start()

    def stop(self) -> None:
        """Stop the heartbeat."""
        self._stopped = True
        self._heartbeat.stop()

    def notice_interruption(self) -> None:
        """Notice that the store was away: leases may have lapsed that their holders will renew."""
        self._store_failed = True

    def _renew_leases(self) -> None:
        try:
            self._stored.leases.renew(self._stored.store)
        except StoreUnavailable:
            self._store_failed = True  # written by the heartbeat's thread, read by the loop
            raise

    def _on_heartbeat(self) -> None:
        if not self._running:  # otherwise the last one takes longer than a third of a lease: leave it to the next beat
            self._running = True
            self._core.run_in_background(self._maintain(), if_cancelled=self._maintained)

    def _maintained(self) -> None:
        self._running = False

    async def _maintain(self) -> None:
        pools = self._core.pools.by_type
        self._stored.check_store()
        try:
            await self._refiller.recount_conversations()  # before leases are judged: it notices an interruption
            await self.reap()
            await self._stored.delayed.wake()
            await self._refiller.recount(list(pools.values()))
            await self._look_up_tickets()
            await self._stored.store.prune(before=clock.wall_time() - self._retention)
        except StoreUnavailable:
            self._store_failed = True
            if not self._stopped:  # otherwise the store was closed meanwhile
                raise
        finally:
            self._maintained()
        for pool in pools.values():
            self._refiller.refill(pool)

    async def reap(self) -> None:
        """Take back records whose holder has let its lease lapse, and report those that are dead."""
        now, wall = clock.now(), clock.wall_time()
        self._watch_clock(now, wall)
        if self._store_failed:  # others could not renew their leases, or store the ends of their tasks
            self._store_failed = False
            self._reaps_from = max(self._reaps_from, now + self._lease / 2 + _FOUND_WITHIN)
        if now < self._reaps_from:
            return
        latest = wall + _LONGEST_AHEAD if now >= self._judges_from else math.inf
        reaped = self._stored.store.reap(now=wall, max_attempts=self._max_attempts, latest=latest)
        for dead in await self._stored.load.measure(reaped):
            self._stored.report_dead(dead.record, dead.completion)

    def _watch_clock(self, now: float, wall: float) -> None:
        """Notice that the wall clock was set: until every holder has renewed its leases, their ends say little."""
        before, self._clock_offset = self._clock_offset, wall - now
        if before is None:  # it may have been set shortly before the start
            self._judges_from = now + _RENEWED_WITHIN
        elif abs(step := wall - now - before) > self._lease / 10:
            log.warning("the wall clock was set %s by %.1f s", "forward" if step > 0 else "back", abs(step))
            self._reaps_from, self._judges_from = now + self._lease, now + _RENEWED_WITHIN

    async def _look_up_tickets(self) -> None:
        """Ask the store for tickets whose tasks wait there: another process may have ended one, or left it again."""
        if not self._to_look_up:  # every ticket once, before any is looked up again
            self._to_look_up = self._stored.stored_ids()
        batch, self._to_look_up = self._to_look_up[:_MAX_LOOKUPS], self._to_look_up[_MAX_LOOKUPS:]
        for task_id, found in zip(batch, await asyncio.gather(*map(self._stored.store.find, batch)), strict=True):
            self._stored.found(task_id, found)
