"""Puts, leases and completions of the ledgers beside raw batched inserts at the same durability; a million spilled."""

from __future__ import annotations

import asyncio
import gc
import itertools
import os
import statistics
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from math import inf
from pathlib import Path
from typing import Any

from forebay import BackpressureSupervisor, Task
from forebay.events import Event, TaskFinished
from forebay.interfaces import Completion, Lease, PutResult, TaskRecord, TaskStore
from forebay.overflow import encode_task, open_task_store
from forebay.overflow.sqlite_schema import SCHEMA
from forebay.storage.sqlite_file import open_file
from forebay.storage.url import Synchronous
from forebay.task import Priority

ROWS = 20_000
AT_ONCE = 1_000  # putters that wait at a time, and rows in a raw transaction
LEASED = 100  # at a time
ROUNDS = 5
MILLION = int(os.environ.get("TASKS", "1000000"))
SLOTS = 100
SAMPLES = 50  # of resident memory, while spilling and again while refilling
BOUND = 2 * max(ROWS, MILLION)


def rows(count: int) -> list[TaskRecord]:
    """Rows as a supervisor makes them."""
    made = []
    for number in range(count):
        task = Task("work", {"topic": "rivers", "number": number})
        envelope = encode_task(task, task.payload, bound=1_000_000)
        made.append(
            TaskRecord(
                task_id=task.task_id,
                task_type=task.task_type,
                priority=Priority.NORMAL,
                envelope=envelope,
                enqueued_at=time.time(),
            )
        )
    return made


def raw(path: Path, synchronous: Synchronous, stored: list[TaskRecord]) -> float:
    """Seconds for the same rows into the same table and indexes, by executemany, as many in a transaction."""
    connection = open_file(path, SCHEMA, synchronous, 5.0)
    columns = "task_id, task_type, state, priority, due, key, attempts, enqueued_at, envelope"
    insert = f"INSERT INTO task ({columns}) VALUES (?, ?, 0, ?, ?, ?, 0, ?, ?)"  # noqa: S608
    began = time.perf_counter()
    for start in range(0, len(stored), AT_ONCE):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            insert,
            [
                (row.task_id, row.task_type, int(row.priority), inf, row.key, row.enqueued_at, row.envelope)
                for row in stored[start : start + AT_ONCE]
            ],
        )
        connection.execute("COMMIT")
    seconds = time.perf_counter() - began
    connection.close()
    return seconds


async def every(work: Callable[[Any], Awaitable[Any]], items: list[Any], expected: Any) -> float:
    """Seconds to do it for each, by so many who each wait for the answer before they take the next."""
    left = iter(items)

    async def one() -> None:
        for item in left:
            assert await work(item) is expected

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(AT_ONCE)))
    return time.perf_counter() - began


async def ledger_seconds(url: str, stored: list[TaskRecord]) -> tuple[float, float, float]:
    """Seconds for puts, leases and completions."""
    ledger = open_task_store(url)
    await ledger.open()

    def finish(lease: Lease) -> Awaitable[bool]:
        end = Completion(status="succeeded", result=b"result", attempts=1, finished_at=time.time())
        return ledger.finish(lease.record.task_id, end, fence=lease.fence)

    puts = await every(ledger.put, stored, PutResult.STORED)
    leases, leasing = await lease_all(ledger)
    assert len(leases) == len(stored)
    finishes = await every(finish, leases, True)
    await ledger.close()
    return puts, leasing, finishes


async def lease_all(ledger: TaskStore, limit: int = BOUND) -> tuple[list[Lease], float]:
    """Lease all that waits, a few at a time; what was leased, and the seconds that took."""
    leases: list[Lease] = []
    until = time.time() + 1e6
    began = time.perf_counter()
    while len(leases) < limit and (some := await ledger.lease("work", LEASED, until=until)):
        leases += some
    return leases, time.perf_counter() - began


