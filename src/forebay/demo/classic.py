"""The classic supervisor: what a fleet of agents is usually run with.

What it stands for. Most code that runs many agents is a loop around ``asyncio.create_task``, or ``asyncio.gather``, or
``graph.abatch`` (whose ``max_concurrency`` is None unless somebody sets it). A supervisor accepts whatever comes, hands
it to its workers in turn, and a worker starts what it is handed. It is good code: nothing blocks, failures are caught,
the SDK retries, and a task that fails is tried again with exponential backoff and jitter. What it has not is any notion
of *full*. So each of the ten thousand is begun; they all ask the one key for their first answer; whoever gets it is one
of thousands that ask for a second; and a run that gives up at its third call begins again at the first, and pays again.

What is kind about it, so that it shows the idea and not a straw man:

- The client is shared, with the SDK's own limits (1,000 connections) and retries, which honour ``retry-after-ms``.
- The retry is OpenAI's published recipe, ``wait_random_exponential(min=1, max=60), stop_after_attempt(6)`` of tenacity
  ("How to handle rate limits", OpenAI Cookbook), here in five lines.
- Each worker begins one run in a turn of the event loop. With a bare ``gather`` over ten thousand agents the loop is
  busy with beginnings for its first minute, no connection is made within the SDK's five seconds, and on our machines
  nothing at all was done in a hundred seconds.
- The plant forgives hammering: a refused call costs the key nothing, which OpenAI's documentation does not promise.
- It is given no timeout of its own and no caller that leaves.

What some have, and what it changes: a semaphore in each worker. That is half of Forebay. Then no more than fifty runs
are begun, and as many are done in a minute; but the other tasks wait in memory, in the order in which they came, and
are gone with their process. ``forebay demo --classic-limit 5`` shows it.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final

from forebay.demo.agent import agent, connect
from forebay.demo.meter import Meter
from forebay.demo.sample import Orders
from forebay.demo.workload import Job, surge

ATTEMPTS: Final = 6
LONGEST: Final = 60.0  # seconds

Handle = Callable[[Job], Awaitable[None]]


class Worker:
    """Starts a run for each task that it is handed, as they come."""

    def __init__(self, handle: Handle, *, limit: int | None = None) -> None:
        self.queue: asyncio.Queue[Job] = asyncio.Queue()
        self._runs: set[asyncio.Task[None]] = set()  # the loop itself holds them only weakly
        self._handle = handle
        self._room: AbstractAsyncContextManager[None] = asyncio.Semaphore(limit) if limit else nullcontext()

    async def work(self) -> None:
        """Take tasks for ever."""
        while True:
            job = await self.queue.get()
            run = asyncio.create_task(self._run(job))
            self._runs.add(run)
            run.add_done_callback(self._runs.discard)
            await asyncio.sleep(0)  # let the others have a turn

    async def _run(self, job: Job) -> None:
        async with self._room:
            await self._handle(job)


class Supervisor:
    """Hands each task to the next worker."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self._next = itertools.cycle(workers)

    def submit(self, job: Job) -> None:
        """Accept a task."""
        next(self._next).queue.put_nowait(job)


async def with_retries(graph: Any, payload: dict[str, Any]) -> Any:
    """Run an agent; if it fails, again, after a random wait from a window that doubles."""
    for attempt in range(1, ATTEMPTS):
        try:
            return await graph.ainvoke(payload)
        except Exception:  # noqa: BLE001 - as tenacity does, unless told otherwise
            await asyncio.sleep(random.uniform(1.0, min(LONGEST, 2.0 ** (attempt - 1))))  # noqa: S311 - jitter
    return await graph.ainvoke(payload)


async def run(orders: Orders, meter: Meter) -> None:
    """Meet the surge, until the process is ended."""
    settings = orders.settings
    jobs = surge(settings.tasks, settings.seed)
    client = connect(orders.provider, meter, retries=settings.sdk_retries)

    async def handle(graph: Any, job: Job) -> None:
        try:
            state = await with_retries(graph, job.payload())
        except Exception:  # noqa: BLE001 - one task's failure is not another's
            meter.failed()
        else:
            meter.done(state, seconds=time.monotonic() - submitted, priority=job.priority)

    def worker() -> Worker:
        graph = agent(client, orders.provider, meter)
        return Worker(lambda job: handle(graph, job), limit=settings.classic_limit)

    supervisor = Supervisor([worker() for _ in range(settings.workers)])
    works = [asyncio.create_task(worker.work()) for worker in supervisor.workers]
    meter.begin()
    submitted = time.monotonic()
    for job in jobs:
        supervisor.submit(job)
    meter.submitted = len(jobs)

    def look() -> None:
        meter.waiting = sum(worker.queue.qsize() for worker in supervisor.workers)
        meter.running = meter.submitted - meter.waiting - meter.ended

    meter.look = look
    await asyncio.wait(works)
