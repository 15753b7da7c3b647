"""Durable task stores: a process killed at any moment. Those that are also shared: several processes on one store."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.task_stores import DURABLE_STORES, SHARED_STORES, StoreBackend

from forebay.interfaces import PutResult, RecordState, TaskRecord
from forebay.overflow import open_task_store
from forebay.task import Priority

PUTS = """
import asyncio, sys
from forebay.overflow import open_task_store
from forebay.task import Priority
from forebay.interfaces import Completion, PutResult, TaskRecord

async def put_forever(store, putter):
    number = 0
    while True:
        name = f"{putter}-{number}"
        record = TaskRecord(
            task_id=name, task_type="t", priority=Priority.NORMAL, envelope=b"x" * 500, enqueued_at=0.0
        )
        result = await store.put(record, fence="mine" if number % 2 else None, until=1.0)
        assert result is PutResult.STORED
        print("put", name, flush=True)
        if number % 2:
            end = Completion(status="succeeded", result=name.encode())
            assert await store.finish(name, end, fence="mine")
            print("finished", name, flush=True)
        number += 1

async def main():
    store = open_task_store(sys.argv[1])
    await store.open()
    await asyncio.gather(*(put_forever(store, putter) for putter in range(20)))

asyncio.run(main())
"""

LEASES = """
import asyncio, sys
from forebay.overflow import open_task_store

async def main():
    store = open_task_store(sys.argv[1])
    await store.open()
    leases = await store.lease("t", 7, until=1e12)  # before the start, so that each process gets some
    print("ready", flush=True)
    sys.stdin.readline()
    while leases:
        for lease in leases:
            print(lease.record.task_id, flush=True)
        leases = await store.lease("t", 7, until=1e12)
    await store.close()

asyncio.run(main())
"""


@contextmanager
def child(code: str, url: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", code, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("backend", "options"),
    [
        pytest.param(backend, options, id=f"{backend}{options}")
        for backend in DURABLE_STORES
        for options in backend.options
    ],
)
def test_acknowledged_writes_survive_a_kill(backend: StoreBackend, options: str, tmp_path: Path) -> None:
    url = backend.url(tmp_path, options=options)
    with child(PUTS, url) as process:
        assert process.stdout is not None
        output = [process.stdout.readline() for _ in range(400)]
        process.kill()
        output += process.stdout.readlines()  # what it had written when it died

    async def check() -> None:
        store = open_task_store(url)
        await store.open()
        for line in output:
            if not line.endswith("\n"):  # killed while it wrote the line
                continue
            what, name = line.split()
            found = await store.find(name)
            assert found is not None, line
            if what == "finished":
                assert found[0] is RecordState.DONE
                assert found[2] is not None
                assert found[2].result == name.encode()
        depths = await store.depths()
        leases = await store.lease("t", 1_000_000, until=10.0)
        assert len(leases) == sum(depths.values())
        await store.close()

    assert len(output) >= 400
    asyncio.run(check())


@pytest.mark.parametrize("backend", SHARED_STORES, ids=str)
def test_two_processes_never_lease_the_same_record(backend: StoreBackend, tmp_path: Path) -> None:
    url = backend.fast_url(tmp_path)

    async def fill() -> None:
        store = open_task_store(url)
        await store.open()
        records = [
            TaskRecord(task_id=f"{number}", task_type="t", priority=Priority.NORMAL, envelope=b"", enqueued_at=0.0)
            for number in range(2_000)
        ]
        assert set(await asyncio.gather(*map(store.put, records))) == {PutResult.STORED}
        await store.close()

    asyncio.run(fill())
    with child(LEASES, url) as one, child(LEASES, url) as two:
        for process in (one, two):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        outputs = []
        for process in (one, two):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
        for process in (one, two):
            out, _ = process.communicate(timeout=60)
            assert process.returncode == 0
            outputs.append(out.split())
    assert all(outputs)
    assert sorted(outputs[0] + outputs[1], key=int) == [f"{number}" for number in range(2_000)]


@pytest.mark.parametrize("backend", SHARED_STORES, ids=str)
def test_many_may_open_a_new_store_at_once(backend: StoreBackend, tmp_path: Path) -> None:
    """The first to come creates it, in SQLite the write-ahead log and the tables; the others wait for it."""
    for attempt in range(10):
        directory = tmp_path / str(attempt)
        directory.mkdir()

        async def open_all(url: str = backend.url(directory)) -> None:
            stores = [open_task_store(url) for _ in range(8)]
            await asyncio.gather(*(store.open() for store in stores))
            await asyncio.gather(*(store.close() for store in stores))

        asyncio.run(open_all())
