"""The task store on Redis: tasks per second through a real server, compared with raw streams in the same run."""

from __future__ import annotations

import asyncio
import gc
import statistics
import time
from collections.abc import Awaitable, Callable
from typing import Any

from tests.support.redis_servers import redis_server

from bench.baselines.raw_streams import stream_seconds
from forebay.interfaces import Completion, Lease, PutResult, TaskRecord, TaskStore
from forebay.overflow import open_task_store
from forebay.task import Priority

RECORDS = 20_000
PAYLOAD = b"x" * 500
AT_ONCE = 1_000  # calls in flight
BATCH = 500  # commands of the baseline in a round trip, as the store has at most; records in one lease
ROUNDS = 5
STAGES = ("put", "lease", "finish")
SPILLED = 300  # tasks that are put one by one into an idle store, to see how soon each is leased


def new_records() -> list[TaskRecord]:
    """Return records of 500 bytes."""
    return [
        TaskRecord(
            task_id=f"{time.time_ns():x}-{number:x}",
            task_type="work",
            priority=Priority.NORMAL,
            envelope=PAYLOAD,
            enqueued_at=time.time(),
        )
        for number in range(RECORDS)
    ]


async def for_each(work: Callable[[Any], Awaitable[Any]], items: list[Any], expected: Any) -> float:
    """Return the seconds to call `work` for each item, `AT_ONCE` calls at a time."""
    left = iter(items)

    async def one() -> None:
        for item in left:
            assert await work(item) is expected

    started = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return time.perf_counter() - started


async def store_seconds(url: str, records: list[TaskRecord]) -> tuple[float, float, float]:
    """Return the seconds to put, lease and finish all `records`."""
    store = open_task_store(url)
    await store.open()

    def finish(lease: Lease) -> Awaitable[bool]:
        completion = Completion(status="succeeded", result=b"result", attempts=1, finished_at=time.time())
        return store.finish(lease.record.task_id, completion, fence=lease.fence)

    putting = await for_each(store.put, records, PutResult.STORED)
    leases: list[Lease] = []
    started = time.perf_counter()
    while batch := await store.lease("work", BATCH, until=time.time() + 1e6):
        leases += batch
    leasing = time.perf_counter() - started
    assert len(leases) == len(records)
    finishing = await for_each(finish, leases, True)
    await store.prune(before=time.time() + 1.0)
    await store.close()
    return putting, leasing, finishing


async def news_seconds(url: str) -> list[float]:
    """Return the seconds from the end of each put by one process until another one has leased the record."""
    putter, leaser = open_task_store(url), open_task_store(url)
    await putter.open()
    await leaser.open()
    news = asyncio.Event()
    leaser.subscribe(on_waiting=news.set, on_ended=lambda: None)
    delays = []
    for record in new_records()[:SPILLED]:
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


def run() -> dict[str, Any]:
    """Return tasks per second (more is better), and milliseconds (less is better)."""
    stores: list[tuple[float, float, float]] = []
    streams: list[tuple[float, float, float]] = []
    with redis_server() as server:
        for _ in range(ROUNDS):
            records = new_records()
            gc.collect()
            streams.append(stream_seconds(server.url, records, batch=BATCH))
            gc.collect()
            stores.append(asyncio.run(store_seconds(f"{server.url}?bound={2 * RECORDS}", records)))
        delays = asyncio.run(news_seconds(f"{server.url}?name=news"))
    results: dict[str, Any] = {"records": RECORDS, "at_once": AT_ONCE}
    for name, runs in (("store", stores), ("streams", streams)):
        results[f"{name}_tasks_per_s"] = RECORDS / statistics.median(sum(each) for each in runs)
        for index, stage in enumerate(STAGES):
            results[f"{name}_{stage}_per_s"] = RECORDS / statistics.median(each[index] for each in runs)
    results["ratio"] = statistics.median(
        sum(stream) / sum(store) for store, stream in zip(stores, streams, strict=True)
    )
    results["put_to_lease_p50_ms"] = 1e3 * statistics.median(delays)
    results["put_to_lease_p99_ms"] = 1e3 * statistics.quantiles(delays, n=100)[98]
    return results
