"""Drain: finish what is inside, cancel the rest when the time is up, and report both."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from forebay._json import JsonStruct
from forebay.events import log
from forebay.supervisor.queue_spill import QueueSpill, QueueSpillDispatcher, is_movable
from forebay.supervisor.runs.run import Run
from forebay.supervisor.runs.slot_loans import run_and_ancestors
from forebay.supervisor.settings import MAX_STORE_SILENCE
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.core import Core
    from forebay.supervisor.held_tasks import HeldTasks
    from forebay.supervisor.runs.retries import TaskRetries
    from forebay.supervisor.runs.run import ActiveRuns
    from forebay.supervisor.runs.timers import Timer
    from forebay.supervisor.saga_driver import SagaDriver
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.ticket import Ticket

_MAX_LATENESS = 1.0  # seconds by which a look at the overflow may be late
_CLOSE_TIME = 5.0  # seconds, at least, that moving the queue to the overflow has when a supervisor closes


class DrainReport(JsonStruct, frozen=True, kw_only=True):
    """The outcome of draining, for the tasks that were inside when it started.

    Attributes:
        finished: how many ended by themselves: succeeded, failed, timed out or expired.
        spilled: how many are left in the overflow, to be run later.
        cancelled: how many were cancelled when the time was up, and stopped: those that ran, and those that waited and
            were not in the overflow.
        orphans: ids of those whose handler did not stop and may still be running.
        unanswered: of how many others the overflow had not answered whether it has the task, or its end: they may be
            run again.
    """

    finished: int
    spilled: int
    cancelled: int
    orphans: tuple[str, ...]
    unanswered: int = 0


class DrainDispatcher(QueueSpillDispatcher, Protocol):
    """The dispatcher, as far as draining needs it."""

    @property
    def started(self) -> int:
        """The number of runs that have been started."""

    @property
    def runs(self) -> ActiveRuns:
        """Its runs in progress."""

    @property
    def spill(self) -> Spill | None:
        """The overflow, if there is one."""

    @property
    def wait_listeners(self) -> list[Callable[[], None]]:
        """Called whenever a task begins to wait, or a run to await one."""

    @property
    def retries(self) -> TaskRetries:
        """The tasks that wait for their next attempt."""

    @property
    def held(self) -> HeldTasks:
        """The tasks that wait for a cheaper worker though a slot is free."""

    @property
    def sagas(self) -> SagaDriver | None:
        """The sagas that are driven here, if there is a log."""

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
        self._queue_spill: QueueSpill | None = None
        self._unfinished: Ticket | None = None  # one of the tickets that have not ended
        self._awaited: frozenset[object] = frozenset()  # answers of the overflow, when it was looked at last
        self._store_is_silent = False
        self._look_at = math.inf  # loop time of the next look
        self._store_timer: Timer | None = None

    async def run(self, timeout: float | None, *, closing: bool = False) -> DrainReport:  # noqa: ASYNC109 - it cuts off, not raises
        """Let what is inside finish for at most `timeout` seconds, and cancel the rest.

        Waiting tasks that may wait in the overflow move there, within the same time. With `closing`, nothing else
        starts, and they have a few seconds for it.
        """
        self._registry.add_listener(self._progress.set)
        self._core.background_listeners.append(self._progress.set)
        self._dispatcher.wait_listeners.append(self._progress.set)
        try:
            return await self._run(timeout, closing=closing)
        finally:
            self._core.timers.cancel(self._store_timer)
            if self._queue_spill is not None:
                self._queue_spill.stop()
            self._dispatcher.wait_listeners.remove(self._progress.set)
            self._core.background_listeners.remove(self._progress.set)
            self._registry.remove_listener(self._progress.set)

    async def _run(self, timeout: float | None, *, closing: bool) -> DrainReport:  # noqa: ASYNC109 - as above
        self._dispatcher.retries.begin_drain()
        self._dispatcher.held.begin_drain()
        sagas = self._dispatcher.sagas
        if sagas is not None:
            sagas.begin_drain()
        spill = self._dispatcher.spill
        survives = spill is not None and spill.stored.survives()
        inside = self._unfinished_tickets()
        moving = self._queue_spill = self._move_queue(spill) if spill is not None and survives else None
        if spill is not None and timeout is None:
            self._watch_store()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                await self._wait_until_empty()
        if moving is not None and closing:
            moving.empty_queue()
        elif moving is not None:
            moving.stop()
        if sagas is not None and (closing or timeout is not None):
            sagas.stop()
        cut = self._unfinished_tickets()
        not_moved = 0 if moving is None else sum(ticket.run is None and _may_move(ticket) for ticket in cut)
        self._cancel(cut)
        cut_at = self._core.loop.time()
        await self._wait_until_stopped(self._grace)
        if moving is not None:
            left = cut_at + _CLOSE_TIME - self._core.loop.time()
            await self._wait(lambda: closing and moving.pending, left)
            moving.abandon()
            cut += moving.cut
            if lost := not_moved + len(moving.cut) + len(moving.unanswered):
                log.error("%d waiting tasks were cancelled: the overflow did not store them in time", lost)
        if late := self._unfinished_tickets():  # their store calls were pending when the rest was cancelled
            started = any(ticket.run is not None and ticket.run.abandoned_at is None for ticket in late)  # since then
            self._cancel(late)
            left = cut_at + self._grace - self._core.loop.time()
            await self._wait_until_stopped(self._grace if started else left)
        closed = [ticket for ticket in inside if self._core.closed and ticket.status is TaskStatus.CANCELLED]
        return self._report(inside, [*cut, *late, *closed])

    def _report(self, inside: list[Ticket], cut: list[Ticket]) -> DrainReport:
        orphans = tuple(run.task.task_id for run in self._dispatcher.runs if not run.awaits_start)
        may_run = set(orphans)
        known = {ticket.task_id for ticket in inside}
        cut_ids = {ticket.task_id for ticket in cut}
        may_be_stored = set() if self._queue_spill is None else set(self._queue_spill.unanswered)
        finished, spilled, cancelled, unanswered = set[str](), set[str](), set[str](), set[str]()
        for ticket in (*inside, *cut):
            if not ticket.done() or ticket in may_be_stored:
                unanswered.add(ticket.task_id)
            elif ticket.status is TaskStatus.SPILLED:
                spilled.add(ticket.task_id)
            elif ticket.status is TaskStatus.CANCELLED and ticket.task_id in cut_ids:
                cancelled.add(ticket.task_id)
            elif ticket.result is not None and ticket.task_id in known:  # otherwise it was rejected, or is a later one
                finished.add(ticket.task_id)
        return DrainReport(
            finished=len(finished),
            spilled=len(spilled),
            cancelled=len(cancelled - may_run),
            orphans=orphans,
            unanswered=len(unanswered - may_run),
        )

    def _move_queue(self, spill: Spill) -> QueueSpill:
        """Begin to move the waiting tasks to the overflow, which survives the process."""
        spill.stored.stop_refilling()
        moving = QueueSpill(self._core, self._dispatcher, spill)
        inside = [ticket for ticket in self._registry.live.values() if not _is_awaited_inside(ticket)]
        for ticket in _behind_moved(inside):
            ticket.cancel("earlier tasks of its conversation are left to the next process, and it may not be stored")
        moving.start([ticket for ticket in inside if _may_move(ticket)])
        return moving

    def cancel_all(self) -> None:
        """Cancel everything inside, at once."""
        if self._queue_spill is not None:
            self._queue_spill.abandon()
        self._cancel(self._unfinished_tickets())

    def _cancel(self, tickets: list[Ticket]) -> None:
        """Cancel `tickets`, or requeue them if they are stored.

        Those that run come last, and messages of a conversation in reverse: the end of one must not start another.
        """
        waiting = [ticket for ticket in reversed(tickets) if ticket.run is None]
        for ticket in (*waiting, *(ticket for ticket in tickets if ticket.run is not None)):
            if ticket.done():
                continue
            if self._dispatcher.can_requeue(ticket):
                self._dispatcher.requeue(ticket)
            else:
                ticket.cancel("the supervisor stopped before it was done")

    async def _wait_until_stopped(self, seconds: float) -> None:
        """Wait for handlers to stop and for the store to answer, for at most `seconds`."""
        await self._wait(
            lambda: self._dispatcher.runs or self._core.background_tasks or self._is_compensating(), seconds
        )

    async def _wait(self, condition: Callable[[], object], seconds: float) -> None:
        """Wait while `condition` holds, for at most `seconds`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while condition() and not self._core.closed:
                    await self._wait_for_progress()

    async def _wait_until_empty(self) -> None:
        while not (self._core.closed or self._store_is_silent) and self._is_going_on():
            await self._wait_for_progress()

    def _is_compensating(self) -> bool:
        return self._dispatcher.sagas is not None and self._dispatcher.sagas.is_compensating

    def _is_going_on(self) -> bool:
        if self._is_moving() or self._is_compensating():
            return True
        if not self._has_unfinished():
            return False
        if self._has_run_at_work() or self._has_startable():
            return True
        # The runs that are left await other tasks. If some of these wait here, they cannot start: so no run may end.
        waiting = any(ticket.status is TaskStatus.WAITING for ticket in self._registry.live.values())
        return not waiting and any(not run.zombie for run in self._dispatcher.runs)

    def _has_run_at_work(self, *, without_store: bool = False) -> bool:
        """Return whether a run may end before others here start: a zombie may not, nor one that awaits a task here.

        With `without_store`, one whose start the overflow has not recorded may not either.
        """
        await_others = []
        for run in self._dispatcher.runs:
            if run.zombie or (without_store and run.awaits_start):
                continue
            if not run.is_suspended:
                return True
            if run.awaited_elsewhere:
                await_others.append(run)
        if not await_others:
            return False
        # What they await in other supervisors may itself await what waits here.
        left = [ticket for ticket in self._registry.live.values() if ticket.run is None]
        above = {run for ticket in left for run in run_and_ancestors(ticket.parent)}
        return any(run not in above for run in await_others)

    def _watch_store(self) -> None:
        """Give the overflow up if it has answered nothing since the last look, and nothing else is waited for."""
        now = self._core.loop.time()
        before, self._awaited = self._awaited, self._awaited_answers()
        blocked = now > self._look_at + _MAX_LATENESS  # so answers may not have been read
        if before and before <= self._awaited and not blocked:
            self._store_is_silent = True
            log.error(
                "draining waits no longer for the overflow, which has not answered about %d tasks for %.0f s: they may"
                " be run again. Look at its disk, or at its server, before the next process uses it",
                len(self._awaited),
                MAX_STORE_SILENCE,
            )
            self._progress.set()
        else:
            self._look_at = now + MAX_STORE_SILENCE
            self._store_timer = self._core.timers.at(self._look_at, self._watch_store)

    def _awaited_answers(self) -> frozenset[object]:
        """Return the answers of the overflow that draining waits for; none if tasks run, or can start, without them."""
        if self._has_run_at_work(without_store=True) or self._has_startable(without_store=True):
            return frozenset()
        tickets = list(filter(self._awaits_store, self._unfinished_tickets()))
        writes = 0
        if self._queue_spill is not None:
            tickets += self._queue_spill.held
            writes = self._queue_spill.answered
        # A task asks for several things, one after the other. An answer about any task may let others start.
        progress = (self._dispatcher.started, writes)
        return frozenset((each.task_id, each.attempts, each.run is None, progress) for each in tickets)

    def _awaits_store(self, ticket: Ticket) -> bool:
        """Return whether nothing but an answer of the overflow keeps a task from going on."""
        if ticket.pending_store_calls:
            return True
        if ticket.run is not None:
            return ticket.run.awaits_start
        pool = self._core.pools.by_type.get(ticket.task.task_type)
        if ticket.status is not TaskStatus.SPILLED or pool is None or self._is_delayed(ticket):
            return False
        if pool.usable_slots > pool.running:
            return True
        runs = self._dispatcher.runs  # one that awaits its start holds a slot until the overflow answers
        return any(run.awaits_start for worker in pool.workers for run in runs.on(worker))

    def _is_delayed(self, ticket: Ticket) -> bool:
        spill = self._dispatcher.spill
        return spill is not None and spill.stored.is_delayed(ticket)

    def _is_moving(self) -> bool:
        return self._queue_spill is not None and self._queue_spill.pending

    def _has_unfinished(self) -> bool:
        """Return whether a ticket has not ended; remember one, since looking for it can take long."""
        if self._unfinished is None or not self._is_unfinished(self._unfinished):
            # The newest first: a dict whose oldest entries were deleted is slow to find its first one.
            tickets = reversed(self._registry.live.values())
            self._unfinished = next(filter(self._is_unfinished, tickets), None)
        return self._unfinished is not None

    def _has_startable(self, *, without_store: bool = False) -> bool:
        """Return whether a worker could still take one of the tasks; or could `without_store`, if it never answers.

        Of each conversation only the first task counts: the others wait for it.
        """
        seen: set[str] = set()
        for ticket in filter(self._is_unfinished, self._registry.live.values()):
            if (thread_id := ticket.task.thread_id) is None:
                if ticket.run is None and self._may_run(ticket, without_store=without_store):
                    return True
            elif thread_id not in seen:
                seen.add(thread_id)
                conversation = self._dispatcher.conversations.get(thread_id)
                first = ticket if conversation is None else conversation.first
                if self._may_run(first, without_store=without_store):
                    return True
        return False

    async def _wait_for_progress(self) -> None:
        self._progress.clear()
        await self._progress.wait()

    def _may_run(self, ticket: Ticket, *, without_store: bool) -> bool:
        """Return whether a worker could still take a task, or runs it, while no run is at work.

        Workers that stay FAILED until they are revived do not count, and neither do those whose slots are all held by
        zombies, or all that are not reserved for others, nor those for a type that is paused. Zombies also hold what a
        tenant may have running, if it is blocked. Waiting for any of these could take forever. So could waiting for a
        task whose `not_before` has not come, unless a run here may await it.
        """
        if ticket.run is None and ticket.task.starts_in() and not (ticket.attempts or _is_awaited_inside(ticket)):
            return False
        if without_store and self._awaits_store(ticket):
            return False
        if ticket.run is not None:
            return not ticket.run.zombie
        priority, pool = ticket.task.priority, self._core.pools.by_type.get(ticket.task.task_type)
        if ticket.task.tenant in self._core.tenants.blocked:
            return False
        runs = self._dispatcher.runs
        are_stuck = runs.are_all_stuck if without_store else runs.are_all_zombies
        now = self._core.loop.time()
        return (
            pool is not None
            and not pool.paused
            and any(
                worker.breaker.retry_after(now) is not None and not are_stuck(worker, priority)
                for worker in pool.workers
            )
        )

    def _unfinished_tickets(self) -> list[Ticket]:
        """Return the tickets that have not ended and that this supervisor has to end."""
        return list(filter(self._is_unfinished, self._registry.live.values()))

    def _is_unfinished(self, ticket: Ticket) -> bool:
        if ticket.status is TaskStatus.SPILLED:
            if ticket.stored and ticket.pending_store_calls and not ticket.done():
                return True  # its end is being stored
            return self._dispatcher.spill is not None and not self._dispatcher.spill.stored.durable
        return not ticket.done()


def _is_awaited_inside(ticket: Ticket) -> bool:
    """Return whether a run that has not ended has submitted a task, and so may await it."""
    return isinstance(ticket.parent, Run) and not ticket.parent.ended


def _may_move(ticket: Ticket) -> bool:
    """Return whether a task may wait in the overflow."""
    return ticket.slot is None and (ticket.task.spill or ticket.stored)


def _behind_moved(tickets: list[Ticket]) -> list[Ticket]:
    """Return those that may not move, behind others of their conversation that do: they would overtake them."""
    behind, moved = [], set()
    for ticket in tickets:
        if ticket.task.thread_id is None or not is_movable(ticket):
            continue
        if _may_move(ticket):
            moved.add(ticket.task.thread_id)
        elif ticket.task.thread_id in moved:
            behind.append(ticket)
    return behind
