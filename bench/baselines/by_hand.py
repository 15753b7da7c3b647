"""Tasks without a supervisor: Semaphore, asyncio.timeout, create_task and gather; or coroutines over a queue."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any


async def run_tasks(work: Callable[[Any], Awaitable[None]], *, tasks: int, slots: int) -> None:
    """Run `work` once for each number below `tasks`, at most `slots` at a time."""
    semaphore = asyncio.Semaphore(slots)

    async def one(payload: int) -> None:
        async with semaphore, asyncio.timeout(300):
            await work(payload)

    await asyncio.gather(*[asyncio.create_task(one(number)) for number in range(tasks)])


async def run_workers(work: Callable[[Any], Awaitable[None]], *, tasks: int, workers: int) -> None:
    """Run `work` once for each number below `tasks`, on coroutines that take them from a queue.

    At most twice as many tasks as workers, and a hundred, are under way; then the submitter awaits the older half.
    """
    queue: asyncio.Queue[tuple[asyncio.Future[None], int]] = asyncio.Queue()

    async def worker() -> None:
        while True:
            ended, payload = await queue.get()
            async with asyncio.timeout(300):
                await work(payload)
            ended.set_result(None)

    fleet = [asyncio.create_task(worker()) for _ in range(workers)]
    under_way: list[asyncio.Future[None]] = []
    for payload in range(tasks):
        if len(under_way) >= 2 * workers + 100:
            older = len(under_way) // 2
            for ended in under_way[:older]:
                await ended
            del under_way[:older]
        under_way.append(asyncio.get_running_loop().create_future())
        queue.put_nowait((under_way[-1], payload))
    for ended in under_way:
        await ended
    for each in fleet:
        each.cancel()


async def waiting_tasks(tasks: int) -> list[asyncio.Task[None]]:
    """Return asyncio tasks that all wait for a semaphore."""
    semaphore = asyncio.Semaphore(0)

    async def one() -> None:
        async with semaphore, asyncio.timeout(300):
            await asyncio.sleep(0)

    waiting = [asyncio.create_task(one()) for _ in range(tasks)]
    await asyncio.sleep(0)
    return waiting
