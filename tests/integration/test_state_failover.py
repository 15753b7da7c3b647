"""The Redis master of shared state is killed under load: its keys fail until another takes over, and none is lost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
from tests.support.callers import running
from tests.support.redis_servers import RedisSetup, redis_cluster, redis_sentinels

from forebay.errors import ShardAnswerLost, ShardUnavailable
from forebay.state import ShardedState

AGENTS = 20
BEFORE, AFTER = 100, 100  # updates of all agents together


@pytest.mark.slow
@pytest.mark.parametrize("start", [redis_sentinels, redis_cluster])
async def test_no_acknowledged_update_is_lost_with_the_master(
    start: Callable[[], AbstractContextManager[RedisSetup]],
) -> None:
    done, unknown, refused = Counter[int](), Counter[int](), Counter[int]()
    with start() as servers:
        async with await ShardedState.connect(f"{servers.url}?name=state&replicas=1", timeout=3.0) as state:

            async def agent(number: int) -> None:
                space = state.namespace(f"agent {number}")
                while True:
                    try:
                        await space.update("calls", lambda calls: (calls or 0) + 1)
                        done[number] += 1
                    except ShardAnswerLost:
                        unknown[number] += 1
                    except ShardUnavailable:
                        refused[number] += 1
                        await asyncio.sleep(0.05)

            async def until_done(more: int) -> None:
                goals = {number: done[number] + more // AGENTS for number in range(AGENTS)}
                while any(done[number] < goal for number, goal in goals.items()):  # noqa: ASYNC110 - nobody tells
                    await asyncio.sleep(0.05)

            async with asyncio.timeout(100.0), running(*map(agent, range(AGENTS))):
                await until_done(BEFORE)
                master = servers.master("state")
                master.kill()
                loop = asyncio.get_running_loop()
                await loop.run_in_executor(None, servers.promote, "state")
                await loop.run_in_executor(None, master.start)  # a replica now
                await until_done(AFTER)
            for number in range(AGENTS):
                counted = (await state.namespace(f"agent {number}").update("calls", lambda calls: calls)).value
                # One more may have been on its way when the agents were cancelled.
                assert done[number] <= counted <= done[number] + unknown[number] + 1
        assert sum(unknown.values()) + sum(refused.values()) > 0
