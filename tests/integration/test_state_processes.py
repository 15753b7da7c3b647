"""Shared state in several processes: what they count together is right, also if one of them is killed."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.state_backends import SHARED_BACKENDS, StateBackend

from forebay.state import ShardedState

PROCESSES, AGENTS, UPDATES = 3, 5, 8

# Each agent counts in a key of all and in one of its own, and says what it has counted.
COUNT = """
import asyncio, json, sys
from forebay.state import ShardedState

async def main(urls, agents, updates):
    async with await ShardedState.connect(*urls, timeout=30.0) as state:
        async def agent(number):
            for _ in range(updates):
                await state.update("calls", lambda calls: (calls or 0) + 1)
                await state.namespace(f"agent-{number}").update("calls", lambda calls: (calls or 0) + 1)
                print("counted", flush=True)
        await asyncio.gather(*(agent(number) for number in range(agents)))

asyncio.run(main(*json.loads(sys.argv[1])))
"""


def count(urls: list[str], updates: int) -> subprocess.Popen[str]:
    """Start a process that counts."""
    arguments = json.dumps([urls, AGENTS, updates])
    return subprocess.Popen([sys.executable, "-c", COUNT, arguments], stdout=subprocess.PIPE, text=True)


async def counted(urls: list[str]) -> tuple[int, int]:
    """Return the count of all, and the sum of those of the agents."""
    async with await ShardedState.connect(*urls, timeout=30.0) as state:
        found = [await each.get("calls") for each in (state, *(state.namespace(f"agent-{n}") for n in range(AGENTS)))]
    total, *agents = [0 if each is None else each.value for each in found]
    return total, sum(agents)


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARED_BACKENDS, ids=str)
def test_processes_that_count_together_lose_nothing(backend: StateBackend, tmp_path: Path) -> None:
    urls = backend.urls(tmp_path)
    processes = [count(urls, UPDATES) for _ in range(PROCESSES)]
    outputs = [process.communicate(timeout=100)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * PROCESSES
    expected = PROCESSES * AGENTS * UPDATES
    assert sum(output.count("counted") for output in outputs) == expected
    assert asyncio.run(counted(urls)) == (expected, expected)


@pytest.mark.slow
@pytest.mark.parametrize("backend", SHARED_BACKENDS, ids=str)
def test_a_process_that_is_killed_has_counted_what_it_has_said(backend: StateBackend, tmp_path: Path) -> None:
    """At most one update of each agent is unsaid: the one that was on its way."""
    urls = backend.urls(tmp_path)
    with count(urls, 1_000_000) as process:
        assert process.stdout is not None
        said = [process.stdout.readline() for _ in range(25)]
        process.send_signal(signal.SIGKILL)
        said += process.stdout.readlines()
    total, of_agents = asyncio.run(counted(urls))
    complete = sum(line == "counted\n" for line in said)
    assert complete <= of_agents <= total <= complete + AGENTS
