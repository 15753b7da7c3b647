"""The beginning and the end of a house."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay.supervisor.drain import Drain
from forebay.supervisor.nested_supervisor import start_handlers, stop_handlers
from forebay.supervisor.spill.spill import Spill

if TYPE_CHECKING:
    from forebay.interfaces import TaskStore
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.settings import SupervisorSettings
    from forebay.supervisor.worker import WorkerAgent


async def start_up(
    dispatcher: Dispatcher, workers: Mapping[str, WorkerAgent], ledger: TaskStore | None, settings: SupervisorSettings
) -> None:
    """Open the overflow, start what the workers hold, let the workers in. Failing, it leaves nothing open."""
    try:
        if ledger is not None:
            dispatcher.spill = Spill(dispatcher, ledger, settings)
            await dispatcher.spill.open()
        await start_handlers(workers.values())
    except BaseException:
        dispatcher.timers.close()
        if dispatcher.spill is not None:
            await dispatcher.spill.close()
        raise
    for worker in workers.values():
        dispatcher.add_worker(worker)


def add_running_worker(dispatcher: Dispatcher, worker: WorkerAgent) -> None:
    """Let a worker in that comes when the house is open: what it holds is started meanwhile."""
    if worker.handler.start is not None:
        dispatcher.run_in_background(worker.handler.start())
    dispatcher.add_worker(worker)


async def shut_down(dispatcher: Dispatcher, workers: Mapping[str, WorkerAgent], *, grace: float) -> None:
    """End everything, in the order in which nothing is lost. Cut short itself, it still ends every ticket."""
    drain = Drain(dispatcher, grace=grace)
    try:
        if dispatcher.spill is not None:
            dispatcher.spill.stop_refilling()
        await drain.run(0.0)
        await stop_handlers(workers.values())
        if dispatcher.spill is not None:
            await dispatcher.spill.close()
    finally:
        drain.cancel_all()
        if dispatcher.spill is not None:
            dispatcher.spill.end_tickets()
        dispatcher.start_gate.close()
        dispatcher.runner_pool.close()
        dispatcher.timers.close()
        dispatcher.notify_progress()
