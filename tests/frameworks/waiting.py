"""Waiting for what no event tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from forebay import BackpressureSupervisor, Task


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds for which there is no event."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - it is what the public API shows
            await asyncio.sleep(0.005)


async def check_cancelled_run_holds_its_slot(
    supervisor: BackpressureSupervisor, entered: asyncio.Event, leave: asyncio.Event
) -> None:
    """Check that a run of the worker "agent" that is cancelled lasts until what it awaits has cleaned up.

    Args:
        supervisor: of the worker.
        entered: set by what the run awaits.
        leave: waited for by its clean-up.
    """
    ticket = await supervisor.submit(Task("ask", "Which river?"))
    await entered.wait()
    ticket.cancel()
    await ticket
    for _ in range(20):
        await asyncio.sleep(0)
    assert supervisor.workers["agent"].current_tasks == 1
    leave.set()
    await until(lambda: supervisor.workers["agent"].current_tasks == 0)
