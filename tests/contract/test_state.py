"""The contract of shared state, on every backend."""

from __future__ import annotations

import asyncio
import datetime as dt
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from tests.support.state_backends import BACKENDS, SHARED_BACKENDS, StateBackend

from forebay.errors import Conflict, InvalidSetting, InvalidStateKey, InvalidStateValue
from forebay.state import ShardedState


@pytest.fixture(params=BACKENDS, ids=str)
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    backend: StateBackend = request.param
    return backend.urls(tmp_path)


@pytest.fixture(params=SHARED_BACKENDS, ids=str)
def shared_urls(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    backend: StateBackend = request.param
    return backend.urls(tmp_path)


@pytest.fixture
async def state(urls: list[str]) -> AsyncIterator[ShardedState]:
    async with await ShardedState.connect(*urls) as state:
        yield state


async def keys(state: Any, prefix: str = "", *, reverse: bool = False) -> list[str]:
    return [entry.key async for entry in state.scan(prefix, reverse=reverse)]


async def test_a_value_is_read_with_its_version(state: ShardedState) -> None:
    version = await state.put("topic", {"name": "rivers", "depth": [1, 2.5, None, True], "raw": b"\0\xff"})
    assert await state.get("topic") == ({"name": "rivers", "depth": [1, 2.5, None, True], "raw": b"\0\xff"}, version)


@pytest.mark.parametrize(
    "value", [None, False, 0, -(1 << 63), (1 << 64) - 1, 1.5, "", "\0é𝄞", b"", [], {}, {1: {"a": [None]}}]
)
async def test_plain_data_comes_back_as_it_was(state: ShardedState, value: Any) -> None:
    await state.put("value", value)
    found = await state.get("value")
    assert found is not None
    assert (type(found.value), found.value) == (type(value), value)


async def test_a_time_with_a_zone_comes_back(state: ShardedState) -> None:
    time = dt.datetime(2026, 11, 30, 12, 30, 1, 500, tzinfo=dt.UTC)
    await state.put("time", time)
    found = await state.get("time")
    assert found is not None
    assert found.value == time


async def test_a_key_that_there_is_not_has_no_value(state: ShardedState) -> None:
    assert await state.get("nothing") is None
    assert not await state.delete("nothing")


async def test_versions_grow_and_never_repeat_after_a_deletion(state: ShardedState) -> None:
    versions = []
    for number in range(20):
        versions.append(await state.put("key", number))
        if number % 3 == 0:
            assert await state.delete("key")
            assert await state.get("key") is None
    assert versions == sorted(set(versions))
    assert versions[0] > 0


async def test_a_write_with_a_stale_version_is_a_conflict_and_changes_nothing(state: ShardedState) -> None:
    first = await state.put("key", "first")
    second = await state.put("key", "second", if_version=first)
    with pytest.raises(Conflict) as conflict:
        await state.put("key", "third", if_version=first)
    assert (conflict.value.key, conflict.value.expected, conflict.value.found) == ("key", first, second)
    with pytest.raises(Conflict):
        await state.delete("key", if_version=first)
    assert await state.get("key") == ("second", second)
    assert await state.delete("key", if_version=second)
    with pytest.raises(Conflict) as conflict:
        await state.put("key", "fourth", if_version=second)
    assert conflict.value.found == 0


async def test_version_0_writes_only_if_there_is_no_such_key(state: ShardedState) -> None:
    version = await state.put("key", 1, if_version=0)
    with pytest.raises(Conflict) as conflict:
        await state.put("key", 2, if_version=0)
    assert conflict.value.found == version
    await state.delete("key")
    assert await state.put("key", 3, if_version=0) > version


async def test_an_update_of_a_key_that_there_is_not_gets_none(state: ShardedState) -> None:
    assert (await state.update("calls", lambda calls: (calls or 0) + 1)).value == 1

    async def add(calls: int) -> int:
        await asyncio.sleep(0)
        return calls + 1

    updated = await state.update("calls", add)
    assert updated.value == 2
    assert await state.get("calls") == updated


async def test_concurrent_updates_lose_nothing(state: ShardedState) -> None:
    await asyncio.gather(*(state.update("calls", lambda calls: (calls or 0) + 1) for _ in range(30)))
    found = await state.get("calls")
    assert found is not None
    assert found.value == 30


async def test_an_update_that_raises_writes_nothing(state: ShardedState) -> None:
    version = await state.put("key", 1)
    with pytest.raises(ZeroDivisionError):
        await state.update("key", lambda value: value / 0)
    assert await state.get("key") == (1, version)


async def test_connections_share_what_is_written(shared_urls: list[str]) -> None:
    async with (
        await ShardedState.connect(*shared_urls) as one,
        await ShardedState.connect(*reversed(shared_urls)) as other,
    ):
        for number in range(20):
            version = await one.put(f"key {number}", number)
            assert await other.get(f"key {number}") == (number, version)
            assert one.shard_of(f"key {number}") == other.shard_of(f"key {number}")
        with pytest.raises(Conflict):
            await other.put("key 0", 1, if_version=0)
        assert len(await keys(other)) == 20


async def test_connections_that_update_the_same_key_lose_nothing(shared_urls: list[str]) -> None:
    async with (
        await ShardedState.connect(*shared_urls) as one,
        await ShardedState.connect(*shared_urls) as other,
    ):
        states = [one, other] * 10
        await asyncio.gather(*(each.update("calls", lambda calls: (calls or 0) + 1) for each in states))
        assert (await one.update("calls", lambda calls: calls)).value == 20


async def test_an_entry_expires(state: ShardedState) -> None:
    await state.put("short", 1, ttl=0.05)
    await state.put("long", 1, ttl=100)
    await state.put("kept", 1, ttl=0.05)
    await state.put("kept", 2)
    while await state.get("short") is not None:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    assert await keys(state) == ["kept", "long"]
    version = await state.put("short", 2, if_version=0)
    assert await state.get("short") == (2, version)
    assert await keys(state) == ["kept", "long", "short"]


async def test_a_key_that_is_written_again_at_once_without_a_ttl_stays(state: ShardedState) -> None:
    await asyncio.gather(state.put("kept", 1, ttl=0.05), state.put("short", 1, ttl=0.05), state.put("kept", 2))
    while await state.get("short") is not None:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.01)
    await state.put("kept", 3)
    assert await keys(state) == ["kept"]


