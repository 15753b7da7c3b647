"""Time per task with 10,000 workers, compared with 10 workers: it should not depend on their number.

Beside it are as many coroutines that take tasks from a queue: what the number of workers costs by hand.
"""

from __future__ import annotations

import asyncio
import gc
import statistics
import time

from bench.baselines.by_hand import run_workers
from forebay import BackpressureSupervisor, Task, Ticket

SMALL = (10, 10_000)  # workers and tasks
LARGE = (10_000, 100_000)
ROUNDS = 3


async def work(_: object) -> None:
    """Yield to the event loop once."""
    await asyncio.sleep(0)


async def by_hand(workers: int, tasks: int) -> float:
    """Return the seconds per task without a supervisor."""
    started = time.perf_counter()
    await run_workers(work, tasks=tasks, workers=workers)
    return (time.perf_counter() - started) / tasks


async def supervised(workers: int, tasks: int) -> float:
    """Return the seconds per task, with a submitter that waits whenever tasks are rejected."""
    async with BackpressureSupervisor(lag_bound=None) as supervisor:
        for number in range(workers):
            supervisor.register_worker(f"w{number}", handler=work, task_types=["work"])
        under_way: list[Ticket] = []
        submitted = 0
        started = time.perf_counter()
        while submitted < tasks:
            ticket = supervisor.submit_nowait(Task("work"))
            if ticket:
                submitted += 1
                under_way.append(ticket)
            else:
                for oldest in under_way[: len(under_way) // 2 + 1]:
                    await oldest
                del under_way[: len(under_way) // 2 + 1]
        for ticket in under_way:
            await ticket
        return (time.perf_counter() - started) / tasks


def run() -> dict[str, float]:
    """Return medians of interleaved rounds: microseconds a task, and large over small (less is better)."""
    samples: dict[str, list[float]] = {}
    for _ in range(ROUNDS):
        for name, way in (("workers", supervised), ("by_hand", by_hand)):
            for workers, tasks in (SMALL, LARGE):
                gc.collect()
                seconds = asyncio.run(way(workers, tasks))
                samples.setdefault(f"{name}_{workers}_us", []).append(1e6 * seconds)
    results = {name: statistics.median(sample) for name, sample in samples.items()}
    results["ratio"] = results["workers_10000_us"] / results["workers_10_us"]
    results["by_hand_ratio"] = results["by_hand_10000_us"] / results["by_hand_10_us"]
    return results
