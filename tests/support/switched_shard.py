"""A shard in memory that can be switched off, as a server is down."""

from __future__ import annotations

import asyncio
from typing import Any

from forebay.errors import StoreUnavailable
from forebay.state import MemoryShard


class SwitchedShard(MemoryShard):
    """A shard that can be switched off. A call that it has while it is switched off fails after a second."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.is_off = False
        self.opened = 0

    async def open(self) -> None:
        self.opened += 1

    async def get(self, *args: Any, **options: Any) -> Any:
        await self.ping()
        return await super().get(*args, **options)

    async def ping(self) -> None:
        if self.is_off:
            await asyncio.sleep(1.0)
            raise StoreUnavailable(where=self.url, why="it is switched off", advice="Switch it on.")
