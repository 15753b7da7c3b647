"""The semaphore side: a supervisor that gives each worker a semaphore, as many do who have seen a classic one fail.

It is the common repair: ``asyncio.Semaphore`` around each run, ``asyncio.gather`` over all tasks, the openai SDK's own
retries for each call, and a retry of a failed run as in OpenAI's recipe (see `classic_side`). Each worker runs as many
agents at a time as it does under Forebay, so all sides have the same fifty agents.

It bounds its own concurrency, so it neither runs out of memory nor drowns the provider. What it lacks:

- The size of a semaphore fits one rate limit at one latency. Fifty agents ask for half as much again as this key
  grants, so the provider refuses most calls, and some runs give up and pay again from their first call. A smaller
  semaphore would fit, if somebody knew both numbers at every hour.
- Tasks wait in memory in the order of their submission, whatever their priority, and they are lost with the process.
- A caller who submits another task is never rejected, and never learns when to come back.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from typing import Any

from demo.agent import agent, connect
from demo.classic_side import with_retries
from demo.meter import Meter
from demo.sample import Instructions
from demo.workload import Job, surge


class Worker:
    """An agent behind a semaphore.

    Args:
        graph: the agent.
        limit: runs at a time.
    """

    def __init__(self, graph: Any, limit: int) -> None:
        self.running = 0
        self._graph = graph
        self._semaphore = asyncio.Semaphore(limit)

    async def run(self, job: Job) -> Any:
        """Run one task when the semaphore lets it in, and return its graph's state.

        Raises:
            Exception: the last attempt failed.
        """
        async with self._semaphore:
            self.running += 1
            try:
                return await with_retries(self._graph, job.payload())
            finally:
                self.running -= 1


async def run(instructions: Instructions, meter: Meter) -> None:
    """Run the surge until the process is ended."""
    settings = instructions.settings
    jobs = surge(settings.tasks, settings.seed)
    client = connect(instructions.provider, meter, retries=settings.sdk_retries)
    workers = [Worker(agent(client, instructions.provider, meter), settings.slots) for _ in range(settings.workers)]

    async def handle(worker: Worker, job: Job) -> None:
        try:
            state = await worker.run(job)
        except Exception:  # noqa: BLE001 - the failure of one task must not end the others
            meter.failed()
        else:
            meter.done(state, seconds=time.monotonic() - submitted, priority=job.priority)

    def observe() -> None:
        meter.running = sum(worker.running for worker in workers)
        meter.waiting = meter.submitted - meter.running - meter.ended

    meter.begin()
    submitted = time.monotonic()
    meter.submitted = len(jobs)
    meter.observe = observe
    await asyncio.gather(*(handle(worker, job) for worker, job in zip(itertools.cycle(workers), jobs, strict=False)))
