"""The classic supervisor: what a fleet of agents is usually run with.

What it stands for. Most code that runs many agents is a loop around ``asyncio.create_task``, or ``asyncio.gather``, or
``graph.abatch`` (whose ``max_concurrency`` is None unless somebody sets it). A supervisor accepts whatever comes and
hands it to its workers in turn; a worker starts what it is handed. It is good code: nothing blocks, failures are
caught, the SDK retries, and a task that failed is run again after exponential backoff with jitter. What it has not is a
notion of *full*. So runs are begun as fast as the loop turns, they all ask the one key for their first answer, whoever
gets it is one of thousands that ask for a second, and a run that gives up at its third call begins again at its first
and pays again. The key is as busy as under Forebay, and hardly anything gets done.

What is kind about it, so that it shows the idea and not a straw man:

- One client is shared, with the SDK's own bounds (1,000 connections, 600 s) and retries, which honour `retry-after-ms`.
- The retry waits and gives up as in OpenAI's published recipe, tenacity's ``wait_random_exponential(min=1, max=60)``
  and ``stop_after_attempt(6)`` ("How to handle rate limits", OpenAI Cookbook), written out in five lines. It is around
  the run, which is what a supervisor has in its hands; around each call it would change little (computed).
- Each of the ten workers begins one run in a turn of the event loop, as one does that fetches its tasks one by one.
  A bare ``gather`` fares worse: while ten thousand runs are being set up, no connection is made within the SDK's five
  seconds, and on a busy machine of two cores no answer arrived in a hundred seconds.
- The plant forgives hammering: a refused call costs the key nothing. OpenAI's guide to rate limits says that
  "unsuccessful requests contribute to your per-minute limit"; were it so here, next to nothing would be answered.
- It has no timeouts and no callers that leave, so nothing is cut off.

Its first hundred seconds are its worst, for many have begun and few have ended; a faster machine only begins more. In
400 s (measured, as was what follows, when answers came at 60 tokens a second) it settles at about 45 tasks a minute, a
fifth of what the key grants, with 3,000 runs under way. If the processor cost nothing (computed), it would do 35 a
minute in the first hundred, by having 9,900 of them give up. And the less processor it gets, the fewer it begins, which
helps it: with a fifth of a core it began 1,200 in 400 s (measured), and did 106 a minute at 1.8 times the least cost.

What some have instead: a semaphore in each worker. ``--classic-limit 5`` shows it: fifty runs at a time. They ask for
half as much again as the key grants, so six of ten calls were refused (measured), some runs gave up, a task cost 1.4
times the least, and three quarters were done of what Forebay does. A smaller semaphore would fit this key at this hour,
if somebody knew both. And the others wait in memory, in the order in which they came, whatever their priority; nobody
who submits one more is told no; and they are gone with their process.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from typing import Any, Final

from demo.agent import agent, connect
from demo.meter import Meter
from demo.sample import Orders
from demo.workload import Job, surge

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
