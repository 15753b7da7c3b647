"""Killing a process while it drains: no task is lost whose ticket said that it is stored."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.task_stores import SHARED_STORES, StoreBackend

from forebay.overflow import open_task_store

TASKS = 8_000

DRAINING = """
import asyncio, sys
from forebay import BackpressureSupervisor, Task

url, tasks = sys.argv[1], int(sys.argv[2])

async def work(task):
    await asyncio.sleep(3600)

async def note(ticket):
    try:
        await ticket
    except Exception:
        print(ticket.task_id, flush=True)

async def main():
    supervisor = BackpressureSupervisor(overflow=url, max_queue_size=tasks, backpressure_threshold=1.0)
    supervisor.register_worker("worker", handler=work, task_types=["work"])
    await supervisor.start()
    tickets = [supervisor.submit_nowait(Task("work", number)) for number in range(tasks)]
    notes = [asyncio.ensure_future(note(ticket)) for ticket in tickets]
    await asyncio.sleep(0)
    print("draining", flush=True)
    await supervisor.drain(timeout=60)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARED_STORES, ids=str)
@pytest.mark.parametrize("after", [1, 1_500, 4_000])
def test_a_kill_while_draining_loses_no_task_that_was_said_to_be_stored(
    after: int, backend: StoreBackend, tmp_path: Path
) -> None:
    url = backend.url(tmp_path)
    command = [sys.executable, "-c", DRAINING, url, str(TASKS)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as victim:
        assert victim.stdout is not None
        assert victim.stdout.readline() == "draining\n"
        stored = [victim.stdout.readline() for _ in range(after)]
        victim.send_signal(signal.SIGKILL)
        stored += victim.stdout.readlines()
    whole = {line.strip() for line in stored if line.endswith("\n")}
    assert len(whole) >= after

    async def waiting() -> set[str]:
        store = open_task_store(url)
        await store.open()
        try:
            return {lease.record.task_id for lease in await store.lease("work", TASKS, until=0.0)}
        finally:
            await store.close()

    assert whole <= asyncio.run(waiting())
