"""A process that is killed in the middle loses nothing that it acknowledged as spilled or durable."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

WORKER = """
import asyncio, sys
from forebay import BackpressureSupervisor, Task

async def main(folder, first, last):
    done = open(f"{folder}/done", "a", buffering=1)
    acknowledged = open(f"{folder}/acknowledged", "a", buffering=1)

    async def work(task):
        await asyncio.sleep(0.02)
        done.write(f"{task.task_id}\\n")

    supervisor = BackpressureSupervisor(overflow=f"sqlite:///{folder}/spill.db", max_queue_size=5, lease=1.0)
    supervisor.register_worker("w", handler=work, task_types=["work"], max_concurrent=4)
    async with supervisor:
        async def submit(number):
            durable = number % 2 == 0
            ticket = await supervisor.submit(Task("work", number, task_id=f"t{number}", durable=durable))
            if durable or ticket.verdict.value == "spilled":
                acknowledged.write(f"t{number}\\n")
        for start in range(first, last, 50):
            await asyncio.gather(*(submit(number) for number in range(start, start + 50)))
            print(start, flush=True)
        if first == last:  # the survivor: what was running when its process was killed comes back as its lease lapses
            with open(f"{folder}/acknowledged") as known:
                tickets = [supervisor.ticket(task_id) for task_id in known.read().split()]
            results = await asyncio.gather(*tickets)
            print({result.status.value for result in results}, flush=True)

asyncio.run(main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3])))
"""


def start(folder: Path, first: int, last: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WORKER, str(folder), str(first), str(last)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def lines(path: Path) -> list[str]:
    return path.read_text().split() if path.exists() else []


def test_what_was_acknowledged_survives_kill_nine(tmp_path: Path) -> None:
    for round_ in range(3):
        with start(tmp_path, 1000 * round_, 1000 * round_ + 300) as victim:
            assert victim.stdout is not None
            for _ in range(round_ + 2):  # in the middle of submitting and of running
                victim.stdout.readline()
            victim.send_signal(signal.SIGKILL)
            victim.wait()
    with start(tmp_path, 5000, 5000) as survivor:
        output, _ = survivor.communicate(timeout=60)
    assert output == "{'succeeded'}\n"
    acknowledged, done = set(lines(tmp_path / "acknowledged")), lines(tmp_path / "done")
    assert len(acknowledged) > 100
    assert acknowledged <= set(done), sorted(acknowledged - set(done))
    assert all(done.count(task_id) <= 1 + 3 for task_id in set(done))  # at least once: again after a kill, not more
