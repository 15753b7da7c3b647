"""A shard in memory that counts the operations on it, and fails at one of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from forebay.errors import StoreUnavailable
from forebay.state import MemoryShard
from forebay.state.entry import StoredEntry
from forebay.state.shard import ANY_VERSION, OperationRejected, Page


class CountingShard(MemoryShard):
    """A shard whose entries outlive its connection, as those of a server do."""

    def __init__(self, url: str = "memory://") -> None:
        super().__init__(url)
        self.reads = 0
        self.entries_read = 0
        self.writes = 0
        self.fail_at: int | None = None  # the write that fails, and so do all after it

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

    def count_from_here(self) -> None:
        self.reads = self.entries_read = self.writes = 0

    async def get(self, namespace: str, key: bytes) -> StoredEntry | None:
        self.reads += 1
        self.entries_read += 1
        return await super().get(namespace, key)

    async def scan(
        self, namespace: str, prefix: bytes, after: bytes | None = None, limit: int = 100, *, reverse: bool = False
    ) -> Page:
        self.reads += 1
        page = await super().scan(namespace, prefix, after, limit, reverse=reverse)
        self.entries_read += len(page.entries)
        return page

    async def put(
        self, namespace: str, key: bytes, data: bytes, ttl: float | None = None, if_version: int = ANY_VERSION
    ) -> int:
        self._count_write()
        return await super().put(namespace, key, data, ttl, if_version)

    async def delete(self, namespace: str, key: bytes, if_version: int = ANY_VERSION) -> bool:
        self._count_write()
        return await super().delete(namespace, key, if_version)

    def _count_write(self) -> None:
        self.writes += 1
        if self.fail_at is not None and self.writes >= self.fail_at:
            raise OperationRejected(StoreUnavailable(where=self.url, why="killed", advice=""))
