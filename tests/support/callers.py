"""Callers that go on while servers fail: a test waits for what they get done, and fails with the error of any."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import Any, Final

WAIT: Final = 60.0  # seconds within which callers must have got done what a test waits for, on a busy machine


@asynccontextmanager
async def running(*callers: Coroutine[Any, Any, object]) -> AsyncIterator[None]:
    """Run callers until the block ends. If one of them fails, the block is cancelled and fails with its error."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(caller) for caller in callers]
        yield
        for task in tasks:
            task.cancel()


class Accepted:
    """The ids of what was accepted from one or more callers.

    Attributes:
        ids: those that were accepted, in order.
        last_error: why one was rejected most recently, None before that.
    """

    def __init__(self) -> None:
        self.ids: list[str] = []
        self.last_error: Exception | None = None
        self._changed = asyncio.Event()

    def add(self, task_id: str) -> None:
        """Add an id that was accepted."""
        self.ids.append(task_id)
        self._changed.set()

    def reject(self, error: Exception) -> None:
        """Keep the reason why one was rejected."""
        self.last_error = error

    async def more(self, count: int, *, within: float = WAIT) -> None:
        """Return when so many more have been accepted."""
        before = len(self.ids)
        try:
            async with asyncio.timeout(within):
                while len(self.ids) < before + count:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            accepted = len(self.ids) - before
            message = f"{accepted} of {count} were accepted within {within:.0f} s; the last error: {self.last_error!r}"
            raise AssertionError(message) from self.last_error
