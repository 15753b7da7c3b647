"""LangGraph's checkpoints in shared state: the time of reading a thread's latest one, by how many it has."""

from __future__ import annotations

import asyncio
import statistics
import tempfile
import time
from contextlib import ExitStack
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from tests.support.redis_servers import redis_cluster, redis_server

from forebay.adapters.langgraph import ShardedSaver
from forebay.state import ShardedState

FEW = 100
MANY = 100_000
QUICK = 10_000
READS = 300
MESSAGES = [f"message {number}: {'x' * 100}" for number in range(20)]


def _thread(name: str) -> RunnableConfig:
    return {"configurable": {"thread_id": name, "checkpoint_ns": ""}}


async def _put(saver: Any, thread: str, number: int) -> None:
    checkpoint = empty_checkpoint()
    version = f"{number:032}"
    checkpoint["channel_values"] = {"messages": MESSAGES, "step": number}
    checkpoint["channel_versions"] = {"messages": f"{0:032}", "step": version}
    new = {"messages": f"{0:032}", "step": version} if number == 0 else {"step": version}
    await saver.aput(_thread(thread), checkpoint, {"source": "loop", "step": number}, new)


async def _fill(saver: Any, thread: str, count: int) -> float:
    """Write so many checkpoints, some at once, and return the seconds."""
    started = time.perf_counter()
    for start in range(0, count, FEW):
        await asyncio.gather(*(_put(saver, thread, number) for number in range(start, start + FEW)))
    return time.perf_counter() - started


async def _read_seconds(saver: Any, thread: str) -> float:
    started = time.perf_counter()
    found = await saver.aget_tuple(_thread(thread))
    seconds = time.perf_counter() - started
    assert found is not None
    assert found.checkpoint["channel_values"]["messages"] == MESSAGES
    return seconds


async def _measure(saver: Any, many: int) -> tuple[float, float, float]:
    """Return the median seconds of a read at few checkpoints and at many, in turns, and those of a write."""
    await _fill(saver, "few", FEW)
    writing = await _fill(saver, "many", many)
    reads = [(await _read_seconds(saver, "few"), await _read_seconds(saver, "many")) for _ in range(READS)]
    at_few, at_many = (statistics.median(each) for each in zip(*reads, strict=True))
    return at_few, at_many, writing / many


async def _measure_shards(urls: list[str], many: int) -> tuple[float, float, float]:
    async with await ShardedState.connect(*urls) as state:
        return await _measure(ShardedSaver(state), many)


def run(*, quick: bool = False) -> dict[str, Any]:
    """Return for each kind of shard how much longer a read takes at many checkpoints (1: no longer), and its time.

    `memory_saver` is LangGraph's own saver, in memory, which looks at all ids of the thread.
    """
    many = QUICK if quick else MANY
    results: dict[str, Any] = {"few": FEW, "many": many}
    with ExitStack() as stack:
        directory = stack.enter_context(tempfile.TemporaryDirectory())
        kinds = {
            "memory": ["memory://"],
            "sqlite": [f"sqlite:///{directory}/state.db"],
            "redis": [stack.enter_context(redis_server()).url],
            "three_shards": [stack.enter_context(redis_server()).url for _ in range(3)],
            "cluster": [stack.enter_context(redis_cluster()).url],
        }
        for name, urls in kinds.items():
            at_few, at_many, writing = asyncio.run(_measure_shards(urls, many))
            results[f"{name}_read_ratio"] = at_many / at_few
            results[f"{name}_read_us"] = at_many * 1e6
            results[f"{name}_puts_per_s"] = 1 / writing

    at_few, at_many, _ = asyncio.run(_measure(InMemorySaver(), many))
    results["memory_saver_read_ratio"] = at_many / at_few
    return results
