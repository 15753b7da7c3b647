"""Shared state on Redis under a hundred agents: operations per second, compared with redis-py's pipelines."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from contextlib import ExitStack
from typing import Any

from tests.support.redis_servers import redis_server

from bench.baselines.raw_redis import agents_seconds, collected_seconds
from forebay.state import ShardedState

AGENTS = 100
ROUNDS = 200  # of a put and a get, by each agent
RUNS = 5
VALUE = {"notes": "x" * 400, "step": 7, "done": True}


async def state_seconds(urls: list[str]) -> float:
    """Return the seconds of concurrent agents on one state."""
    async with await ShardedState.connect(*urls) as state:

        async def agent(name: int) -> None:
            for number in range(ROUNDS):
                key = f"agent {name} {number % 10}"
                await state.put(key, VALUE)
                assert await state.get(key) is not None

        started = time.perf_counter()
        await asyncio.gather(*(agent(name) for name in range(AGENTS)))
        return time.perf_counter() - started


def run() -> dict[str, Any]:
    """Return operations per second, and ratios (more is better): of one and three shards over the baselines.

    `collected` is a program that sends all agents' commands of a round together, and waits for nothing else: the most
    that redis-py can do. `agents` are as many concurrent agents, with a pipeline each.
    """
    seconds: dict[str, list[float]] = {name: [] for name in ("state", "three_shards", "collected", "agents")}
    size = {"agents": AGENTS, "rounds": ROUNDS, "value": VALUE}
    with ExitStack() as stack:
        urls = [stack.enter_context(redis_server()).url for _ in range(3)]
        for _ in range(RUNS):
            gc.collect()
            seconds["collected"].append(collected_seconds(urls[0], **size))  # type: ignore[arg-type]
            seconds["state"].append(asyncio.run(state_seconds(urls[:1])))
            seconds["agents"].append(asyncio.run(agents_seconds(urls[0], **size)))  # type: ignore[arg-type]
            seconds["three_shards"].append(asyncio.run(state_seconds(urls)))
    operations = 2 * AGENTS * ROUNDS
    results: dict[str, Any] = {"agents": AGENTS, "operations": operations}
    for name, each in seconds.items():
        results[f"{name}_per_s"] = operations / statistics.median(each)
    for name in ("state", "three_shards"):
        for baseline in ("collected", "agents"):
            pairs = zip(seconds[baseline], seconds[name], strict=True)
            results[f"{name}_over_{baseline}"] = statistics.median(raw / own for raw, own in pairs)
    return results
