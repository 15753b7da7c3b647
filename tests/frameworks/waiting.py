"""Waiting for what no event tells."""

from __future__ import annotations

import asyncio
from collections.abc import Callable


async def until(holds: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until something holds for which there is no event."""
    async with asyncio.timeout(seconds):
        while not holds():  # noqa: ASYNC110 - it is what the public API shows
            await asyncio.sleep(0.005)
