"""The near cache: bounded, and never filled by a read that an invalidation has overtaken."""

from __future__ import annotations

import asyncio
from functools import partial

from forebay.state.entry import StoredEntry
from forebay.state.near_cache import CachedServer, NearCache
from forebay.testing import virtual

HERE = ("127.0.0.1", 6379)
THERE = ("127.0.0.1", 6380)


def entry(number: int, size: int = 10) -> StoredEntry:
    return StoredEntry(b"key", b"x" * size, number)


def listening(cache: NearCache) -> CachedServer:
    server = CachedServer(cache)
    server.listen(HERE)
    return server


def keep(server: CachedServer, name: bytes, found: StoredEntry, ttl: float | None = None) -> None:
    read = server.begin(name, HERE)
    assert read is not None
    server.keep(read, found, ttl, HERE)
    server.end(read)


def test_what_was_read_is_kept_until_it_changes() -> None:
    server = listening(NearCache(10))
    keep(server, b"a", entry(1))
    keep(server, b"b", entry(2))
    assert server.get(b"a", HERE) == entry(1)
    server.drop([b"a", b"other"])
    assert server.get(b"a", HERE) is None
    assert server.get(b"b", HERE) == entry(2)


def test_a_read_that_an_invalidation_has_overtaken_keeps_nothing() -> None:
    server = listening(NearCache(10))
    for invalidate in (partial(server.drop, [b"a"]), server.drop_all, partial(server.listen, HERE)):
        early, other = server.begin(b"a", HERE), server.begin(b"b", HERE)
        assert early is not None
        assert other is not None
        invalidate()
        late = server.begin(b"a", HERE)
        assert late is not None
        server.keep(early, entry(1), None, HERE)
        assert server.get(b"a", HERE) is None
        server.keep(late, entry(2), None, HERE)
        assert server.get(b"a", HERE) == entry(2)
        server.keep(early, entry(1), None, HERE)
        assert server.get(b"a", HERE) == entry(2)
        for read in (early, other, late):
            server.end(read)
    assert not server._reads


def test_nothing_is_kept_unless_the_server_that_is_read_from_is_listened_to() -> None:
    cache = NearCache(10)
    server = CachedServer(cache)
    assert server.begin(b"a", HERE) is None
    server.listen(HERE)
    assert server.begin(b"a", THERE) is None
    assert server.begin(b"a", None) is None
    keep(server, b"a", entry(1))
    assert server.get(b"a", THERE) is None
    assert server.get(b"a", None) is None
    read = server.begin(b"b", HERE)
    assert read is not None
    server.keep(read, entry(1), None, THERE)
    assert server.get(b"b", HERE) is None
    server.listen(None)
    assert cache.statistics.entries == cache.statistics.bytes == 0
    assert server.get(b"a", HERE) is None
    server.listen(HERE)
    assert server.get(b"a", HERE) is None


def test_nothing_is_kept_in_another_event_loop() -> None:
    cache = NearCache(10)
    server = CachedServer(cache)

    async def listen() -> None:
        server.listen(HERE)
        keep(server, b"a", entry(1))
        assert server.get(b"a", HERE) == entry(1)

    async def read() -> StoredEntry | None:
        assert server.begin(b"a", HERE) is None
        return server.get(b"a", HERE)

    asyncio.run(listen())
    assert asyncio.run(read()) is None


def test_the_entries_that_were_not_used_for_longest_are_dropped() -> None:
    cache = NearCache(3)
    one, other = listening(cache), listening(cache)
    for server, name in ((one, b"a"), (other, b"a"), (one, b"b")):
        keep(server, name, entry(1))
    assert one.get(b"a", HERE) is not None
    keep(one, b"c", entry(1))
    assert other.get(b"a", HERE) is None
    assert all(one.get(name, HERE) is not None for name in (b"a", b"b", b"c"))
    other.drop_all()
    assert cache.statistics.entries == 3


def test_the_bytes_of_entries_are_bounded() -> None:
    cache = NearCache(1_000, max_bytes=10_000)
    server = listening(cache)
    for number in range(50):
        keep(server, b"%d" % number, entry(number, size=700))
        assert cache.statistics.bytes <= 10_000
    assert 5 < cache.statistics.entries < 15
    keep(server, b"large", entry(1, size=10_001))
    assert server.get(b"large", HERE) is None
    keep(server, b"a", entry(1, size=9_000))
    keep(server, b"a", entry(2, size=10))
    assert cache.statistics.entries == 1
    assert cache.statistics.bytes < 1_000
    server.drop_all()
    assert cache.statistics[:2] == (0, 0)


@virtual
async def test_an_entry_is_not_served_after_its_ttl_counted_from_when_the_read_began() -> None:
    server = listening(NearCache(10))
    read = server.begin(b"a", HERE)
    assert read is not None
    await asyncio.sleep(3.0)
    server.keep(read, entry(1), 5.0, HERE)
    await asyncio.sleep(1.9)
    assert server.get(b"a", HERE) == entry(1)
    await asyncio.sleep(0.1)
    assert server.get(b"a", HERE) is None
