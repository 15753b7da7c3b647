"""What the task plane counts, and the frozen snapshot of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import msgspec

from forebay.interfaces import Reading, WorkerState

if TYPE_CHECKING:
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.worker import WorkerAgent


class WorkerStatistics(msgspec.Struct, frozen=True, kw_only=True):
    """One worker, at one moment. Durations in milliseconds."""

    name: str
    state: WorkerState
    current_tasks: int
    max_concurrent: int
    load_factor: float
    zombies: int
    avg_duration_ms: float


class Counters(msgspec.Struct, kw_only=True):
    """Running totals since the start."""

    submitted: int = 0
    admitted: int = 0
    spilled: int = 0
    rejected: int = 0
    refilled: int = 0
    started: int = 0
    succeeded: int = 0
    failed: int = 0
    timed_out: int = 0
    cancelled: int = 0
    expired: int = 0
    zombies: int = 0
    stalls: int = 0


class Statistics(msgspec.Struct, frozen=True, kw_only=True):
    """A snapshot of a supervisor.

    Attributes:
        submitted, admitted, spilled, rejected: verdicts since the start; a task found spilled at the start counts in
            none of them.
        refilled: spilled tasks that came back inside.
        started: starts of handlers.
        succeeded, failed, timed_out, cancelled, expired: endings.
        zombies: handlers that outlived their timeout or cancellation and the grace after it, since the start.
        stalls: times that code held up the event loop beyond its bound.
        running: slots taken now.
        waiting: tasks in the lines now.
        outside: tasks in the overflow now, as far as this process knows.
        load: `system_load()`.
        binding: the resource that reads highest; what its runs wait for, if that is why; None if all read 0.
        utilization: slots taken over slots.
        workers: each worker.
    """

    submitted: int
    admitted: int
    spilled: int
    rejected: int
    refilled: int
    started: int
    succeeded: int
    failed: int
    timed_out: int
    cancelled: int
    expired: int
    zombies: int
    stalls: int
    running: int
    waiting: int
    outside: int
    load: float
    limited_by: str | None
    utilization: float
    workers: tuple[WorkerStatistics, ...]


def snapshot(
    dispatcher: Dispatcher | None, workers: Mapping[str, WorkerAgent], readings: Sequence[Reading]
) -> Statistics:
    """What a supervisor is and has counted; without a house, it has not started."""
    highest = max(readings, key=lambda reading: reading.load)
    cause = highest.resource if dispatcher is None else dispatcher.load.limiting_resource(highest.resource)
    return Statistics(
        **msgspec.structs.asdict(Counters() if dispatcher is None else dispatcher.counts),
        running=sum(worker.current_tasks for worker in workers.values()),
        waiting=0 if dispatcher is None else sum(pool.waiting for pool in dispatcher.pools.values()),
        outside=0 if dispatcher is None or dispatcher.spill is None else dispatcher.spill.stored_tasks,
        load=highest.load,
        limited_by=cause if highest.load else None,
        utilization=utilization(workers),
        workers=tuple(_worker_statistics(worker) for worker in workers.values()),
    )


def utilization(workers: Mapping[str, WorkerAgent]) -> float:
    """Slots taken over slots, of all workers that are not FAILED; 0.0 if there are none."""
    slots = sum(worker.slots for worker in workers.values())
    taken = sum(worker.current_tasks for worker in workers.values() if not worker.failed)
    return taken / slots if slots else 0.0


def _worker_statistics(worker: WorkerAgent) -> WorkerStatistics:
    return WorkerStatistics(
        name=worker.name,
        state=worker.state,
        current_tasks=worker.current_tasks,
        max_concurrent=worker.max_concurrent,
        load_factor=worker.load_factor,
        zombies=worker.zombies,
        avg_duration_ms=worker.avg_duration_ms,
    )
