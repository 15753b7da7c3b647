"""The Redis master is lost: with ?replicas=1 no acknowledged write goes with it, without it the newest ones do."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager

import pytest
from tests.support.redis_servers import RedisSetup, StandaloneRedis, redis_cluster, redis_replicated, redis_sentinels

from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, PutResult, RecordState, TaskRecord, TaskStore
from forebay.overflow import open_task_store, redis as redis_store
from forebay.task import Priority

NAMES = itertools.count()
FOR_EVER = 1e6  # seconds


def record(task_id: str, at: float = 0.0) -> TaskRecord:
    return TaskRecord(
        task_id=task_id, task_type="t", priority=Priority.NORMAL, envelope=b"envelope", enqueued_at=at
    )


@asynccontextmanager
async def opened(url: str) -> AsyncIterator[TaskStore]:
    store = open_task_store(url)
    await store.open()
    try:
        yield store
    finally:
        await store.close()


async def in_thread(work: Callable[[], object]) -> None:
    """Run what blocks, while the event loop goes on."""
    await asyncio.get_running_loop().run_in_executor(None, work)


# --- one master and one replica, which lags --------------------------------------------------------------------------


@pytest.fixture
def pair(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandaloneRedis]:
    """Return a master with a replica, both behind proxies; the store waits for replicas for a tenth of a second."""
    monkeypatch.setattr(redis_store, "_ACKNOWLEDGE_TIMEOUT_MS", 100)
    with redis_replicated(proxied=True) as started:
        yield started


def lose_master(pair: StandaloneRedis) -> str:
    """Kill the master with all that its replica has not got, and return the URL of what was its replica."""
    pair.kill_master()
    pair.proxies[0].cut()
    replica = pair.promote()
    return f"redis://127.0.0.1:{replica.port}/0"


async def test_without_a_replica_that_has_them_acknowledged_writes_are_lost_with_the_master(
    pair: StandaloneRedis,
) -> None:
    """The control: what the other tests hold does not hold by itself."""
    async with opened(pair.url) as store:
        assert await store.put(record("before")) is PutResult.STORED
        await in_thread(lambda: pair.wait_for_replicas())
        pair.proxies[0].lag(FOR_EVER)
        assert await store.put(record("after")) is PutResult.STORED
    async with opened(lose_master(pair)) as store:
        assert await store.find("before") is not None
        assert await store.find("after") is None


async def test_what_a_replica_does_not_have_is_not_acknowledged_and_not_stored(pair: StandaloneRedis) -> None:
    url = f"{pair.url}?replicas=1"
    async with opened(url) as store:
        assert await store.put(record("before")) is PutResult.STORED
        pair.proxies[0].lag(FOR_EVER)
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas had the write"):
            await store.put(record("after"))
    async with opened(pair.url) as store:
        assert await store.find("after") is None
        assert [lease.record.task_id for lease in await store.lease("t", 10, until=1.0)] == ["before"]


async def test_an_end_that_a_replica_does_not_have_is_not_acknowledged(pair: StandaloneRedis) -> None:
    url, end = f"{pair.url}?replicas=1", Completion(status="succeeded", result=b"result", finished_at=1.0)
    async with opened(url) as store:
        for task_id in ("acknowledged", "lost"):
            assert await store.put(record(task_id), fence="mine", until=10.0) is PutResult.STORED
        assert await store.finish("acknowledged", end, fence="mine")
        pair.proxies[0].lag(FOR_EVER)
        with pytest.raises(StoreUnavailable):
            await store.finish("lost", end, fence="mine")
        with pytest.raises(StoreUnavailable):  # nor does anybody read it before it is as durable
            await store.find("lost")
    async with opened(lose_master(pair)) as store:
        states = [(await store.find(task_id) or [None])[0] for task_id in ("acknowledged", "lost")]
        assert states == [RecordState.DONE, RecordState.LEASED]
        assert await store.finish("lost", end, fence="mine")  # as its holder does until it is stored


async def test_a_repeated_write_is_acknowledged_only_once_a_replica_has_it(pair: StandaloneRedis) -> None:
    """The master has done it already, so that the new connection has nothing to wait for by itself."""
    url, proxy = f"{pair.url}?replicas=1", pair.proxies[0]
    async with opened(url) as store:
        assert await store.put(record("before")) is PutResult.STORED
        proxy.lag(FOR_EVER)
        proxy.cut_at(1, "answer")
        with pytest.raises(StoreUnavailable):
            await store.put(record("after"))
        assert proxy.has_cut
    async with opened(lose_master(pair)) as store:
        assert await store.find("before") is not None
        assert await store.find("after") is None
