"""The near cache on real servers: other writers are seen, and what cannot be known to be current is not served."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.support.redis_servers import RedisServer, StandaloneRedis, redis_sentinels, redis_server
from tests.support.state_backends import BACKENDS, StateBackend

from forebay.errors import InvalidSetting, ShardUnavailable
from forebay.state import Namespace, ShardedState
from forebay.state.near_cache import CachedServer

CACHED = [each for each in BACKENDS if each.name in {"redis", "redis shards", "replicated", "sentinel", "cluster"}]
LIMIT = 20.0  # seconds within which what is waited for has happened, on a busy machine


@pytest.fixture(params=CACHED, ids=str)
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    backend: StateBackend = request.param
    return backend.urls(tmp_path)


@pytest.fixture
def own_redis() -> Iterator[StandaloneRedis]:
    with redis_server() as redis:
        yield redis


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(LIMIT):
        while not await condition():  # noqa: ASYNC110 - nobody tells
            await asyncio.sleep(0.005)


async def until_cached(state: ShardedState, space: Namespace, key: str) -> None:
    """Return once the near cache has answered for a key."""

    async def is_hit() -> bool:
        assert state.near_cache is not None
        before = state.near_cache.hits
        await space.get(key)
        return state.near_cache.hits > before

    await until(is_hit)


def entries(state: ShardedState) -> int:
    assert state.near_cache is not None
    return state.near_cache.entries


async def value(space: Namespace, key: str) -> Any:
    found = await space.get(key)
    return None if found is None else found.value


async def until_is(space: Namespace, key: str, expected: object) -> None:
    """Return once a key has a value."""

    async def is_expected() -> bool:
        return bool(await value(space, key) == expected)

    await until(is_expected)


async def test_the_writes_of_others_are_seen(urls: list[str]) -> None:
    async with (
        await ShardedState.connect(*urls, near_cache=1_000) as state,
        await ShardedState.connect(*urls) as other,
    ):
        for name in ("", "agent", "é"):
            space, others = (each.namespace(name) if name else each for each in (state, other))
            for key in ("a", "b c"):
                version = await others.put(key, 1)
                await until_cached(state, space, key)
                assert await space.get(key) == (1, version)
                await others.put(key, 2)
                await until_is(space, key, 2)
                await until_cached(state, space, key)
                await others.delete(key)
                await until_is(space, key, None)


async def test_own_writes_are_seen_at_once(urls: list[str]) -> None:
    async with await ShardedState.connect(*urls, near_cache=1_000) as state:
        await state.put("key", 0)
        for number in range(1, 30):
            await until_cached(state, state, "key")
            if number % 3 == 0:
                await state.delete("key")
                assert await state.get("key") is None
                await state.put("key", number)
            elif number % 3 == 1:
                await asyncio.gather(*(state.get("key") for _ in range(3)), state.put("key", number), state.get("key"))
            else:
                await state.update("key", lambda last: last + 1)
            assert await value(state, "key") == number


async def test_an_entry_that_expires_is_gone(urls: list[str]) -> None:
    async with await ShardedState.connect(*urls, near_cache=1_000) as state:
        await state.put("other", 1)
        await until_cached(state, state, "other")
        await state.put("key", 1, ttl=0.3)
        await until_is(state, "key", None)
        assert entries(state) == 1


async def test_updates_and_conditions_are_decided_by_the_server(
    urls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        await ShardedState.connect(*urls, near_cache=1_000) as state,
        await ShardedState.connect(*urls) as other,
    ):
        await state.put("key", 1)
        await until_cached(state, state, "key")
        monkeypatch.setattr(CachedServer, "drop", lambda *_: None)  # no message arrives
        version = await other.put("key", 10)
        assert await value(state, "key") == 1
        seen = []

        def change(count: int) -> int:
            seen.append(count)
            return count + 1

        assert (await state.update("key", change)).version > version
        assert seen == [10]
        assert await value(other, "key") == 11


async def test_what_changes_while_nobody_listens_is_read_again(own_redis: StandaloneRedis) -> None:
    async with (
        await ShardedState.connect(own_redis.url, near_cache=1_000) as state,
        await ShardedState.connect(own_redis.url) as other,
    ):
        for number in range(2):
            await other.put("key", number)
            await until_is(state, "key", number)
            await until_cached(state, state, "key")
            killed = own_redis.master().ask("CLIENT", "KILL", "TYPE", "pubsub")
            assert killed == 1
            await other.put("key", "changed")  # the listener is back a second later
            await until_is(state, "key", "changed")
            await until_cached(state, state, "key")
            assert await value(state, "key") == "changed"


async def test_an_emptied_database_empties_the_cache(own_redis: StandaloneRedis) -> None:
    async with await ShardedState.connect(own_redis.url, near_cache=1_000) as state:
        await state.put("key", 1)
        await until_cached(state, state, "key")
        own_redis.master().ask("FLUSHALL")
        await until_is(state, "key", None)


@pytest.mark.parametrize("end", [RedisServer.kill, RedisServer.stop], ids=["killed", "hangs"])
async def test_a_shard_that_is_down_is_not_answered_for(
    own_redis: StandaloneRedis, end: Callable[[RedisServer], None]
) -> None:
    async with await ShardedState.connect(own_redis.url, near_cache=1_000, timeout=1.0) as state:
        await state.put("key", 1)
        await until_cached(state, state, "key")
        end(own_redis.master())
        await until(lambda: _is_empty(state))
        for _ in range(3):
            with pytest.raises(ShardUnavailable):
                await state.get("key")
        assert state.down


async def _is_empty(state: ShardedState) -> bool:
    return entries(state) == 0


async def test_another_master_is_listened_to_after_a_failover() -> None:
    with redis_sentinels() as redis:
        async with (
            await ShardedState.connect(redis.url, near_cache=1_000) as state,
            await ShardedState.connect(redis.url) as other,
        ):
            await state.put("key", 1)
            await until_cached(state, state, "key")
            redis.kill_master()
            await until(lambda: _is_up(state))
            await until(lambda: _is_up(other))
            await other.put("key", 2)
            await until_is(state, "key", 2)
            await until_cached(state, state, "key")
            await other.put("key", 3)
            await until_is(state, "key", 3)


async def _is_up(state: ShardedState) -> bool:
    try:
        await state.put("probe", 1)
    except ShardUnavailable:
        return False
    return True


async def test_shards_that_report_no_changes_are_not_cached(tmp_path: Path) -> None:
    for urls in (["memory://"], [f"sqlite:///{tmp_path}/a.db"]):
        async with await ShardedState.connect(*urls, near_cache=10) as state:
            await state.put("key", 1)
            assert await value(state, "key") == await value(state, "key") == 1
            assert state.near_cache == (0, 0, 0, 0)
    async with await ShardedState.connect("memory://") as state:
        assert state.near_cache is None


@pytest.mark.parametrize("near_cache", [0, -1, 1.5, "10", True], ids=repr)
async def test_what_is_no_size_is_rejected(near_cache: Any) -> None:
    with pytest.raises(InvalidSetting, match="near_cache"):
        await ShardedState.connect("memory://", near_cache=near_cache)
