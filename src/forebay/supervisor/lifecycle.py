"""The start and the end of a supervisor."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay.errors import StoreUnavailable
from forebay.events import log
from forebay.supervisor.drain import Drain
from forebay.supervisor.nested_supervisor import start_handlers, stop_handlers
from forebay.supervisor.settings import MAX_STORE_SILENCE

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.spill.spill import Spill
    from forebay.supervisor.worker import WorkerAgent

_OTHER_LOOP_CHECK = 0.05  # seconds between two looks at a supervisor that starts or closes in another event loop


async def start_up(dispatcher: Dispatcher, workers: Mapping[str, WorkerAgent]) -> None:
    """Open the overflow, start the handlers, and add the workers. If that fails, nothing stays open."""
    try:
        await asyncio.sleep(0)  # an eager task factory starts this before the supervisor knows that it is starting
        if dispatcher.spill is not None:
            await dispatcher.spill.open()
        if dispatcher.sagas is not None:
            await dispatcher.sagas.open()
        await start_handlers(workers, dispatcher.core.base_context, dispatcher.supervision.exited)
    except BaseException:
        dispatcher.core.timers.close()
        if dispatcher.sagas is not None:
            await dispatcher.sagas.close()
        if dispatcher.spill is not None:
            await _close_spill(dispatcher.spill)
        raise
    for worker in workers.values():
        dispatcher.add_worker(worker)
    dispatcher.supervision.begin()
    if dispatcher.sagas is not None:
        dispatcher.sagas.begin()


def add_running_worker(dispatcher: Dispatcher, worker: WorkerAgent) -> None:
    """Add a worker to a supervisor that runs. If its handler has to be started first, tasks wait for that."""
    dispatcher.add_worker(worker)
    dispatcher.starts.begin(worker)
    dispatcher.core.registry.notify_progress()  # there may be room
    if worker.handler.saga is not None and dispatcher.sagas is not None:
        dispatcher.sagas.scan_soon()  # sagas of this name may be in the log


async def shut_down(dispatcher: Dispatcher, workers: Mapping[str, WorkerAgent], *, grace: float) -> None:
    """End everything, in an order that loses nothing. If this is cancelled, it still ends every ticket."""
    drain = Drain(dispatcher.core, dispatcher, grace=grace)
    spill = dispatcher.spill
    try:
        if spill is not None:
            spill.stored.stop_refilling()
        dispatcher.starts.close()
        dispatcher.supervision.close()
        await drain.run(0.0, closing=True)
        await stop_handlers(workers.values(), grace=grace)
        if dispatcher.sagas is not None:
            await dispatcher.sagas.close()
        if spill is not None:
            await _close_spill(spill)
    finally:
        drain.cancel_all()
        if spill is not None:
            spill.end_tickets()
        dispatcher.completion.close()
        dispatcher.slot_claims.close()
        dispatcher.start_gate.close()
        dispatcher.runner_pool.close()
        dispatcher.core.close()
        dispatcher.core.registry.notify_progress()


async def wait_until_done(step: asyncio.Future[None]) -> None:
    """Wait for the start or the close of a supervisor, perhaps in another event loop, or in one that has ended."""
    loop = step.get_loop()
    if loop is asyncio.get_running_loop():
        await asyncio.wait((step,))
        return
    while not (step.done() or loop.is_closed()):  # noqa: ASYNC110 - that loop may end without a word to this one
        await asyncio.sleep(_OTHER_LOOP_CHECK)


async def _close_spill(spill: Spill) -> None:
    closing = asyncio.ensure_future(spill.close())
    try:
        await asyncio.wait((closing,), timeout=MAX_STORE_SILENCE)
    finally:
        if not closing.done():  # a store that stands still may not even notice that it is cancelled
            closing.cancel()
    if not closing.done():
        log.error("the overflow did not close within %.0f s; tasks leased here run elsewhere later", MAX_STORE_SILENCE)
        return
    try:
        closing.result()
    except StoreUnavailable as error:  # nothing can be done about it here, and whoever closes has other things to do
        log.error("leases could not be returned to the overflow; tasks leased here run elsewhere later: %s", error)
