"""Time per supervised task, compared with tasks by hand: Semaphore, asyncio.timeout, create_task and gather."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from bench.baselines.by_hand import run_tasks
from forebay import BackpressureSupervisor, Task

TASKS = 20_000
ROUNDS = 7
SLOTS = 10


async def noop(_: object) -> None:
    """Do nothing."""


async def yielding(_: object) -> None:
    """Yield to the event loop once."""
    await asyncio.sleep(0)


async def by_hand(work: Callable[[Any], Awaitable[None]]) -> float:
    """Return the seconds for all tasks without a supervisor."""
    started = time.perf_counter()
    await run_tasks(work, tasks=TASKS, slots=SLOTS)
    return time.perf_counter() - started


async def supervised(work: Callable[[Any], Awaitable[None]]) -> float:
    """Return the seconds for all tasks: created, submitted and awaited."""
    async with BackpressureSupervisor(max_queue_size=2 * TASKS, backpressure_threshold=1.0) as supervisor:
        for number in range(SLOTS):
            supervisor.register_worker(f"w{number}", handler=work, task_types=["work"])
        started = time.perf_counter()
        for ticket in [supervisor.submit_nowait(Task("work", number)) for number in range(TASKS)]:
            await ticket
        return time.perf_counter() - started


def run() -> dict[str, float]:
    """Return medians of interleaved rounds: microseconds a task, and by hand over supervised (more is better)."""
    results: dict[str, float] = {}
    for work in (noop, yielding):
        hand: list[float] = []
        ours: list[float] = []
        for _ in range(ROUNDS):
            for sample, way in ((hand, by_hand), (ours, supervised)):
                gc.collect()
                sample.append(1e6 * asyncio.run(way(work)) / TASKS)
        results[f"{work.__name__}_by_hand_us"] = statistics.median(hand)
        results[f"{work.__name__}_supervised_us"] = statistics.median(ours)
        results[f"{work.__name__}_ratio"] = statistics.median(h / o for h, o in zip(hand, ours, strict=True))
    return results
