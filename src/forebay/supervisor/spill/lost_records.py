"""Lost records: what a live process has of its tasks is stored again after the store has lost its records."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

import msgspec

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.events import log
from forebay.interfaces import PutResult

if TYPE_CHECKING:
    from forebay.interfaces import Lease, TaskRecord, TaskStore
    from forebay.supervisor.core import Core
    from forebay.supervisor.spill.leases import HeldLeases

_RETRY_INTERVAL = 1.0  # seconds until a record that could not be stored again is stored again


class LostRecords:
    """Notices that the store has lost its records, and stores those of leased tasks again, which wait or run here.

    A task whose lease had lapsed before may be with another process. That one has a lease's time to store its record
    again; after that, this process does.

    Args:
        core: the objects that the parts of the supervisor share.
        store: the task store.
        leases: the leases that this process holds.
        lease: seconds that a lease lasts unless renewed.
    """

    def __init__(self, core: Core, store: TaskStore, leases: HeldLeases, *, lease: float) -> None:
        self._core = core
        self._store = store
        self._leases = leases
        self._duration = lease
        self._losses = 0
        self._settled_at = -math.inf  # loop time from which a task without a record is known to be gone
        self._lapsed: dict[str, tuple[Lease, float]] = {}  # leases that lapsed here, and loop times, by task id

    def notice(self) -> None:
        """Notice that the records are gone, and store those again whose leases are held here."""
        log.error(
            "the overflow has lost its records: its server was emptied, or restarted without them. Tasks that run or"
            " wait in a live process are stored again; those that only waited there are lost"
        )
        self._losses += 1
        self._settled_at = self._core.loop.time() + self._duration
        for lease in sorted(self._leases.held(), key=lambda each: each.record.enqueued_at):
            self._restore_in_background(lease)

    @property
    def settling(self) -> bool:
        """True if other processes may not have stored their records again yet."""
        return self._core.loop.time() < self._settled_at

    def _restore_in_background(self, lease: Lease) -> None:
        again = partial(self._restore_in_background, lease)
        self._core.run_in_background(self._restore(lease), if_cancelled=again)

    async def _restore(self, lease: Lease) -> None:
        """Store the record of a lease again, as long as it is held, unless there is one."""
        while self._leases.holds(lease):
            until = clock.wall_time() + self._duration
            put = None
            with contextlib.suppress(StoreUnavailable):
                put = await self._store.put(self._record(lease), fence=lease.fence, until=until)
            if put is PutResult.STORED and not self._leases.extend(lease, until):  # its task has left or ended
                await self._store.release([lease])
            if put not in {None, PutResult.FULL}:
                return
            await asyncio.sleep(_RETRY_INTERVAL)

    def _record(self, lease: Lease) -> TaskRecord:
        ticket = self._core.registry.live.get(lease.record.task_id)
        if ticket is None or ticket.lease is None or ticket.lease.fence != lease.fence:
            return lease.record
        return msgspec.structs.replace(ticket.lease.record, attempts=ticket.attempts)

    def keep_lapsed(self, lease: Lease) -> None:
        """Keep what is known of a task that is left to another process."""
        self._lapsed[lease.record.task_id] = lease, self._core.loop.time()

    def forget_lapsed(self, task_id: str) -> None:
        """Forget a task that was left to another process."""
        self._lapsed.pop(task_id, None)

    def lapsed(self, task_id: str) -> Lease | None:
        """Return the lease on a task that has no record: if it lapsed here before its record was lost."""
        lease, at = self._lapsed.get(task_id, (None, math.inf))
        return lease if at <= self._settled_at else None

    async def store_again(self, lease: Lease) -> bool:
        """Let a task wait in the store whose lease is not held any more; return whether it does."""
        put = await self._store.put(lease.record, now=clock.wall_time())
        return put.written

    async def release(self, leases: Sequence[Lease]) -> None:
        """Let tasks wait in the store whose leases are given back, even if it loses its records at this moment."""
        losses = self._losses
        try:
            await self._store.release(leases)
        except StoreUnavailable:
            if losses == self._losses:
                raise
            await asyncio.gather(*map(self.store_again, leases))
