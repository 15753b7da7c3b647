"""A near cache: entries that were read, kept in the process until the server says that they have changed."""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Iterable
from math import inf
from typing import NamedTuple, TypeAlias

from forebay.clock import now, running_loop
from forebay.state.entry import StoredEntry

_MAX_BYTES = 64 << 20  # of names and data
_OVERHEAD = 300  # bytes that an entry takes besides its name and data

Address: TypeAlias = tuple[str, int]


class NearCacheStatistics(NamedTuple):
    """The use of a near cache.

    Attributes:
        entries: that it has.
        bytes: that they take, about.
        hits: reads that it has answered.
        misses: reads that a server has answered.
    """

    entries: int
    bytes: int
    hits: int
    misses: int


class _Kept(NamedTuple):
    entry: StoredEntry
    expires: float  # monotonic


class NearCache:
    """The entries that a process keeps of all Redis servers of a state: those that were used last.

    Args:
        max_entries: entries that it has at most.
        max_bytes: bytes that they take at most.
    """

    def __init__(self, max_entries: int, max_bytes: int = _MAX_BYTES) -> None:
        self._max_entries = max_entries
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[CachedServer, bytes], _Kept] = OrderedDict()
        self._bytes = 0
        self._hits = self._misses = 0

    @property
    def statistics(self) -> NearCacheStatistics:
        """Its use."""
        return NearCacheStatistics(len(self._kept), self._bytes, self._hits, self._misses)

    def get(self, server: CachedServer, name: bytes) -> StoredEntry | None:
        """Return an entry that has not expired."""
        kept = self._kept.get((server, name))
        if kept is not None and kept.expires <= now():
            self.drop(server, name)
            kept = None
        if kept is None:
            self._misses += 1
            return None
        self._hits += 1
        self._kept.move_to_end((server, name))
        return kept.entry

    def keep(self, server: CachedServer, name: bytes, entry: StoredEntry, expires: float) -> None:
        """Keep an entry, and drop those that were not used for longest, if there are too many."""
        self.drop(server, name)
        self._kept[server, name] = _Kept(entry, expires)
        self._bytes += _size(name, entry)
        while len(self._kept) > self._max_entries or self._bytes > self._max_bytes:
            (_, dropped), kept = self._kept.popitem(last=False)
            self._bytes -= _size(dropped, kept.entry)

    def drop(self, server: CachedServer, name: bytes) -> None:
        """Drop an entry, if it is there."""
        kept = self._kept.pop((server, name), None)
        if kept is not None:
            self._bytes -= _size(name, kept.entry)

    def drop_all(self, server: CachedServer) -> None:
        """Drop all entries of a server."""
        for each, name in [key for key in self._kept if key[0] is server]:
            self.drop(each, name)


def _size(name: bytes, entry: StoredEntry) -> int:
    return len(name) + len(entry.data) + _OVERHEAD


class Read:
    """A read of an entry that is on its way.

    Attributes:
        name: of the entry, on the server.
        began_at: monotonic seconds.
        is_valid: False once the entry has changed meanwhile: then what was read may be its former value.
    """

    def __init__(self, name: bytes) -> None:
        self.name = name
        self.began_at = now()
        self.is_valid = True

    def invalidate(self) -> None:
        """Record that the entry has changed, or may have."""
        self.is_valid = False


class CachedServer:
    """The part of a near cache that has the entries of one server.

    It has none unless the server is listened to, at the same address as the entries are read from: after a failover,
    the two may differ for a while. In another event loop, or a process that was forked, nobody listens either.

    Args:
        cache: the near cache.
    """

    def __init__(self, cache: NearCache) -> None:
        self._cache = cache
        self._listening_to: Address | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # in which changes are reported
        self._reads: dict[bytes, set[Read]] = {}

    def get(self, name: bytes, address: Address | None) -> StoredEntry | None:
        """Return an entry.

        Args:
            name: of the entry, on the server.
            address: from which entries are read.
        """
        return self._cache.get(self, name) if self._is_current(address) else None

    def begin(self, name: bytes, address: Address | None) -> Read | None:
        """Return a read that begins now, to be ended by `end`; None if nothing can be kept of it."""
        if not self._is_current(address):
            return None
        read = Read(name)
        self._reads.setdefault(name, set()).add(read)
        return read

    def end(self, read: Read) -> None:
        """Record that a read has ended."""
        reads = self._reads[read.name]
        reads.discard(read)
        if not reads:
            del self._reads[read.name]

    def keep(self, read: Read, entry: StoredEntry, ttl: float | None, address: Address | None) -> None:
        """Keep what was read, unless it may have changed since the read began."""
        if read.is_valid and self._is_current(address):
            expires = inf if ttl is None else read.began_at + ttl
            self._cache.keep(self, read.name, entry, expires)

    def drop(self, names: Iterable[bytes]) -> None:
        """Drop entries that have changed."""
        for name in names:
            self._cache.drop(self, name)
            for read in self._reads.get(name, ()):
                read.invalidate()

    def drop_all(self) -> None:
        """Drop all entries: each of them may have changed."""
        self._cache.drop_all(self)
        for reads in self._reads.values():
            for read in reads:
                read.invalidate()

    def listen(self, address: Address | None) -> None:
        """Record that the server is listened to, at an address; None: it no longer is."""
        self.drop_all()
        self._listening_to = address
        self._loop = running_loop()

    def _is_current(self, address: Address | None) -> bool:
        return address is not None and address == self._listening_to and running_loop() is self._loop
