"""Stored tasks: the tickets whose tasks have a record in the task store, with their leases, starts and ends."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Protocol
from weakref import ref

from forebay.errors import StillSpilled, StoreUnavailable, UnknownTask
from forebay.events import TaskDeadLettered, log
from forebay.interfaces import Completion, Lease, RecordState, TaskRecord, TaskStore
from forebay.supervisor.runs.slot_loans import run_and_ancestors
from forebay.supervisor.spill import records
from forebay.supervisor.spill.leases import HeldLeases
from forebay.supervisor.ticket import Ticket, unsuccessful_result
from forebay.task import Task, TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.conversations import Conversations
    from forebay.supervisor.core import Core
    from forebay.supervisor.runs.run import ActiveRuns, Run

_RETRY_INTERVAL = 1.0  # seconds until the end of a task that could not be stored is stored again


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


def _is_stored_only(ticket: Ticket) -> bool:
    """Return whether a task waits in the store or is with another process, and no answer of the store is awaited."""
    return (
        ticket.status is TaskStatus.SPILLED
        and ticket.lease is None
        and not (ticket.pending_store_calls or ticket.done())
    )


class StoredTasks:
    """The supervisor's side of the task store: tickets whose tasks have a record there.

    Attributes:
        store: the task store.
        durable: whether it survives its process.
        leases: the leases on records that this process holds.
        leased_elsewhere: tickets whose records another process holds, by task id.
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
        self.leases = HeldLeases(lease)
        self.leased_elsewhere: dict[str, Ticket] = {}
        self.refill_stopped = False
        self._conversation_moved: Callable[[str], Awaitable[None]] | None = None

    def on_conversation_moved(self, callback: Callable[[str], Awaitable[None]]) -> None:
        """Call `callback` when a task of a conversation has ended in the store; with the task type."""
        self._conversation_moved = callback

    def conversation_moved(self, task: Task) -> None:
        """Look for the next task of the conversation of `task`, whose record has ended or come back."""
        if task.thread_id is not None and self._conversation_moved is not None:
            again = partial(self.conversation_moved, task)
            self._core.run_in_background(self._conversation_moved(task.task_type), if_cancelled=again)

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
        """Watch the deadline of a task that waits in the store, and hold its ticket no longer than needed."""
        if ticket.deadline is not None and ticket.expiry_timer is None:
            due = self._core.loop.time() + ticket.deadline.remaining()
            error = "its deadline passed while it waited in the overflow"
            expired = unsuccessful_result(ticket, TaskStatus.EXPIRED, error)
            # A weak reference: the timer must not keep the ticket alive.
            ticket.set_expiry(self._core.timers.at(due, self._end_spilled, ref(ticket), expired))
        self._hold_weakly(ticket)

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

    def drop_lease(self, ticket: Ticket) -> str | None:
        """Forget the lease on a task's record; return its fence, if there was one."""
        ticket.drop_lease()
        return self.leases.drop(ticket.task_id)

    def lease_is_valid(self, ticket: Ticket) -> bool:
        """Return whether this process may start a task: it needs no lease, or its lease has not lapsed."""
        return ticket.lease is None or self.leases.is_valid(ticket.task_id)

    def lease_lapsed(self, ticket: Ticket) -> None:
        """Leave a task to another process, because its lease lapsed before its turn came."""
        ticket.leave_queue()
        self.drop_lease(ticket)
        self.leave_to_other_process(ticket)

    def leave_to_other_process(self, ticket: Ticket) -> None:
        """Let another process end a task; `StoreMaintenance` looks up the result."""
        ticket.move_to_store()
        self.leased_elsewhere[ticket.task_id] = ticket
        self._registry.notify_progress()

    def _forget_other_process(self, task_id: str) -> None:
        """Stop looking up a task that another process was to end."""
        self.leased_elsewhere.pop(task_id, None)

    def stored_ids(self) -> list[str]:
        """Return the ids of the tasks whose tickets are held here, by anybody, while they wait in the store."""
        spilled = [ticket.task_id for ticket in self._registry.live.values() if _is_stored_only(ticket)]
        return [*spilled, *self._registry.weak.keys()]

    def found(self, task_id: str, found: tuple[RecordState, TaskRecord, Completion | None] | None) -> None:
        """Follow what the store says of a task whose ticket is held here."""
        ticket = self._registry.live.get(task_id) or self._registry.weak.get(task_id)
        if ticket is None or not _is_stored_only(ticket):
            return  # it has come back, or ended, meanwhile
        if found is None:  # it has ended, and its result is not kept any more
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
        elif found[0] is not RecordState.LEASED and task_id in self.leased_elsewhere:  # that process has left it again
            self._forget_other_process(task_id)
            self.wait_in_store(ticket)

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
            held = await self.store.begin_attempt(lease)
        except Exception as exc:  # noqa: BLE001 - whatever is wrong with the store, the run must go on
            log.error("the start of task %r could not be recorded; it runs anyway: %s", ticket.task_id, exc)
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
            self.drop_lease(ticket)
            self.leave_to_other_process(ticket)
        run.handler_ended(None, asyncio.CancelledError())

    # --- ends ---

    def complete(self, ticket: Ticket, result: TaskResult) -> None:
        """Store the end of a task, and only then give its ticket the result."""
        self._registry.hold_strongly(ticket.task_id)
        self._core.timers.cancel(ticket.clear_expiry())
        ticket.begin_store_call()
        self._complete_in_background(ticket, result, self.drop_lease(ticket))

    def complete_again(self, ended: Ticket, result: TaskResult, fence: str | None) -> None:
        """Store the end of a task whose ticket has ended, because the store does not have it yet."""
        ended.begin_store_call()
        self._complete_in_background(ended, result, fence)

    def _complete_in_background(self, ticket: Ticket, result: TaskResult, fence: str | None) -> None:
        again = partial(self._complete_in_background, ticket, result, fence)
        self._core.run_in_background(self._complete(ticket, result, fence), if_cancelled=again)

    async def _complete(self, ticket: Ticket, result: TaskResult, fence: str | None) -> None:
        codec = self._core.codecs.result_codec(ticket.task.task_type)
        result, completion = records.completion_of_result(result, codec, bound=self._max_payload_bytes)
        try:
            stored = await self.store.finish(ticket.task_id, completion, fence=fence)
        except Exception:  # noqa: BLE001 - whatever is wrong with the store, the ticket must end
            log.exception("the end of task %r could not be stored: it may be run again", ticket.task_id)
            stored = True
            if not self.durable and ticket.task.thread_id is not None:
                self._core.run_in_background(self._finish_later(ticket, completion, fence))
        ticket.end_store_call()
        task = ticket.task
        self._left_overflow(ticket)
        if fence is None and stored:  # without a lease, the record was waiting in the store
            self._dispatcher.conversations.remove_stored(task.thread_id)
        self.conversation_moved(task)
        if ticket.done():
            return
        if stored:
            self._forget_other_process(ticket.task_id)
            pool = self._core.pools.by_type.get(task.task_type)
            if fence is None and pool is not None and task.thread_id is None:  # else it is counted again, see above
                pool.remove_spilled(task.priority)
            self._registry.settle(ticket, result)
        elif ticket.pending_store_calls or ticket.lease is not None:
            pass  # it was refilled meanwhile, and that run ends it
        elif self.stays_stored:
            self.release(ticket)
        else:
            self.leave_to_other_process(ticket)

    async def _finish_later(self, ticket: Ticket, completion: Completion, fence: str | None) -> None:
        """Store the end of a task that could not be stored: no lease lapses, so its conversation would stand still."""
        while not self.refill_stopped:
            await asyncio.sleep(_RETRY_INTERVAL)
            with contextlib.suppress(StoreUnavailable):
                await self.store.finish(ticket.task_id, completion, fence=fence)
                self.conversation_moved(ticket.task)
                return

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
        self._registry.settle(ticket, records.result_of_record(record, completion, self._core.codecs))
        if state is RecordState.DEAD:
            self._registry.forget_end(ticket.task_id)  # it may be requeued, and end in another way

    def report_dead(self, record: TaskRecord, completion: Completion) -> None:
        """Report a stored task that became a dead letter."""
        error = completion.error or ""
        log.error("task %r is a dead letter, and will not be tried again: %s", record.task_id, error)
        if self._core.bus.active:
            self._core.bus.emit(
                TaskDeadLettered(
                    at=self._core.loop.time(),
                    task_id=record.task_id,
                    task_type=record.task_type,
                    attempts=record.attempts,
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
            await self.store.release(leases)

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
