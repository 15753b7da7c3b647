"""A check that a block leaves no asyncio tasks and no threads behind."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from forebay import clock
from forebay._threads import idle_threads
from forebay.errors import ForebayError

_ITERATIONS = 20  # of the event loop, in which cancelled tasks may end


class LeakFound(ForebayError, AssertionError):
    """The block left these running:{listing}"""  # noqa: D415 - the listing ends it

    leaks: tuple[str, ...]


@asynccontextmanager
async def no_leaks(grace: float = 1.0) -> AsyncIterator[None]:
    """Fail if the block leaves asyncio tasks or threads that did not run before it.

    Threads of Forebay that wait for their next job do not count: they end after 30 seconds.

    Args:
        grace: real seconds to wait for threads that are ending.

    Raises:
        LeakFound: tasks or threads are left; `leaks` describes each of them.
    """
    tasks, threads = asyncio.all_tasks(), set(threading.enumerate())
    yield
    for _ in range(_ITERATIONS):
        if not asyncio.all_tasks() - tasks:
            break
        await asyncio.sleep(0)
    leaks = [_describe(task) for task in asyncio.all_tasks() - tasks]
    until = clock.monotonic() + grace
    for thread in set(threading.enumerate()) - threads:
        if thread not in idle_threads:
            thread.join(max(0.0, until - clock.monotonic()))
        if thread.is_alive() and thread not in idle_threads:
            leaks.append(f"thread {thread.name!r}")
    if leaks:
        listing = "".join(f"\n  {line}" for line in sorted(leaks))
        raise LeakFound(listing=listing, leaks=tuple(leaks))


def _describe(task: asyncio.Task[Any]) -> str:
    stack = task.get_stack(limit=1)
    where = f" at {stack[-1].f_code.co_filename}:{stack[-1].f_lineno}" if stack else ""
    return f"asyncio task {task.get_name()!r}, {getattr(task.get_coro(), '__qualname__', task.get_coro())}{where}"