async def test_a_scan_yields_the_keys_with_a_prefix_in_order(state: ShardedState) -> None:
    names = [f"b{number:03}" for number in range(250)]
    versions = await asyncio.gather(*(state.put(name, name.upper()) for name in names))
    await asyncio.gather(*(state.put(name, 0) for name in ("a", "b", "c", "bb")))
    await state.delete("b007")
    entries = [entry async for entry in state.scan("b0")]
    assert [entry.key for entry in entries] == [name for name in names[:100] if name != "b007"]
    assert entries[1] == ("b001", "B001", versions[1])
    assert await keys(state) == sorted({*names, "a", "b", "c", "bb"} - {"b007"})
    assert await keys(state, "b", reverse=True) == sorted({*names, "b", "bb"} - {"b007"}, reverse=True)
    assert await keys(state, "d") == []


async def test_a_scan_goes_on_after_a_key_and_ends_at_its_limit(state: ShardedState) -> None:
    names = [f"b{number:03}" for number in range(250)]
    await asyncio.gather(*(state.put(name, 0) for name in [*names, "a", "c"]))

    async def scan(**options: Any) -> list[str]:
        return [entry.key async for entry in state.scan("b", **options)]

    assert await scan(limit=1) == ["b000"]
    assert await scan(limit=1, reverse=True) == ["b249"]
    assert await scan(limit=0) == []
    assert await scan(limit=120) == names[:120]
    assert await scan(limit=1_000, after="b100") == names[101:]
    assert await scan(after="b1005", limit=2) == ["b101", "b102"]
    assert await scan(after="b100", reverse=True, limit=2) == ["b099", "b098"]
    assert await scan(after="b1005", reverse=True, limit=1) == ["b100"]
    assert await scan(after="") == await scan(after="a") == names
    assert await scan(after="c", reverse=True) == names[::-1]
    assert await scan(after="c") == await scan(after="a", reverse=True) == []


