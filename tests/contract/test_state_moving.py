"""The contract of shared state while its entries move between shards, on every backend."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any, TypeAlias

import pytest
from tests.support.kept_shard import KeptShard
from tests.support.state_backends import MOVING_BACKENDS, StateBackend

from forebay.errors import Conflict, InvalidSetting, InvalidShardUrl
from forebay.state import Namespace, Rebalanced, Shard, ShardedState
from forebay.state.entry import StoredEntry
from forebay.state.shard_url import open_shard

Shards: TypeAlias = list[str | Shard]

NAMES = [f"key {number:03}" for number in range(150)]
SPACES = ["agent-7", "a/b", "é {x}*", "k", *(f"agent {number}" for number in range(20))]
HOUR = 3_600_000_000  # microseconds, in versions


@pytest.fixture(params=MOVING_BACKENDS, ids=str)
def shards(request: pytest.FixtureRequest, tmp_path: Path) -> Shards:
    """Four shards of one kind."""
    backend: StateBackend = request.param
    if not backend.templates:
        return [KeptShard(f"memory://{letter}") for letter in "abcd"]
    return [*backend.urls(tmp_path)]


async def contents(space: Namespace) -> dict[str, tuple[Any, int]]:
    entries = [entry async for entry in space.scan()]
    assert [entry.key for entry in entries] == sorted({entry.key for entry in entries})
    return {entry.key: (entry.value, entry.version) for entry in entries}


async def everything(state: ShardedState) -> dict[str, dict[str, tuple[Any, int]]]:
    names = {space: await contents(state.namespace(space)) for space in SPACES}
    return names | {"": await contents(state)}


async def fill(state: Namespace) -> None:
    await asyncio.gather(*(state.put(name, name.upper()) for name in NAMES))
    for space in SPACES:
        await asyncio.gather(*(state.namespace(space).put(f"{number}", space) for number in range(5)))


def places(state: ShardedState) -> dict[tuple[str, str], str]:
    spaces = {(space, f"{number}"): state.namespace(space).shard_of("0") for space in SPACES for number in range(5)}
    return spaces | {("", name): state.shard_of(name) for name in NAMES}


async def entries_by_shard(shards: Shards) -> dict[str, set[tuple[str, str]]]:
    """Return what is on each shard, past any state."""
    found = dict[str, set[tuple[str, str]]]()
    for each in shards:
        shard = open_shard(each).shard
        await shard.open()
        keys = found[shard.url] = set()
        for space in ["", *SPACES]:
            page = await shard.scan(space.replace("/", "%2F"), b"", limit=1_000)
            keys |= {(space, entry.key.decode()) for entry in page.entries}
        await shard.close()
    return found


def by_shard(placed: dict[tuple[str, str], str]) -> dict[str, set[tuple[str, str]]]:
    return {url: {key for key, place in placed.items() if place == url} for url in placed.values()}


async def gone(state: ShardedState, key: str) -> None:
    """Return when an entry has expired."""
    while await state.get(key) is not None:  # noqa: ASYNC110 - only the shard knows
        await asyncio.sleep(0.01)


@pytest.mark.parametrize(("old", "new"), [("abc", "abcd"), ("abcd", "abc"), ("ab", "cd"), ("a", "b")], ids="-".join)
async def test_a_rebalance_moves_what_is_misplaced_and_nothing_else(shards: Shards, old: str, new: str) -> None:
    before, after = ([shards["abcd".index(letter)] for letter in letters] for letters in (old, new))
    async with await ShardedState.connect(*before) as state:
        await fill(state)
        kept, old_places = await everything(state), places(state)
    async with await ShardedState.connect(*after, moving_from=before) as state:
        assert await everything(state) == kept
        progress = list[Rebalanced]()
        result = await state.rebalance(progress.append)
        new_places = places(state)
        assert result.moved == sum(old_places[key] != place for key, place in new_places.items())
        assert progress[-1] == result
        assert await everything(state) == kept
        assert (await state.rebalance()).moved == 0
    assert {url: keys for url, keys in (await entries_by_shard(shards)).items() if keys} == by_shard(new_places)
    async with await ShardedState.connect(*after) as state:
        assert await everything(state) == kept
        for name in NAMES:
            assert await state.get(name) == kept[""][name]


async def test_a_weight_that_changes_moves_entries(tmp_path: Path) -> None:
    urls = [f"sqlite:///{tmp_path}/{letter}.db?fsync=no" for letter in "ab"]
    async with await ShardedState.connect(*urls) as state:
        await fill(state)
        kept = await everything(state)
    heavier = [f"{urls[0]}&weight=3", urls[1]]
    async with await ShardedState.connect(*heavier, moving_from=urls) as state:
        assert (await state.rebalance()).moved > 0
    async with await ShardedState.connect(*heavier) as state:
        assert await everything(state) == kept


async def test_a_server_under_another_name_keeps_its_entries(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    former, renamed = (
        [f"sqlite:///{tmp_path}/{name}/{letter}.db?fsync=no" for letter in "ab"] for name in ("real", "link")
    )
    async with await ShardedState.connect(*former) as state:
        await fill(state)
        kept, old_places = await everything(state), places(state)
    async with await ShardedState.connect(*renamed, moving_from=former) as state:
        assert await everything(state) == kept
        for name in NAMES[:50]:
            assert await state.get(name) == kept[""][name]
        result = await state.rebalance()
        assert await everything(state) == kept
        elsewhere = [place for place, url in places(state).items() if url[-4:] != old_places[place][-4:]]
        assert 0 < result.moved <= len(elsewhere) < len(old_places)
    async with await ShardedState.connect(*renamed) as state:
        assert await everything(state) == kept


async def test_an_operation_moves_its_entry_first(shards: Shards) -> None:
    async with await ShardedState.connect(shards[0]) as state:
        versions = dict(zip(NAMES, await asyncio.gather(*(state.put(name, 0) for name in NAMES)), strict=True))
    got, put, conditional, updated, deleted, absent = NAMES[:6]
    async with await ShardedState.connect(shards[1], moving_from=shards[:1]) as state:
        assert await state.get(got) == (0, versions[got])
        assert await state.put(put, 1) > versions[put]
        with pytest.raises(Conflict) as conflict:
            await state.put(conditional, 1, if_version=0)
        assert conflict.value.found == versions[conditional]
        version = await state.put(conditional, 1, if_version=versions[conditional])
        assert await state.get(conditional) == (1, version)
        assert (await state.update(updated, lambda value: value + 5)).value == 5
        with pytest.raises(Conflict):
            await state.delete(deleted, if_version=1)
        assert await state.delete(deleted, if_version=versions[deleted])
        assert not await state.delete(deleted)
        assert await state.delete(absent)
        assert await state.get(absent) is None
        assert await state.put("new", 1, if_version=0) > 0
        assert await state.put(absent, 2, if_version=0) > versions[absent]
        assert sorted(await contents(state)) == sorted({*NAMES, "new"} - {deleted})
        left = (await entries_by_shard(shards[:1]))[open_shard(shards[0]).shard.url]
        assert left == {("", name) for name in NAMES[6:]}
        assert (await state.rebalance()).moved == len(NAMES) - 6


async def test_a_ttl_moves_with_its_entry(shards: Shards) -> None:
    async with await ShardedState.connect(shards[0]) as state:
        await state.put("long", 1, ttl=100)
        await state.put("none", 1)
        await state.put("short", 1, ttl=0.5)
    async with await ShardedState.connect(shards[1], moving_from=shards[:1]) as state:
        await state.rebalance()
        await gone(state, "short")
        assert sorted(await contents(state)) == ["long", "none"]
        shard = open_shard(shards[1]).shard
        await shard.open()
        copied = await shard.copy("", b"long")
        assert copied.ttl is not None
        assert 50 < copied.ttl <= 100
        assert (await shard.copy("", b"none")).ttl is None
        await shard.close()


async def test_a_rebalance_that_was_broken_off_goes_on(shards: Shards) -> None:
    async with await ShardedState.connect(shards[0]) as state:
        await fill(state)
        kept = await everything(state)

    def break_off(progress: Rebalanced) -> None:
        assert progress.moved > 0
        raise ZeroDivisionError

    async with await ShardedState.connect(*shards[1:3], moving_from=shards[:1]) as state:
        with pytest.raises(ZeroDivisionError):
            await state.rebalance(break_off)
        assert await everything(state) == kept
    async with (
        await ShardedState.connect(*shards[1:3], moving_from=shards[:1]) as one,
        await ShardedState.connect(*shards[1:3], moving_from=shards[:1]) as other,
    ):
        results = await asyncio.gather(one.rebalance(), other.rebalance())
        assert sum(result.moved for result in results) < len(NAMES) + 5 * len(SPACES)
        assert await everything(one) == await everything(other) == kept
    assert not (await entries_by_shard(shards[:1]))[open_shard(shards[0]).shard.url]


async def test_versions_are_larger_than_those_of_a_shard_whose_clock_is_ahead(shards: Shards) -> None:
    async with await ShardedState.connect(shards[0]) as state:
        ahead = await state.put("other", 0) + HOUR
        shard = open_shard(shards[0]).shard
        await shard.open()
        await shard.restore("", StoredEntry(b"key", b"\x01", ahead), None)
        await shard.restore("agent", StoredEntry(b"key", b"\x01", ahead), None)
        await shard.close()
        removed = await state.put("removed", 1)
        assert await state.delete("removed")
    async with await ShardedState.connect(shards[1], moving_from=shards[:1]) as state:
        assert await state.put("removed", 1) > removed
        for space in (state, state.namespace("agent")):
            assert await space.get("key") == (1, ahead)
            assert await space.delete("key")
            assert await space.put("key", 2) > ahead


@pytest.mark.parametrize("ttl", [None, 0.05], ids=["deleted", "expired"])
async def test_a_process_that_restores_an_entry_late_brings_nothing_back(shards: Shards, ttl: float | None) -> None:
    async with await ShardedState.connect(shards[0]) as state:
        version = await state.put("key", 1)
        await state.put("kept", 1)
    old, new = open_shard(shards[0]).shard, open_shard(shards[1]).shard
    await asyncio.gather(old.open(), new.open())
    late, kept = await old.copy("", b"key"), await old.copy("", b"kept")
    assert late.entry == (b"key", b"\x01", version)
    assert late.entry is not None
    assert kept.entry is not None
    async with await ShardedState.connect(shards[1], moving_from=shards[:1]) as state:
        latest = await state.put("kept", 2)
        if ttl is None:
            await state.delete("key")
        else:
            await state.put("key", 2, ttl=ttl)
            await gone(state, "key")
        await new.restore("", late.entry, None)
        await new.restore("", kept.entry, None)
        assert await state.get("key") is None
        assert await contents(state) == {"kept": (2, latest)}
        assert await state.put("key", 3, if_version=0) > version
    await asyncio.gather(old.close(), new.close())


async def test_an_entry_moves_away_and_comes_back(shards: Shards) -> None:
    async with await ShardedState.connect(shards[0]):
        pass
    async with await ShardedState.connect(shards[1], moving_from=shards[:1]) as state:
        await state.put("ttl", 1, ttl=100)
        await state.put("again", 1)
        await state.delete("again")
        await state.put("again", 2)
        kept = await contents(state)
    for new, old in ((0, 1), (1, 0), (2, 1), (1, 2)):
        async with await ShardedState.connect(shards[new], moving_from=[shards[old]]) as state:
            await state.rebalance()
            assert await contents(state) == kept


async def test_a_scan_sees_each_entry_once_while_it_is_moved(shards: Shards) -> None:
    names = [f"key {number:04}" for number in range(800)]
    async with await ShardedState.connect(*shards[:2]) as state:
        await asyncio.gather(*(state.put(name, name) for name in names))
    async with (
        await ShardedState.connect(*shards[1:3], moving_from=shards[:2]) as state,
        await ShardedState.connect(*shards[1:3], moving_from=shards[:2]) as other,
    ):
        rebalance = asyncio.create_task(other.rebalance())
        while True:
            was_done = rebalance.done()
            assert list(await contents(state)) == names
            assert [entry.key async for entry in state.scan("key 0", reverse=True)] == names[::-1]
            if was_done:
                break
        assert (await rebalance).moved > 0


async def test_concurrent_updates_during_a_rebalance_lose_nothing(shards: Shards) -> None:
    counters = NAMES[:20]
    async with await ShardedState.connect(*shards[:3]) as state:
        await asyncio.gather(*(state.put(name, 0) for name in counters))
        await fill(state.namespace("x"))
    states = [await ShardedState.connect(*shards, moving_from=shards[:3]) for _ in range(3)]

    async def increment(state: ShardedState) -> None:
        for name in [*counters, *reversed(counters)]:
            await state.update(name, lambda value: value + 1)
            await state.namespace("x").update("calls", lambda value: (value or 0) + 1)

    await asyncio.gather(*(increment(state) for state in states), states[0].rebalance(), states[1].rebalance())
    assert [(await states[2].get(name) or (None,))[0] for name in counters] == [6] * 20
    assert (await states[1].namespace("x").get("calls") or (None,))[0] == 120
    for state in states:
        await state.close()


async def test_namespaces_are_enumerated(shards: Shards) -> None:
    names = ["", "é {x}*", "a%2Fb", "k", "#1", "}k", *(f"agent {number}" for number in range(250))]
    shard = open_shard(shards[0]).shard
    await shard.open()
    await asyncio.gather(*(shard.put(name, b"key}k", b"data") for name in names))
    await shard.delete("agent 7", b"key}k")
    found, after = set[str](), None
    while True:
        page = await shard.namespaces(after)
        found.update(page.names)
        after = page.after
        if after is None:
            break
    assert found == {*names} - {"agent 7"}
    await shard.close()


@pytest.mark.parametrize("moving_from", ["memory://", 7, {"memory://"}, []], ids=repr)
async def test_what_is_no_list_of_former_shards_is_rejected(moving_from: Any) -> None:
    with pytest.raises(InvalidSetting, match="a list of the shards as they were given before"):
        await ShardedState.connect("memory://", moving_from=moving_from)


async def test_former_shards_are_checked_as_shards_are() -> None:
    with pytest.raises(InvalidShardUrl):
        await ShardedState.connect("memory://", moving_from=["memory://", "memory://"])
    async with await ShardedState.connect("memory://") as state:
        with pytest.raises(InvalidSetting, match="moving_from"):
            await state.rebalance()
