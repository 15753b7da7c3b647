"""Refill: stored tasks come back into the queue as slots become free."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Protocol, TypeAlias

from forebay import clock
from forebay.carried_context import restore_context
from forebay.errors import InvalidPayload, StoreUnavailable
from forebay.events import TaskRefilled, log
from forebay.interfaces import Completion, Lease, TaskRecord
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew
from forebay.supervisor.runs.completion import describe_error
from forebay.supervisor.spill import records
from forebay.supervisor.spill.ask_jitter import AskJitter
from forebay.supervisor.spill.stored_tasks import StoredTasks
from forebay.supervisor.ticket import Ticket, TicketOwner, spilled_ticket, unsuccessful_result
from forebay.task import Deadline, Priority, Task, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.conversations import Conversations
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.worker import WorkerAgent

_Depths: TypeAlias = Mapping[tuple[str, Priority, str], int]  # how many records wait, by task type, priority, tenant
_RETRY_INTERVAL = 1.0  # seconds until a store that failed is asked for records again
_PATIENCE = 0.1  # seconds for which new tasks wait for the turns of records that are being leased
_MIN_WINDOW = 0.002  # seconds within which a store is asked for records that another process may have stored
_MAX_WINDOW = 0.05  # seconds, after many questions in vain
_ROUND_TRIP_GAIN = 0.2  # weight of the newest lease in the average round trip


class RefillDispatcher(TicketOwner, Protocol):
    """The dispatcher, as far as refilling needs it."""

    @property
    def conversations(self) -> Conversations:
        """The conversations of its tasks."""

    def is_waiting(self, ticket: Ticket) -> bool:
        """Return whether a task waits in the queue, or behind another one of its conversation."""

    def expiry_reason(self, ticket: Ticket, pool: Pool) -> str | None:
        """Return why it is too late for a task to start, or None if it is not."""

    def resume_retries(self, ticket: Ticket, record: TaskRecord) -> None:
        """Go on with the attempts at a task that comes back from its store."""

    def pick_worker(self, pool: Pool, ticket: Ticket) -> WorkerAgent | None:
        """Return the worker on which a task may start now, unless other tasks wait for it."""

    def start_or_queue(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None, *, is_due: bool = False) -> None:
        """Start a task on `worker`, or queue it; unless `is_due`, hold it until its time."""

    def serve(self, pool: Pool) -> None:
        """Start what waits in the queue of `pool`, on workers that have a free slot."""


class Refiller:
    """Takes stored tasks back into the queue: it reserves room first, and then leases exactly that many records.

    A refilled task is not admitted a second time.

    Attributes:
        refilling: the pools for which records are being leased, and those that are paused.
        refilled: how many stored tasks have come back.
        unreadable: leases on records that a newer version stored, by task id. They are held until the end, so that no
            process of this version leases the records again.
        unserved_depths: how many records wait of types that no worker here serves.
        jitter: how long to wait before asking the store for records that other processes may take too.
    """

    def __init__(self, core: Core, dispatcher: RefillDispatcher, stored: StoredTasks, *, lease: float) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._registry = core.registry
        self._stored = stored
        self._lease = lease  # seconds that a lease lasts
        self.refilling: set[Pool] = set()
        self.refilled = 0
        self.unreadable: dict[str, Lease] = {}
        self.unserved_depths: dict[tuple[str, Priority, str], int] = {}  # by task type, priority and tenant
        self.jitter = AskJitter(min_window=_MIN_WINDOW, max_window=_MAX_WINDOW)
        self._round_trip = 0.0  # average seconds that leasing takes
        self._spills = 0  # records that were stored from here, so far
        self._spilled_at: dict[Pool, int] = {}  # how many there were with the latest of each pool
        self._recount_after: set[Pool] = set()  # pools whose records must be counted when their refill is over

    # --- how much waits in the store ---

    def add_pool(self, pool: Pool) -> None:
        """Count the records of a task type that is served from now on."""
        counts = _by_priority(self.unserved_depths).get(pool.task_type, {})
        for priority, of_tenants in counts.items():
            pool.set_spilled(priority, of_tenants)
        self.unserved_depths = {key: depth for key, depth in self.unserved_depths.items() if key[0] != pool.task_type}

    def remove_pool(self, pool: Pool) -> None:
        """Count the records of a task type that no worker here serves any more."""
        self._spilled_at.pop(pool, None)
        self._recount_after.discard(pool)
        for priority in Priority:
            for tenant, count in pool.spilled.of(priority).items():
                self.unserved_depths[pool.task_type, priority, tenant] = count

    def _is_served(self, pool: Pool) -> bool:
        return self._core.pools.by_type.get(pool.task_type) is pool

    async def recount(self, pools: Iterable[Pool], *, refilling: Pool | None = None) -> None:
        """Replace the counts of `pools` and of unserved types by those of the store, which other processes use too.

        A pool that is being refilled is left out, because the store may or may not have counted its new leases. The
        exception is `refilling`, whose own refill calls this.
        """
        spills = self._spills
        self._set_depths(await self._stored.store.depths(), pools, spills, refilling)

    def add_spilled(self, pool: Pool, task: Task) -> None:
        """Count one more record of `pool` that waits in the store: that of `task`."""
        if not self._is_served(pool):  # its last worker has gone meanwhile
            key = (pool.task_type, task.priority, task.tenant)
            self.unserved_depths[key] = self.unserved_depths.get(key, 0) + 1
            return
        self._spills += 1
        self._spilled_at[pool] = self._spills
        pool.add_spilled(task.priority, task.tenant)

    def _set_depths(self, depths: _Depths, pools: Iterable[Pool], spills: int, refilling: Pool | None = None) -> None:
        """Set the counts of `pools` to those that the store made when `spills` records had been counted here.

        It may not have counted what was stored since. A count that is too high costs a lease that finds nothing.
        """
        by_priority = _by_priority(depths)
        for pool in pools:
            if pool in self.refilling and pool is not refilling:
                continue
            stored_since = self._spilled_at.get(pool, 0) > spills
            for priority in Priority:
                counts = by_priority.get(pool.task_type, {}).get(priority, {})
                known = pool.spilled.of(priority) if stored_since else {}
                pool.set_spilled(priority, counts | {name: max(n, counts.get(name, 0)) for name, n in known.items()})
        served = self._core.pools.by_type
        self.unserved_depths = {key: depth for key, depth in depths.items() if key[0] not in served}

    def recount_conversations_soon(self) -> None:
        """Do as `recount_conversations` does, in the background, unless that is under way."""
        if not self._dispatcher.conversations.recounting:
            self._core.run_in_background(self._try_recount_conversations())

    async def _try_recount_conversations(self) -> None:
        with contextlib.suppress(StoreUnavailable):  # the heartbeat counts again
            await self.recount_conversations()

    async def recount_conversations(self) -> None:
        """Replace the counts of conversations by those of the store."""
        conversations = self._dispatcher.conversations
        conversations.begin_recount()
        try:
            unfinished = await self._stored.load.measure(self._stored.store.conversations())
            conversations.recount(unfinished, self._stored.leases.conversations())
        finally:
            conversations.end_recount()

    async def count_waiting(self, task_type: str | None) -> None:
        """Count and refill again, because a record of `task_type` has ended, and the next of its conversation waits.

        That one may be of any type, but its pool has records that wait. So have those of records that were woken. Those
        that were known to wait may have ended since.
        """
        spills = self._spills
        try:
            depths = await self._stored.store.depths()
        except StoreUnavailable:
            return  # the heartbeat counts again
        by_type = self._core.pools.by_type
        types = {task_type, *(waiting for waiting, _, _ in depths)}
        pools = [pool for name, pool in by_type.items() if name in types or pool.spilled]
        self._recount_after.update(pool for pool in pools if pool in self.refilling)
        self._set_depths(depths, pools, spills)
        for pool in pools:
            self.refill(pool)

    async def refresh(self) -> None:
        """Count what waits in the store now, and refill."""
        pools = list(self._core.pools.by_type.values())
        await self.recount(pools)
        await self.recount_conversations()
        for pool in pools:
            self.refill(pool)

    @property
    def spilled_tasks(self) -> int:
        """The number of records that wait, those that are delayed included, as far as is known."""
        pools = self._core.pools.by_type.values()
        waiting = sum(self.unserved_depths.values()) + sum(sum(pool.spilled.totals.values()) for pool in pools)
        return waiting + self._dispatcher.conversations.parked_in_overflow + self._stored.delayed.count

    # --- back into the queue ---

    def refill(self, pool: Pool) -> None:
        """Lease records of `pool` if there is room for them."""
        if pool not in self.refilling and self._may_refill(pool) and pool.refill_demand(self._round_trip):
            self.refilling.add(pool)
            pool.expect_records(expected=pool.takes_turns)
            self._core.run_in_background(self._refill(pool), if_cancelled=partial(self.resume, (pool,)))

    def _may_refill(self, pool: Pool) -> bool:
        return not (self._stored.refill_stopped or pool.paused) and self._takes_records(pool)

    def _takes_records(self, pool: Pool) -> bool:
        """Return whether a record that comes back into `pool` finds a worker: zombies keep it without one."""
        return self._is_served(pool) and pool.is_to_be_served

    def pause(self, pools: Iterable[Pool]) -> set[Pool]:
        """Take nothing back into `pools`; return those of them that `resume` has to resume."""
        paused = set(pools) - self.refilling
        self.refilling |= paused
        return paused

    def resume(self, pools: Iterable[Pool]) -> None:
        """Take tasks back into `pools` again."""
        for pool in pools:
            self._stop_refilling(pool)
            self.refill(pool)

    async def _refill(self, pool: Pool) -> None:
        loop, store, late = self._core.loop, self._stored.store, None
        if pool.expects_records:  # a store that does not answer keeps no slot free for long
            late = self._core.timers.at(loop.time() + _PATIENCE, self._expect_no_records, pool)
        try:
            while self._may_refill(pool):
                demand = pool.refill_demand(self._round_trip)
                if demand is None and pool in self._recount_after:
                    self._recount_after.discard(pool)
                    await self.recount([pool], refilling=pool)
                    demand = pool.refill_demand(self._round_trip)
                if demand is None:
                    break
                priority, shares = demand
                room = sum(shares.values())
                pool.reserve(room)
                asked = loop.time()
                try:
                    until = clock.wall_time() + self._lease
                    leases = await store.lease(pool.task_type, room, until=until, priority=priority, shares=shares)
                finally:
                    pool.unreserve(room)
                if not self._may_refill(pool):
                    await store.release(leases)
                    break
                self._round_trip += _ROUND_TRIP_GAIN * (loop.time() - asked - self._round_trip)
                self.jitter.record(found=bool(leases))
                pool.refill_policy.record_fetch(priority, len(leases), pool.spilled.totals)
                for count, lease in enumerate(leases):
                    if not self._takes_records(pool):
                        await store.release(leases[count:])
                        break
                    await self._take_in(lease, pool)
                pool.forget_returned()
                self._dispatcher.serve(pool)
                if len(leases) < room:
                    await self._recount_after_lease(pool, found=bool(leases))
        except StoreUnavailable:  # the heartbeat comes later, and not at all for a store that ends with the process
            self._core.timers.at(loop.time() + _RETRY_INTERVAL, self.refill, pool)
            raise
        finally:
            self._core.timers.cancel(late)
            self._stop_refilling(pool)

    async def _recount_after_lease(self, pool: Pool, *, found: bool) -> None:
        """Count the records of `pool` again, of which there are fewer than were known."""
        if self._stored.durable and not found:  # others were faster: not all processes should ask again at once
            await asyncio.sleep(self.jitter.delay(clock.draw()))
        await self.recount([pool], refilling=pool)

    def _stop_refilling(self, pool: Pool) -> None:
        self.refilling.discard(pool)
        pool.forget_returned()
        self._expect_no_records(pool)

    def _expect_no_records(self, pool: Pool) -> None:
        """Start new tasks that have waited for the turns of records meanwhile."""
        pool.expect_records(expected=False)
        self._dispatcher.serve(pool)

    async def _take_in(self, lease: Lease, pool: Pool) -> None:
        record, stored, registry = lease.record, self._stored, self._registry
        ticket = registry.live.get(record.task_id) or registry.hold_strongly(record.task_id)
        if ticket is None or ticket.stored:  # otherwise it is still counted as on its way to the store
            pool.remove_spilled(record.priority, record.tenant, returns=True)
            self._dispatcher.conversations.remove_stored(record.thread_id)
        pool.remove_nested_spilled(record.task_id)
        ended = registry.ended.get(record.task_id) if ticket is None else None
        if ended is not None and ended.result is not None:
            stored.complete_again(ended, ended.result, lease)
        elif ticket is not None and self._is_inside(ticket):
            stored.adopt(ticket, lease)
        else:
            if ticket is None or ticket.found:
                ticket = await self._read_ticket(lease, ticket)
            if ticket is not None:
                self._start_or_queue(ticket, lease, pool)

    def _is_inside(self, ticket: Ticket) -> bool:
        """Return whether a task waits or runs here and was not asked to stop."""
        if ticket.run is not None:
            return ticket.run.abandoned_at is None
        return self._dispatcher.is_waiting(ticket)

    def _start_or_queue(self, ticket: Ticket, lease: Lease, pool: Pool) -> None:
        record, stored, core, dispatcher = lease.record, self._stored, self._core, self._dispatcher
        ticket.refill(lease)
        if record.failures:
            dispatcher.resume_retries(ticket, record)
        self._registry.remember_key(ticket)
        core.timers.cancel(ticket.clear_expiry())
        stored.leases.hold(lease)
        if ticket.done():  # it has ended meanwhile, and its completion is on its way to the store
            return
        self.refilled += 1
        self._registry.add(ticket)  # even if it ends now: whoever looks for the task gets this ticket
        if core.bus.active or ticket.listeners is not None:
            event = TaskRefilled(at=core.loop.time(), task_id=record.task_id, task_type=record.task_type)
            self._registry.emit(ticket, event)
        if ticket.cancel_reason is not None:
            stored.complete(ticket, unsuccessful_result(ticket, TaskStatus.CANCELLED, ticket.cancel_reason))
        elif (error := dispatcher.expiry_reason(ticket, pool)) is not None:
            stored.complete(ticket, unsuccessful_result(ticket, TaskStatus.EXPIRED, error))
        else:
            worker = None if pool.takes_turns else dispatcher.pick_worker(pool, ticket)  # else `serve` starts it
            dispatcher.start_or_queue(ticket, pool, worker, is_due=True)

    async def _read_ticket(self, lease: Lease, ticket: Ticket | None) -> Ticket | None:
        """Return the ticket of a record that another process stored, or None if this one cannot read it."""
        record = lease.record
        try:
            task, carried = records.read_record(record, self._core.codecs)
        except EnvelopeTooNew:
            if record.task_id not in self.unreadable:  # otherwise its lease had lapsed, and no newer process took it
                log.warning("task %r was stored by a newer version of Forebay and is left for it", record.task_id)
            self.unreadable[record.task_id] = lease
            return None
        except (EnvelopeDamaged, InvalidPayload) as exc:
            completion = Completion(
                status=TaskStatus.FAILED.value,
                error=describe_error(exc),
                attempts=record.attempts,
                finished_at=clock.wall_time(),
            )
            if await self._stored.store.mark_dead(lease, completion):
                self._stored.report_dead(record, completion)
                if record.thread_id is not None:
                    self._core.run_in_background(self.count_waiting(record.task_type))
            return None
        if ticket is None:
            ticket = spilled_ticket(self._dispatcher, task, submitted_at=record.enqueued_at)
        ticket.restore(task, None if record.deadline is None else Deadline(record.deadline))
        if carried is not None:
            context = self._core.base_context.copy()
            context.run(restore_context, carried)
            ticket.restore_context(context)
        return ticket


def _by_priority(depths: _Depths) -> dict[str, dict[Priority, dict[str, int]]]:
    """Return how many records wait by task type, then priority, then tenant."""
    counts: dict[str, dict[Priority, dict[str, int]]] = {}
    for (task_type, priority, tenant), depth in depths.items():
        counts.setdefault(task_type, {}).setdefault(priority, {})[tenant] = depth
    return counts
