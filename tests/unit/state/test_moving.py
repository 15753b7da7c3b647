"""Moving entries between shards, with operations that take their time and processes that die, in virtual time."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support.kept_shard import KeptShard
from tests.support.late_shard import LateShard

from forebay.clock import draw
from forebay.errors import Conflict, ShardUnavailable, StoreUnavailable
from forebay.state import Rebalanced, ShardedState
from forebay.testing import virtual

KEYS = [f"key {number}" for number in range(6)]


def cluster(count: int, delay: float = 0.02) -> list[Any]:
    return [LateShard(KeptShard(f"memory://{number}"), delay) for number in range(count)]


class Process:
    """A process that increments counters, and knows how many of its increments are done, and how many may be."""

    def __init__(self, state: ShardedState) -> None:
        self.state = state
        self.done = dict.fromkeys(KEYS, 0)
        self.began = dict.fromkeys(KEYS, 0)
        self.versions = dict.fromkeys(KEYS, 0)

    async def run(self, times: int) -> None:
        for _ in range(times):
            key = KEYS[int(draw() * len(KEYS))]
            self.began[key] += 1
            updated = await self.state.update(key, lambda count: (count or 0) + 1)
            self.done[key] += 1
            assert updated.version > self.versions[key]
            self.versions[key] = updated.version


@given(seed=st.integers(0, 1 << 30))
def test_updates_lose_nothing_while_processes_move_entries_and_die(seed: int) -> None:
    @virtual(seed=seed)
    async def run() -> None:
        shards = cluster(4)
        async with await ShardedState.connect(*shards[:2]) as state:
            first = Process(state)
            await first.run(10)
        states = [await ShardedState.connect(*shards[1:], moving_from=shards[:2]) for _ in range(4)]
        processes = [Process(state) for state in states]
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(process.run(20)) for process in processes]
        tasks += [asyncio.create_task(state.rebalance()) for state in states[:3]]
        for task in (tasks[0], tasks[1], tasks[4], tasks[5]):  # the others live
            asyncio.get_running_loop().call_later(draw() * 2.0, task.cancel)
        await asyncio.gather(*tasks, return_exceptions=True)
        for task in (tasks[2], tasks[3], tasks[6]):
            task.result()
        await asyncio.sleep(1.0)  # what dead processes have sent arrives
        await states[3].rebalance()
        async with await ShardedState.connect(*shards[1:]) as state:
            for key in KEYS:
                found = await state.get(key)
                count = 0 if found is None else found.value
                done = sum(process.done[key] for process in [first, *processes])
                killed = sum(process.began[key] - process.done[key] for process in processes)
                assert done <= count <= done + killed
        for each in states:
            await each.close()

    run()


@given(seed=st.integers(0, 1 << 30))
def test_what_was_deleted_or_has_expired_does_not_come_back(seed: int) -> None:
    @virtual(seed=seed)
    async def run() -> None:
        shards = cluster(2, delay=0.5)
        async with await ShardedState.connect(shards[0]) as state:
            await asyncio.gather(*(state.put(key, "old") for key in KEYS))
        states = [await ShardedState.connect(shards[1], moving_from=shards[:1]) for _ in range(4)]

        async def remove(state: ShardedState, key: str) -> None:
            if key in KEYS[::2]:
                await state.delete(key)
            else:
                await state.put(key, "new", ttl=0.1)

        others = [asyncio.create_task(state.rebalance()) for state in states[1:]]
        readers = [asyncio.create_task(state.get(key)) for state in states for key in KEYS]
        await asyncio.gather(*(remove(states[0], key) for key in KEYS))
        await asyncio.gather(*others, *readers)
        await asyncio.sleep(5.0)
        for key in KEYS:
            assert await states[0].get(key) is None
        assert [entry async for entry in states[0].scan()] == []
        for each in states:
            await each.close()

    run()


@given(seed=st.integers(0, 1 << 30))
def test_of_those_that_create_a_key_one_succeeds(seed: int) -> None:
    @virtual(seed=seed)
    async def run() -> None:
        shards = cluster(3)
        async with await ShardedState.connect(shards[0]) as state:
            await state.put(KEYS[0], "old")
        states = [await ShardedState.connect(*shards[1:], moving_from=shards[:1]) for _ in range(5)]
        for key, expected in ((KEYS[0], 0), (KEYS[1], 1)):
            puts = [state.put(key, number, if_version=0) for number, state in enumerate(states)]
            results = await asyncio.gather(*puts, return_exceptions=True)
            assert sum(isinstance(result, int) for result in results) == expected
            assert all(isinstance(result, int | Conflict) for result in results)
        for each in states:
            await each.close()

    run()


@given(seed=st.integers(0, 1 << 30))
def test_a_scan_sees_each_entry_once_while_it_is_moved(seed: int) -> None:
    @virtual(seed=seed)
    async def run() -> None:
        shards = cluster(3)
        names = [f"key {number:03}" for number in range(250)]
        async with await ShardedState.connect(*shards[:2]) as state:
            await asyncio.gather(*(state.put(name, name) for name in names))
        async with (
            await ShardedState.connect(*shards[1:], moving_from=shards[:2]) as state,
            await ShardedState.connect(*shards[1:], moving_from=shards[:2]) as other,
        ):
            rebalance = asyncio.create_task(other.rebalance())
            for reverse in (False, True, False, True):
                found = [entry.key async for entry in state.scan(reverse=reverse)]
                assert found == sorted(names, reverse=reverse)
            await rebalance

    run()


class DyingShard(KeptShard):
    """A shard that fails from the `calls`-th call on; that call is done, or not."""

    def __init__(self, url: str, calls: int, *, answer_lost: bool) -> None:
        super().__init__(url)
        self.left = calls
        self.answer_lost = answer_lost
        for name in ("copy", "restore", "delete", "scan", "namespaces"):
            setattr(self, name, self._counted(getattr(self, name)))

    def _counted(self, method: Any) -> Any:
        async def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0 and self.answer_lost:
                await method(*args, **kwargs)
            if self.left <= 0:
                raise StoreUnavailable(where=self.url, why="it is dead", advice="Wait.")
            return await method(*args, **kwargs)

        return call

    async def ping(self) -> None:
        """Fail, while it is dead."""
        if self.left <= 0:
            raise StoreUnavailable(where=self.url, why="it is dead", advice="Wait.")


@pytest.mark.parametrize("answer_lost", [False, True])
@pytest.mark.parametrize("dies", [0, 1])
def test_a_rebalance_goes_on_after_a_shard_has_died_at_any_call(dies: int, answer_lost: bool) -> None:  # noqa: FBT001
    @virtual
    async def run(calls: int) -> bool:
        shards = [KeptShard("memory://0"), KeptShard("memory://1")]
        dying = shards[dies] = DyingShard(f"memory://{dies}", 1_000, answer_lost=answer_lost)
        async with await ShardedState.connect(shards[0]) as state:
            versions = {key: await state.put(key, key) for key in KEYS}
        async with await ShardedState.connect(shards[1], moving_from=shards[:1]) as state:
            dying.left = calls
            died = False
            with suppress(ShardUnavailable):
                died = True
                await state.rebalance()
                died = False
            dying.left = 1_000
            await asyncio.sleep(1.0)  # it is found again
            result = await state.rebalance()
            assert result.moved <= len(KEYS)
            found = {entry.key: (entry.value, entry.version) async for entry in state.scan()}
            assert found == {key: (key, versions[key]) for key in KEYS}
            assert not (await shards[0].scan("", b"")).entries
        return died

    calls = 1
    while run(calls):
        calls += 1
    assert calls > len(KEYS)


@virtual
async def test_entries_move_away_from_a_shard_that_is_full() -> None:
    full, other = KeptShard("memory://a", max_bytes=10_000), KeptShard("memory://b")
    async with await ShardedState.connect(full) as state:
        count = 0
        with suppress(ShardUnavailable):  # it is full
            while True:
                await state.put(f"key {count}", b"x" * 500)
                count += 1
    async with await ShardedState.connect(full, other, moving_from=[full]) as state:
        assert await state.get("key 0") is not None
        assert (await state.rebalance()).moved > 0
        assert len([entry async for entry in state.scan()]) == count
        assert await state.put("new", b"x" * 500) > 0


@virtual
async def test_what_was_moved_stays_moved_when_a_shard_dies() -> None:
    shards = [KeptShard("memory://a"), KeptShard("memory://b"), DyingShard("memory://c", 40, answer_lost=False)]
    async with await ShardedState.connect(shards[0]) as state:
        await asyncio.gather(*(state.put(f"key {number}", number) for number in range(300)))
    seen = list[Rebalanced]()
    async with await ShardedState.connect(*shards[1:], moving_from=shards[:1]) as state:
        with pytest.raises(ShardUnavailable, match="memory://c"):
            await state.rebalance(seen.append)
        moved = len((await shards[1].scan("", b"", limit=1_000)).entries)
        assert moved > 0
        shards[2].left = 1_000  # type: ignore[attr-defined]
        await asyncio.sleep(1.0)
        assert (await state.rebalance()).moved < 300
        assert [entry.value async for entry in state.scan()] == sorted(range(300), key=lambda number: f"key {number}")
