"""The classic side does what its module says."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from demo.classic_side import ATTEMPTS, Supervisor, Worker, with_retries
from demo.workload import Job, surge
from forebay.simulation import simulate


class Graph:
    """An agent that fails so many times before it answers."""

    def __init__(self, failures: int) -> None:
        self.failures = failures
        self.runs: list[float] = []

    async def ainvoke(self, payload: dict[str, Any]) -> dict[str, Any]:
        self.runs.append(asyncio.get_running_loop().time())
        if len(self.runs) <= self.failures:
            raise ConnectionError
        return payload


def test_a_failed_run_is_repeated_after_a_wait_that_may_double() -> None:
    graph = Graph(failures=3)
    assert simulate(lambda: with_retries(graph, {"topic": "rivers"})) == {"topic": "rivers"}
    gaps = [b - a for a, b in zip(graph.runs, graph.runs[1:], strict=False)]
    assert gaps[0] == pytest.approx(1.0)
    assert 1.0 <= gaps[1] <= 2.0
    assert 1.0 <= gaps[2] <= 4.0


def test_it_gives_up_after_six_attempts() -> None:
    graph = Graph(failures=100)
    with pytest.raises(ConnectionError):
        simulate(lambda: with_retries(graph, {}))
    assert len(graph.runs) == ATTEMPTS == 6


async def started(jobs: list[Job]) -> list[int]:
    """Return how many runs each of three workers starts if none ever ends."""
    counts = [0, 0, 0]

    def worker(number: int) -> Worker:
        async def handle(_job: Job) -> None:
            counts[number] += 1
            await asyncio.Event().wait()

        return Worker(handle)

    supervisor = Supervisor([worker(number) for number in range(3)])
    works = [asyncio.create_task(worker.work()) for worker in supervisor.workers]
    for job in jobs:
        supervisor.submit(job)
    for _ in range(4 * len(jobs)):
        await asyncio.sleep(0)
    for work in works:
        work.cancel()
    return counts


async def test_it_hands_out_in_turn_and_without_bound() -> None:
    assert await started(surge(90, 1)) == [30, 30, 30]
