"""Puts and gets through redis-py itself, in two ways: a loop that collects all commands, and concurrent agents."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import msgspec
import redis
import redis.asyncio

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


class Spent(NamedTuple):
    """The seconds that have passed since some moment, and those of them in which this process had a processor."""

    wall: float
    cpu: float

    @classmethod
    def now(cls) -> Spent:
        """Return the seconds since the moments that the clocks count from."""
        return cls(time.perf_counter(), time.process_time())

    def since(self, started: Spent) -> Spent:
        """Return the seconds between two moments."""
        return Spent(self.wall - started.wall, self.cpu - started.cpu)


def one_loop(url: str, *, agents: int, rounds: int, value: Any) -> Spent:
    """Return what a plain loop takes that has all agents' commands of a round at hand.

    It sends their SETs in one pipeline, and then their GETs in another: there is no event loop, no agent that waits for
    an answer of its own, no version, and no index of the keys.
    """
    with redis.Redis.from_url(url) as client:
        started = Spent.now()
        for number in range(rounds):
            pipeline = client.pipeline(transaction=False)
            for agent in range(agents):
                pipeline.set(f"raw {agent} {number % 10}", _encode(value))
            pipeline.execute()
            pipeline = client.pipeline(transaction=False)
            for agent in range(agents):
                pipeline.get(f"raw {agent} {number % 10}")
            for data in pipeline.execute():
                _decode(data)
        return Spent.now().since(started)


async def pipeline_each(url: str, *, agents: int, rounds: int, value: Any) -> Spent:
    """Return what concurrent agents take on one client of redis-py.

    Each sends its SET and its GET in a pipeline of its own, on one of as many connections: one round trip, where an
    agent that waits for its SET first has two.
    """
    client = redis.asyncio.Redis.from_url(url, max_connections=agents)

    async def agent(name: int) -> None:
        for number in range(rounds):
            pipeline = client.pipeline(transaction=False)
            pipeline.set(f"raw {name} {number % 10}", _encode(value))
            pipeline.get(f"raw {name} {number % 10}")
            _decode((await pipeline.execute())[1])

    await asyncio.gather(*(agent(name) for name in range(agents)))  # connects
    started = Spent.now()
    await asyncio.gather(*(agent(name) for name in range(agents)))
    spent = Spent.now().since(started)
    await client.aclose()
    return spent
