"""The classic side: a supervisor without a limit, as most fleets of agents are run.

Most code that runs many agents is a loop around ``asyncio.create_task``, or ``asyncio.gather``, or ``graph.abatch``
(its ``max_concurrency`` is None unless somebody sets it). A supervisor accepts every task and hands it to its workers
in turn; a worker starts each task at once. It is good code: nothing blocks, failures are caught, the SDK retries, and a
task that failed is run again after exponential backoff with jitter. It has no notion of *full*. So runs start as fast
as the event loop turns, and all of them ask the one key for their first answer. A run that gets one competes with
thousands for its second, and a run that gives up at its third call starts again at its first and pays again. The key is
as busy as under Forebay, and hardly any task gets done.

The comparison is kind to it, so that it shows the idea and not a caricature:

- One client is shared, with the SDK's own bounds (1,000 connections, 600 s) and retries, which honour `retry-after-ms`.
- The retry waits and gives up as in OpenAI's published recipe, tenacity's ``wait_random_exponential(min=1, max=60)``
  and ``stop_after_attempt(6)`` ("How to handle rate limits", OpenAI Cookbook), written out in five lines. It is around
  the run, because a supervisor has runs in its hands; around each call it would change little (computed).
- Each of the ten workers starts one run in a turn of the event loop, as one does that fetches its tasks one by one.
  A bare ``gather`` does worse: while ten thousand runs are being set up, no connection is made within the SDK's five
  seconds, and on a busy machine of two cores no answer arrived in a hundred seconds.
- The simulated provider does not charge for refusals: a refused call takes nothing of the rate limit. OpenAI's guide
  says that "unsuccessful requests contribute to your per-minute limit"; then next to nothing would be answered here.
- It has no timeouts, and no caller leaves, so nothing is cut off.

Its first hundred seconds are its worst, because many runs have started and few have ended; a faster machine only starts
more. In 400 s (measured, as was what follows, at 60 tokens a second) it settles at about 45 tasks a minute, a fifth of
what the key grants, with 3,000 runs under way. If the processor cost nothing (computed), it would do 35 a minute in the
first hundred seconds, and 9,900 of its runs would give up. With less processor it starts fewer runs, which helps it:
with a fifth of a core it started 1,200 in 400 s (measured), and did 106 a minute at 1.8 times the least cost.
"""

from __future__ import annotations

import asyncio
import itertools
import random
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Final

from demo.agent import agent, connect
from demo.meter import Meter
from demo.sample import Instructions
from demo.workload import Job, surge

ATTEMPTS: Final = 6
MAX_DELAY: Final = 60.0  # seconds

Handle = Callable[[Job], Coroutine[Any, Any, None]]


class Worker:
    """A worker that starts a run for each task in its queue, without a limit."""

    def __init__(self, handle: Handle) -> None:
        self.queue: asyncio.Queue[Job] = asyncio.Queue()
        self._runs: set[asyncio.Task[None]] = set()  # the loop itself holds them only weakly
        self._handle = handle

    async def work(self) -> None:
        """Start a run for each task, until cancelled."""
        while True:
            job = await self.queue.get()
            run = asyncio.create_task(self._handle(job))
            self._runs.add(run)
            run.add_done_callback(self._runs.discard)
            await asyncio.sleep(0)  # let the other workers run


class Supervisor:
    """A supervisor that hands each task to the next worker."""

    def __init__(self, workers: Sequence[Worker]) -> None:
        self.workers = workers
        self._next = itertools.cycle(workers)

    def submit(self, job: Job) -> None:
        """Accept a task."""
        next(self._next).queue.put_nowait(job)


async def with_retries(graph: Any, payload: dict[str, Any]) -> Any:
    """Run an agent, and again if it fails, after a random delay from a window that doubles.

    Raises:
        Exception: the last of `ATTEMPTS` failed.
    """
    for attempt in range(1, ATTEMPTS):
        try:
            return await graph.ainvoke(payload)
        except Exception:  # noqa: BLE001 - as tenacity does by default
            await asyncio.sleep(random.uniform(1.0, min(MAX_DELAY, 2.0 ** (attempt - 1))))  # noqa: S311 - jitter
    return await graph.ainvoke(payload)


async def run(instructions: Instructions, meter: Meter) -> None:
    """Run the surge until the process is ended."""
    settings = instructions.settings
    jobs = surge(settings.tasks, settings.seed)
    client = connect(instructions.provider, meter, retries=settings.sdk_retries)

    async def handle(graph: Any, job: Job) -> None:
        try:
            state = await with_retries(graph, job.payload())
        except Exception:  # noqa: BLE001 - the failure of one task must not end the others
            meter.failed()
        else:
            meter.done(state, seconds=time.monotonic() - submitted, priority=job.priority)

    def worker() -> Worker:
        graph = agent(client, instructions.provider, meter)
        return Worker(lambda job: handle(graph, job))

    supervisor = Supervisor([worker() for _ in range(settings.workers)])
    work = [asyncio.create_task(worker.work()) for worker in supervisor.workers]
    meter.begin()
    submitted = time.monotonic()
    for job in jobs:
        supervisor.submit(job)
    meter.submitted = len(jobs)

    def observe() -> None:
        meter.waiting = sum(worker.queue.qsize() for worker in supervisor.workers)
        meter.running = meter.submitted - meter.waiting - meter.ended

    meter.observe = observe
    await asyncio.wait(work)
