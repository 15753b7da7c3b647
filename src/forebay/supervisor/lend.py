"""Nested work lends its slot: a run that awaits a task of the same house does not hold the slot that the task needs."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import TYPE_CHECKING

from forebay.context import RunningTask
from forebay.supervisor.run import Run

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher


def held_slots(running: RunningTask | None, house: Dispatcher) -> Iterator[Run]:
    """The runs of `house` on the way up from `running` to the outermost submitter."""
    while running is not None:
        if isinstance(running, Run):
            if running.house is house:
                yield running
            running = running.ticket.parent
        else:
            running = None


class Loan:
    """The slots that one await has lent, until it takes them back.

    A run may wait for several tasks at once (a gather): its slot is lent while any of these waits is under way.
    """

    __slots__ = ("_house", "_runs")

    def __init__(self, house: Dispatcher, runs: tuple[Run, ...]) -> None:
        self._house = house
        self._runs = runs
        for run in runs:
            run.waits += 1
            if run.waits == 1 and run.holds:
                house.give(run)

    async def take_back(self) -> None:
        """Wait, at the head of the worker's line, until each run has a slot again.

        A run that is being cancelled does not wait: it ends without a slot.
        """
        for run in self._runs:
            run.waits -= 1
        for run in self._runs:
            if run.lacks_slot:
                await self._regain(run)

    async def _regain(self, run: Run) -> None:
        worker = run.worker
        if worker.has_room() and not worker.returning:
            self._house.take(run)
            return
        if run.abandoned_at is not None:
            return
        turn: asyncio.Future[None] = self._house.loop.create_future()
        entry = (run, turn)
        worker.returning.append(entry)
        try:
            await turn
        finally:
            if not turn.done() or turn.cancelled():
                worker.returning.remove(entry)
