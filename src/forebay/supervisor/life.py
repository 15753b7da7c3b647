"""The beginning and the end of a house."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay.supervisor.drain import Drain
from forebay.supervisor.nested import start_held, stop_held
from forebay.supervisor.refill import Overflow

if TYPE_CHECKING:
    from forebay.supervisor.dispatch import Dispatcher
    from forebay.supervisor.settings import Settings
    from forebay.supervisor.worker import WorkerAgent
    from forebay.typing import Ledger


async def start_up(
    house: Dispatcher, workers: Mapping[str, WorkerAgent], ledger: Ledger | None, settings: Settings
) -> None:
    """Open the overflow, start what the workers hold, let the workers in. Failing, it leaves nothing open."""
    try:
        if ledger is not None:
            house.overflow = Overflow(house, ledger, settings)
            await house.overflow.open()
        await start_held(workers.values())
    except BaseException:
        house.timers.close()
        if house.overflow is not None:
            await house.overflow.close()
        raise
    for worker in workers.values():
        house.add(worker)


def let_in(house: Dispatcher, worker: WorkerAgent) -> None:
    """Let a worker in that comes when the house is open: what it holds is started meanwhile."""
    if worker.handler.start is not None:
        house.background(worker.handler.start())
    house.add(worker)


async def shut_down(house: Dispatcher, workers: Mapping[str, WorkerAgent], *, grace: float) -> None:
    """End everything, in the order in which nothing is lost. Cut short itself, it still ends every ticket."""
    drain = Drain(house, grace=grace)
    try:
        if house.overflow is not None:
            house.overflow.stop_pulling()
        await drain.run(0.0)
        await stop_held(workers.values())
        if house.overflow is not None:
            await house.overflow.close()
    finally:
        drain.cut()
        if house.overflow is not None:
            house.overflow.let_tickets_go()
        house.start_gate.close()
        house.crew.close()
        house.timers.close()
        house.stirred()
