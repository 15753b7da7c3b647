"""The ledger in SQLite where it has to hold: a process killed in the middle, several processes on one file."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from forebay.interfaces import PutResult, RecordState, TaskRecord
from forebay.overflow import open_task_store
from forebay.task import Priority

PUTS = """
import asyncio, sys
from forebay.overflow import open_ledger
from forebay.task import Priority
from forebay.interfaces import Completion, Put, Row

async def put_for_ever(ledger, putter):
    number = 0
    while True:
        name = f"{putter}-{number}"
        row = Row(task_id=name, task_type="t", priority=Priority.NORMAL, envelope=b"x" * 500, enqueued_at=0.0)
        assert await ledger.put(row, fence="mine" if number % 2 else None, until=1.0) is Put.STORED
        print("put", name, flush=True)
        if number % 2:
            end = Completion(status="succeeded", result=name.encode())
            assert await ledger.finish(name, end, fence="mine")
            print("finished", name, flush=True)
        number += 1

async def main():
    ledger = open_ledger(sys.argv[1])
    await ledger.open()
    await asyncio.gather(*(put_for_ever(ledger, putter) for putter in range(20)))

asyncio.run(main())
"""

LEASES = """
import asyncio, sys
from forebay.overflow import open_ledger

async def main():
    ledger = open_ledger(sys.argv[1])
    await ledger.open()
    leases = await ledger.lease("t", 7, until=1e12)  # so that each has some, however late it comes to its turn
    print("ready", flush=True)
    sys.stdin.readline()
    while leases:
        for lease in leases:
            print(lease.row.task_id, flush=True)
        leases = await ledger.lease("t", 7, until=1e12)
    await ledger.close()

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


@pytest.mark.parametrize("synchronous", ["full", "normal", "off"])
def test_what_was_acknowledged_survives_a_kill(tmp_path: Path, synchronous: str) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db?synchronous={synchronous}"
    with child(PUTS, url) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(400)]
        process.kill()
        said += process.stdout.readlines()  # what it had said when it died

    async def check() -> None:
        ledger = open_task_store(url)
        await ledger.open()
        for line in said:
            if not line.endswith("\n"):  # died in the middle of saying it
                continue
            what, name = line.split()
            found = await ledger.find(name)
            assert found is not None, line
            if what == "finished":
                assert found[0] is RecordState.DONE
                assert found[2] is not None
                assert found[2].result == name.encode()
        depths = await ledger.depths()
        leases = await ledger.lease("t", 1_000_000, until=10.0)
        assert len(leases) == sum(depths.values())
        await ledger.close()

    assert len(said) >= 400
    asyncio.run(check())


def test_two_processes_never_lease_the_same_row(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/ledger.db?synchronous=off"

    async def fill() -> None:
        ledger = open_task_store(url)
        await ledger.open()
        rows = [
            TaskRecord(task_id=f"{number}", task_type="t", priority=Priority.NORMAL, envelope=b"", enqueued_at=0.0)
            for number in range(2_000)
        ]
        assert set(await asyncio.gather(*map(ledger.put, rows))) == {PutResult.STORED}
        await ledger.close()

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


def test_many_may_open_a_new_file_at_once(tmp_path: Path) -> None:
    """The log is switched on and the schema made by whoever comes first, and the others wait for it."""
    for turn in range(10):
        url = f"sqlite:///{tmp_path}/ledger-{turn}.db"

        async def open_all(url: str = url) -> None:
            ledgers = [open_task_store(url) for _ in range(8)]
            await asyncio.gather(*(ledger.open() for ledger in ledgers))
            await asyncio.gather(*(ledger.close() for ledger in ledgers))

        asyncio.run(open_all())
