"""Stored tasks: the tickets whose tasks have a record in the task store, with their leases, starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary, WeakValueDictionary, ref

import msgspec

from forebay import clock
from forebay.errors import StillSpilled, StoreUnavailable, UnknownTask
from forebay.events import TaskDeadLettered, log
from forebay.interfaces import Completion, Lease, RecordState, TaskRecord, TaskStore
from forebay.supervisor.runs.slot_loans import run_and_ancestors
from forebay.supervisor.spill import records
from forebay.supervisor.spill.delayed_records import DelayedRecords
from forebay.supervisor.spill.leases import HeldLeases
from forebay.supervisor.spill.lost_records import LostRecords
from forebay.supervisor.spill.store_load import StoreLoad
from forebay.supervisor.ticket import Ticket, unsuccessful_result
from forebay.task import Task, TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.conversations import Conversations
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.run import ActiveRuns, Run
    from forebay.supervisor.worker import WorkerAgent

_RETRY_INTERVAL = 1.0  # seconds until the end or the delay of a task that could not be stored is stored again


class StoredTaskDispatcher(Protocol):
    """The dispatcher, as far as stored tasks need it."""

    @property
    def conversations(self) -> Conversations:
        """The conversations of its tasks."""

    def dequeue(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the queue."""

    def next_in_conversation(self, ticket: Ticket) -> None:
        """Start or queue the next task of the conversation."""

    def start_handler(self, run: Run) -> None:
        """Start the handler of a run."""

    def expiry_reason(self, ticket: Ticket, pool: Pool) -> str | None:
        """Return why it is too late for a task to start, or None if it is not."""

    def pick_worker(self, pool: Pool, ticket: Ticket) -> WorkerAgent | None:
        """Return the worker on which a task may start now, unless other tasks wait for it."""

    def start_or_queue(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None, *, is_due: bool = False) -> None:
        """Start a task on `worker`, or queue it; unless `is_due`, hold it until its time."""


def _is_dead(status: TaskStatus, lease: Lease | None) -> bool:
    """Return whether a stored task that has ended becomes a dead letter."""
    return lease is not None and status in (TaskStatus.FAILED, TaskStatus.TIMED_OUT)


def _is_stored_only(ticket: Ticket) -> bool:
    """Return whether a task waits in the store or is with another process, and no answer of the store is awaited."""
    return (
        ticket.status is TaskStatus.SPILLED
        and ticket.lease is None
        and not (ticket.pending_store_calls or ticket.done())
    )


class _Delay(NamedTuple):
    """The delay of a task until its next attempt."""

    lease: Lease
    due: float  # epoch seconds
    due_here: float  # loop time


