"""Slot loans: a run that awaits a task does not hold the slot that the task may need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from forebay.context import DetachedTask, RunningTask
from forebay.supervisor.runs.run import Run, RunOwner

if TYPE_CHECKING:
    from forebay.supervisor.ticket import Reclaim, Ticket


def run_and_ancestors(running: RunningTask | None) -> Iterator[Run]:
    """Yield `running` and the runs above it, of any supervisor, up to the outermost submitter.

    Above a compensation is the run that awaits it.
    """
    while running is not None:
        if isinstance(running, Run):
            yield running
            running = running.ticket.parent
        else:
            running = _awaiting(running)


def _awaiting(running: RunningTask) -> Run | None:
    """Return the run that awaits a compensation, unless it has ended or is to stop: then it lends nothing."""
    run = running.awaited_by if isinstance(running, DetachedTask) else None
    return run if isinstance(run, Run) and run.abandoned_at is None and not run.ended else None


def active_runs(running: RunningTask | None, dispatcher: object) -> Iterator[Run]:
    """Yield the runs of `dispatcher` that have not ended, from `running` upwards."""
    return (run for run in run_and_ancestors(running) if run.dispatcher is dispatcher and not run.ended)


def depth(running: RunningTask) -> int:
    """Return how many runs led to `running`, itself included, whether or not they have ended."""
    return running.ticket.depth + 1 if isinstance(running, Run) else 1


class SlotLoan:
    """The slots that are lent while one run awaits a task of `dispatcher`.

    The task may need the slot of every run from the one that awaits it up to the outermost run of `dispatcher` or
    of a supervisor below it, because nested tasks may pass through the same workers again. So each of these runs
    lends its slot while it awaits a task itself. Then work that goes down a tree of supervisors and up again cannot
    deadlock, and a run that submits a task and works on keeps its slot, whatever that task waits for. A run that
    awaits several tasks at once (a gather) lends its slot as long as it awaits any of them.

    A worker that has as many open runs as it may have, suspended ones included, begins no new one. That delays no run
    that waits for its own nested task, queued or running, since nested tasks start all the same. A run that waits for
    any other task, or for room, may need a new run to begin, and so may those above it: they do not count while it
    waits. Such a task is another submitter's, a stored one, one behind its conversation, or one in another supervisor,
    whose slots may be held by tasks that wait here.
    """

    __slots__ = ("_awaiting_run", "_chain", "_dispatcher", "_exempt", "_runs")

    def __init__(self, dispatcher: RunOwner, awaiting: Run, awaited: Ticket | None) -> None:
        self._awaiting_run = awaiting
        self._dispatcher = dispatcher
        # A run that was asked to stop, and awaits a task all the same, keeps its slot: it is at work.
        self._chain = chain = tuple(run for run in run_and_ancestors(awaiting) if run.abandoned_at is None)
        own = awaiting.dispatcher is dispatcher
        self._exempt = not (own and awaited is not None and is_own_nested(awaiting, awaited))
        self._runs = chain[
            : max((count for count, run in enumerate(chain, 1) if _may_pass(dispatcher, run)), default=0)
        ]
        awaiting.begin_await(dispatcher)
        for run in self._runs:
            run.begin_loan()
        if self._exempt:
            for run in chain:
                if run.begin_exemption():
                    run.dispatcher.dispatch(run.worker)
        for run in {awaiting: None, **dict.fromkeys(self._runs)}:
            if run.lends_slot and run.holds_slot:
                run.dispatcher.lend_slot(run)

    async def reclaim(self) -> None:
        """Wait, ahead of the queue of its worker, until the run that awaited has a slot again.

        The runs above it claim their slots too, but this does not wait for them: a task that holds one of these slots
        may need the slot of this run.

        A cancellation of the await is raised once the run has a slot: code that catches it, such as
        ``asyncio.timeout``, goes on to work. A run that its supervisor stops does not wait: it ends without a slot.
        """
        self._end()
        await take_slot_back(self._awaiting_run)

    async def claim(self) -> None:
        """Do as `reclaim` does, for a compensation: the run that awaits it claims its slot, and this does not wait."""
        self._end()
        if self._awaiting_run.lacks_slot:
            self._awaiting_run.dispatcher.slot_claims.claim(self._awaiting_run)

    def _end(self) -> None:
        awaiting = self._awaiting_run
        awaiting.end_await(self._dispatcher)
        for run in self._runs:
            run.end_loan()
        if self._exempt:
            for run in self._chain:
                run.end_exemption()
        for run in self._runs:
            if run is not awaiting and run.lacks_slot:
                run.dispatcher.slot_claims.claim(run)


def lend_slots(dispatcher: RunOwner, running: RunningTask | None, awaited: Ticket | None) -> Reclaim | None:
    """Lend the slot of `running`, or of the run that awaits it; return how to get it back."""
    if isinstance(running, Run):
        return SlotLoan(dispatcher, running, awaited).reclaim
    run = None if running is None else _awaiting(running)
    return None if run is None else SlotLoan(dispatcher, run, awaited).claim


async def take_slot_back(run: Run) -> None:
    """Wait until a run has a slot again, if it has lent its own and awaits nothing any more: see `SlotLoan.reclaim`."""
    if not run.lacks_slot:
        return
    claims = run.dispatcher.slot_claims
    granted = claims.claim(run)
    if granted is not None:
        try:
            await _wait_for_slot(run, granted)
        finally:
            claims.withdraw(run, granted)


def is_own_nested(run: RunningTask, awaited: Ticket) -> bool:
    """Return whether an awaited task is nested in `run`, and queued or running."""
    inside = awaited.queue_entry is not None or awaited.run is not None
    return inside and awaited.nested and awaited.parent is run


def _may_pass(dispatcher: RunOwner, run: Run) -> bool:
    """Return whether a task of `dispatcher` may wait for the slot of `run`."""
    return run.dispatcher is dispatcher or dispatcher.is_above(run.dispatcher)


async def _wait_for_slot(run: Run, granted: asyncio.Future[None]) -> None:
    """Wait until `granted` is done, even if the caller is cancelled, unless the run is to stop."""
    cancellation: asyncio.CancelledError | None = None
    while not granted.done():
        try:
            await asyncio.wait((granted,))
        except asyncio.CancelledError as error:
            if run.abandoned_at is not None or run.ended:
                raise
            cancellation = error
    if cancellation is not None:
        raise cancellation