async def test_the_bounds_of_a_scan_are_checked(state: ShardedState) -> None:
    with pytest.raises(InvalidStateKey):
        await anext(state.scan(after="\ud800"), None)
    for limit in (-1, 1.5):
        with pytest.raises(InvalidSetting, match="limit"):
            await anext(state.scan(limit=limit), None)  # type: ignore[arg-type]


async def test_a_prefix_is_no_pattern(state: ShardedState) -> None:
    hostile = [
        "*",
        "a*",
        "a?",
        "a[b]",
        "a\\",
        "%",
        "a%",
        "_",
        "a\0",
        "\0",
        "a\n",
        "{x}",
        "}{",
        "a:b",
        "é",
        "\U0010ffff",
        "a",
    ]
    await asyncio.gather(*(state.put(key, key) for key in hostile))
    for key in hostile:
        assert [entry.value async for entry in state.scan(key)] == sorted(
            each for each in hostile if each.startswith(key)
        )
        assert (await state.get(key) or ("", 0))[0] == key
    assert await keys(state) == sorted(hostile)


async def test_namespaces_are_apart(state: ShardedState) -> None:
    agent, other = state.namespace("agent-7"), state.namespace("agent-8")
    await asyncio.gather(agent.put("calls", 7), other.put("calls", 8), state.put("calls", 0))
    assert [(await each.get("calls") or (None,))[0] for each in (agent, other, state)] == [7, 8, 0]
    assert await keys(agent) == await keys(state) == ["calls"]
    await agent.delete("calls")
    assert await keys(other) == ["calls"]
    assert len({agent.shard_of(f"key {number}") for number in range(50)}) == 1


async def test_names_of_namespaces_cannot_be_mistaken_for_others(state: ShardedState) -> None:
    names = ["a", "a/b", "a%2Fb", "a}b", "{a}", "a:b", "a#1", "a ", "\0", "=a", "é"]
    spaces = [state.namespace(name) for name in names]
    spaces += [state.namespace("a").namespace("b"), state.namespace("a").namespace("b").namespace("c")]
    for number, space in enumerate(spaces):
        await space.put("key", number)
    assert [(await space.get("key") or (None,))[0] for space in spaces] == list(range(len(spaces)))
    assert await keys(state) == []


@pytest.mark.parametrize("key", ["", None, 7, b"key", "x" * 1_025, "é" * 513, "\ud800"])
async def test_what_is_no_key_is_rejected(state: ShardedState, key: Any) -> None:
    for call in (state.get(key), state.put(key, 1), state.delete(key), state.update(key, lambda _: 1)):
        with pytest.raises(InvalidStateKey, match="a str of 1 to 1,024 bytes"):
            await call
    with pytest.raises(InvalidStateKey):
        state.shard_of(key)
    with pytest.raises(InvalidStateKey):
        state.namespace(key)


@dataclass(frozen=True)
class Point:
    """An object that can be the key of a dict."""

    x: int


@pytest.mark.parametrize("value", [object(), {1, 2}.__iter__(), 1 << 64, "\ud800", "x" * (8 << 20), {Point(1): 1}])
async def test_what_is_no_value_is_rejected(state: ShardedState, value: Any) -> None:
    with pytest.raises(InvalidStateValue, match="cannot be stored"):
        await state.put("key", value)
    assert await state.get("key") is None


@pytest.mark.parametrize("options", [{"ttl": 0}, {"ttl": -1}, {"ttl": "1"}, {"if_version": -1}, {"if_version": 1.5}])
async def test_what_is_no_setting_is_rejected(state: ShardedState, options: Any) -> None:
    with pytest.raises(InvalidSetting):
        await state.put("key", 1, **options)
    assert await state.get("key") is None


async def test_large_values_are_kept(state: ShardedState) -> None:
    values = [bytes([number]) * (3 << 20) for number in range(4)]
    await asyncio.gather(*(state.put(f"{number}", value) for number, value in enumerate(values)))
    assert [entry.value async for entry in state.scan()] == values