def speed() -> Iterator[tuple[str, float]]:
    """Interleaved rounds: a second's worth of each, and the median ratio of the puts to raw inserts."""
    kinds = {"memory": "memory://?", **{f"sqlite_{how}": f"synchronous={how}&" for how in ("full", "normal", "off")}}
    took: dict[str, list[tuple[float, float, float]]] = {kind: [] for kind in kinds}
    by_hand: dict[str, list[float]] = {how: [] for how in ("full", "normal", "off")}
    for _ in range(ROUNDS):
        stored = rows(ROWS)
        for kind, url in kinds.items():
            with tempfile.TemporaryDirectory() as folder:
                gc.collect()
                if kind != "memory":
                    how = kind.removeprefix("sqlite_")
                    by_hand[how].append(raw(Path(folder, "raw.db"), Synchronous(how), stored))
                    url = f"sqlite:///{folder}/ledger.db?{url}"  # noqa: PLW2901
                took[kind].append(asyncio.run(ledger_seconds(f"{url}bound={BOUND}", stored)))
    for how, seconds in by_hand.items():
        yield f"raw_{how}_inserts_per_s", ROWS / statistics.median(seconds)
    for kind, samples in took.items():
        for place, what in enumerate(("puts", "leases", "completions")):
            yield f"{kind}_{what}_per_s", ROWS / statistics.median(sample[place] for sample in samples)
        if kind != "memory":
            ratios = [
                hand / puts for hand, (puts, _, _) in zip(by_hand[kind.removeprefix("sqlite_")], samples, strict=True)
            ]
            yield f"{kind}_put_ratio", statistics.median(ratios)


async def spilled_and_refilled(folder: str, tasks: int) -> dict[str, Any]:
    """Submit so many to a house that is full, let it run them all; resident memory in between, in megabytes.

    Nobody holds a ticket, as who submits a million will not: whoever wants a result asks by its id.
    """
    memory: list[float] = []
    full, empty = asyncio.Event(), asyncio.Event()
    done = itertools.count(1).__next__

    async def work(_: Task) -> None:
        await full.wait()

    def hear(event: Event) -> None:
        if isinstance(event, TaskFinished):
            if (count := done()) == tasks:
                empty.set()
            if count % (tasks // SAMPLES) == 0:
                memory.append(resident())

    async def submit(number: int) -> bool:
        ticket = await supervisor.submit(Task("work", {"topic": "rivers", "number": number}))
        if number % (tasks // SAMPLES) == 0:
            memory.append(resident())
        return bool(ticket)

    supervisor = BackpressureSupervisor(
        overflow=f"sqlite:///{folder}/ledger.db?synchronous=normal&bound={BOUND}", max_queue_size=SLOTS, on_event=hear
    )
    supervisor.register_worker("worker", handler=work, task_types=["work"], max_concurrent=SLOTS)
    async with supervisor:
        before = resident()
        spilling = await every(submit, list(range(tasks)), True)
        spilled = supervisor.statistics().spilled
        full.set()
        began = time.perf_counter()
        await empty.wait()
        refilling = time.perf_counter() - began
    return {
        "tasks_spilled": spilled,
        "tasks_refilled": supervisor.statistics().refilled,
        "spilled_per_s": tasks / spilling,
        "refilled_per_s": tasks / refilling,
        "resident_before_mb": before,
        "resident_peak_mb": max(memory),
        "resident_mb": memory,
    }


async def leases_when_full(folder: str, waiting: int) -> float:
    """Leases a second while so many rows wait."""
    ledger = open_task_store(f"sqlite:///{folder}/ledger.db?synchronous=off&bound={BOUND}")
    await ledger.open()
    await every(ledger.put, rows(waiting), PutResult.STORED)
    leases, seconds = await lease_all(ledger, limit=min(waiting, ROWS) // 2)
    await ledger.close()
    return len(leases) / seconds


def resident() -> float:
    """Megabytes of this process that are in memory."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def run() -> dict[str, Any]:
    """Figures for a second, ratios to raw inserts (more is better); the leases' to those from a short queue."""
    figures: dict[str, Any] = dict(speed())
    for waiting in (ROWS, MILLION):
        with tempfile.TemporaryDirectory() as folder:
            figures[f"leases_per_s_of_{waiting}"] = asyncio.run(leases_when_full(folder, waiting))
    gc.collect()
    with tempfile.TemporaryDirectory() as folder:
        return figures | asyncio.run(spilled_and_refilled(folder, MILLION))
