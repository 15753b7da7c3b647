"""Nested work lends its slot: a run that awaits a task does not hold the slot that the task may need."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from forebay.context import RunningTask
from forebay.supervisor.run import Run

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.worker import WorkerAgent


def ancestry(running: RunningTask | None) -> Iterator[Run]:
    """`running` and the runs above it, of whatever house, up to the outermost submitter."""
    while isinstance(running, Run):
        yield running
        running = running.ticket.parent


def held_slots(running: RunningTask | None, house: Dispatcher) -> Iterator[Run]:
    """The runs of `house` that are under way, from `running` upwards."""
    return (run for run in ancestry(running) if run.house is house and not run.ended)


class Loan:
    """The slots that one await of a task of `house` has lent, until it takes them back.

    The task may need the slot of every run from the one that awaits it up to the last of `house`, for it may come down
    the same way. So each of them lends its own while it awaits a task itself: work that goes down a tree of houses and
    up again cannot deadlock, while who submits a task and works on keeps its slot, whatever that task waits for. A run
    may wait for several tasks at once (a gather): any of them will do.
    """

    __slots__ = ("_awaiting", "_runs")

    def __init__(self, house: Dispatcher, awaiting: Run) -> None:
        self._awaiting = awaiting
        chain = tuple(ancestry(awaiting))
        needed = max((place for place, run in enumerate(chain, start=1) if run.house is house), default=0)
        self._runs = chain[:needed]
        awaiting.awaits += 1
        for run in self._runs:
            run.waits_below += 1
        for run in {awaiting: None, **dict.fromkeys(self._runs)}:
            if run.lends and run.holds:
                run.house.give(run)

    async def take_back(self) -> None:
        """Wait, at the head of its worker's line, until the run that awaited has a slot again.

        Those above it get theirs back in the same way, but are not waited for: who holds the slot may need this run's.
        A run that is being cancelled does not wait: it ends without a slot.
        """
        self._awaiting.awaits -= 1
        for run in self._runs:
            run.waits_below -= 1
        for run in self._runs:
            if run is not self._awaiting and run.lacks_slot:
                _claim(run)
        if self._awaiting.lacks_slot:
            await _regain(self._awaiting)


async def _regain(run: Run) -> None:
    turn = _claim(run)
    if turn is None:
        return
    try:
        await turn
    finally:
        if (run, turn) in run.worker.returning:
            run.worker.returning.remove((run, turn))


def _claim(run: Run) -> asyncio.Future[None] | None:
    """Take a slot for `run` if there is one; else what is done when it has one, or None if it need not wait."""
    worker = run.worker
    if worker.has_room() and not worker.returning:
        run.house.take(run)
        return None
    if run.abandoned_at is not None:
        return None
    turn: asyncio.Future[None] = run.house.loop.create_future()
    worker.returning.append((run, turn))
    return turn


def repay(worker: WorkerAgent) -> None:
    """Give the slots that have fallen free on `worker` to the runs that lent theirs, in the order of their claims."""
    while worker.returning and worker.has_room():
        run, _ = worker.returning[0]
        if run.lacks_slot:
            run.house.take(run)
        for claim in [claim for claim in worker.returning if claim[0] is run]:  # one slot answers them all
            worker.returning.remove(claim)
            if not claim[1].done():
                claim[1].set_result(None)
