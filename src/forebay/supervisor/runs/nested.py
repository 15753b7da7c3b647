"""Nested work lends its slot: a run that awaits a task does not hold the slot that the task may need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from forebay.context import RunningTask
from forebay.supervisor.runs.run import Run

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.worker import WorkerAgent


def run_and_ancestors(running: RunningTask | None) -> Iterator[Run]:
    """`running` and the runs above it, of whatever house, up to the outermost submitter."""
    while isinstance(running, Run):
        yield running
        running = running.ticket.parent


def active_runs(running: RunningTask | None, dispatcher: Dispatcher) -> Iterator[Run]:
    """The runs of `house` that are under way, from `running` upwards."""
    return (run for run in run_and_ancestors(running) if run.dispatcher is dispatcher and not run.ended)


class SlotLoan:
    """The slots that one await of a task of `house` has lent, until it takes them back.

    The task may need the slot of every run from the one that awaits it up to the last of `house`, for it may come down
    the same way. So each of them lends its own while it awaits a task itself: work that goes down a tree of houses and
    up again cannot deadlock, while who submits a task and works on keeps its slot, whatever that task waits for. A run
    may wait for several tasks at once (a gather): any of them will do.
    """

    __slots__ = ("_awaiting_run", "_runs")

    def __init__(self, dispatcher: Dispatcher, awaiting: Run) -> None:
        self._awaiting_run = awaiting
        chain = tuple(run_and_ancestors(awaiting))
        needed = max((place for place, run in enumerate(chain, start=1) if run.dispatcher is dispatcher), default=0)
        self._runs = chain[:needed]
        awaiting.awaited_tasks += 1
        for run in self._runs:
            run.slot_loans += 1
        for run in {awaiting: None, **dict.fromkeys(self._runs)}:
            if run.lends_slot and run.holds_slot:
                run.dispatcher.return_slot(run)

    async def reclaim(self) -> None:
        """Wait, at the head of its worker's line, until the run that awaited has a slot again.

        Those above it get theirs back in the same way, but are not waited for: who holds the slot may need this run's.
        A run that is being cancelled does not wait: it ends without a slot.
        """
        self._awaiting_run.awaited_tasks -= 1
        for run in self._runs:
            run.slot_loans -= 1
        for run in self._runs:
            if run is not self._awaiting_run and run.lacks_slot:
                _claim_slot(run)
        if self._awaiting_run.lacks_slot:
            await _reclaim_slot(self._awaiting_run)


async def _reclaim_slot(run: Run) -> None:
    turn = _claim_slot(run)
    if turn is None:
        return
    try:
        await turn
    finally:
        if (run, turn) in run.worker.slot_claims:
            run.worker.slot_claims.remove((run, turn))


def _claim_slot(run: Run) -> asyncio.Future[None] | None:
    """Take a slot for `run` if there is one; else what is done when it has one, or None if it need not wait."""
    worker = run.worker
    if worker.has_free_slot() and not worker.slot_claims:
        run.dispatcher.take_slot(run)
        return None
    if run.abandoned_at is not None:
        return None
    turn: asyncio.Future[None] = run.dispatcher.loop.create_future()
    worker.slot_claims.append((run, turn))
    return turn


def grant_claims(worker: WorkerAgent) -> None:
    """Give the slots that have fallen free on `worker` to the runs that lent theirs, in the order of their claims."""
    while worker.slot_claims and worker.has_free_slot():
        run, _ = worker.slot_claims[0]
        if run.lacks_slot:
            run.dispatcher.take_slot(run)
        for claim in [claim for claim in worker.slot_claims if claim[0] is run]:  # one slot answers them all
            worker.slot_claims.remove(claim)
            if not claim[1].done():
                claim[1].set_result(None)
