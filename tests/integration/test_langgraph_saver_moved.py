"""The LangGraph checkpointer and store on a state to which a shard is added, and on one with a near cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.report import CapabilityReport
from tests.integration.test_langgraph_saver import put_many, thread, values
from tests.support.state_backends import BACKENDS

from forebay.adapters.langgraph import ShardedSaver, ShardedStore
from forebay.state import ShardedState

BY_NAME = {backend.name: backend for backend in BACKENDS}


def failures(report: CapabilityReport) -> list[str]:
    return [failure for result in report.results.values() for failure in result.failures]


@pytest.mark.parametrize("name", ["redis", "redis shards", "cluster"])
def test_the_suite_of_langgraph_passes_with_a_near_cache(name: str, tmp_path: Path) -> None:
    urls = BY_NAME[name].urls(tmp_path)

    async def saver() -> AsyncIterator[BaseCheckpointSaver[str]]:
        async with await ShardedState.connect(*urls, near_cache=1_000) as state:
            yield ShardedSaver(state)

    report = asyncio.run(validate(checkpointer_test(name="near cache")(saver)))
    assert failures(report) == []
    assert report.passed_all()


@pytest.mark.parametrize("name", ["redis shards", "sqlite shards"])
def test_the_suite_of_langgraph_passes_while_a_shard_is_added(name: str, tmp_path: Path) -> None:
    urls = BY_NAME[name].urls(tmp_path)

    async def saver() -> AsyncIterator[BaseCheckpointSaver[str]]:
        async with await ShardedState.connect(*urls, moving_from=urls[:2]) as state:
            yield ShardedSaver(state)

    report = asyncio.run(validate(checkpointer_test(name="moving")(saver)))
    assert failures(report) == []
    assert report.passed_all()


@pytest.mark.parametrize("name", ["redis shards", "sqlite shards"])
def test_threads_and_items_move_to_an_added_shard(name: str, tmp_path: Path) -> None:
    urls = BY_NAME[name].urls(tmp_path)
    threads = [f"t-{number}" for number in range(20)]

    async def move() -> None:
        async with await ShardedState.connect(*urls[:2]) as state:
            for each in threads:
                await put_many(ShardedSaver(state), 5, thread(each))
                await ShardedStore(state).aput(("a", each), "key", {"thread": each})
        async with await ShardedState.connect(*urls, moving_from=urls[:2]) as state:
            saver = ShardedSaver(state)
            for each in threads[::2]:
                assert await values(saver, thread(each), limit=2) == [4, 3]
            await saver.aprune(threads[:5])
            assert len(await values(saver, None)) == 5 + 15 * 5
            await state.rebalance()
            assert len(await values(saver, None)) == 5 + 15 * 5
        async with await ShardedState.connect(*urls) as state:
            saver, store = ShardedSaver(state), ShardedStore(state)
            assert await values(saver, thread("t-3")) == [4]
            assert await values(saver, thread("t-9")) == [4, 3, 2, 1, 0]
            await saver.adelete_thread("t-9")
            listed = {each.config["configurable"]["thread_id"] async for each in saver.alist(None)}
            assert listed == set(threads) - {"t-9"}
            assert await store.alist_namespaces() == sorted(("a", each) for each in threads)
            assert len(await store.asearch(("a",), limit=100)) == 20

    asyncio.run(move())
