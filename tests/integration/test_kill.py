"""Killing processes at any moment: no acknowledged task is lost, and none is completed twice.

The processes share one store, so this is tested on the stores that are durable and shared.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from tests.support.task_stores import SHARED_SERVICES, StoreBackend

KILLS = 20

WORKER = """
import asyncio, os, sys
from forebay import BackpressureSupervisor, Task
from forebay.events import TaskFinished

folder, role, url = sys.argv[1:]

def note(name, task_id):  # one write, which a kill leaves whole or undone
    os.write(files[name], f"{task_id}\\n".encode())

files = {name: os.open(f"{folder}/{name}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
         for name in ("acknowledged", "completed", "started")}

def on_event(event):
    # Its completion is stored. (If a task was only looked up here, another process may report it too.)
    if isinstance(event, TaskFinished) and event.result.success and event.result.worker_id == role:
        note("completed", event.task_id)
        print("completed", flush=True)

async def work(task):
    note("started", task.task_id)
    await asyncio.sleep(0.01)

async def main():
    supervisor = BackpressureSupervisor(
        overflow=url, max_queue_size=5, lease=1.0, max_attempts=100, on_event=on_event
    )
    supervisor.register_worker(role, handler=work, task_types=["work"], max_concurrent=4)

    async def submit(number):
        durable = number % 2 == 0
        ticket = await supervisor.submit(Task("work", number, task_id=f"{role}-{number}", durable=durable))
        if durable or ticket.verdict.value == "spilled":
            note("acknowledged", ticket.task_id)
        print("submitted", flush=True)

    async with supervisor:
        if role != "survivor":
            for first in range(0, 1_000_000, 10):
                await asyncio.gather(*(submit(number) for number in range(first, first + 10)))
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)  # all others are dead
        with open(f"{folder}/acknowledged") as known:
            tickets = [await supervisor.find(task_id) for task_id in known.read().split()]
        results = await asyncio.gather(*tickets)
        print("ended", {result.status.value for result in results}, flush=True)

asyncio.run(main())
"""


def start(folder: Path, role: str, url: str, program: str = WORKER) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, str(folder), role, url]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def lines(path: Path) -> list[str]:
    return path.read_text().split()


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARED_SERVICES, ids=str)
def test_acknowledged_tasks_survive_twenty_kills_and_are_completed_once(backend: StoreBackend, tmp_path: Path) -> None:
    url = backend.url(tmp_path)
    with start(tmp_path, "survivor", url) as survivor:
        try:
            assert survivor.stdout is not None
            assert survivor.stdout.readline() == "ready\n"
            for kill in range(KILLS):
                with start(tmp_path, f"victim{kill}", url) as victim:
                    assert victim.stdout is not None
                    for _ in range(1 + kill * 7 % 60):  # in the middle of submitting, of running, of completing
                        assert victim.stdout.readline()
                    victim.send_signal(signal.SIGKILL)
            output, _ = survivor.communicate("all others are dead\n", timeout=60)
        finally:
            survivor.kill()
    assert [line for line in output.splitlines() if line != "completed"] == ["ended {'succeeded'}"]
    acknowledged, started = set(lines(tmp_path / "acknowledged")), Counter(lines(tmp_path / "started"))
    completed = Counter(lines(tmp_path / "completed"))
    assert len(acknowledged) > 100
    assert acknowledged <= set(started), sorted(acknowledged - set(started))
    assert max(completed.values()) == 1, completed.most_common(3)
    assert sum(count > 1 for count in started.values()) > 0  # else no kill hit a running task


RETRYING_WORKER = """
import asyncio, os, sys
from forebay import BackpressureSupervisor, Retry, Task, context
from forebay.retry import RetryBudget

folder, role, url = sys.argv[1:]

def note(name, *words):  # one write, which a kill leaves whole or undone
    os.write(files[name], (" ".join(map(str, words)) + chr(10)).encode())

files = {name: os.open(f"{folder}/{name}", os.O_CREAT | os.O_APPEND | os.O_WRONLY)
         for name in ("acknowledged", "attempts", "completed")}

def on_event(event):
    if event.kind == "retried":
        print("retried", flush=True)
    elif event.kind == "finished" and event.result.success and event.result.worker_id == role:
        note("completed", event.task_id)

async def work(task):
    attempt = context.running_task().attempt
    note("attempts", task.task_id, attempt, role)
    await asyncio.sleep(0.005)
    if task.payload % 3 == 0 and attempt < 3:
        raise ConnectionError("no answer")

async def main():
    supervisor = BackpressureSupervisor(
        overflow=url, max_queue_size=5, lease=1.0, max_attempts=100, on_event=on_event,
        retry_budget=RetryBudget(extra=10_000)
    )
    supervisor.register_worker(
        role, handler=work, task_types=["work"], max_concurrent=4, reset_timeout=0.05,
        retry=Retry(max_attempts=3, base_delay=0.2, max_delay=0.2)
    )
    async with supervisor:
        if role != "survivor":
            for number in range(90):
                thread_id = f"conversation-{number % 4}" if number % 2 else None
                await supervisor.submit(
                    Task("work", number, task_id=f"{role}-{number}", durable=True, thread_id=thread_id)
                )
                note("acknowledged", f"{role}-{number}")
        print("ready", flush=True)
        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)  # all others are dead
        with open(f"{folder}/acknowledged") as known:
            tickets = [await supervisor.find(task_id) for task_id in known.read().split()]
        results = await asyncio.gather(*tickets)
        print("ended", {result.status.value for result in results}, flush=True)

asyncio.run(main())
"""


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARED_SERVICES, ids=str)
def test_kills_between_attempts_forget_no_retry_and_no_attempt(backend: StoreBackend, tmp_path: Path) -> None:
    url = backend.url(tmp_path)
    with start(tmp_path, "survivor", url, RETRYING_WORKER) as survivor:
        try:
            assert survivor.stdout is not None
            assert survivor.stdout.readline() == "ready\n"
            for kill in range(KILLS // 2):
                with start(tmp_path, f"victim{kill}", url, RETRYING_WORKER) as victim:
                    assert victim.stdout is not None
                    retried = 0
                    while retried < 1 + kill * 5 % 9:  # so records are delayed, woken, leased and being delayed
                        line = victim.stdout.readline()
                        assert line
                        retried += line == "retried\n"
                    victim.send_signal(signal.SIGKILL)
            output, _ = survivor.communicate("all others are dead\n", timeout=60)
        finally:
            survivor.kill()
    assert output.splitlines()[-1] == "ended {'succeeded'}"
    attempts: dict[str, list[tuple[int, str]]] = {}
    for line in (tmp_path / "attempts").read_text().splitlines():
        task_id, attempt, role = line.split()
        attempts.setdefault(task_id, []).append((int(attempt), role))
    completed = Counter(lines(tmp_path / "completed"))
    assert set(lines(tmp_path / "acknowledged")) <= set(attempts)
    assert max(completed.values()) == 1, completed.most_common(3)
    for task_id, made in attempts.items():
        numbers = [number for number, _ in made]
        assert numbers == sorted(set(numbers)), (task_id, made)  # none is made twice, or forgotten
    moved = [made for made in attempts.values() if len({role for _, role in made}) > 1]
    assert moved  # else no kill hit a task between its attempts
