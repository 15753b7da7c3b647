"""A shard of shared state that dies, hangs or is full: its keys fail, all others go on, and admission feels it."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from tests.support.redis_servers import StandaloneRedis, redis_cluster, redis_server, shared
from tests.support.switched_shard import SwitchedShard
from tests.support.task_plane import virtual

from forebay import BackpressureSupervisor, Overloaded, Retry, Task, TaskStatus
from forebay.clock import now
from forebay.errors import ShardAnswerLost, ShardUnavailable
from forebay.state import MemoryShard, ShardedState

TIMEOUT = 2.0  # seconds


@pytest.fixture
def servers() -> Iterator[list[StandaloneRedis]]:
    with redis_server() as one, redis_server() as two, redis_server() as three:
        yield [one, two, three]


def keys_of(state: ShardedState, server: StandaloneRedis) -> list[str]:
    """Return ten keys that are on `server`."""
    keys = (f"key {number}" for number in range(1_000))
    return [key for key in keys if state.shard_of(key).startswith(server.url)][:10]


async def until_up(state: ShardedState) -> None:
    while state.down:  # noqa: ASYNC110 - nobody tells
        await asyncio.sleep(0.05)


async def check_others(state: ShardedState, others: list[StandaloneRedis]) -> None:
    for server in others:
        for key in keys_of(state, server):
            version = await state.put(key, 1)
            assert await state.get(key) == (1, version)


@pytest.mark.parametrize("how", ["killed", "hangs"])
async def test_the_keys_of_a_shard_that_is_down_fail_at_once_and_the_others_go_on(
    servers: list[StandaloneRedis], how: str
) -> None:
    async with await ShardedState.connect(*(server.url for server in servers), timeout=TIMEOUT) as state:
        keys = keys_of(state, servers[0])
        await asyncio.gather(*(state.put(key, 0) for key in keys))
        dead = servers[0].master()
        if how == "killed":
            dead.kill()
        else:
            os.kill(dead.pid, signal.SIGSTOP)
        try:
            started = now()
            outcomes = await asyncio.gather(*(state.put(key, 1) for key in keys), return_exceptions=True)
            assert now() - started < TIMEOUT + 3.0  # in which the thread of the shard gives up
            assert all(isinstance(outcome, ShardUnavailable) for outcome in outcomes)
            started = now()
            for key in keys:
                with pytest.raises(ShardUnavailable, match=f":{dead.port}/") as error:
                    await state.get(key)
                assert not isinstance(error.value, ShardAnswerLost)
            assert now() - started < TIMEOUT
            with pytest.raises(ShardUnavailable):
                _ = [entry async for entry in state.scan()]
            await check_others(state, servers[1:])
            assert list(state.down) == [state.shard_of(keys[0])]
        finally:
            if how == "hangs":
                os.kill(dead.pid, signal.SIGCONT)
        if how == "killed":
            dead.start()
        await until_up(state)
        await asyncio.gather(*(state.put(key, 2) for key in keys))
        assert {entry.value for entry in [entry async for entry in state.scan("key")]} == {1, 2}


async def test_a_state_connects_while_a_shard_is_down(servers: list[StandaloneRedis]) -> None:
    dead = servers[0].master()
    dead.kill()
    async with await ShardedState.connect(*(server.url for server in servers), timeout=TIMEOUT) as state:
        with pytest.raises(ShardUnavailable):
            await state.get(keys_of(state, servers[0])[0])
        await check_others(state, servers[1:])
        dead.start()
        await until_up(state)
        await check_others(state, servers)


async def test_tasks_that_use_a_shard_which_is_down_are_rejected_before_they_run(
    servers: list[StandaloneRedis],
) -> None:
    async with await ShardedState.connect(servers[0].url, timeout=TIMEOUT) as state:

        async def count(_: Task) -> int:
            return int((await state.update("calls", lambda calls: (calls or 0) + 1)).value)

        async def think(_: Task) -> str:
            return "thought"

        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("counter", handler=count, task_types=["count"], max_concurrent=5)
            supervisor.register_worker("thinker", handler=think, task_types=["think"])
            assert await supervisor.run(Task("count")) == 1
            dead = servers[0].master()
            dead.kill()
            failed = [await supervisor.submit(Task("count")) for _ in range(3)]
            results = [await ticket for ticket in failed]
            assert {result.status for result in results} == {TaskStatus.FAILED}
            assert all("cannot be reached" in str(result.error) for result in results)
            with pytest.raises(Overloaded, match=f"shard:.*:{dead.port}/") as rejected:
                await supervisor.run(Task("count"))
            assert rejected.value.retry_after is not None
            assert await supervisor.run(Task("think")) == "thought"
            dead.start()
            await until_up(state)
            assert await supervisor.run(Task("count")) == 1  # it keeps nothing on disk


async def test_tasks_that_need_no_shard_which_is_down_go_on(servers: list[StandaloneRedis]) -> None:
    async with await ShardedState.connect(*(server.url for server in servers), timeout=TIMEOUT) as state:

        async def write(task: Task) -> int:
            return await state.put(str(task.payload), 1)

        keys = [keys_of(state, server) for server in servers]
        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("writer", handler=write, task_types=["write"], max_concurrent=10)
            await supervisor.map("write", [key for some in keys for key in some])
            dead = servers[0].master()
            dead.kill()
            for _ in range(3):
                results = await supervisor.map("write", [some[0] for some in keys], return_exceptions=True)
                assert [isinstance(result, int) for result in results] == [False, True, True]
            loads = {reading.resource: reading.load for reading in supervisor.readings()}
            assert loads[f"shard:{state.shard_of(keys[0][0])}"] == pytest.approx(1 / 3, abs=0.05)
            for server in servers[1:]:
                server.master().kill()
            await asyncio.gather(*(supervisor.submit(Task("write", some[0])) for some in keys))
            while len(state.down) < len(servers):  # noqa: ASYNC110 - nobody tells
                await asyncio.sleep(0.05)
            with pytest.raises(Overloaded, match="shard:"):
                await supervisor.run(Task("write", keys[0][0]))


async def test_a_full_shard_rejects_writes_that_add_and_goes_on(servers: list[StandaloneRedis]) -> None:
    async with await ShardedState.connect(servers[0].url, timeout=TIMEOUT) as state:
        server = servers[0].master()
        version = await state.put("key", "x" * 100)
        server.ask("CONFIG", "SET", "maxmemory", 500_000, "maxmemory-policy", "noeviction")
        for write in (state.put("key", 1), state.put("other", 1), state.put("key", 1, if_version=version)):
            with pytest.raises(ShardUnavailable, match="its memory is full"):
                await write
        assert await state.get("key") == ("x" * 100, version)
        assert not state.down
        assert await state.delete("key")


async def test_a_full_shard_in_memory_rejects_writes_that_add() -> None:
    async with await ShardedState.connect(MemoryShard(max_bytes=10_000)) as state:
        for number in range(20):
            await state.put(f"key {number}", b"x" * 100)
        with pytest.raises(ShardUnavailable, match="its memory is full"):
            await asyncio.gather(*(state.put(f"more {number}", b"x" * 100) for number in range(100)))
        await state.put("key 0", b"x" * 100)
        await state.delete("key 1")
        await state.put("another", b"x" * 100)


class SlowShard(MemoryShard):
    """A shard that takes seconds to answer."""

    async def get(self, *args: Any, **options: Any) -> Any:
        await asyncio.sleep(7.0)
        return await super().get(*args, **options)


@virtual
async def test_the_load_of_a_slow_shard_is_seen_by_admission() -> None:
    async with await ShardedState.connect(SlowShard("memory://slow"), timeout=10.0) as state:

        async def read(task: Task) -> Any:
            return await state.get(str(task.payload))

        async with BackpressureSupervisor() as supervisor:
            supervisor.register_worker("reader", handler=read, task_types=["read"], max_concurrent=20)
            tickets = [await supervisor.submit(Task("read", number)) for number in range(10)]
            await asyncio.sleep(6.0)
            loads = {reading.resource: reading.load for reading in supervisor.readings()}
            assert loads["shard:memory://slow"] == pytest.approx(0.6, abs=0.01)
            assert [result.success for result in await asyncio.gather(*tickets)] == [True] * 10


@virtual
async def test_a_retry_waits_until_the_shard_is_back() -> None:
    shard = SwitchedShard("memory://switched")
    async with await ShardedState.connect(shard) as state, BackpressureSupervisor() as supervisor:

        async def read(task: Task) -> Any:
            return await state.get(str(task.payload))

        supervisor.register_worker("reader", handler=read, task_types=["read"], retry=Retry(max_attempts=2))
        shard.is_off = True
        ticket = await supervisor.submit(Task("read", "key"))
        await asyncio.sleep(60.0)
        shard.is_off = False
        result = await ticket
        assert (result.status, result.attempts) == (TaskStatus.SUCCEEDED, 2)


async def test_a_cluster_is_used_though_the_threads_of_the_loop_are_taken() -> None:
    """Plain nodes of graphs run there, and may wait for the state themselves."""
    may_end = threading.Event()
    with ThreadPoolExecutor(1) as executor:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(executor)
        taken = loop.run_in_executor(None, may_end.wait)
        try:
            async with await ShardedState.connect(f"{shared(redis_cluster).url}?name=threads") as state:
                await state.put("key", 1)
                found = await state.get("key")
                assert found is not None
                assert found.value == 1
                assert await state.delete("key")
        finally:
            may_end.set()
            await taken
