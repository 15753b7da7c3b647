"""Memory per waiting task, without its payload, compared with a bare asyncio task that waits."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

from bench.baselines.by_hand import waiting_tasks
from forebay import BackpressureSupervisor, Task

TASKS = 20_000
_POINTER = 8  # bytes of the list entry that holds a task here


async def supervised() -> float:
    """Return the bytes of each task that waits in the queue."""
    never = asyncio.Event()

    async def hold(_: Task) -> None:
        await never.wait()

    async with BackpressureSupervisor(max_queue_size=2 * TASKS, backpressure_threshold=1.0) as supervisor:
        supervisor.register_worker("w", handler=hold, task_types=["work"])
        await supervisor.submit(Task("work"))
        before = _traced_bytes()
        tickets = [supervisor.submit_nowait(Task("work")) for _ in range(TASKS)]
        held = _traced_bytes() - before - _POINTER * TASKS
        never.set()
        await asyncio.gather(*tickets)
    return held / TASKS


async def by_hand() -> float:
    """Return the bytes of each asyncio task that waits for a semaphore."""
    before = _traced_bytes()
    tasks = await waiting_tasks(TASKS)
    held = _traced_bytes() - before - _POINTER * TASKS
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return held / TASKS


def _traced_bytes() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def run() -> dict[str, float]:
    """Return the bytes of a waiting task, and supervised over by hand (less is better)."""
    tracemalloc.start()
    ours, hand = asyncio.run(supervised()), asyncio.run(by_hand())
    tracemalloc.stop()
    return {"supervised_bytes": ours, "by_hand_bytes": hand, "ratio": ours / hand}
