"""Durable saga logs: a process killed at any moment has acknowledged no entry that is lost."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.saga_logs import DURABLE_LOGS, LogBackend

from forebay.saga import SagaState, open_saga_log
from forebay.saga.records import LogWrite

SAGAS = 20
PER_ROUND = 5  # entries of a saga before it begins again

APPENDS = """
import asyncio, sys
from forebay.saga import SagaState, open_saga_log
from forebay.saga.records import LogWrite, SagaHeader

async def drive(log, saga_id, per_round):
    number = 0
    while True:
        header = SagaHeader(saga_id=saga_id, name="publish", version="1", envelope=b"x" * 500, submission=1.0)
        stored = await log.begin(header, b"restarted", fence="killed", until=100.0, now=0.0)
        assert stored.holder == "killed"
        number = len(stored.entries)
        print(saga_id, number, flush=True)
        for left in reversed(range(per_round)):
            state = SagaState.RUNNING if left else SagaState.COMPENSATED
            entry = f"{saga_id} {number}".encode()
            assert await log.append(saga_id, LogWrite(number, [entry], state), fence="killed", now=1.0)
            number += 1
            print(saga_id, number, flush=True)

async def main():
    log = open_saga_log(sys.argv[1])
    await log.open()
    await asyncio.gather(*(drive(log, f"saga-{number}", int(sys.argv[3])) for number in range(int(sys.argv[2]))))

asyncio.run(main())
"""


def kill_after(lines: int, url: str) -> dict[str, int]:
    """Run a process that drives sagas, kill it after so many acknowledgements; return the entries of each saga."""
    command = [sys.executable, "-c", APPENDS, url, str(SAGAS), str(PER_ROUND)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            read = [process.stdout.readline() for _ in range(lines)]
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
        finally:
            process.kill()
    acknowledged: dict[str, int] = {}
    for line in [*read, *output.splitlines(keepends=True)]:
        if line.endswith("\n"):
            saga_id, count = line.split()
            acknowledged[saga_id] = int(count)
    assert process.returncode == -signal.SIGKILL
    return acknowledged


@pytest.mark.parametrize("backend", DURABLE_LOGS, ids=str)
@pytest.mark.parametrize("lines", [1, 30, 333, 1_000])
async def test_acknowledged_entries_survive_a_kill(backend: LogBackend, lines: int, tmp_path: Path) -> None:
    url = backend.url(tmp_path)
    acknowledged = kill_after(lines, url)
    log = open_saga_log(url)
    await log.open()
    for saga_id, count in acknowledged.items():
        stored = await log.get(saga_id)
        assert stored is not None
        found = [entry.decode() for entry in stored.entries]
        assert len(found) in (count, count + 1)  # one may have been on its way
        assert found == [
            "restarted" if number % (PER_ROUND + 1) == PER_ROUND else f"{saga_id} {number}"
            for number in range(len(found))
        ]
        ended = len(found) % (PER_ROUND + 1) == PER_ROUND
        assert stored.header.state is (SagaState.COMPENSATED if ended else SagaState.RUNNING)
        assert stored.holder == ("" if ended else "killed")
    claimed = await log.claim(["publish"], limit=SAGAS, fence="survivor", until=200.0, now=100.0)
    for stored in claimed:
        write = LogWrite(len(stored.entries), [b"on"], SagaState.DONE)
        assert not await log.append(stored.header.saga_id, write, fence="killed", now=101.0)
        assert await log.append(stored.header.saga_id, write, fence="survivor", now=101.0)
    assert await log.list(states=[SagaState.RUNNING], limit=1) == []
    await log.close()
