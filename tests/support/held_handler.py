"""A handler whose runs a test holds until it lets them end."""

from __future__ import annotations

import asyncio
from typing import Any

from forebay import Task


class HeldHandler:
    """A handler that works until it is told to end.

    Attributes:
        started: the payloads of its runs.
    """

    def __init__(self) -> None:
        self.started: list[Any] = []
        self.at_work = asyncio.Event()
        self.may_end = asyncio.Event()

    async def __call__(self, task: Task) -> Any:
        self.started.append(task.payload)
        self.at_work.set()
        await self.may_end.wait()
        return f"result of {task.payload}"
