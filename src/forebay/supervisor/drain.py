"""Drain: finish what is inside, cancel the rest when the time is up, and report both."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Protocol

import msgspec

from forebay.supervisor.runs.run import Run
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.runs.run import ActiveRuns
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.start_gate import StartGate
    from forebay.supervisor.ticket import Ticket
    from forebay.supervisor.worker import WorkerAgent


class DrainReport(msgspec.Struct, frozen=True, kw_only=True):
    """The outcome of draining, for the tasks that were inside when it started.

    Attributes:
        finished: how many ended by themselves: succeeded, failed, timed out or expired.
        spilled: how many are left in the overflow, to be run later.
        cancelled: how many were cancelled when the time was up, and stopped.
        orphans: ids of those whose handler did not stop and may still be running.
    """

    finished: int
    spilled: int
    cancelled: int
    orphans: tuple[str, ...]


class DrainDispatcher(Protocol):
    """The dispatcher, as far as draining needs it."""

    @property
    def runs(self) -> ActiveRuns:
        """Its runs in progress."""

    @property
    def start_gate(self) -> StartGate:
        """The gate that lets runs start."""

    @property
    def spill(self) -> Spill | None:
        """The overflow, if there is one."""

    def dequeue(self, ticket: Ticket) -> None:
        """Take a waiting ticket out of the queue."""

    def start_or_queue(self, ticket: Ticket, pool: Pool, worker: WorkerAgent | None) -> None:
        """Start a task on `worker`, or queue it."""

    def can_requeue(self, ticket: Ticket) -> bool:
        """Return whether a task is stored where the next process finds it."""

    def requeue(self, ticket: Ticket) -> None:
        """Stop a stored task, so that the next process runs it again."""


class Drain:
    """One draining of a supervisor that admits nothing any more. Several may run at a time.

    Args:
        core: the objects that the parts of the supervisor share.
        dispatcher: the dispatcher.
        grace: seconds that a cancelled handler has to stop.
    """

    def __init__(self, core: Core, dispatcher: DrainDispatcher, *, grace: float) -> None:
        self._core = core
        self._dispatcher = dispatcher
        self._registry = core.registry
        self._grace = grace
        self._progress = asyncio.Event()

    async def run(self, timeout: float | None) -> DrainReport:  # noqa: ASYNC109 - it cuts off, not raises
        """Let what is inside finish for at most `timeout` seconds, and cancel the rest."""
        self._registry.add_listener(self._progress.set)
        try:
            return await self._run(timeout)
        finally:
            self._registry.remove_listener(self._progress.set)

    async def _run(self, timeout: float | None) -> DrainReport:  # noqa: ASYNC109 - as above
        spill = self._dispatcher.spill
        spilled = 0
        if spill is not None and spill.stored.durable:
            spill.stored.stop_refilling()
            spilled = await self._spill_waiting(spill)
        inside = self._unfinished_tickets()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wait_until_empty()
        left = self._unfinished_tickets()
        spilled += self._cancel(left)
        await self._wait_for_handlers()
        if late := self._unfinished_tickets():  # their store calls were pending when the rest was cancelled
            spilled += self._cancel(late)
            await self._wait_for_handlers()
        orphans = tuple(run.task.task_id for run in self._dispatcher.runs.all())
        cancelled = sum(1 for ticket in left if ticket.status is TaskStatus.CANCELLED and ticket.task_id not in orphans)
        return DrainReport(finished=len(inside) - len(left), spilled=spilled, cancelled=cancelled, orphans=orphans)

    async def _spill_waiting(self, spill: Spill) -> int:
        """Spill the waiting tasks that may wait in the overflow; return how many are there now."""
        out = 0
        for ticket in [ticket for ticket in self._registry.live.values() if _is_waiting(ticket)]:
            if not _is_waiting(ticket):
                continue  # it has ended, or is about to, while others were spilled
            if ticket.slot or not (ticket.task.spill or ticket.stored):
                continue
            if isinstance(ticket.parent, Run) and not ticket.parent.ended:
                continue  # its parent may await it
            self._dispatcher.dequeue(ticket)  # before the await, or a worker might start it meanwhile
            ticket.move_to_store()
            if ticket.stored:
                spill.stored.release(ticket)
            else:
                ticket.begin_store_call()
                await asyncio.shield(self._core.run_to_completion(self._spill_one(ticket, spill)))
            out += ticket.stored
        return out

    async def _spill_one(self, ticket: Ticket, spill: Spill) -> None:
        await spill.spill_waiting(ticket)
        ticket.end_store_call()
        if ticket.done():
            return
        if ticket.cancel_reason is not None:
            spill.stored.cancel(ticket, ticket.cancel_reason)
        elif ticket.stored:
            spill.stored.release(ticket)
        else:
            pool = self._core.pools.by_type[ticket.task.task_type]
            worker = self._dispatcher.start_gate.pick(pool, ticket.task.priority, nested=ticket.nested)
            self._dispatcher.start_or_queue(ticket, pool, worker)

    def cancel_all(self) -> None:
        """Cancel everything inside, at once."""
        self._cancel(self._unfinished_tickets())

    def _cancel(self, tickets: list[Ticket]) -> int:
        """Cancel `tickets`, or requeue them if they are stored; return how many were requeued."""
        requeued = 0
        for ticket in tickets:
            if ticket.done():
                continue
            if self._dispatcher.can_requeue(ticket):
                self._dispatcher.requeue(ticket)
                requeued += 1
            else:
                ticket.cancel("the supervisor stopped before it was done")
        return requeued

    async def _wait_for_handlers(self) -> None:
        """Wait for handlers to stop and for the store to answer, for at most the grace."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._grace):
                while self._dispatcher.runs.all() or self._core.background_tasks:
                    await self._wait_for_progress()

    async def _wait_until_empty(self) -> None:
        while (inside := self._unfinished_tickets()) and (
            self._dispatcher.runs.all() or any(self._may_run(ticket) for ticket in inside)
        ):
            await self._wait_for_progress()

    async def _wait_for_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    def _may_run(self, ticket: Ticket) -> bool:
        """Return whether a worker could still take a task.

        Workers that stay FAILED until they are revived do not count: waiting for them could take forever.
        """
        pool = self._core.pools.by_type.get(ticket.task.task_type)
        now = self._core.loop.time()
        return pool is not None and any(worker.breaker.retry_after(now) is not None for worker in pool.workers)

    def _unfinished_tickets(self) -> list[Ticket]:
        """Return the tickets that have not ended and that this supervisor has to end."""
        spill = self._dispatcher.spill
        tickets = self._registry.live.values()
        if spill is None or not spill.stored.durable:
            return list(tickets)
        return [ticket for ticket in tickets if ticket.status is not TaskStatus.SPILLED]


def _is_waiting(ticket: Ticket) -> bool:
    return ticket.status is TaskStatus.WAITING and not ticket.pending_store_calls
