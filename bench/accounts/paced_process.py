"""A process that does one thing again and again for a while, beside others that do it at the same time."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Awaitable, Callable

WARM_UP = 50  # calls


async def count_calls(seconds: float, callers: int, call: Callable[[], Awaitable[object]]) -> None:
    """Make calls, `callers` at once, for some seconds; print how many there were, and the seconds of processor."""
    for _ in range(WARM_UP):
        await call()
    wait_for_start()
    count, cpu, end = 0, time.process_time(), time.perf_counter() + seconds

    async def run() -> None:
        nonlocal count
        while time.perf_counter() < end:
            await call()
            count += time.perf_counter() < end

    await asyncio.gather(*(run() for _ in range(callers)))
    print(count, time.process_time() - cpu, flush=True)


def count_blocking_calls(seconds: float, call: Callable[[], object]) -> None:
    """Make calls, one after the other. See `count_calls`."""
    for _ in range(WARM_UP):
        call()
    wait_for_start()
    count, cpu, end = 0, time.process_time(), time.perf_counter() + seconds
    while time.perf_counter() < end:
        call()
        count += 1
    print(count, time.process_time() - cpu, flush=True)


def wait_for_start() -> None:
    """Say that this process is ready, and wait for a line on standard input."""
    print("ready", flush=True)
    sys.stdin.readline()
