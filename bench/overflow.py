"""The overflow between processes: from room to start, from submit to start elsewhere, and one to ten supervisors."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier, Event
from pathlib import Path
from typing import Any, cast

from forebay import BackpressureSupervisor, Task
from forebay.interfaces import TaskStore
from forebay.overflow import open_task_store

URL = os.environ.get("OVERFLOW", "")  # a file in a temporary directory by default
PROCESSES = (1, 2, 5, 10)
SLOTS = 4  # of each process
SECONDS = 0.2  # that a task takes
TASKS = 60  # for each process
STARTS = 100  # tasks that are submitted one by one, while all processes are idle
GAP = 0.05  # seconds between two of these

_spawn = multiprocessing.get_context("spawn")


class CountingStore:
    """A task store that counts its calls."""

    def __init__(self, inner: TaskStore) -> None:
        self._inner = inner
        self.calls = Counter[str]()

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._inner, name)
        if not callable(attribute):
            return attribute

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls[name] += 1
            return attribute(*args, **kwargs)

        return call


class TimedHandler:
    """A handler that takes the seconds in its payload, and keeps its waits.

    Attributes:
        waits: seconds from submission to start.
        gaps: seconds from the end of a run to the start of the next one, where it had a slot alone.
    """

    def __init__(self) -> None:
        self.waits: list[float] = []
        self.gaps: list[float] = []
        self._running = 0
        self._ended_at: float | None = None

    async def __call__(self, task: Task) -> None:
        """Take the seconds of the task."""
        now = time.time()
        self.waits.append(now - task.payload["submitted"])
        if self._ended_at is not None and self._running == SLOTS - 1:
            self.gaps.append(now - self._ended_at)
        self._running += 1
        try:
            await asyncio.sleep(task.payload["seconds"])
        finally:
            self._running -= 1
            self._ended_at = time.time()


def run_worker(url: str, ready: Barrier, stop: Event, results: Queue[Any]) -> None:
    """Run one supervisor until `stop`, in a process of its own."""
    handler, store = TimedHandler(), CountingStore(open_task_store(url))

    async def run() -> None:
        async with BackpressureSupervisor(overflow=cast("TaskStore", store)) as supervisor:
            supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=SLOTS)
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(None, ready.wait)
            store.calls.clear()
            await loop.run_in_executor(None, stop.wait)
            results.put((handler.waits, handler.gaps, store.calls.total()))

    asyncio.run(run())


@asynccontextmanager
async def supervisors(count: int, url: str, results: list[Any]) -> AsyncIterator[BackpressureSupervisor]:
    """Run `count` supervisors, and yield one whose tasks all wait for them; then add to `results` what they report."""
    ready, stop, queue = _spawn.Barrier(count + 1), _spawn.Event(), _spawn.Queue()
    processes = [_spawn.Process(target=run_worker, args=(url, ready, stop, queue)) for _ in range(count)]
    for process in processes:
        process.start()
    loop = asyncio.get_running_loop()
    async with BackpressureSupervisor(overflow=url, max_queue_size=0) as here:
        here.register_worker("none", handler=TimedHandler(), task_types=["work"])
        here.pause("work")
        await loop.run_in_executor(None, ready.wait)
        yield here
        stop.set()
        results += [await loop.run_in_executor(None, queue.get) for _ in processes]
    for process in processes:
        process.join()


def new_task(seconds: float) -> Task:
    """Return a task that takes `seconds`."""
    return Task("work", {"submitted": time.time(), "seconds": seconds})


async def start_waits(count: int, url: str) -> Sequence[float]:
    """Return the seconds from submission to start, of tasks that find `count` idle supervisors."""
    results: list[Any] = []
    async with supervisors(count, url, results) as here:
        tickets = []
        for _ in range(STARTS):
            tickets.append(await here.submit(new_task(0.0)))
            await asyncio.sleep(GAP)
        await asyncio.gather(*tickets)
    return [wait for waits, *_ in results for wait in waits]


async def flood(count: int, url: str) -> tuple[float, float, Sequence[float]]:
    """Return the seconds of many tasks on `count` supervisors over the ideal, calls for each, and waits for a task."""
    results: list[Any] = []
    tasks = TASKS * count
    async with supervisors(count, url, results) as here:
        started = time.perf_counter()
        tickets = await asyncio.gather(*(here.submit(new_task(SECONDS)) for _ in range(tasks)))
        await asyncio.gather(*tickets)
        took = time.perf_counter() - started
    ideal = tasks * SECONDS / (SLOTS * count)
    return took / ideal, sum(calls for *_, calls in results) / tasks, [gap for _, gaps, _ in results for gap in gaps]


def idle_share(url: str, seconds: float = 10.0) -> float:
    """Return the share of a core that an idle supervisor uses."""

    async def run() -> float:
        async with BackpressureSupervisor(overflow=url) as supervisor:
            supervisor.register_worker("worker", handler=TimedHandler(), task_types=["work"])
            await asyncio.sleep(1.0)
            before = time.process_time()
            await asyncio.sleep(seconds)
            return (time.process_time() - before) / seconds

    return asyncio.run(run())


def run(*, quick: bool = False) -> dict[str, Any]:
    """Measure with each number of processes."""
    results: dict[str, Any] = {}
    counts = PROCESSES[::3] if quick else PROCESSES
    with tempfile.TemporaryDirectory() as directory:

        def url(name: str) -> str:
            return URL or f"sqlite:///{Path(directory)}/{name}.db?fsync=checkpoint"

        results["idle_percent_of_a_core"] = 100 * idle_share(url("idle"))
        for count in counts:
            waits = sorted(asyncio.run(start_waits(count, url(f"idle{count}"))))
            results[f"{count}_idle_start_ms_p50"] = 1e3 * statistics.median(waits)
            results[f"{count}_idle_start_ms_p99"] = 1e3 * waits[int(len(waits) * 0.99)]
        for count in counts:
            slowdown, calls, gaps = asyncio.run(flood(count, url(f"flood{count}")))
            results[f"{count}_flood_time_over_ideal"] = slowdown
            results[f"{count}_flood_calls_per_task"] = calls
            results[f"{count}_room_to_start_ms_p50"] = 1e3 * statistics.median(gaps)
    return results
