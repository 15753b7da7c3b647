"""A shard is added while several processes use the state, and one that rebalances is killed: nothing is lost."""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.support.redis_servers import redis_server
from tests.support.state_backends import MOVING_BACKENDS, StateBackend

from forebay.state import ShardedState

KEYS = [f"key {number}" for number in range(40)]
OTHERS = [f"other {number:05}" for number in range(3_000)]
PROCESSES = 3
ROUNDS = 5

PROGRAM = """
import asyncio, json, signal, sys
from forebay.state import ShardedState

what, urls, keys, rounds = json.loads(sys.argv[1])

async def increment(state):
    for _ in range(rounds):
        for key in keys:
            await state.update(key, lambda count: count + 1)
            await state.namespace(key).update("count", lambda count: (count or 0) + 1)

async def main():
    async with await ShardedState.connect(*urls, moving_from=urls[:-1]) as state:
        print("ready", flush=True)
        if what == "increment":
            await increment(state)
        else:
            await state.rebalance(wait_to_be_killed)

def wait_to_be_killed(progress):
    print(progress.moved, flush=True)
    signal.pause()

asyncio.run(main())
"""


@pytest.fixture(params=[each for each in MOVING_BACKENDS if each.name in {"sqlite", "redis", "cluster"}], ids=str)
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    backend: StateBackend = request.param
    return backend.urls(tmp_path)


async def start(what: str, urls: list[str]) -> asyncio.subprocess.Process:
    arguments = json.dumps([what, urls, KEYS, ROUNDS])
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", PROGRAM, arguments, stdout=asyncio.subprocess.PIPE
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"ready\n"
    return process


async def test_entries_move_away_from_a_server_that_is_full() -> None:
    with redis_server() as full, redis_server() as empty:
        async with await ShardedState.connect(full.url) as state:
            await asyncio.gather(*(state.put(key, key) for key in OTHERS[:300]), state.put("ttl", 1, ttl=1_000))
        full.master().ask("CONFIG", "SET", "maxmemory", 500_000, "maxmemory-policy", "noeviction")
        async with await ShardedState.connect(full.url, empty.url, moving_from=[full.url]) as state:
            moving = next(key for key in OTHERS if state.shard_of(key).startswith(empty.url))
            assert await state.delete(moving)
            assert 50 < (await state.rebalance()).moved < 250
            assert len([entry async for entry in state.scan()]) == 300
            assert await state.put(moving, 1, if_version=0) > 0


async def test_processes_that_count_during_a_rebalance_lose_nothing(urls: list[str]) -> None:
    async with await ShardedState.connect(*urls[:-1]) as state:
        await asyncio.gather(*(state.put(key, 0) for key in KEYS), *(state.put(key, key) for key in OTHERS))
    killed, *others = await asyncio.gather(
        start("rebalance", urls), *(start("increment", urls) for _ in range(PROCESSES))
    )
    assert killed.stdout is not None
    assert await killed.stdout.readline()  # it has moved some
    killed.kill()
    await killed.wait()
    async with await ShardedState.connect(*urls, moving_from=urls[:-1]) as state:
        await state.rebalance()
        assert await asyncio.gather(*(each.wait() for each in others)) == [0] * PROCESSES
        await state.rebalance()
    async with await ShardedState.connect(*urls) as state:
        found: dict[str, Any] = {entry.key: entry.value async for entry in state.scan()}
        assert found == dict.fromkeys(KEYS, PROCESSES * ROUNDS) | {key: key for key in OTHERS}
        for key in KEYS:
            count = await state.namespace(key).get("count")
            assert count is not None
            assert count.value == PROCESSES * ROUNDS
        assert len({state.shard_of(key) for key in OTHERS}) == len(urls)
