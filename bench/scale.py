"""Time per task with 10,000 workers, compared with 10 workers: it should not depend on their number."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time

from forebay import BackpressureSupervisor, Task, Ticket

SMALL = (10, 10_000)  # workers and tasks
LARGE = (10_000, 100_000)
ROUNDS = 3


async def seconds_per_task(workers: int, tasks: int) -> float:
    """Return the seconds per task, with a submitter that waits whenever tasks are rejected."""

    async def work(_: Task) -> None:
        await asyncio.sleep(0)

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
    small: list[float] = []
    large: list[float] = []
    for _ in range(ROUNDS):
        for sample, size in ((small, SMALL), (large, LARGE)):
            gc.collect()
            sample.append(1e6 * asyncio.run(seconds_per_task(*size)))
    few, many = statistics.median(small), statistics.median(large)
    return {"workers_10_us": few, "workers_10000_us": many, "ratio": many / few}
