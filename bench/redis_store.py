"""The task store on Redis: tasks per second through a real server, compared with raw streams in the same run."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from typing import Any

from tests.support.redis_servers import RedisServer, redis_server

from bench.baselines.raw_streams import stream_seconds
from bench.store_calls import AT_ONCE, new_record, store_seconds
from forebay import BackpressureSupervisor, Task
from forebay.interfaces import TaskStore
from forebay.overflow import open_task_store

RECORDS = 20_000
PAYLOAD = b"x" * 500
BATCH = 500  # commands of the baseline in a round trip, as the store has at most; records in one lease
ROUNDS = 5
STAGES = ("put", "lease", "finish")
SPILLED = 300  # tasks that are put one by one into an idle store, to see how soon each is leased


async def news_seconds(url: str) -> list[float]:
    """Return the seconds from the end of each put by one process until another one has leased the record."""
    putter, leaser = open_task_store(url), open_task_store(url)
    await putter.open()
    await leaser.open()
    news = asyncio.Event()
    leaser.subscribe(on_waiting=news.set, on_ended=lambda: None)
    delays = []
    for record in [new_record(PAYLOAD) for _ in range(SPILLED)]:
        news.clear()
        await putter.put(record)
        stored = time.perf_counter()
        delays.append(await lease_one(leaser, news) - stored)
        await asyncio.sleep(0.03)  # as long as news may be held back, and more
    await putter.close()
    await leaser.close()
    return delays


async def lease_one(store: TaskStore, news: asyncio.Event) -> float:
    """Lease a record when there is news, and return the time."""
    while True:
        await news.wait()
        news.clear()
        if await store.lease("work", 1, until=time.time() + 1e6):
            return time.perf_counter()


async def room_seconds(url: str) -> list[float]:
    """Return the seconds from the end of a run, in a slot without a queue, to the start of the next spilled task."""
    seconds: list[float] = []
    ended = 0.0

    async def work(_: Task) -> None:
        nonlocal ended
        seconds.append(time.perf_counter() - ended)
        await asyncio.sleep(0.01)
        ended = time.perf_counter()

    supervisor = BackpressureSupervisor(overflow=url, max_queue_size=0)
    supervisor.register_worker("worker", handler=work, task_types=["work"], max_concurrent=1)
    async with supervisor:
        for ticket in await asyncio.gather(*(supervisor.submit(Task("work")) for _ in range(SPILLED))):
            await ticket
    return seconds[1:]


def cpu_seconds(server: RedisServer) -> tuple[float, float]:
    """Return the seconds of processor that this process and the server have used."""
    used = server.info("cpu")
    return time.process_time(), float(used["used_cpu_user"]) + float(used["used_cpu_sys"])


def run() -> dict[str, Any]:
    """Return tasks per second (more is better), microseconds of processor for a task and milliseconds (less is better).

    A busy machine makes everything slower, and changes the microseconds least.
    """
    cpu: dict[str, list[tuple[float, float]]] = {"store": [], "streams": []}
    stores: list[tuple[float, float, float]] = []
    streams: list[tuple[float, float, float]] = []
    with redis_server() as server:
        for _ in range(ROUNDS):
            records = [new_record(PAYLOAD) for _ in range(RECORDS)]
            gc.collect()
            before = cpu_seconds(server.servers[0])
            streams.append(stream_seconds(server.url, records, batch=BATCH))
            between = cpu_seconds(server.servers[0])
            gc.collect()
            stores.append(asyncio.run(store_seconds(f"{server.url}?bound={2 * RECORDS}", records, batch=BATCH)))
            after = cpu_seconds(server.servers[0])
            cpu["streams"].append((between[0] - before[0], between[1] - before[1]))
            cpu["store"].append((after[0] - between[0], after[1] - between[1]))
        delays = asyncio.run(news_seconds(f"{server.url}?name=news"))
        rooms = asyncio.run(room_seconds(f"{server.url}?name=room"))
    results: dict[str, Any] = {"records": RECORDS, "at_once": AT_ONCE}
    for name, runs in (("store", stores), ("streams", streams)):
        results[f"{name}_tasks_per_s"] = RECORDS / statistics.median(sum(each) for each in runs)
        for index, stage in enumerate(STAGES):
            results[f"{name}_{stage}_per_s"] = RECORDS / statistics.median(each[index] for each in runs)
        for index, side in enumerate(("client", "server")):
            results[f"{name}_{side}_us"] = 1e6 / RECORDS * statistics.median(each[index] for each in cpu[name])
    results["ratio"] = statistics.median(
        sum(stream) / sum(store) for store, stream in zip(stores, streams, strict=True)
    )
    for name, seconds in (("put_to_lease", delays), ("room_to_start", rooms)):
        results[f"{name}_p50_ms"] = 1e3 * statistics.median(seconds)
        results[f"{name}_p99_ms"] = 1e3 * statistics.quantiles(seconds, n=100)[98]
    return results
