"""Agents that put and get values through redis-py itself, in two ways."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import msgspec
import redis
import redis.asyncio


def collected_seconds(url: str, *, agents: int, rounds: int, value: Any) -> float:
    """Return the seconds of a program that has all agents' commands of a round at hand, and sends them together.

    Nobody waits for any of them alone: there is no event loop, and no agent.
    """
    with redis.Redis.from_url(url) as client:
        started = time.perf_counter()
        for number in range(rounds):
            pipeline = client.pipeline(transaction=False)
            for agent in range(agents):
                pipeline.set(f"raw {agent} {number % 10}", msgspec.msgpack.encode(value))
            pipeline.execute()
            pipeline = client.pipeline(transaction=False)
            for agent in range(agents):
                pipeline.get(f"raw {agent} {number % 10}")
            for data in pipeline.execute():
                msgspec.msgpack.decode(data)
        return time.perf_counter() - started


async def agents_seconds(url: str, *, agents: int, rounds: int, value: Any) -> float:
    """Return the seconds of concurrent agents on one client, each with a pipeline of its own for both commands."""
    client = redis.asyncio.Redis.from_url(url, max_connections=agents)

    async def agent(name: int) -> None:
        for number in range(rounds):
            pipeline = client.pipeline(transaction=False)
            pipeline.set(f"raw {name} {number % 10}", msgspec.msgpack.encode(value))
            pipeline.get(f"raw {name} {number % 10}")
            msgspec.msgpack.decode((await pipeline.execute())[1])

    await asyncio.gather(*(agent(name) for name in range(agents)))  # connects
    started = time.perf_counter()
    await asyncio.gather(*(agent(name) for name in range(agents)))
    seconds = time.perf_counter() - started
    await client.aclose()
    return seconds
