"""Store changes: what other processes store and end is noticed soon, and not by all processes at once."""

from __future__ import annotations

import asyncio
import math
from itertools import islice
from typing import TYPE_CHECKING

from forebay import clock
from forebay.errors import StoreUnavailable
from forebay.supervisor.spill.ask_jitter import AskJitter
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.spill.refill import Refiller
    from forebay.supervisor.spill.stored_tasks import StoredTasks
    from forebay.supervisor.ticket import Ticket

_BUSY_WINDOW = 0.5  # seconds within which the records are counted for which no slot is free
_MIN_LOOKUP_WINDOW = 0.002  # seconds
_MAX_LOOKUP_WINDOW = 0.5  # seconds, after many lookups in vain
_MAX_LOOKUPS = 100  # tickets at a time
_LOOKUP_PAUSE = 0.001  # seconds for each ticket that was looked up, so that there are at most 1,000 in a second


class WaitingRecords:
    """Counts the records again when other processes may have stored some, and takes them in.

    While a slot is free, it does so soon: after a few milliseconds, or up to 50 if it has often found nothing. While
    none is free, it does so twice a second, since a record may go before what is queued, and at once when a slot
    becomes free.

    Attributes:
        stale: whether other processes may have stored records since the last count.
    """

    def __init__(self, core: Core, stored: StoredTasks, refiller: Refiller) -> None:
        self._core = core
        self._stored = stored
        self._refiller = refiller
        self._timer: Timer | None = None
        self._had_room = False  # when the timer was set
        self._counting = False
        self._stopped = False
        self.stale = False

    def stop(self) -> None:
        """Count no more."""
        self._stopped = True
        self._core.timers.cancel(self._timer)

    def notice(self) -> None:
        """Notice that another process may have stored records."""
        if self._stored.refill_stopped:
            return
        self.stale = True
        self._arm(has_room=self._has_room())

    def room_appeared(self) -> None:
        """Notice that a worker has a free slot and nothing to start."""
        if not self._had_room:
            self._core.timers.cancel(self._timer)
            self._timer = None
            self._arm(has_room=True)

    def _has_room(self) -> bool:
        return any(pool.free_slots(Priority.CRITICAL) > 0 for pool in self._core.pools.by_type.values())

    def _arm(self, *, has_room: bool) -> None:
        if self._timer is None and not self._counting and not self._stopped:
            draw = clock.draw()
            delay = self._refiller.jitter.delay(draw) if has_room else draw * _BUSY_WINDOW
            self._had_room = has_room
            self._timer = self._core.timers.at(self._core.loop.time() + delay, self._count_soon)

    def _count_soon(self) -> None:
        self._timer = None
        self._counting = True
        self._core.run_in_background(self._count(), if_cancelled=self._counted)

    async def _count(self) -> None:
        self.stale = False
        pools = list(self._core.pools.by_type.values())
        try:
            await self._refiller.recount(pools)
        except StoreUnavailable:  # the heartbeat counts again
            return
        finally:
            self._counted()
        if not any(pool.spilled for pool in pools):
            self._refiller.jitter.record(found=False)
        for pool in pools:
            self._refiller.refill(pool)

    def _counted(self) -> None:
        self._counting = False
        if self.stale:
            self._arm(has_room=self._has_room())


class AwaitedResults:
    """Looks up the tasks that somebody awaits here, after other processes have ended tasks."""

    def __init__(self, core: Core, stored: StoredTasks) -> None:
        self._core = core
        self._stored = stored
        self._jitter = AskJitter(min_window=_MIN_LOOKUP_WINDOW, max_window=_MAX_LOOKUP_WINDOW)
        self._timer: Timer | None = None
        self._not_before = 0.0  # loop time of the next lookup, at the earliest
        self._looking = False
        self._stopped = False
        self._ended_at = -math.inf  # epoch seconds when another process was last known to have ended a task
        self._due: dict[str, None] = {}  # ids to be looked up
        self._again = False  # all are to be looked up after those

    def stop(self) -> None:
        """Look up no more."""
        self._stopped = True
        self._core.timers.cancel(self._timer)

    def notice(self) -> None:
        """Notice that another process has ended tasks."""
        self._ended_at = clock.wall_time()
        self._again = True
        self._arm()

    def watch(self, ticket: Ticket) -> None:
        """Follow a ticket that is awaited from now on; its task may have ended already."""
        self._stored.watch(ticket)
        if ticket.submitted_at is None or ticket.submitted_at <= self._ended_at:
            self._due[ticket.task_id] = None
            self._arm()

    def _arm(self) -> None:
        if not (self._timer is not None or self._looking or self._stopped) and (
            self._due or (self._again and self._stored.awaited)
        ):
            at = max(self._core.loop.time(), self._not_before) + self._jitter.delay(clock.draw())
            self._timer = self._core.timers.at(at, self._look_up_soon)

    def _look_up_soon(self) -> None:
        self._timer = None
        self._looking = True
        self._core.run_in_background(self._look_up(), if_cancelled=self._looked_up)

    async def _look_up(self) -> None:
        if not self._due:
            self._due, self._again = dict.fromkeys(self._stored.awaited), False
        batch = list(islice(self._due, _MAX_LOOKUPS))
        for task_id in batch:
            del self._due[task_id]
        batch = list(filter(self._stored.is_awaited, batch))
        self._not_before = self._core.loop.time() + _LOOKUP_PAUSE * len(batch)
        try:
            found = await asyncio.gather(*map(self._stored.store.find, batch))
        except StoreUnavailable:  # the heartbeat looks again
            return
        finally:
            self._looked_up()
        for task_id, each in zip(batch, found, strict=True):
            self._stored.found(task_id, each)
        if batch:
            self._jitter.record(found=any(each is None or each[2] is not None for each in found))

    def _looked_up(self) -> None:
        self._looking = False
        self._arm()
