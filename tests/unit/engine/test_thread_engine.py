"""Coroutines in threads: a task that is run again while its first run has not stopped."""

from __future__ import annotations

import asyncio
import threading

from forebay import BackpressureSupervisor, Task


async def test_the_second_run_of_a_task_ends_as_it_would_alone() -> None:
    loop, began, go_on = asyncio.get_running_loop(), asyncio.Event(), threading.Event()

    async def handle(_: Task) -> str:
        if not began.is_set():
            loop.call_soon_threadsafe(began.set)
            go_on.wait()
        await asyncio.sleep(0.0)
        return "done"

    supervisor = BackpressureSupervisor()
    supervisor.register_worker("w", handler=handle, task_types=["work"], max_concurrent=4, engine="thread")
    async with supervisor:
        task = Task("work")
        ticket = await supervisor.submit(task)
        await began.wait()
        ticket.cancel()
        again = await supervisor.submit(task)
        assert (await again).result == "done"
        go_on.set()
