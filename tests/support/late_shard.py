"""A shard to which each operation takes its time, there and back, and whose operations cannot be called off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from forebay.clock import draw
from forebay.state import Shard


class LateShard:
    """A shard behind a slow network: an operation is done although its caller has been cancelled.

    Args:
        shard: does the operations.
        delay: seconds that a message takes at most.
    """

    def __init__(self, shard: Shard, delay: float) -> None:
        self.url = shard.url
        self._shard = shard
        self._delay = delay

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._shard, name)

        async def send(*args: Any, **kwargs: Any) -> Any:
            async def arrive() -> Any:
                await asyncio.sleep(draw() * self._delay)
                return await method(*args, **kwargs)

            operation = asyncio.ensure_future(arrive())
            operation.add_done_callback(_retrieve)
            result = await asyncio.shield(operation)
            await asyncio.sleep(draw() * self._delay)
            return result

        return send if name not in {"open", "close"} else method


def _retrieve(operation: asyncio.Future[Any]) -> None:
    """Take the error of an operation whose caller may have gone."""
    if not operation.cancelled():
        operation.exception()
