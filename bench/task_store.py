"""Task stores: puts, leases and completions compared with raw inserts of equal durability; a million tasks spilled."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bench.baselines.raw_sqlite import insert_seconds
from bench.store_calls import AT_ONCE, for_each, lease_all, new_record, store_seconds
from forebay import BackpressureSupervisor, Task
from forebay.events import Event, TaskFinished
from forebay.interfaces import PutResult, TaskRecord
from forebay.overflow import encode_task, open_task_store
from forebay.storage.url import Fsync
from forebay.task import DEFAULT_TENANT

RECORDS = 20_000
LEASED = 100  # records in one lease
SHARES = {DEFAULT_TENANT: LEASED}
ROUNDS = 5
MILLION = int(os.environ.get("TASKS", "1000000"))
SLOTS = 100
SAMPLES = 50  # of resident memory, while spilling and again while refilling
BOUND = 2 * max(RECORDS, MILLION)


def new_records(count: int) -> list[TaskRecord]:
    """Return records with the envelopes of a supervisor."""
    tasks = [Task("work", {"topic": "rivers", "number": number}) for number in range(count)]
    return [new_record(encode_task(task, task.payload, bound=1_000_000), task.task_id) for task in tasks]


def rates() -> Iterator[tuple[str, float]]:
    """Yield the operations per second of each store, and the median ratio of its puts to raw inserts."""
    kinds = {"memory": "memory://?", **{f"sqlite_fsync_{how.value}": f"fsync={how.value}&" for how in Fsync}}
    seconds: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    raw: dict[str, list[float]] = {how.value: [] for how in Fsync}
    for _ in range(ROUNDS):
        records = new_records(RECORDS)
        for kind, url in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                gc.collect()
                if kind != "memory":
                    how = kind.removeprefix("sqlite_fsync_")
                    raw[how].append(insert_seconds(Path(folder, "raw.db"), Fsync(how), records, batch=AT_ONCE))
                    url = f"sqlite:///{folder}/tasks.db?{url}"  # noqa: PLW2901
                seconds[kind].append(
                    asyncio.run(store_seconds(f"{url}bound={BOUND}", records, batch=LEASED, shares=SHARES))
                )
    for how, samples in raw.items():
        yield f"raw_fsync_{how}_inserts_per_s", RECORDS / statistics.median(samples)
    for kind, runs in seconds.items():
        for index, operation in enumerate(("puts", "leases", "completions")):
            yield f"{kind}_{operation}_per_s", RECORDS / statistics.median(run[index] for run in runs)
        if kind != "memory":
            baseline = raw[kind.removeprefix("sqlite_fsync_")]
            ratios = [hand / puts for hand, (puts, _, _) in zip(baseline, runs, strict=True)]
            yield f"{kind}_put_ratio", statistics.median(ratios)


async def spill_and_refill(folder: str, tasks: int) -> dict[str, Any]:
    """Submit `tasks` tasks to a full supervisor and let it run them all; sample resident memory in megabytes.

    No ticket is kept, as with any submitter of a million tasks: results are read by task id.
    """
    memory: list[float] = []
    all_spilled, all_done = asyncio.Event(), asyncio.Event()
    next_count = itertools.count(1).__next__

    async def work(_: Task) -> None:
        await all_spilled.wait()

    def count_finished(event: Event) -> None:
        if isinstance(event, TaskFinished):
            if (count := next_count()) == tasks:
                all_done.set()
            if count % (tasks // SAMPLES) == 0:
                memory.append(resident_mb())

    async def submit(number: int) -> bool:
        ticket = await supervisor.submit(Task("work", {"topic": "rivers", "number": number}))
        if number % (tasks // SAMPLES) == 0:
            memory.append(resident_mb())
        return bool(ticket)

    supervisor = BackpressureSupervisor(
        overflow=f"sqlite:///{folder}/tasks.db?fsync=checkpoint&bound={BOUND}",
        max_queue_size=SLOTS,
        on_event=count_finished,
    )
    supervisor.register_worker("worker", handler=work, task_types=["work"], max_concurrent=SLOTS)
    async with supervisor:
        before = resident_mb()
        spilling = await for_each(submit, list(range(tasks)), True)
        spilled = supervisor.statistics().spilled
        all_spilled.set()
        started = time.perf_counter()
        await all_done.wait()
        refilling = time.perf_counter() - started
    return {
        "tasks_spilled": spilled,
        "tasks_refilled": supervisor.statistics().refilled,
        "spilled_per_s": tasks / spilling,
        "refilled_per_s": tasks / refilling,
        "resident_before_mb": before,
        "resident_peak_mb": max(memory),
        "resident_mb": memory,
    }


async def leases_per_second(folder: str, waiting: int) -> float:
    """Return the leases per second while `waiting` records wait."""
    store = open_task_store(f"sqlite:///{folder}/tasks.db?fsync=no&bound={BOUND}")
    await store.open()
    await for_each(store.put, new_records(waiting), PutResult.STORED)
    leases, seconds = await lease_all(store, batch=LEASED, shares=SHARES, limit=min(waiting, RECORDS) // 2)
    await store.close()
    return len(leases) / seconds


def resident_mb() -> float:
    """Return the resident memory of this process in megabytes."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run() -> dict[str, Any]:
    """Return operations per second, and ratios to raw inserts (more is better)."""
    results: dict[str, Any] = dict(rates())
    for waiting in (RECORDS, MILLION):
        with tempfile.TemporaryDirectory() as folder:
            results[f"leases_per_s_of_{waiting}"] = asyncio.run(leases_per_second(folder, waiting))
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        return results | asyncio.run(spill_and_refill(folder, MILLION))
