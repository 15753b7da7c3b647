"""The Redis master is lost: with ?replicas=1 no acknowledged write goes with it, without it the newest ones do."""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, AbstractContextManager, AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

import pytest
from redis.crc import key_slot
from tests.support.callers import Accepted, running
from tests.support.redis_servers import (
    RedisSetup,
    StandaloneRedis,
    redis_cluster,
    redis_replicated,
    redis_sentinels,
    redis_server,
    until,
)
from tests.support.unreliable_store import AcknowledgedWrites, StoreFaults, UnreliableStore

from forebay import BackpressureSupervisor, Task, clock
from forebay.errors import StoreUnavailable
from forebay.interfaces import Completion, Lease, PutResult, RecordState, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.overflow import redis as redis_store
from forebay.overflow.redis import RedisTaskStore
from forebay.storage.redis_master import RedisMaster
from forebay.task import Priority

NAMES = itertools.count()
ENDLESS = 1e6  # seconds


def record(task_id: str, at: float = 0.0) -> TaskRecord:
    return TaskRecord(task_id=task_id, task_type="t", priority=Priority.NORMAL, envelope=b"envelope", enqueued_at=at)


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
    replica = pair.promote()
    return f"redis://127.0.0.1:{replica.port}/0"


async def test_without_a_replica_that_has_them_acknowledged_writes_are_lost_with_the_master(
    pair: StandaloneRedis,
) -> None:
    """The control: what the other tests hold does not hold by itself."""
    async with opened(pair.url) as store:
        assert await store.put(record("before")) is PutResult.STORED
        await in_thread(pair.wait_for_replicas)
        pair.proxies[0].lag(ENDLESS)
        assert await store.put(record("after")) is PutResult.STORED
    async with opened(lose_master(pair)) as store:
        assert await store.find("before") is not None
        assert await store.find("after") is None


async def test_what_a_replica_does_not_have_is_not_acknowledged_and_not_stored(pair: StandaloneRedis) -> None:
    url = f"{pair.url}?replicas=1"
    async with opened(url) as store:
        assert await store.put(record("before")) is PutResult.STORED
        pair.proxies[0].lag(ENDLESS)
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
        pair.proxies[0].lag(ENDLESS)
        with pytest.raises(StoreUnavailable):
            await store.finish("lost", end, fence="mine")
        with pytest.raises(StoreUnavailable):  # nor does anybody read it before it is as durable
            await store.find("lost")
    async with opened(lose_master(pair)) as store:
        states = [(await store.find(task_id) or [None])[0] for task_id in ("acknowledged", "lost")]
        assert states == [RecordState.DONE, RecordState.LEASED]
        assert await store.finish("lost", end, fence="mine")  # as its holder does until it is stored


async def test_a_start_that_a_replica_does_not_have_is_not_acknowledged(pair: StandaloneRedis) -> None:
    """With its start a replica has the lease: after it takes over, no other process takes a record that runs."""
    async with opened(f"{pair.url}?replicas=1") as store:
        await store.put(record("acknowledged"))
        (begun,) = await store.lease("t", 1, until=10.0)
        assert await store.begin_attempt(begun)
        await store.put(record("lost"))
        pair.proxies[0].lag(ENDLESS)
        (lost,) = await store.lease("t", 1, until=10.0)
        with pytest.raises(StoreUnavailable, match="only 0 of 1 replicas had the write"):
            await store.begin_attempt(lost)
    async with opened(lose_master(pair)) as store:
        assert [lease.record.task_id for lease in await store.lease("t", 10, until=10.0)] == ["lost"]
        end = Completion(status="succeeded", result=b"result", finished_at=1.0)
        assert await store.finish("acknowledged", end, fence=begun.fence)
        assert not await store.finish("lost", end, fence=lost.fence)


