"""How many objects the garbage collector walks through for each worker: half the time with ten thousand of them."""

from __future__ import annotations

import asyncio
import gc

from forebay import BackpressureSupervisor, Task

WORKERS = 300
# For each worker, 4 and 13 on Python 3.13; other versions track a dictionary more, or less.
MOST_IDLE, MOST_USED = 6, 16


def tracked() -> int:
    """Return how many objects the garbage collector tracks."""
    gc.collect()
    return len(gc.get_objects())


async def test_a_worker_is_few_objects_for_the_garbage_collector() -> None:
    begun = asyncio.Barrier(WORKERS + 1)

    async def work(_: Task) -> None:
        await begun.wait()

    async with BackpressureSupervisor(lag_bound=None, keep_results=1) as supervisor:
        supervisor.register_worker("first", handler=work, task_types=["work"])
        before = tracked()
        for number in range(1, WORKERS):
            supervisor.register_worker(f"w{number}", handler=work, task_types=["work"])
        idle = tracked() - before

        tickets = [supervisor.submit_nowait(Task("work")) for _ in range(WORKERS)]
        await begun.wait()  # each worker has run one
        for ticket in tickets:
            assert (await ticket).success
        del ticket, tickets
        await asyncio.sleep(0)
        used = tracked() - before

    assert idle <= MOST_IDLE * WORKERS
    assert used <= MOST_USED * WORKERS
