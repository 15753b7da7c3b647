"""A spend log on a disk that is full, and one that many processes write to at the same time."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from forebay.spend_log import SpendQuery, read_spend

PREAMBLE = """
import os, sys
from forebay.spend_log import SpendAmounts, SpendLabels, SpendLog

spend_log = SpendLog("sqlite:///" + sys.argv[1])
spend_log.open()

def spend(model, usd=1.0):
    spend_log.record(SpendLabels(3600, "openai", "acme", model, ""), SpendAmounts(1, 1, 1, usd))
"""


def start(script: str, path: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PREAMBLE + textwrap.dedent(script), str(path)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def end(process: subprocess.Popen[str]) -> str:
    output, errors = process.communicate(timeout=60)
    assert process.returncode == 0, errors
    return output


def spent(path: Path) -> tuple[int, float]:
    (group,) = read_spend(path, SpendQuery(by=()))
    return group.amounts.calls, group.amounts.usd


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the size of files is bounded by a resource limit")
def test_what_is_spent_while_the_disk_is_full_is_written_once_there_is_room(tmp_path: Path) -> None:
    path = tmp_path / "spend.db"
    process = start(
        """
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        spend("first")
        assert spend_log.flush()
        room = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, room[1]))  # as if no file could grow
        for number in range(5_000):
            spend(f"model {number}")
        assert not spend_log.flush()
        assert not spend_log.flush()
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
        assert spend_log.flush()
        """,
        path,
    )
    end(process)
    assert spent(path) == (5_001, 5_001.0)


@pytest.mark.slow
def test_processes_that_write_at_the_same_time_lose_nothing_of_each_other(tmp_path: Path) -> None:
    path = tmp_path / "spend.db"
    script = """
    sys.stdin.readline()
    for number in range(200):
        spend(f"model {number % 7}", 0.25)
        assert spend_log.flush()
    """
    processes = [start(script, path) for _ in range(4)]
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        end(process)
    assert spent(path) == (800, 200.0)


@pytest.mark.slow
def test_a_process_that_is_killed_keeps_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "spend.db"
    process = start(
        """
        spend("written")
        assert spend_log.flush()
        print("written", flush=True)
        spend("perhaps")
        sys.stdin.readline()
        """,
        path,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "written\n"
    process.kill()
    process.communicate(timeout=60)
    calls, usd = spent(path)
    assert calls in (1, 2)
    assert usd == float(calls)