async def test_a_recorded_task_whose_lease_is_lost_with_the_master_does_not_start(
    pair: StandaloneRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A record is leased to its submitter once it is acknowledged, and so in a second write.

    The new master has too few replicas, too. That must not hide that it does not know the lease.
    """
    settle = RedisTaskStore._settle

    def settle_unseen(self: RedisTaskStore, master: RedisMaster) -> Sequence[Any]:
        if self._unsettled:
            pair.proxies[0].lag(ENDLESS)
        return settle(self, master)

    monkeypatch.setattr(RedisTaskStore, "_settle", settle_unseen)
    now = clock.wall_time()
    lease = Lease(record=record("a"), fence="mine", until=now + 10.0)
    async with opened(f"{pair.url}?replicas=1") as store:
        assert await store.put(lease.record, fence=lease.fence, until=lease.until, now=now) is PutResult.STORED
        assert [each.record.task_id for each in await store.list_records(RecordState.LEASED, 9)] == ["a"]
    async with opened(f"{lose_master(pair)}?replicas=1") as store:
        assert not await store.begin_attempt(lease)
        assert await store.lease("t", 1, until=now + 10.0) == []  # nor does it anywhere else, for a while
        assert (await store.wake(now=now + 41.0)).woken == 1
        assert [each.fence != lease.fence for each in await store.lease("t", 1, until=now + 99.0)] == [True]


async def test_a_repeated_write_is_acknowledged_only_once_a_replica_has_it(pair: StandaloneRedis) -> None:
    """The master has done it already, so that the new connection has nothing to wait for by itself."""
    url, proxy = f"{pair.url}?replicas=1", pair.proxies[0]
    async with opened(url) as store:
        assert await store.put(record("before")) is PutResult.STORED
        proxy.lag(ENDLESS)
        proxy.cut_at(1, "answer")
        with pytest.raises(StoreUnavailable):
            await store.put(record("after"))
        assert proxy.has_cut
    async with opened(lose_master(pair)) as store:
        assert await store.find("before") is not None
        assert await store.find("after") is None


# --- a master of Sentinels, or of a cluster, killed while it works ----------------------------------------------------

SETUPS: list[Callable[..., AbstractContextManager[RedisSetup]]] = [redis_sentinels, redis_cluster]
LAG = 0.05  # seconds that replicas are behind
PUTTERS = 10


class Load:
    """Callers that put records into one store all the time.

    Attributes:
        acknowledged: those that the store acknowledged.
        rejected: the ids of those that it rejected.
    """

    def __init__(self, store: TaskStore) -> None:
        self._store = store
        self._numbers = itertools.count()
        self.acknowledged = Accepted()
        self.rejected: list[str] = []

    def running(self) -> AbstractAsyncContextManager[None]:
        """Put records until the block ends."""
        return running(*(self._put_all_the_time() for _ in range(PUTTERS)))

    async def _put_all_the_time(self) -> None:
        while True:
            task_id = f"{next(self._numbers)}"
            try:
                assert await self._store.put(record(task_id)) is PutResult.STORED
                self.acknowledged.add(task_id)
            except StoreUnavailable as error:
                self.rejected.append(task_id)
                self.acknowledged.reject(error)


def replace_master(setup: RedisSetup) -> None:
    """Kill the master, promote a replica, and let what was the master follow it."""
    killed = setup.kill_master()
    setup.promote()
    killed.start()


async def lose_master_under_load(setup: RedisSetup, options: str) -> tuple[Load, set[str]]:
    """Kill the master of an overflow that works; return what was acknowledged, and what is stored afterwards."""
    for proxy in setup.proxies:
        proxy.lag(LAG)
    async with opened(setup.url + options) as store:
        load = Load(store)
        async with load.running():
            await load.acknowledged.more(100)
            await in_thread(partial(replace_master, setup))
            await load.acknowledged.more(100)
    async with opened(setup.url) as store:
        # A record whose master was lost before it was shown is DELAYED for a while.
        states = (RecordState.WAITING, RecordState.DELAYED)
        stored = {each.record.task_id for state in states for each in await store.list_records(state, 1_000_000)}
    return load, stored


@pytest.mark.slow
@pytest.mark.parametrize("start", SETUPS, ids=lambda start: start.__name__)
async def test_no_acknowledged_task_is_lost_with_a_master_that_is_killed_under_load(
    start: Callable[..., AbstractContextManager[RedisSetup]],
) -> None:
    with start(proxied=True) as setup:
        load, stored = await lose_master_under_load(setup, "?replicas=1")
    assert not set(load.acknowledged.ids) - stored
    assert not set(load.rejected) & stored  # nor was anybody told that a task is not stored that is


@pytest.mark.slow
@pytest.mark.parametrize("start", SETUPS, ids=lambda start: start.__name__)
async def test_without_replicas_that_have_them_the_newest_tasks_are_lost(
    start: Callable[..., AbstractContextManager[RedisSetup]],
) -> None:
    with start(proxied=True) as setup:
        load, stored = await lose_master_under_load(setup, "")
    assert set(load.acknowledged.ids) - stored


async def submit_all_the_time(supervisor: BackpressureSupervisor, name: str, accepted: Accepted) -> None:
    """Submit one durable task after the other."""
    for number in itertools.count():
        task_id = f"{name}-{number}"
        try:
            ticket = await supervisor.submit(Task("work", task_id=task_id, durable=True))
        except StoreUnavailable as error:
            accepted.reject(error)
            continue
        if ticket:
            accepted.add(task_id)
        await asyncio.sleep(0.002)


async def statuses(store: TaskStore, task_ids: Collection[str], *, within: float) -> dict[str, str]:
    """Return the statuses of tasks, once all have ended."""
    ended = dict[str, str]()
    try:
        async with asyncio.timeout(within):
            while set(task_ids) - ended.keys():
                for each in await store.list_records(RecordState.DONE, 1_000_000):
                    assert each.completion is not None
                    ended[each.record.task_id] = each.completion.status
                await asyncio.sleep(0.1)
    except TimeoutError:
        left = {task_id: await store.find(task_id) for task_id in set(task_ids) - ended.keys()}
        raise AssertionError(f"not ended within {within:.0f} s: {left}") from None
    return {task_id: ended[task_id] for task_id in task_ids}


@pytest.mark.slow
@pytest.mark.parametrize("start", SETUPS, ids=lambda start: start.__name__)
async def test_supervisors_lose_no_accepted_task_with_the_master_and_complete_none_twice(
    start: Callable[..., AbstractContextManager[RedisSetup]],
) -> None:
    writes, runs = AcknowledgedWrites(), Counter[str]()

    async def work(task: Task) -> None:
        runs[task.task_id] += 1
        await asyncio.sleep(0.01)

    with start(proxied=True) as setup:
        for proxy in setup.proxies:
            proxy.lag(LAG)
        async with AsyncExitStack() as stack:
            callers, accepted = [], [Accepted() for _ in range(2)]
            for number in range(2):
                inner = open_task_store(f"{setup.url}?replicas=1")
                recorded = UnreliableStore(inner, StoreFaults(), writes, clock.new_random(number))
                supervisor = BackpressureSupervisor(overflow=recorded, lease=3.0, max_queue_size=20, max_attempts=100)
                supervisor.register_worker(f"worker {number}", handler=work, task_types=["work"], max_concurrent=4)
                await stack.enter_async_context(supervisor)
                callers.append(submit_all_the_time(supervisor, f"{number}", accepted[number]))
            async with running(*callers):
                await asyncio.gather(*(each.more(50) for each in accepted))
                await in_thread(partial(replace_master, setup))
                await asyncio.gather(*(each.more(50) for each in accepted))
            task_ids = {task_id for each in accepted for task_id in each.ids}
            async with opened(setup.url) as direct:
                ended = await statuses(direct, task_ids, within=60.0)
    assert set(ended.values()) == {"succeeded"}
    assert max(writes.ended.values()) == 1, writes.ended.most_common(3)
    assert {runs[task_id] for task_id in task_ids} == {1}, runs.most_common(3)


@pytest.mark.slow
@pytest.mark.parametrize("start", SETUPS, ids=lambda start: start.__name__)
async def test_a_master_that_was_replaced_while_it_hung_acknowledges_nothing(
    start: Callable[..., AbstractContextManager[RedisSetup]],
) -> None:
    """A client that had nothing to do meanwhile is still connected to it."""
    with start() as setup:
        async with opened(f"{setup.url}?replicas=1") as store:
            assert await store.put(record("before")) is PutResult.STORED
            await in_thread(setup.wait_for_replicas)
            hung = setup.master()
            hung.stop()
            await in_thread(setup.promote)
            hung.go_on()
            acknowledged, rejected = ["before"], []
            for number in range(100):
                try:
                    assert await store.put(record(f"{number}")) is PutResult.STORED
                    acknowledged.append(f"{number}")
                except StoreUnavailable:
                    rejected.append(f"{number}")
                if len(acknowledged) > 20:
                    break
        await in_thread(lambda: until(lambda: hung in setup.replicas(), "the old master follows the new one"))
        async with opened(setup.url) as store:
            stored = {each.record.task_id for each in await store.list_records(RecordState.WAITING, 1_000_000)}
    assert stored == set(acknowledged), rejected


@pytest.mark.slow
async def test_an_fsync_each_second_is_waited_for() -> None:
    """Redis does so by default; a writer that comes just after one waits longest."""
    with redis_server(appendonly="yes", appendfsync="everysec") as durable:
        async with opened(f"{durable.url}?fsync=yes") as store:
            for number in range(5):
                assert await store.put(record(f"{number}")) is PutResult.STORED


@pytest.mark.slow
async def test_a_server_that_is_killed_again_and_again_loses_nothing_that_was_on_its_disk() -> None:
    with redis_server(appendonly="yes", appendfsync="always") as durable:
        [server] = durable.servers
        async with opened(f"{durable.url}?fsync=yes") as store:
            load = Load(store)
            async with load.running():
                for _ in range(5):
                    await load.acknowledged.more(50)
                    await in_thread(server.kill)
                    await in_thread(server.start)
                await load.acknowledged.more(50)
        async with opened(durable.url) as store:
            stored = {each.record.task_id for each in await store.list_records(RecordState.WAITING, 1_000_000)}
    assert not set(load.acknowledged.ids) - stored
    assert not set(load.rejected) & stored


# --- a slot of a cluster moves to another master ---------------------------------------------------------------------


def move_slot(cluster: RedisSetup, name: str) -> None:
    """Move the slot of an overflow to another master, as a resharding does."""
    source = cluster.master(name)
    target = next(each for each in cluster.servers[:3] if each is not source)
    slot = key_slot(f"{{{name}}}".encode())
    source_id, target_id = (each.ask("CLUSTER MYID") for each in (source, target))
    target.ask("CLUSTER", "SETSLOT", slot, "IMPORTING", source_id)
    source.ask("CLUSTER", "SETSLOT", slot, "MIGRATING", target_id)
    while keys := source.ask("CLUSTER", "GETKEYSINSLOT", slot, 100):
        source.ask("MIGRATE", "127.0.0.1", target.announced, "", 0, 5000, "KEYS", *keys)
    for each in (target, source):
        each.ask("CLUSTER", "SETSLOT", slot, "NODE", target_id)


@pytest.mark.slow
async def test_an_overflow_moves_to_another_master_of_its_cluster_while_it_works() -> None:
    with redis_cluster() as cluster:
        before = cluster.master()
        async with opened(cluster.url) as store:
            load = Load(store)
            async with load.running():
                await load.acknowledged.more(100)
                await in_thread(lambda: move_slot(cluster, "forebay"))
                await load.acknowledged.more(100)
        assert cluster.master() is not before
        async with opened(cluster.url) as store:
            stored = {each.record.task_id for each in await store.list_records(RecordState.WAITING, 1_000_000)}
    assert not set(load.acknowledged.ids) - stored
    assert not set(load.rejected) & stored
