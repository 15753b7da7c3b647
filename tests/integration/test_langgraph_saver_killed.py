"""A process that is killed in the middle of a graph, whose checkpoints another process goes on from."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
from tests.support.state_backends import SHARED_BACKENDS, StateBackend

BACKENDS = [
    pytest.param(backend, marks=() if backend.name == "sqlite" else pytest.mark.slow)
    for backend in SHARED_BACKENDS
    if backend.name in {"sqlite", "redis shards", "cluster"}
]

PROGRAM = """
import asyncio, operator, os, signal, sys
from typing import Annotated, TypedDict
from langgraph.graph import START, StateGraph
from forebay.adapters.langgraph import ShardedSaver
from forebay.state import ShardedState

role, folder, *urls = sys.argv[1:]

class State(TypedDict, total=False):
    messages: Annotated[list[str], operator.add]

def node(name):
    async def run(state):
        with open(f"{folder}/ran", "a") as ran:
            ran.write(f"{name}\\n")
        if name == "second" and role == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        return {"messages": [name]}
    return run

async def main():
    async with await ShardedState.connect(*urls) as state:
        graph = StateGraph(State)
        for name in ("first", "second", "third"):
            graph.add_node(name, node(name))
        graph.add_edge(START, "first").add_edge("first", "second").add_edge("second", "third")
        graph = graph.compile(checkpointer=ShardedSaver(state))
        config = {"configurable": {"thread_id": "t-1"}}
        started = {"messages": ["hello"]} if role == "killed" else None
        print((await graph.ainvoke(started, config, durability="sync"))["messages"])

asyncio.run(main())
"""


@pytest.mark.parametrize("backend", BACKENDS, ids=str)
def test_a_killed_run_goes_on_in_another_process(backend: StateBackend, tmp_path: Path) -> None:
    urls = backend.urls(tmp_path)

    def run(role: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, role, str(tmp_path), *urls]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    assert run("killed").returncode == -signal.SIGKILL
    resumed = run("resumed")
    assert resumed.stdout.strip() == "['hello', 'first', 'second', 'third']", resumed.stderr
    assert (tmp_path / "ran").read_text().split() == ["first", "second", "second", "third"]
