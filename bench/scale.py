"""What a task costs at many workers and tasks, beside few: it should not depend on how large the house is."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time

from forebay import BackpressureSupervisor, Task, Ticket

SMALL = (10, 10_000)
LARGE = (10_000, 100_000)
ROUNDS = 3


async def house(workers: int, tasks: int) -> float:
    """Seconds a task; fed as room appears."""

    async def work(_: Task) -> None:
        await asyncio.sleep(0)

    async with BackpressureSupervisor(lag_bound=None) as supervisor:
        for n in range(workers):
            supervisor.register_worker(f"w{n}", handler=work, task_types=["work"])
        under_way: list[Ticket] = []
        submitted = 0
        began = time.perf_counter()
        while submitted < tasks:
            ticket = supervisor.submit_nowait(Task("work"))
            if ticket:
                submitted += 1
                under_way.append(ticket)
            else:
                for ended in under_way[: len(under_way) // 2 + 1]:
                    await ended
                del under_way[: len(under_way) // 2 + 1]
        for ticket in under_way:
            await ticket
        return (time.perf_counter() - began) / tasks


def run() -> dict[str, float]:
    """Interleaved rounds; medians in microseconds a task, and their ratio (less is better)."""
    small: list[float] = []
    large: list[float] = []
    for _ in range(ROUNDS):
        for sample, size in ((small, SMALL), (large, LARGE)):
            gc.collect()
            sample.append(1e6 * asyncio.run(house(*size)))
    few, many = statistics.median(small), statistics.median(large)
    return {"workers_10_us": few, "workers_10000_us": many, "ratio": many / few}
