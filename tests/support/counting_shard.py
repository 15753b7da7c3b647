"""A shard in memory that counts the operations on it, and fails at one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from forebay.errors import StoreUnavailable
from forebay.state import MemoryShard
from forebay.state.entry import StoredEntry
from forebay.state.shard import ANY_VERSION, OperationRejected, Page

_is_inside: ContextVar[bool] = ContextVar("is_inside", default=False)  # what is done before an operation


class CountingShard(MemoryShard):
    """A shard whose entries outlive its connection, as those of a server do."""

    def __init__(self, url: str = "memory://") -> None:
        super().__init__(url)
        self.reads = 0
        self.entries_read = 0
        self.writes = 0
        self.fail_at: int | None = None  # the write that fails, and so do all after it
        self._turn = asyncio.Lock()  # held by what is done before an operation: the other ones wait for it
        self._meanwhile: tuple[int, Callable[[], Awaitable[object]]] | None = None

    async def close(self) -> None:
        """Keep the entries."""

    @contextmanager
    def killed_at(self, write: int) -> Iterator[None]:
        """Fail from the write of this number on, as if the process had been killed before it."""
        self.writes, self.fail_at = 0, write
        try:
            yield
        finally:
            self.fail_at = None

    def before_operation(self, number: int, do: Callable[[], Awaitable[object]]) -> None:
        """Do something before the operation of this number, counted from here; the operations of that do not count."""
        self.count_from_here()
        self._meanwhile = number, do

    @property
    def has_more(self) -> bool:
        """True while what is to be done before an operation has not been done."""
        return self._meanwhile is not None

    def count_from_here(self) -> None:
        """Count from 0 again, with nothing to do before an operation."""
        self._meanwhile = None
        self.reads = self.entries_read = self.writes = 0

    async def get(self, namespace: str, key: bytes, **options: Any) -> StoredEntry | None:
        await self._count_read()
        self.entries_read += 1
        return await super().get(namespace, key, **options)

    async def scan(
        self, namespace: str, prefix: bytes, after: bytes | None = None, limit: int = 100, *, reverse: bool = False
    ) -> Page:
        await self._count_read()
        page = await super().scan(namespace, prefix, after, limit, reverse=reverse)
        self.entries_read += len(page.entries)
        return page

    async def put(
        self,
        namespace: str,
        key: bytes,
        data: bytes,
        ttl: float | None = None,
        if_version: int = ANY_VERSION,
        **options: Any,
    ) -> int:
        await self._count_write()
        return await super().put(namespace, key, data, ttl, if_version, **options)

    async def delete(self, namespace: str, key: bytes, if_version: int = ANY_VERSION, **options: Any) -> bool:
        await self._count_write()
        return await super().delete(namespace, key, if_version, **options)

    async def _count_read(self) -> None:
        self.reads += 1
        await self._do_meanwhile()

    async def _count_write(self) -> None:
        self.writes += 1
        await self._do_meanwhile()
        if self.fail_at is not None and self.writes >= self.fail_at:
            raise OperationRejected(StoreUnavailable(where=self.url, why="killed", advice=""))

    async def _do_meanwhile(self) -> None:
        await asyncio.sleep(0)  # others run meanwhile, as they do while a server answers
        if _is_inside.get():
            return
        if self._meanwhile is not None and self.reads + self.writes >= self._meanwhile[0]:
            _, do = self._meanwhile
            self._meanwhile = None
            _is_inside.set(True)
            async with self._turn:
                await do()
            _is_inside.set(False)
        async with self._turn:
            pass
