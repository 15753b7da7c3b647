"""What a waiting task holds in memory, without its payload, beside a bare asyncio task that waits."""

from __future__ import annotations

import asyncio
import gc
import tracemalloc

from forebay import BackpressureSupervisor, Task

TASKS = 20_000


async def supervised() -> float:
    """Bytes for each task that waits in the line."""
    never = asyncio.Event()

    async def hold(_: Task) -> None:
        await never.wait()

    async with BackpressureSupervisor(max_queue_size=2 * TASKS, backpressure_threshold=1.0) as supervisor:
        supervisor.register_worker("w", handler=hold, task_types=["work"])
        await supervisor.submit(Task("work"))
        before = _now()
        tickets = [supervisor.submit_nowait(Task("work")) for _ in range(TASKS)]
        held = _now() - before - 8 * TASKS  # less the list that holds them here
        never.set()
        await asyncio.gather(*tickets)
    return held / TASKS


async def by_hand() -> float:
    """Bytes for each asyncio task that waits for a semaphore."""
    semaphore = asyncio.Semaphore(0)

    async def one() -> None:
        async with semaphore, asyncio.timeout(300):
            await asyncio.sleep(0)

    before = _now()
    tasks = [asyncio.create_task(one()) for _ in range(TASKS)]
    await asyncio.sleep(0)
    held = _now() - before - 8 * TASKS
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return held / TASKS


def _now() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def run() -> dict[str, float]:
    """Bytes a waiting task, and the ratio (less is better)."""
    tracemalloc.start()
    ours, hand = asyncio.run(supervised()), asyncio.run(by_hand())
    tracemalloc.stop()
    return {"supervised_bytes": ours, "by_hand_bytes": hand, "ratio": ours / hand}