class StoredTasks:
    """The supervisor's side of the task store: tickets whose tasks have a record there.

    Attributes:
        store: the task store.
        durable: whether it survives its process.
        load: how long the store takes to answer, over a third of a lease.
        leases: the leases on records that this process holds.
        delayed: the records that wait in the store for a time.
        lost: stores what this process has again, after the store has lost its records.
        leased_elsewhere: tickets whose records another process holds, by task id.
        awaited: tickets that are awaited here while their tasks wait in the store or are with another process, by id;
            some may have ended since, or come back.
        refill_stopped: whether this process takes no more tasks from the store.
    """

    def __init__(  # noqa: PLR0913 - the objects that it shares, and two bounds
        self,
        core: Core,
        dispatcher: StoredTaskDispatcher,
        store: TaskStore,
        *,
        runs: ActiveRuns,
        lease: float,
        max_payload_bytes: int,
    ) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._registry = core.registry
        self._runs = runs
        self._max_payload_bytes = max_payload_bytes
        self.store = store
        self.durable = store.durable
        self._survives = store.durable
        self.load = StoreLoad(core.loop, lease / 3)
        self.leases = HeldLeases(lease)
        self.lost = LostRecords(core, store, self.leases, lease=lease)
        self.leased_elsewhere: dict[str, Ticket] = {}
        self.awaited: WeakValueDictionary[str, Ticket] = WeakValueDictionary()
        self.refill_stopped = False
        self.delayed = DelayedRecords(core, store, on_woken=self._count_waiting)
        # Those whose records were delayed, and may have been woken since; loop time of their next attempt, if known.
        self._delayed_tickets: WeakKeyDictionary[Ticket, float] = WeakKeyDictionary()
        self._on_change: Callable[[str | None], Awaitable[None]] | None = None

    def on_change(self, callback: Callable[[str | None], Awaitable[None]]) -> None:
        """Call `callback` when other records may wait than are known; with a task type whose records may be fewer."""
        self._on_change = callback

    async def _count_waiting(self, task_type: str | None = None) -> None:
        if self._on_change is not None:
            await self._on_change(task_type)

    def count_waiting(self, task_type: str) -> None:
        """Count the records that wait, and refill, in the background."""
        again = partial(self.count_waiting, task_type)
        self._core.run_in_background(self._count_waiting(task_type), if_cancelled=again)

    def conversation_moved(self, task: Task) -> None:
        """Look for the next task of the conversation of `task`, whose record has ended or come back."""
        if task.thread_id is not None:
            self.count_waiting(task.task_type)

    @property
    def stays_stored(self) -> bool:
        """True if stored tasks are left to the next process: they survive this one, which takes no more of them."""
        return self.durable and self.refill_stopped

    def check_store(self) -> bool:
        """Return whether the store survives this process; log it once if it no longer does."""
        survives = self.store.durable
        if self._survives and not survives:
            log.error(
                "the overflow was removed or replaced while it was open: tasks that wait there run here and are lost"
                " with this process, and new ones are rejected. Put it back, or restart the processes that use it"
            )
        self._survives = survives
        return survives

    def survives(self) -> bool:
        """Return whether tasks may be left to the next process; if the store was lost, none may from now on."""
        if self.durable and not self.check_store():
            self.durable = False
            for ticket in self._registry.all_unfinished():
                self._registry.hold_strongly(ticket.task_id)
        return self.durable

    # --- tickets of tasks that wait in the store ---

    def wait_in_store(self, ticket: Ticket) -> None:
        """Watch the deadline of a task that waits in the store, and hold its ticket no longer than needed.

        If its workers were unregistered meanwhile and the store ends with this process, the task ends.
        """
        if not self.durable and not self._is_to_be_served(ticket.task.task_type):
            error = f"no worker is registered for {ticket.task.task_type!r} any more"
            self.complete(ticket, unsuccessful_result(ticket, TaskStatus.FAILED, error))
            return
        if ticket.deadline is not None and ticket.expiry_timer is None:
            due = self._core.loop.time() + ticket.deadline.remaining()
            error = "its deadline passed while it waited in the overflow"
            expired = unsuccessful_result(ticket, TaskStatus.EXPIRED, error)
            # A weak reference: the timer must not keep the ticket alive.
            ticket.set_expiry(self._core.timers.at(due, self._end_spilled, ref(ticket), expired))
        self._hold_weakly(ticket)
        if ticket.is_observed:
            self.watch(ticket)

    def _is_to_be_served(self, task_type: str) -> bool:
        pool = self._core.pools.by_type.get(task_type)
        return pool is not None and pool.is_to_be_served

    def _hold_weakly(self, ticket: Ticket) -> None:
        """Hold the ticket of a spilled task weakly, if the store can restore it.

        A store that ends with this process has nothing to restore it from. Nor does a record have the parent of a
        nested task. A ticket that is awaited is held until it ends.
        """
        spilled = ticket.status is TaskStatus.SPILLED and ticket.lease is None
        if self.durable and spilled and ticket.parent is None and not ticket.is_observed:
            self._registry.hold_weakly(ticket)

    # --- leases ---

    def hold_lease(self, ticket: Ticket, lease: Lease) -> None:
        """Hold the lease on a task's record, and renew it from now on."""
        ticket.hold_lease(lease)
        self.leases.hold(lease)

    def drop_lease(self, ticket: Ticket) -> Lease | None:
        """Forget the lease on a task's record, and return it if there was one."""
        ticket.drop_lease()
        return self.leases.drop(ticket.task_id)

    def lease_is_valid(self, ticket: Ticket) -> bool:
        """Return whether this process may start a task: it needs no lease, or its lease has not lapsed."""
        return ticket.lease is None or self.leases.is_valid(ticket.task_id)

    def lease_lapsed(self, ticket: Ticket) -> None:
        """Leave a task to another process, because its lease lapsed before its turn came."""
        ticket.leave_queue()
        self.leave_to_other_process(ticket, self.drop_lease(ticket))

    def leave_to_other_process(self, ticket: Ticket, lease: Lease | None = None) -> None:
        """Let another process end a task, on which this one had `lease`; `StoreMaintenance` looks up the result."""
        if lease is not None:
            self.lost.keep_lapsed(lease)
        ticket.move_to_store()
        self.leased_elsewhere[ticket.task_id] = ticket
        if ticket.is_observed:
            self.watch(ticket)
        self._registry.notify_progress()

    def _forget_other_process(self, task_id: str) -> None:
        """Stop looking up a task that another process was to end."""
        self.leased_elsewhere.pop(task_id, None)
        self.lost.forget_lapsed(task_id)

    def watch(self, ticket: Ticket) -> None:
        """Look up the task of a ticket, which is awaited, soon after other processes have ended tasks."""
        if self.durable:
            self.awaited[ticket.task_id] = ticket

    def is_awaited(self, task_id: str) -> bool:
        """Return whether a ticket is awaited here of whose task only the store knows; forget it if not."""
        ticket = self.awaited.get(task_id)
        if ticket is not None and _is_stored_only(ticket) and ticket.is_observed:
            return True
        self.awaited.pop(task_id, None)
        return False

    def stored_ids(self) -> list[str]:
        """Return the ids of the tasks whose tickets are held here, by anybody, while they wait in the store."""
        spilled = [ticket.task_id for ticket in self._registry.live.values() if _is_stored_only(ticket)]
        return [*spilled, *self._registry.weak.keys()]

    def found(self, task_id: str, found: tuple[RecordState, TaskRecord, Completion | None] | None) -> None:
        """Follow what the store says of a task whose ticket is held here."""
        ticket = self._registry.live.get(task_id) or self._registry.weak.get(task_id)
        if ticket is None or not _is_stored_only(ticket):
            return  # it has come back, or ended, meanwhile
        if found is None and self.lost.settling:
            return  # another process may have it, and store its record again
        if found is None and (lease := self.lost.lapsed(task_id)) is not None:
            self._core.run_in_background(self._store_again(ticket, lease))
        elif found is None:  # it has ended, and its result is not kept any more
            self._forget_other_process(task_id)
            self._core.timers.cancel(ticket.clear_expiry())
            self._registry.discard(ticket)
            ticket.resolve(UnknownTask(task_id=task_id))
            self._registry.notify_progress()
        elif found[2] is not None:
            self._forget_other_process(task_id)
            self._core.timers.cancel(ticket.clear_expiry())
            self._registry.hold_strongly(task_id)
            self.apply_stored_completion(ticket, found[0], found[1], found[2])
        else:
            ticket.read_attempts(found[1].attempts)
            if (
                found[0] is not RecordState.LEASED and task_id in self.leased_elsewhere
            ):  # that process has left it again
                self._forget_other_process(task_id)
                self.wait_in_store(ticket)

    async def _store_again(self, ticket: Ticket, lease: Lease) -> None:
        """Let a task wait in the store whose record was lost, and which no process has."""
        if await self.lost.store_again(lease) and _is_stored_only(ticket):
            self._forget_other_process(ticket.task_id)
            self.wait_in_store(ticket)
            self.count_waiting(ticket.task.task_type)

    def adopt(self, ticket: Ticket, lease: Lease) -> None:
        """Take a new lease on a task that still waits or runs here, though the lease on it was lost."""
        self._forget_other_process(ticket.task_id)
        ticket.adopt(lease)
        self.leases.hold(lease)

    # --- starts ---

    def record_start(self, run: Run) -> None:
        """Record the start of a stored task in the store, and only then start its handler.

        Otherwise a task that kills its process would be tried again without end.
        """
        lease = run.ticket.lease
        assert lease is not None  # noqa: S101 - it is stored, and its lease is still valid
        if run.deadline is not None:
            due = self._core.loop.time() + run.deadline.remaining()
            error = "its deadline passed before the overflow had recorded its start"
            run.set_timer(self._core.timers.at(due, run.end_early, TaskStatus.EXPIRED, error))
        cancelled = partial(run.handler_ended, None, asyncio.CancelledError())
        self._core.run_in_background(self._record_start(run, lease), if_cancelled=cancelled)

    async def _record_start(self, run: Run, lease: Lease) -> None:
        ticket = run.ticket
        try:
            held = await self.load.measure(self.store.begin_attempt(lease))
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with the store, the run must go on
            message = "the start of task %r could not be recorded; it runs anyway"
            self._core.failures.report(message, ticket.task_id, error=exc)
            held = True
        if run.abandoned_at is None:
            self._core.timers.cancel(run.clear_timer())
        if run.abandoned_at is None and held:
            run.restart_clock(self._core.loop.time())
            self._runs.move_to_end(run)
            self._dispatcher.start_handler(run)
            return
        if run.abandoned_at is None:  # another process has it
            ticket.take_back_attempt()
            run.abandon()
            self.leave_to_other_process(ticket, self.drop_lease(ticket))
        run.handler_ended(None, asyncio.CancelledError())

    # --- retries ---

    def count_failure(self, ticket: Ticket, seconds: float, *, error: str) -> None:
        """Count an attempt that has failed in the lease on its task: however that leaves this process, it counts.

        Args:
            ticket: the ticket of the task, which is leased.
            seconds: until the next attempt.
            error: what this one ended with.
        """
        lease = ticket.lease
        assert lease is not None  # noqa: S101 - the caller has checked
        record = msgspec.structs.replace(
            lease.record,
            attempts=ticket.attempts,
            failures=lease.record.failures + 1,
            total_delay=lease.record.total_delay + seconds,
            last_error=error,
            usage=ticket.usage or None,
        )
        lease = msgspec.structs.replace(lease, record=record)
        ticket.hold_lease(lease)
        self.leases.update(lease)

    def record_failures(self, ticket: Ticket) -> None:
        """Store the failures of a task that waits here for its next attempt, in case this process is lost."""
        lease = ticket.lease
        assert lease is not None  # noqa: S101 - the caller has checked
        self._record_failures_in_background(lease)

    def _record_failures_in_background(self, lease: Lease) -> None:
        again = partial(self._record_failures_in_background, lease)
        self._core.run_in_background(self._record_failures(lease), if_cancelled=again)

    async def _record_failures(self, lease: Lease) -> None:
        try:
            await self.store.record_failures(lease)  # if the lease is lost, the next attempt finds that
        except Exception as exc:  # noqa: BLE001 - the lease has them too, and the store learns of them with its end
            message = "a failed attempt at task %r could not be recorded"
            self._core.failures.report(message, lease.record.task_id, error=exc)

    def can_delay(self, ticket: Ticket) -> bool:
        """Return whether a task whose attempt has failed may wait for the next one in the store.

        It waits here if others of its conversation would follow it here, or if a run that has not ended may await it
        and nothing comes back any more.
        """
        if ticket.lease is None:
            return False
        conversation = self._dispatcher.conversations.get(ticket.task.thread_id)
        if conversation is not None and conversation.parked:
            return False
        parent = next(run_and_ancestors(ticket.parent), None)
        return not self.stays_stored or parent is None or parent.ended

    def delay(self, ticket: Ticket, seconds: float) -> None:
        """Give a task back to the store, in which it waits for its next attempt; any process may make that.

        If the store fails until the attempt is due, this process makes it.

        Args:
            ticket: a ticket that `can_delay`, of a task that neither runs nor waits here, and whose failure is counted.
            seconds: until the next attempt is due.
        """
        lease = ticket.lease
        assert lease is not None  # noqa: S101 - see can_delay
        self._core.timers.cancel(ticket.clear_expiry())
        ticket.move_to_store()
        ticket.begin_store_call()
        self._dispatcher.conversations.add_stored(ticket.task.thread_id)  # now: the next one must not start before it
        self._dispatcher.next_in_conversation(ticket)
        delay = _Delay(lease, clock.wall_time() + seconds, self._core.loop.time() + seconds)
        self._delay_in_background(ticket, delay)

    def _delay_in_background(self, ticket: Ticket, delay: _Delay) -> None:
        again = partial(self._delay_in_background, ticket, delay)
        self._core.run_in_background(self._delay(ticket, delay), if_cancelled=again)

    async def _delay(self, ticket: Ticket, delay: _Delay) -> None:
        delayed = await self._store_delay(ticket, delay)
        ticket.end_store_call()
        if delayed is not None:  # whoever has the record: it may be due here
            self.delayed.add(delay.due, delay.due_here - self._core.loop.time())
        if ticket.done():
            return
        if ticket.lease is not delay.lease:  # it was woken and has come back before the answer arrived
            if ticket.cancel_reason is not None:
                ticket.cancel(ticket.cancel_reason)
        elif delayed is None:
            self._come_back(ticket)
        else:
            self._leave_delayed(ticket, delay, delayed=delayed)

    async def _store_delay(self, ticket: Ticket, delay: _Delay) -> bool | None:
        """Return whether the record is delayed, or False if the lease is lost; None if the store fails until it is due.

        If the task is cancelled meanwhile, that is soon enough.
        """
        failed = False
        while True:
            try:
                return await self.store.delay(delay.lease, due=delay.due)
            except Exception as exc:  # noqa: BLE001 - whatever is wrong with the store, the task must go on
                if not failed:
                    message = "task %r could not be delayed in the overflow"
                    self._core.failures.report(message, ticket.task_id, error=exc)
                failed = True
            left = delay.due_here - self._core.loop.time()
            if left <= 0 or ticket.cancel_reason is not None or ticket.done() or ticket.lease is not delay.lease:
                return None
            await asyncio.sleep(min(_RETRY_INTERVAL, left))

    def _come_back(self, ticket: Ticket) -> None:
        """Start or queue a task here that could not be delayed in the store, and whose lease is held."""
        task = ticket.task
        self._dispatcher.conversations.remove_stored(task.thread_id)
        pool = self._core.pools.by_type.get(task.task_type)
        if ticket.cancel_reason is not None:
            self.complete(ticket, unsuccessful_result(ticket, TaskStatus.CANCELLED, ticket.cancel_reason))
        elif self.stays_stored:
            self.release(ticket)
        elif pool is None or not pool.is_to_be_served:  # its lease lapses, and the next worker of its type takes it
            self.leave_to_other_process(ticket, self.drop_lease(ticket))
        elif (late := self._dispatcher.expiry_reason(ticket, pool)) is not None:
            self.complete(ticket, unsuccessful_result(ticket, TaskStatus.EXPIRED, late))
        else:
            worker = self._dispatcher.pick_worker(pool, ticket)
            self._dispatcher.start_or_queue(ticket, pool, worker, is_due=True)

    def _leave_delayed(self, ticket: Ticket, delay: _Delay, *, delayed: bool) -> None:
        """Leave a task whose record is `delayed`, or else leased by another process."""
        lease = self.drop_lease(ticket)
        if self.stays_stored:
            self.release(ticket)
        elif delayed:
            if ticket.nested and (pool := self._core.pools.by_type.get(ticket.task.task_type)) is not None:
                pool.add_nested_spilled(ticket)
            self.wait_delayed(ticket, due_at=delay.due_here)
        else:
            self.leave_to_other_process(ticket, lease)
        if ticket.cancel_reason is not None and not ticket.done():
            ticket.cancel(ticket.cancel_reason)

    def wait_delayed(self, ticket: Ticket, *, due_at: float = 0.0) -> None:
        """Watch a task that waits in the store for a time, until the loop time `due_at` if that is known."""
        self._delayed_tickets[ticket] = due_at
        self.wait_in_store(ticket)

    def is_delayed(self, ticket: Ticket) -> bool:
        """Return whether a task is known to wait in the store for a time that has not come."""
        return self._delayed_tickets.get(ticket, 0.0) > self._core.loop.time()

    # --- ends ---

    def complete(self, ticket: Ticket, result: TaskResult) -> None:
        """Store the end of a task, and only then give its ticket the result."""
        self._registry.hold_strongly(ticket.task_id)
        self._core.timers.cancel(ticket.clear_expiry())
        ticket.begin_store_call()
        self._complete_in_background(ticket, result, self.drop_lease(ticket))

    def complete_again(self, ended: Ticket, result: TaskResult, lease: Lease | None) -> None:
        """Store the end of a task whose ticket has ended, because the store does not have it yet."""
        ended.begin_store_call()
        self._complete_in_background(ended, result, lease)

    def _complete_in_background(self, ticket: Ticket, result: TaskResult, lease: Lease | None) -> None:
        again = partial(self._complete_in_background, ticket, result, lease)
        self._core.run_in_background(self._complete(ticket, result, lease), if_cancelled=again)

    async def _complete(self, ticket: Ticket, result: TaskResult, lease: Lease | None) -> None:
        codec = self._core.codecs.result_codec(ticket.task.task_type)
        result, completion = records.completion_of_result(result, codec, bound=self._max_payload_bytes)
        failed = False
        try:
            stored = await self._store_end(ticket, result.status, completion, lease)
            if not stored and lease is not None and await self._is_gone(ticket.task_id):
                stored = failed = True  # this is its result
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with the store, the ticket must end
            message = "the end of task %r could not be stored; it may be run again"
            self._core.failures.report(message, ticket.task_id, error=exc)
            stored = failed = True
            if self._may_finish_later(ticket, lease):
                self._finish_later_in_background(ticket, result.status, completion, lease)
        ticket.end_store_call()
        task = ticket.task
        self._left_overflow(ticket)
        if lease is None and stored:
            self._left_store(ticket)
        self.conversation_moved(task)
        if ticket.done():
            return
        if stored:
            self._forget_other_process(ticket.task_id)
            self._registry.settle(ticket, result)
            if not failed and _is_dead(result.status, lease):
                self._registry.forget_end(task.task_id)  # it may be requeued, and end in another way
        elif ticket.pending_store_calls or ticket.lease is not None:
            pass  # it was refilled meanwhile, and that run ends it
        elif self.stays_stored:
            self.release(ticket)
        else:
            self.leave_to_other_process(ticket)

    async def _store_end(self, ticket: Ticket, status: TaskStatus, completion: Completion, lease: Lease | None) -> bool:
        """Store the end of a task: one that has failed for good becomes a dead letter."""
        if lease is not None and _is_dead(status, lease):
            if dead := await self.load.measure(self.store.mark_dead(lease, completion)):
                self.report_dead(lease.record, completion)
            return dead
        fence = None if lease is None else lease.fence
        return await self.load.measure(self.store.finish(ticket.task_id, completion, fence=fence))

    async def _is_gone(self, task_id: str) -> bool:
        """Return whether a task has no record any more: then no other process has it, or can say how it ended."""
        return await self.store.find(task_id) is None

    def _may_finish_later(self, ticket: Ticket, lease: Lease | None) -> bool:
        """Return whether the end of a task that could not be stored is kept here until it can be.

        In a store that survives the process the fence says whether the record is still the same: without a lease, the
        end may have been stored, and its id be another task's. In any other store no lease lapses, and so the
        conversation of the task would stand still.
        """
        return lease is not None if self.durable else ticket.task.thread_id is not None

    def _finish_later_in_background(
        self, ticket: Ticket, status: TaskStatus, completion: Completion, lease: Lease | None
    ) -> None:
        again = partial(self._finish_later_in_background, ticket, status, completion, lease)
        self._core.run_in_background(self._finish_later(ticket, status, completion, lease), if_cancelled=again)

    async def _finish_later(
        self, ticket: Ticket, status: TaskStatus, completion: Completion, lease: Lease | None
    ) -> None:
        """Store the end of a task that could not be stored, once the store answers again.

        It is stored unless another process has taken the task meanwhile. Closing the supervisor waits for it, as for
        all answers of the store; if nothing survives the process, no longer than it takes tasks back.
        """
        while self.durable or not self.refill_stopped:
            await asyncio.sleep(_RETRY_INTERVAL)
            with contextlib.suppress(StoreUnavailable):
                stored = await self._store_end(ticket, status, completion, lease)
                if stored and _is_dead(status, lease):
                    self._registry.forget_end(ticket.task_id)  # it may be requeued, and end in another way
                self.conversation_moved(ticket.task)
                return

    def _left_store(self, ticket: Ticket) -> None:
        """Count a task no more whose record had no lease, and so waited in the store."""
        task = ticket.task
        pool = self._core.pools.by_type.get(task.task_type)
        self._dispatcher.conversations.remove_stored(task.thread_id)
        if ticket in self._delayed_tickets:  # it may have been woken since, or not
            self.delayed.recount()
        elif pool is None:
            self.count_waiting(task.task_type)
        elif task.thread_id is None:  # else those that wait are counted again
            pool.remove_spilled(task.priority, task.tenant)

    def _left_overflow(self, ticket: Ticket) -> None:
        """Count a nested task no more as one that waits in the overflow and comes back here."""
        pool = self._core.pools.by_type.get(ticket.task.task_type)
        if ticket.nested and pool is not None:
            pool.remove_nested_spilled(ticket.task_id)

    def apply_stored_completion(
        self, ticket: Ticket, state: RecordState, record: TaskRecord, completion: Completion
    ) -> None:
        """End a ticket with the result in the store."""
        self._left_overflow(ticket)
        ticket.read_attempts(completion.attempts)
        self._registry.settle(ticket, records.result_of_record(record, completion, self._core.codecs))
        if state is RecordState.DEAD:
            self._registry.forget_end(ticket.task_id)  # it may be requeued, and end in another way

    def report_dead(self, record: TaskRecord, completion: Completion) -> None:
        """Report a stored task that became a dead letter."""
        error = completion.error or ""
        # Of a handler's exception the type alone: its text may be content.
        why = error if completion.worker_id is None else error.partition(":")[0]
        log.error("task %r is a dead letter, and will not be tried again: %s", record.task_id, why)
        if self._core.bus.active:
            self._core.bus.emit(
                TaskDeadLettered(
                    at=self._core.loop.time(),
                    task_id=record.task_id,
                    task_type=record.task_type,
                    attempts=completion.attempts,
                    error=error,
                )
            )

    # --- a stored task leaves this process before its end: see the package ---

    def cancel(self, ticket: Ticket, reason: str) -> None:
        """Cancel a task that waits in the store, or was on its way there."""
        ticket.cancel_later(reason)
        result = unsuccessful_result(ticket, TaskStatus.CANCELLED, reason)
        if ticket.stored:
            self._end_spilled(ref(ticket), result)
        else:
            self._registry.settle(ticket, result)

    def _end_spilled(self, known: ref[Ticket], result: TaskResult) -> None:
        ticket = known()
        if ticket is not None and ticket.status is TaskStatus.SPILLED and not ticket.done():
            self.complete(ticket, result)

    def fail_waiting(self, task_type: str, error: str) -> None:
        """End the tasks of a type that wait in the store for workers that will not come, unless it survives."""
        if not self.survives():
            for ticket in [*self._registry.all_unfinished()]:
                waits = ticket.stored and ticket.status is TaskStatus.SPILLED and not ticket.pending_store_calls
                if waits and ticket.task.task_type == task_type:
                    self.complete(ticket, unsuccessful_result(ticket, TaskStatus.FAILED, error))

    def requeue(self, ticket: Ticket) -> None:
        """Stop a stored task, so that the next process runs it again; its lease is returned when the spill closes."""
        if ticket.run is not None:
            ticket.run.abandon()
        else:
            self._dispatcher.dequeue(ticket)
        self.release(ticket)

    def release(self, ticket: Ticket) -> None:
        """End the ticket of a task that is left to the next process, so that nobody waits for it here."""
        self._core.timers.cancel(ticket.clear_expiry())
        self._left_overflow(ticket)
        ticket.move_to_store()
        self._registry.discard(ticket)
        for run in run_and_ancestors(ticket.parent):
            run.record_left_behind()
        ticket.resolve(StillSpilled(task_id=ticket.task_id))
        self._registry.notify_progress()

    async def return_leases(self, task_ids: Iterable[str]) -> None:
        """Return the leases on released tasks that were not started here, so that another process need not wait."""
        leases = self.leases.take(task_ids)
        if leases:
            await self.lost.release(leases)

    def stop_refilling(self) -> None:
        """Take no more tasks from the store, and release those that wait there if it survives this process."""
        self.refill_stopped = True
        if self.survives():
            for ticket in self._registry.all_unfinished():
                self.release_if_left(ticket)

    def release_if_left(self, ticket: Ticket) -> None:
        """Release a task that waits in the store, if it is left there to the next process."""
        waits = ticket.stored and ticket.status is TaskStatus.SPILLED and not ticket.pending_store_calls
        if waits and self.stays_stored and not ticket.done():
            self.release(ticket)

    def end_tickets(self) -> None:
        """End every ticket that is left, because the supervisor stops."""
        for ticket in self._registry.all_unfinished():
            if ticket.stored and self.durable:
                self.release(ticket)
            else:
                error = "the supervisor stopped"
                if ticket.pending_store_calls:
                    error += " before the overflow had answered: it may be run again"
                self._registry.settle(ticket, unsuccessful_result(ticket, TaskStatus.CANCELLED, error))
