"""Whether a block leaves asyncio tasks or threads behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from forebay import clock
from forebay.testing.promises import BrokenPromise

_TURNS = 20  # of the loop, in which what was let go may end


@asynccontextmanager
async def no_leaks(grace: float = 1.0) -> AsyncIterator[None]:
    """An async context that fails if its block leaves asyncio tasks or threads that were not there before.

    Args:
        grace: real seconds that threads which were told to end are waited for.

    Raises:
        BrokenPromise: what is left, by name and place.
    """
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    yield
    for _ in range(_TURNS):
        if not asyncio.all_tasks() - tasks:
            break
        await asyncio.sleep(0)
    left = [_described(task) for task in asyncio.all_tasks() - tasks]
    until = clock.monotonic() + grace
    for thread in set(threading.enumerate()) - threads:
        thread.join(max(0.0, until - clock.monotonic()))
        if thread.is_alive():
            left.append(f"thread {thread.name!r}")
    if left:
        listing = "".join(f"\n  {line}" for line in sorted(left))
        raise BrokenPromise(promise="Nothing is left behind", listing=listing, wrong=tuple(left))


def _described(task: asyncio.Task[Any]) -> str:
    stack = task.get_stack(limit=1)
    where = f" at {stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else ""
    return f"asyncio task {task.get_name()!r}, {getattr(task.get_coro(), '__qualname__', task.get_coro())}{where}"
