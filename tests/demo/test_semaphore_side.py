"""The semaphore side runs a bounded number of tasks at a time, in the order of their submission."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from demo.semaphore_side import Worker
from demo.workload import surge
from forebay.simulation import simulate


class Graph:
    """An agent that takes a second, and notes how many of its runs are under way."""

    def __init__(self) -> None:
        self.running = self.peak = 0
        self.started: list[str] = []

    async def ainvoke(self, payload: dict[str, Any]) -> dict[str, Any]:
        self.started.append(payload["task_id"])
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(1.0)
        self.running -= 1
        return payload


def test_a_worker_runs_no_more_than_its_semaphore_allows_in_the_order_of_submission() -> None:
    graph, jobs = Graph(), surge(20, 1)

    async def run() -> Worker:
        worker = Worker(graph, limit=5)
        await asyncio.gather(*(worker.run(job) for job in jobs))
        return worker

    assert simulate(run).running == 0
    assert graph.peak == 5
    assert graph.started == [job.task_id for job in jobs]


def test_a_run_that_fails_for_good_frees_its_place() -> None:
    class Broken:
        async def ainvoke(self, _: dict[str, Any]) -> None:
            raise ConnectionError

    async def run() -> Worker:
        worker = Worker(Broken(), limit=1)
        for job in surge(2, 1):
            with pytest.raises(ConnectionError):
                await worker.run(job)
        return worker

    assert simulate(run).running == 0
