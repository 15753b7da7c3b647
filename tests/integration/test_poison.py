"""A task that kills its process is tried a bounded number of times, and no other task is lost with it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.task_stores import DURABLE_STORES, StoreBackend

ATTEMPTS = 3

WORKER = """
import asyncio, os, signal, sys
from forebay import BackpressureSupervisor, Priority, Task
from forebay.events import TaskDeadLettered

url, way, first = sys.argv[1:]

async def work(task):
    if task.payload == "poison":
        os._exit(7) if way == "exit" else os.kill(os.getpid(), signal.SIGKILL)

async def main():
    dead = asyncio.Event()

    def on_event(event):
        if isinstance(event, TaskDeadLettered):
            dead.set()

    async with BackpressureSupervisor(overflow=url, lease=0.5, max_attempts=3, on_event=on_event) as supervisor:
        supervisor.register_worker("w", handler=work, task_types=["work"])
        if first == "first":  # both are recorded under a lease, and only one can start
            await asyncio.gather(
                supervisor.submit(Task("work", "poison", task_id="poison", durable=True, priority=Priority.CRITICAL)),
                supervisor.submit(Task("work", "innocent", task_id="innocent", durable=True)),
            )
        await dead.wait()
        innocent = await (await supervisor.find("innocent"))
        print("innocent", innocent.status.value, innocent.attempts)
        poison = await (await supervisor.find("poison"))
        print("poison", poison.status.value, poison.attempts)
        async for letter in supervisor.dead_letters:
            print("letter", letter.task_id, letter.attempts, letter.error.split(":")[0])

asyncio.run(main())
"""


def run(url: str, way: str, which: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", WORKER, url, way, which]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, timeout=60, check=False)


@pytest.mark.slow
@pytest.mark.parametrize("backend", DURABLE_STORES, ids=str)
@pytest.mark.parametrize(("way", "code"), [("exit", 7), ("kill", -9)])
def test_a_task_that_kills_its_process_becomes_a_dead_letter(
    backend: StoreBackend, tmp_path: Path, way: str, code: int
) -> None:
    url = backend.url(tmp_path)
    for attempt in range(ATTEMPTS):
        assert run(url, way, "first" if attempt == 0 else "again").returncode == code
    survivor = run(url, way, "again")
    assert survivor.returncode == 0
    assert survivor.stdout.splitlines() == [
        "innocent succeeded 1",
        f"poison failed {ATTEMPTS}",
        f"letter poison {ATTEMPTS} LeaseLost",
    ]
