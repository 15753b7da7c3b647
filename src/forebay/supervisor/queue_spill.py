"""Queue spill: when a supervisor drains, the tasks that wait in its queue move to the overflow, in group commits."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol

from forebay.events import log
from forebay.supervisor.ticket import Ticket, unsuccessful_result
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.conversations import Conversations
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.start_gate import StartGate
    from forebay.supervisor.worker import WorkerAgent

_MAX_BATCH = 1000  # tasks in one group commit
_MAX_BATCH_BYTES = 16 << 20  # of envelopes in one group commit; a batch exceeds it by one envelope at most
_RETRY_INTERVAL = 1.0  # seconds until a store that failed is tried again
_MAX_RETRIES = 5  # in a row, for messages that may not run here any more


class QueueSpillDispatcher(Protocol):
    """The dispatcher, as far as moving its queue needs it."""

    @property
    def conversations(self) -> Conversations:
        """The conversations of its tasks."""

    @property
    def start_gate(self) -> StartGate:
        """The gate that lets runs start."""

    def dequeue(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the queue."""

    def start_or_queue(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None) -> None:
        """Start a task on `worker`, or queue it."""


class QueueSpill:
    """The move of waiting tasks to the overflow while a supervisor drains.

    A task stays in the queue, and may start, until its batch is written. What the store refuses goes back to the queue,
    unless messages of its conversation have moved: it would run at the same time as they, so it ends CANCELLED. The
    ticket of a task raises StillSpilled once its record is committed, and not before, so that a kill loses nothing that
    its submitter was told is safe.

    Args:
        core: the objects that the parts of the supervisor share.
        dispatcher: the dispatcher.
        spill: the overflow, which survives the process.

    Attributes:
        cut: the tickets that `stop` and `abandon` ended CANCELLED: the overflow does not have them.
        unanswered: those that `abandon` ended CANCELLED while the store was writing them: it may have them.
        answered: how many group commits the store has answered.
    """

    def __init__(self, core: Core, dispatcher: QueueSpillDispatcher, spill: Spill) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._spill = spill
        self._queued: deque[Ticket] = deque()  # in the queue, unless they have started or ended
        self._conversations: dict[str, list[Ticket]] = {}  # of the tasks in `_queued`, by their ids
        self._held: dict[str, Ticket] = {}  # out of the queue, and not in the overflow yet
        self._to_write: deque[Ticket] = deque()  # those of them that no write is under way for
        self._keeps_out = False  # since `empty_queue`: nothing goes back to the queue
        self._failed = False  # the last write
        self._retries = 0  # since a write succeeded
        self._moved: set[str] = set()  # conversations with messages that are left to the next process
        self._stopped = asyncio.Event()
        self.cut: list[Ticket] = []
        self.unanswered: list[Ticket] = []
        self.answered = 0

    @property
    def held(self) -> Iterable[Ticket]:
        """The tasks that are out of the queue, and not in the overflow yet."""
        return self._held.values()

    @property
    def pending(self) -> bool:
        """True while tasks are on their way. After a failed write, those in the queue are like any others there."""
        return bool(self._held) or (bool(self._queued) and not self._failed)

    def start(self, tickets: Iterable[Ticket]) -> None:
        """Move those of `tickets` that wait, in the background; those that are stored already need no write."""
        for ticket in tickets:
            if is_movable(ticket):
                self._queue(ticket)
        free = self._without_unstored_ahead()
        for ticket in [ticket for ticket in self._queued if ticket.stored]:
            self._take(ticket)
        if free:
            self._core.run_in_background(self._spill.stored.return_leases(free))
        if self._queued:
            self._core.run_in_background(self._move(), if_cancelled=self.abandon)

    def empty_queue(self) -> None:
        """Take the tasks out of the queue now, so that none starts any more, and go on writing them."""
        self._keeps_out = True
        while self._queued:
            self._take(self._queued.popleft())

    def stop(self) -> None:
        """Begin no other write, and leave the tasks that are in the queue there."""
        self._stopped.set()
        self._queued.clear()
        while self._to_write:
            self._release_hold(ticket := self._to_write.popleft())
            self._cancel(ticket)

    def abandon(self) -> None:
        """End the tickets of the tasks whose write has not been answered: it may still happen."""
        self.stop()
        for ticket in list(self._held.values()):
            self._release_hold(ticket)
            self.unanswered.append(ticket)
            if not ticket.done():  # otherwise the supervisor has closed meanwhile
                self._end(ticket, "the supervisor stopped before the overflow had answered: it may be run again")

    def _without_unstored_ahead(self) -> list[str]:
        """Return the ids of the stored tasks in the queue that another process may run now.

        Messages behind one of their conversation that only this process has keep their leases until it closes.
        """
        free, unstored = [], set[str]()
        for ticket in self._queued:
            conversation = self._dispatcher.conversations.get(thread_id := ticket.task.thread_id)
            if thread_id is not None and not (ticket.stored and (conversation is None or conversation.first.stored)):
                unstored.add(thread_id)
            if ticket.stored and thread_id not in unstored:
                free.append(ticket.task_id)
        return free

    async def _move(self) -> None:
        while (self._queued or self._to_write) and not self._stopped.is_set():
            batch = self._next_batch()
            if batch:
                await self._write(batch)
            if self._failed:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_RETRY_INTERVAL):
                        await self._stopped.wait()

    def _next_batch(self) -> dict[Ticket, bytes]:
        """Take the next tasks out of the queue, and return them with their envelopes."""
        batch: dict[Ticket, bytes] = {}
        size = 0
        while (self._to_write or self._queued) and len(batch) < _MAX_BATCH and size < _MAX_BATCH_BYTES:
            if not self._to_write:
                self._take(self._queued.popleft())
                continue
            ticket = self._to_write.popleft()
            envelope = None if ticket.cancel_reason is not None else self._spill.encode_waiting(ticket)
            if envelope is None:
                self._finish(ticket, failed=False)
            else:
                batch[ticket] = envelope
                size += len(envelope)
        return batch

    def _queue(self, ticket: Ticket) -> None:
        self._queued.append(ticket)
        if ticket.task.thread_id is not None:
            self._conversations.setdefault(ticket.task.thread_id, []).append(ticket)

    def _take(self, ticket: Ticket) -> None:
        """Take a task out of the queue, and all of its conversation: the next one would start, and overtake it."""
        tickets = self._conversations.pop(ticket.task.thread_id or "", [ticket])
        waiting = list(filter(is_movable, tickets))
        for each in (*waiting[1:], *waiting[:1]):  # the first one last: until then the others only wait behind it
            self._dispatcher.dequeue(each)
        for each in waiting:
            if each.stored:
                if each.task.thread_id is not None:
                    self._moved.add(each.task.thread_id)
                self._spill.stored.release(each)
            else:
                self._hold(each)

    async def _write(self, batch: dict[Ticket, bytes]) -> None:
        failure = await self._spill.spill_waiting(batch)
        self.answered += 1
        self._failed = failure is not None
        self._retries = self._retries + 1 if self._failed else 0
        if failure is not None:
            log.error("%d waiting tasks could not be moved to the overflow: %s", len(batch), failure)
        self._moved.update(ticket.task.thread_id for ticket in batch if ticket.stored and ticket.task.thread_id)
        for ticket in batch:
            if self._held.get(ticket.task_id) is ticket:
                self._finish(ticket, failed=self._failed)
            elif ticket.stored and ticket.result is not None:  # `abandon` has ended it: it must not run again
                lease = self._spill.stored.leases.drop(ticket.task_id)
                self._spill.stored.complete_again(ticket, ticket.result, lease)

    def _finish(self, ticket: Ticket, *, failed: bool) -> None:
        """Release a task that is stored now; leave any other in the queue, to be written again if the store failed."""
        self._release_hold(ticket)
        if ticket.done():
            return
        if ticket.cancel_reason is not None:
            self._spill.stored.cancel(ticket, ticket.cancel_reason)
        elif ticket.stored:
            self._spill.stored.release(ticket)
        elif self._stopped.is_set() or (self._keeps_out and not failed):
            self._cancel(ticket)
        elif self._keeps_out:
            self._hold(ticket)
        elif ticket.task.thread_id in self._moved or ticket.task.starts_in():  # it may not start here
            if failed and self._retries < _MAX_RETRIES:
                self._hold(ticket)
            elif ticket.task.starts_in():
                self._cancel(ticket, "its not_before had not come")
            else:
                self._cancel(ticket, "earlier tasks of its conversation are left to the next process")
        else:
            self._return_to_queue(ticket, failed=failed)

    def _return_to_queue(self, ticket: Ticket, *, failed: bool) -> None:
        if (pool := self._core.pools.by_type.get(ticket.task.task_type)) is None:
            self._cancel(ticket, "its last worker was unregistered")
            return
        gate = self._dispatcher.start_gate
        worker = gate.pick(pool, ticket.task.priority, nested=ticket.nested, ticket=ticket)
        self._dispatcher.start_or_queue(ticket, pool, worker)
        if failed:
            self._queue(ticket)

    def _hold(self, ticket: Ticket) -> None:
        ticket.move_to_store()
        ticket.begin_store_call()
        self._dispatcher.conversations.begin_spill(ticket.task.thread_id)
        self._held[ticket.task_id] = ticket
        self._to_write.append(ticket)

    def _release_hold(self, ticket: Ticket) -> None:
        del self._held[ticket.task_id]
        self._dispatcher.conversations.end_spill(ticket.task.thread_id, stored=False)
        ticket.end_store_call()

    def _cancel(self, ticket: Ticket, reason: str = "the supervisor stopped") -> None:
        if not ticket.done():
            self._end(ticket, f"{reason}, and the overflow has not stored it")
            self.cut.append(ticket)

    def _end(self, ticket: Ticket, error: str) -> None:
        self._core.registry.settle(ticket, unsuccessful_result(ticket, TaskStatus.CANCELLED, error))


def is_movable(ticket: Ticket) -> bool:
    """Return whether a task waits inside and can be moved: no answer of the store decides about it.

    One whose last attempt has not stopped stays: the next process would run it at the same time.
    """
    return ticket.status is TaskStatus.WAITING and not (ticket.pending_store_calls or ticket.is_stopping)
