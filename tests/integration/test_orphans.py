"""No process that runs a handler outlives the program, however the program ends."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = r"""
import asyncio, os, re, signal, subprocess, sys, threading
from forebay import BackpressureSupervisor, Task

def handler(task):
    grandchild = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    os.write(1, f"{os.getpid()} {grandchild.pid}\n".encode())
    match task.payload:
        case "waits":
            threading.Event().wait()
        case "holds the lock":          # `re` does not release the interpreter lock
            re.fullmatch(r"(\w+\s?)+", "a" * 60 + "!")

async def main():
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], engine="process")
        await supervisor.run(Task("work", sys.argv[1]))

if __name__ == "__main__":
    asyncio.run(main())
"""

TIMEOUT = 60_000  # milliseconds


def over(pid: int) -> bool:
    """Wait for the end of a process, and return whether it came in time."""
    try:
        watched = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    poll = select.poll()
    poll.register(watched, select.POLLIN)
    try:
        return bool(poll.poll(TIMEOUT))
    finally:
        os.close(watched)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["waits", "holds the lock"])
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda end: end.name)
def test_no_process_outlives_the_program(task: str, end: signal.Signals, tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    running = subprocess.Popen([sys.executable, str(program), task], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert running.stdout is not None
    with running, running.stdout as output:
        pids = [int(pid) for pid in output.readline().split()]
        assert len(pids) == 2
        family = [int(pid) for pid in Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()]
        running.send_signal(end)
        assert over(running.pid)
    try:
        assert all(over(pid) for pid in {*pids, *family})
    except AssertionError:
        os.killpg(pids[0], signal.SIGKILL)  # else a failure would leave it running
        raise


def test_a_program_without_a_main_guard_fails_with_advice(tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM.replace('if __name__ == "__main__":', "if True:"))
    done = subprocess.run(
        [sys.executable, str(program), "waits"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 1
    assert 'below `if __name__ == "__main__":`' in done.stderr
