"""Tasks without a supervisor: Semaphore, asyncio.timeout, create_task and gather."""

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


async def waiting_tasks(tasks: int) -> list[asyncio.Task[None]]:
    """Return asyncio tasks that all wait for a semaphore."""
    semaphore = asyncio.Semaphore(0)

    async def one() -> None:
        async with semaphore, asyncio.timeout(300):
            await asyncio.sleep(0)

    waiting = [asyncio.create_task(one()) for _ in range(tasks)]
    await asyncio.sleep(0)
    return waiting
