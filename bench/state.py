"""Shared state on Redis under a hundred agents, compared with redis-py used in two ways."""

from __future__ import annotations

import asyncio
import gc
import statistics
from contextlib import ExitStack
from typing import Any

from tests.support.redis_servers import redis_server

from bench.baselines.raw_redis import Spent, one_loop, pipeline_each
from forebay.state import ShardedState

AGENTS = 100
ROUNDS = 200  # of a put and a get, by each agent
RUNS = 5
VALUE = {"notes": "x" * 400, "step": 7, "done": True}


async def concurrent_agents(urls: list[str]) -> Spent:
    """Return what concurrent agents take on one state, each of which waits for its put, and then for its get."""
    async with await ShardedState.connect(*urls) as state:

        async def agent(name: int) -> None:
            for number in range(ROUNDS):
                key = f"agent {name} {number % 10}"
                await state.put(key, VALUE)
                assert await state.get(key) is not None

        started = Spent.now()
        await asyncio.gather(*(agent(name) for name in range(AGENTS)))
        return Spent.now().since(started)


def run() -> dict[str, Any]:
    """Return operations per second, microseconds of processor for one, and ratios of both (more is better).

    `state` and `three_shards` are a hundred agents on one server, and on three. The baselines, on one server:

    - `pipeline_each`: as many agents, each with a pipeline of redis-py for its two commands. It is what a program of
      agents does without this library.
    - `one_loop`: no agents, but a loop that has all commands of a round at hand. It is the most that redis-py can do.

    Both do less: they have no versions, no index for scans, and no time limit for each operation, and a write whose
    answer is lost may be done twice.
    """
    spent: dict[str, list[Spent]] = {name: [] for name in ("one_loop", "state", "pipeline_each", "three_shards")}
    size: dict[str, Any] = {"agents": AGENTS, "rounds": ROUNDS, "value": VALUE}
    with ExitStack() as stack:
        urls = [stack.enter_context(redis_server()).url for _ in range(3)]
        for _ in range(RUNS):
            gc.collect()
            spent["one_loop"].append(one_loop(urls[0], **size))
            spent["state"].append(asyncio.run(concurrent_agents(urls[:1])))
            spent["pipeline_each"].append(asyncio.run(pipeline_each(urls[0], **size)))
            spent["three_shards"].append(asyncio.run(concurrent_agents(urls)))
    operations = 2 * AGENTS * ROUNDS
    results: dict[str, Any] = {"agents": AGENTS, "operations": operations}
    for name, each in spent.items():
        results[f"{name}_per_s"] = operations / statistics.median(one.wall for one in each)
        results[f"{name}_cpu_us"] = 1e6 * statistics.median(one.cpu for one in each) / operations
    for name in ("state", "three_shards"):
        for baseline in ("pipeline_each", "one_loop"):
            pairs = list(zip(spent[baseline], spent[name], strict=True))
            results[f"{name}_over_{baseline}"] = statistics.median(raw.wall / own.wall for raw, own in pairs)
            results[f"{name}_over_{baseline}_cpu"] = statistics.median(raw.cpu / own.cpu for raw, own in pairs)
    return results
