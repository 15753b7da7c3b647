"""Worker processes that listen on one socket, as those of a gateway: which of them accepts a connection."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.support.redis_servers import runs, until

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="it has no workers")
ROOT = Path(__file__).parents[2]
PATIENCE = 60.0  # seconds on a slow machine


class WorkerProgram:
    """Running worker processes, and callers of them.

    Attributes:
        connections: those that were made, with the process id of the worker that has each.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.connections: list[tuple[socket.socket, int]] = []

    def connect(self) -> int:
        """Make a connection; return the process id of the worker that has accepted it."""
        connection = socket.create_connection(("127.0.0.1", self._port), timeout=PATIENCE)
        with connection.makefile("r") as lines:
            pid = int(lines.readline())
        self.connections.append((connection, pid))
        return pid

    def held(self) -> list[int]:
        """Return how many connections each worker has, the least first."""
        return sorted(Counter(pid for _, pid in self.connections).values())


@contextmanager
def workers(*options: object) -> Iterator[WorkerProgram]:
    command = [sys.executable, "-m", "tests.support.worker_program", *map(str, options)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        program = WorkerProgram(int(process.stdout.readline()))
        try:
            yield program
        finally:
            process.kill()
            for connection, _ in program.connections:
                connection.close()


def two_workers(program: WorkerProgram) -> tuple[int, int]:
    """Return the process ids of two workers, the one that has accepted first and the other."""
    first = program.connect()
    return first, until(lambda: {program.connect()} - {first}, "the other accepts", within=PATIENCE).pop()


def test_connections_that_stay_open_fall_evenly_on_two_workers() -> None:
    with workers(2, PATIENCE) as program:
        for _ in range(64):
            program.connect()
        assert sum(program.held()) == 64
        assert 30 <= program.held()[0] < 64


def test_connections_are_accepted_by_the_others_while_a_worker_hangs_and_by_it_afterwards() -> None:
    with workers(2) as program:
        hangs, other = two_workers(program)
        os.kill(hangs, signal.SIGSTOP)
        assert {program.connect() for _ in range(20)} == {other}
        os.kill(hangs, signal.SIGCONT)
        until(lambda: program.connect() == hangs, "it accepts again", within=PATIENCE)


def test_connections_are_accepted_by_the_others_once_a_worker_has_died_and_then_by_the_new_one() -> None:
    with workers(2) as program:
        dies, other = two_workers(program)
        os.kill(dies, signal.SIGKILL)
        until(lambda: not runs(dies), "it has died", within=PATIENCE)
        assert dies not in {program.connect() for _ in range(20)}
        until(lambda: program.connect() not in (dies, other), "the new one accepts", within=PATIENCE)


def test_a_worker_that_is_stopped_by_itself_leaves_connections_to_the_other() -> None:
    with workers(2) as program:
        stops, _ = two_workers(program)
        os.kill(stops, signal.SIGTERM)
        until(lambda: not runs(stops), "it has ended", within=PATIENCE)
        assert stops not in {program.connect() for _ in range(20)}
