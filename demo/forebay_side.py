"""Forebay's side: the same agents behind a BackpressureSupervisor, with an overflow."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections import Counter
from typing import Final

from demo.agent import agent, connect
from demo.meter import Meter
from demo.sample import Instructions, Side
from demo.settings import Settings
from demo.stored_tasks import StoredTasks, count_overflow
from demo.workload import Job, surge
from forebay.errors import StoreUnavailable
from forebay.events import Event, TaskFinished
from forebay.interfaces import WorkerState
from forebay.supervisor import BackpressureSupervisor
from forebay.task import Task
from forebay.upstream import Upstream

TASK_TYPE: Final = "brief"
_AT_ONCE: Final = 500  # submissions at a time: the store writes them in groups
_INTERVAL: Final = 0.25  # seconds between readings of the supervisor's statistics
_MARGIN: Final = 0.5  # seconds of the drain that are left for requeuing what is cut off


async def run(instructions: Instructions, meter: Meter, stop: asyncio.Event) -> None:
    """Run the surge, or what the overflow holds, until all is done, time is up, or `stop` is set."""
    settings = instructions.settings
    started: dict[str, tuple[float, Job]] = {}

    def on_event(event: Event) -> None:
        if isinstance(event, TaskFinished):
            began, job = started.get(event.task_id, (None, None))
            if event.result.success:
                seconds = None if began is None else time.monotonic() - began
                meter.done(event.result.result, seconds=seconds, priority=None if job is None else job.priority)
            else:
                meter.failed()

    key = Upstream("key", provider=instructions.provider.rules)  # without limits: it learns them from the headers
    client = key.bind(connect(instructions.provider, meter, retries=settings.sdk_retries))
    jobs = surge(settings.tasks, settings.seed) if instructions.side is Side.FOREBAY else []
    supervisor = BackpressureSupervisor(
        overflow=settings.overflow, lease=settings.lease, on_event=on_event, keep_results=0
    )
    for number in range(1, settings.workers + 1):
        graph = agent(client, instructions.provider, meter)
        supervisor.register_worker(
            f"worker-{number}", handler=graph, task_types=[TASK_TYPE], max_concurrent=settings.slots
        )
    async with supervisor:
        meter.begin("surge" if jobs else "resumed")
        monitor = asyncio.create_task(_monitor(supervisor, key, meter))
        for first in range(0, len(jobs), _AT_ONCE):
            if stop.is_set():
                break
            await asyncio.gather(*(_submit(supervisor, job, started) for job in jobs[first : first + _AT_ONCE]))
            meter.submitted = min(len(jobs), first + _AT_ONCE)
        await _until_over(settings, meter, stop)
        meter.stage = "draining"
        draining = asyncio.create_task(supervisor.drain(timeout=max(0.0, settings.drain - _MARGIN)))
        await asyncio.wait((draining, asyncio.create_task(stop.wait())), return_when=asyncio.FIRST_COMPLETED)
        draining.cancel()
        monitor.cancel()
        _record(supervisor, key, meter)
        await supervisor.close()
    meter.waiting = meter.running = meter.queued = 0
    meter.spilled = (await asyncio.to_thread(count_overflow, settings.overflow)).to_do


async def _submit(supervisor: BackpressureSupervisor, job: Job, started: dict[str, tuple[float, Job]]) -> None:
    # durable: a task that starts at once survives a kill -9 too
    task = Task(TASK_TYPE, job.payload(), task_id=job.task_id, priority=job.priority, durable=True)
    started[job.task_id] = (time.monotonic(), job)
    await supervisor.submit(task)


async def _until_over(settings: Settings, meter: Meter, stop: asyncio.Event) -> None:
    """Wait until all is done, the time before the drain is up, or `stop` is set."""
    while not stop.is_set() and meter.seconds < settings.seconds - settings.drain:
        if meter.inside == 0 and (await _stored(settings)).to_do == 0:
            return
        try:
            async with asyncio.timeout(min(1.0, max(0.0, settings.seconds - settings.drain - meter.seconds))):
                await stop.wait()
        except TimeoutError:
            pass


async def _stored(settings: Settings) -> StoredTasks:
    """Return the counts of the task store, read from the store itself."""
    try:
        return await asyncio.to_thread(count_overflow, settings.overflow)
    except (sqlite3.OperationalError, StoreUnavailable):  # it is busy, or away: count again later
        return StoredTasks(waiting=1)


async def _monitor(supervisor: BackpressureSupervisor, key: Upstream, meter: Meter) -> None:
    while True:
        _record(supervisor, key, meter)
        await asyncio.sleep(_INTERVAL)


def _record(supervisor: BackpressureSupervisor, key: Upstream, meter: Meter) -> None:
    now = supervisor.statistics()
    states = Counter(worker.state for worker in now.workers)
    meter.running, meter.waiting, meter.spilled = now.running, now.waiting, now.outside
    meter.load, meter.limited_by = now.load, now.limited_by
    accounts = key.statistics().accounts  # one of them, once a call has been made
    meter.queued = sum(account.queued for account in accounts)
    meter.waiting_for = next((account.limited_by for account in accounts if account.load), None)
    meter.workers = {state.value: states[state] for state in WorkerState if states[state]}
