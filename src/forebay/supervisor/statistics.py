"""Statistics: a frozen snapshot of a supervisor."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from forebay._json import JsonStruct
from forebay.call_usage import NO_USAGE, CallUsage
from forebay.interfaces import WorkerState
from forebay.supervisor.type_counts import TaskTypeCounts
from forebay.task import TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.admission_controller import AdmissionController
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.loop_monitor import LoopMonitor
    from forebay.supervisor.worker import WorkerAgent


class WorkerStatistics(JsonStruct, frozen=True, kw_only=True):
    """One worker at one moment, and its counters since the start of the supervisor.

    Attributes:
        name: the worker's.
        state: IDLE, BUSY, OVERLOADED or FAILED.
        current_tasks: slots taken now, those of zombies included.
        max_concurrent: its slots.
        suspended: runs that have lent their slot now.
        load_factor: slots taken over slots.
        zombies: handlers that have been asked to stop and have not, now.
        avg_duration_ms: recent milliseconds of a success.
        started: starts of its handler.
        succeeded, failed, timed_out, cancelled, expired: how many attempts ended in each way. One that is left to
            another process counts in none.
        zombies_found: handlers that outlived the end of their attempt and the grace.
        busy_seconds: for how many seconds its slots were taken, summed over the slots. Its growth over a time, divided
            by ``max_concurrent`` times that time, is the worker's utilization.
        costs: US dollars of a task, given or learned, by task type; without those that are not known.
    """

    name: str
    state: WorkerState
    current_tasks: int
    max_concurrent: int
    suspended: int = 0
    load_factor: float
    zombies: int
    avg_duration_ms: float
    leaving: bool = False
    restarts: int = 0
    started: int = 0
    succeeded: int = 0
    failed: int = 0
    timed_out: int = 0
    cancelled: int = 0
    expired: int = 0
    zombies_found: int = 0
    busy_seconds: float = 0.0
    costs: Mapping[str, float] = {}


class TaskTypeStatistics(JsonStruct, frozen=True, kw_only=True):
    """The tasks of one type, since the start of the supervisor.

    Attributes:
        task_type: the type; ``"other"`` stands for those that are not counted apart, beyond a thousand.
        submitted, admitted, spilled, rejected: verdicts.
        started: starts of handlers.
        succeeded, failed, timed_out, cancelled, expired: how many tasks ended in each way.
        waiting: tasks in its queue now, as in `Statistics`.
        usage: of the calls of those that have ended.
    """

    task_type: str
    submitted: int = 0
    admitted: int = 0
    spilled: int = 0
    rejected: int = 0
    started: int = 0
    succeeded: int = 0
    failed: int = 0
    timed_out: int = 0
    cancelled: int = 0
    expired: int = 0
    waiting: int = 0
    usage: CallUsage = NO_USAGE


class Statistics(JsonStruct, frozen=True, kw_only=True):
    """A snapshot of a supervisor.

    Attributes:
        submitted, admitted, spilled, rejected: verdicts since the start. Tasks that were in the overflow at the start
            do not count.
        refilled: how often a task came back from the overflow: one that was spilled, a stored one for its next attempt,
            or one that an earlier run left there.
        started: starts of handlers.
        retries: how many retries the retry budget has allowed.
        succeeded, failed, timed_out, cancelled, expired: how many tasks ended in each way.
        zombies: handlers that outlived their timeout or cancellation and the grace after it, since the start.
        stalls: how often code blocked the event loop beyond its bound.
        running: slots taken now.
        suspended: runs that have lent their slot now, because they wait for tasks.
        waiting: tasks in the queues now, those parked behind their conversation inside, and `delayed`.
        delayed: tasks that wait here now for their next attempt, or for their `not_before`, without a slot.
        held: tasks that wait now for a cheaper worker though a slot is free. They are in `waiting`, too.
        outside: tasks in the overflow now, as far as this process knows.
        load: `system_load()`.
        limited_by: the resource with the highest load or, if that is a pool whose runs wait for an upstream, the
            upstream; None if every load is 0.
        utilization: slots taken over slots.
        workers: each worker that is registered now; one that is being unregistered is `leaving`.
        paused: the task types that are paused.
        task_types: each task type that has a worker, or had tasks.
    """

    submitted: int = 0
    admitted: int = 0
    spilled: int = 0
    rejected: int = 0
    refilled: int = 0
    started: int = 0
    retries: int = 0
    succeeded: int = 0
    failed: int = 0
    timed_out: int = 0
    cancelled: int = 0
    expired: int = 0
    zombies: int = 0
    stalls: int = 0
    running: int = 0
    suspended: int = 0
    waiting: int = 0
    delayed: int = 0
    held: int = 0
    outside: int = 0
    load: float = 0.0
    limited_by: str | None = None
    utilization: float = 0.0
    workers: tuple[WorkerStatistics, ...] = ()
    paused: tuple[str, ...] = ()
    task_types: tuple[TaskTypeStatistics, ...] = ()


def snapshot(
    dispatcher: Dispatcher,
    admission: AdmissionController,
    monitor: LoopMonitor | None,
    workers: Mapping[str, WorkerAgent],
) -> Statistics:
    """Return the statistics of a supervisor that has been started."""
    highest = max(dispatcher.load.readings(), key=lambda reading: reading.load)
    ends, spill = dispatcher.core.registry.ends, dispatcher.spill
    return Statistics(
        submitted=admission.submitted,
        admitted=admission.admitted,
        spilled=admission.spilled,
        rejected=admission.rejected,
        refilled=0 if spill is None else spill.refiller.refilled,
        started=dispatcher.started,
        retries=dispatcher.retries.allowed,
        succeeded=dispatcher.core.registry.succeeded,
        failed=ends[TaskStatus.FAILED],
        timed_out=ends[TaskStatus.TIMED_OUT],
        cancelled=ends[TaskStatus.CANCELLED],
        expired=ends[TaskStatus.EXPIRED],
        zombies=dispatcher.completion.zombies,
        stalls=0 if monitor is None else monitor.stalls,
        waiting=sum(pool.waiting for pool in dispatcher.core.pools.by_type.values()),
        delayed=sum(pool.delayed for pool in dispatcher.core.pools.by_type.values()),
        held=dispatcher.held.count,
        outside=0 if spill is None else spill.refiller.spilled_tasks,
        load=highest.load,
        paused=tuple(pool.task_type for pool in dispatcher.core.pools.by_type.values() if pool.paused),
        limited_by=dispatcher.load.limiting_resource(highest.resource) if highest.load else None,
        task_types=_task_type_statistics(dispatcher),
        **worker_statistics(workers, dispatcher.loop.time()),
    )


def _task_type_statistics(dispatcher: Dispatcher) -> tuple[TaskTypeStatistics, ...]:
    counted, pools = dispatcher.core.registry.types.by_type, dispatcher.core.pools.by_type
    found = []
    for task_type in sorted({*counted, *pools}):
        counts = msgspec.structs.asdict(counted.get(task_type) or TaskTypeCounts())
        admitted = counts["submitted"] - counts["spilled"] - counts["rejected"]
        waiting = pools[task_type].waiting if task_type in pools else 0
        found.append(TaskTypeStatistics(task_type=task_type, admitted=admitted, waiting=waiting, **counts))
    return tuple(found)


def worker_statistics(workers: Mapping[str, WorkerAgent], now: float) -> dict[str, Any]:
    """Return the fields of `Statistics` that are computed from the workers alone; `now` is loop time."""
    return {
        "running": sum(worker.current_tasks for worker in workers.values()),
        "suspended": sum(worker.suspended for worker in workers.values()),
        "utilization": utilization(workers),
        "workers": tuple(_worker_statistics(worker, now) for worker in workers.values()),
    }


def utilization(workers: Mapping[str, WorkerAgent]) -> float:
    """Return the slots taken over the slots, of all workers that are not FAILED; 0.0 if there are none."""
    slots = sum(worker.slots for worker in workers.values())
    taken = sum(min(worker.current_tasks, worker.slots) for worker in workers.values())
    return taken / slots if slots else 0.0


def _worker_statistics(worker: WorkerAgent, now: float) -> WorkerStatistics:
    return WorkerStatistics(
        name=worker.name,
        state=worker.state,
        current_tasks=worker.current_tasks,
        max_concurrent=worker.max_concurrent,
        suspended=worker.suspended,
        load_factor=worker.load_factor,
        zombies=worker.zombies,
        avg_duration_ms=worker.avg_duration_ms,
        leaving=worker.leaving,
        restarts=worker.restarts,
        started=worker.started,
        succeeded=worker.succeeded,
        failed=worker.other_ends[TaskStatus.FAILED],
        timed_out=worker.other_ends[TaskStatus.TIMED_OUT],
        cancelled=worker.other_ends[TaskStatus.CANCELLED],
        expired=worker.other_ends[TaskStatus.EXPIRED],
        zombies_found=worker.zombies_found,
        busy_seconds=worker.busy_seconds(now),
        costs=_costs(worker),
    )


def _costs(worker: WorkerAgent) -> dict[str, float]:
    if worker.costs is None:
        return {}
    return {kind: usd for kind in worker.task_types if (usd := worker.costs.of(kind)) is not None}
