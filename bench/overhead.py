"""What a supervised task costs beside a task by hand: Semaphore, asyncio.timeout, create_task and gather."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from forebay import BackpressureSupervisor, Task

TASKS = 20_000
ROUNDS = 7
SLOTS = 10


async def noop(_: object) -> None:
    """Do nothing."""


async def yielding(_: object) -> None:
    """Give the loop one turn."""
    await asyncio.sleep(0)


async def by_hand(work: Callable[[Any], Awaitable[None]]) -> float:
    """Seconds for all tasks, as one writes it without a supervisor."""
    semaphore = asyncio.Semaphore(SLOTS)

    async def one(payload: int) -> None:
        async with semaphore, asyncio.timeout(300):
            await work(payload)

    began = time.perf_counter()
    await asyncio.gather(*[asyncio.create_task(one(n)) for n in range(TASKS)])
    return time.perf_counter() - began


async def supervised(work: Callable[[Any], Awaitable[None]]) -> float:
    """Seconds for all tasks, made, submitted and awaited."""
    async with BackpressureSupervisor(max_queue_size=2 * TASKS, backpressure_threshold=1.0) as supervisor:
        for n in range(SLOTS):
            supervisor.register_worker(f"w{n}", handler=work, task_types=["work"])
        began = time.perf_counter()
        for ticket in [supervisor.submit_nowait(Task("work", n)) for n in range(TASKS)]:
            await ticket
        return time.perf_counter() - began


def run() -> dict[str, float]:
    """Interleaved rounds; medians in microseconds a task, and their ratio (more is better)."""
    figures: dict[str, float] = {}
    for work in (noop, yielding):
        hand: list[float] = []
        ours: list[float] = []
        for _ in range(ROUNDS):
            for sample, way in ((hand, by_hand), (ours, supervised)):
                gc.collect()
                sample.append(1e6 * asyncio.run(way(work)) / TASKS)
        figures[f"{work.__name__}_by_hand_us"] = statistics.median(hand)
        figures[f"{work.__name__}_supervised_us"] = statistics.median(ours)
        figures[f"{work.__name__}_ratio"] = statistics.median(h / o for h, o in zip(hand, ours, strict=True))
    return figures
