"""A shard in memory: entries live as long as the state that opened it, in this process only."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from math import inf
from typing import NamedTuple

from forebay.clock import now, wall_time
from forebay.errors import StoreUnavailable
from forebay.state.entry import StoredEntry
from forebay.state.shard import (
    ANY_VERSION,
    TOMBSTONE_TTL,
    Copied,
    NamePage,
    OperationRejected,
    Page,
    WriteRefused,
)
from forebay.state.version import next_version

_MAX_BYTES = 1 << 30  # of keys and values
_OVERHEAD = 200  # bytes that an entry takes besides its key and value
_SWEPT = 10  # expired entries that a write drops


class _Kept(NamedTuple):
    entry: StoredEntry
    expires: float  # monotonic


class _Tombstone(NamedTuple):
    version: int
    expires: float  # monotonic


class MemoryShard:
    """A shard in memory.

    Args:
        url: what identifies it.
        max_bytes: of all keys and values; a write beyond it is rejected.
    """

    def __init__(self, url: str = "memory://", *, max_bytes: int = _MAX_BYTES) -> None:
        self.url = url
        self._max_bytes = max_bytes
        self._size = 0
        self._version = 0
        self._entries: dict[str, dict[bytes, _Kept]] = {}
        self._keys: dict[str, list[bytes]] = {}  # sorted, those of expired entries included
        self._expiring: list[tuple[float, str, bytes]] = []  # sorted; of entries that were replaced, too
        self._tombstones: dict[tuple[str, bytes], _Tombstone] = {}

    async def open(self) -> None:
        """Do nothing: it is always open."""

    async def close(self) -> None:
        """Drop all entries."""
        self._entries.clear()
        self._keys.clear()
        self._expiring.clear()
        self._tombstones.clear()
        self._size = 0

    async def get(self, namespace: str, key: bytes, *, cached: bool = False) -> StoredEntry | None:  # noqa: ARG002
        """Return an entry."""
        return self._find(namespace, key)

    def _find(self, namespace: str, key: bytes) -> StoredEntry | None:
        kept = self._entries.get(namespace, {}).get(key)
        if kept is None:
            return None
        if kept.expires <= now():
            self._drop(namespace, key)
            return None
        return kept.entry

    async def put(  # noqa: PLR0913 - what a write is made of
        self,
        namespace: str,
        key: bytes,
        data: bytes,
        ttl: float | None = None,
        if_version: int = ANY_VERSION,
        *,
        floor: int | None = None,
    ) -> int:
        """Write an entry."""
        self._sweep()
        self._check(namespace, key, if_version)
        version = next_version(max(self._version, floor or 0), wall_time())
        self._write(namespace, StoredEntry(key, data, version), ttl)
        if floor is not None and ttl is not None:
            self._leave_tombstone(namespace, key, version - 1, ttl)
        return version

    def _write(self, namespace: str, entry: StoredEntry, ttl: float | None) -> None:
        key, data, version = entry
        found = self._find(namespace, key)
        size = len(key) + len(data) + _OVERHEAD
        freed = 0 if found is None else len(key) + len(found.data) + _OVERHEAD
        if self._size + size - freed > self._max_bytes:
            advice = "Delete entries, or give them a ttl."
            raise OperationRejected(StoreUnavailable(where=self.url, why="its memory is full", advice=advice))
        self._version = max(self._version, version)
        expires = inf if ttl is None else now() + ttl
        self._entries.setdefault(namespace, {})[key] = _Kept(entry, expires)
        if found is None:
            insort(self._keys.setdefault(namespace, []), key)
        if ttl is not None:
            insort(self._expiring, (expires, namespace, key))
        self._size += size - freed

    async def delete(
        self, namespace: str, key: bytes, if_version: int = ANY_VERSION, *, floor: int | None = None
    ) -> bool:
        """Delete an entry."""
        found = self._check(namespace, key, if_version)
        if found is None:
            return False
        self._drop(namespace, key)
        if floor is not None:
            self._leave_tombstone(namespace, key, found.version)
        return True

    async def copy(self, namespace: str, key: bytes) -> Copied:
        """Return an entry with its ttl."""
        entry = self._find(namespace, key)
        latest = next_version(self._version, wall_time())
        if entry is None:
            return Copied(None, None, latest)
        expires = self._entries[namespace][key].expires
        return Copied(entry, None if expires == inf else expires - now(), latest)

    async def restore(self, namespace: str, entry: StoredEntry, ttl: float | None) -> None:
        """Write an entry with its version."""
        self._sweep()
        found = self._find(namespace, entry.key)
        tombstone = self._tombstones.get((namespace, entry.key))
        removed = 0 if tombstone is None or tombstone.expires <= now() else tombstone.version
        if max(0 if found is None else found.version, removed) < entry.version:
            self._write(namespace, entry, ttl)

    async def namespaces(self, after: str | None = None) -> NamePage:
        """Return all names."""
        return NamePage(list(self._entries), after=None) if after is None else NamePage([], after=None)

    def _leave_tombstone(self, namespace: str, key: bytes, version: int, ttl: float = 0.0) -> None:
        if (namespace, key) not in self._tombstones:
            self._size += len(key) + _OVERHEAD
        expires = now() + ttl + TOMBSTONE_TTL
        self._tombstones[namespace, key] = _Tombstone(version, expires)
        insort(self._expiring, (expires, namespace, key))

    def _check(self, namespace: str, key: bytes, if_version: int) -> StoredEntry | None:
        found = self._find(namespace, key)
        version = 0 if found is None else found.version
        if if_version not in {ANY_VERSION, version}:
            raise WriteRefused(version)
        return found

    def _drop(self, namespace: str, key: bytes) -> None:
        kept = self._entries[namespace].pop(key)
        self._size -= len(key) + len(kept.entry.data) + _OVERHEAD
        keys = self._keys[namespace]
        del keys[bisect_left(keys, key)]
        if not keys:
            del self._keys[namespace], self._entries[namespace]

    def _sweep(self) -> None:
        time = now()
        for _ in range(_SWEPT):
            if not self._expiring or self._expiring[0][0] > time:
                return
            _, namespace, key = self._expiring.pop(0)
            self._find(namespace, key)
            tombstone = self._tombstones.get((namespace, key))
            if tombstone is not None and tombstone.expires <= time:
                del self._tombstones[namespace, key]
                self._size -= len(key) + _OVERHEAD

    async def scan(
        self, namespace: str, prefix: bytes, after: bytes | None = None, limit: int = 100, *, reverse: bool = False
    ) -> Page:
        """Return entries by the order of their keys."""
        keys = self._keys.get(namespace, [])
        first, last = bisect_left(keys, prefix), bisect_left(keys, prefix + b"\xff")  # no key in UTF-8 has that byte
        if after is not None and reverse:
            last = min(last, bisect_left(keys, after))
        elif after is not None:
            first = max(first, bisect_right(keys, after))
        chosen = keys[max(first, last - limit) : last][::-1] if reverse else keys[first : min(last, first + limit)]
        found = [self._find(namespace, key) for key in chosen]
        return Page([each for each in found if each is not None], chosen[-1] if last - first > limit else None)

    async def ping(self) -> None:
        """Do nothing: it always answers."""
