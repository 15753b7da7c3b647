"""Pressure: what each resource holds against what it may hold, and which of them binds on a task's path."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay.interfaces import LoadSource, Reading
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.worker import WorkerAgent


class SystemLoad:
    """The readings of one house. Pure: it looks at its pools and workers, and is told of the host.

    Attributes:
        host: how late the event loop is, against how late it may be; kept up by the watch.
    """

    __slots__ = ("_pools", "_workers", "host")

    def __init__(self, pools: Mapping[str, Pool], workers: Mapping[str, WorkerAgent]) -> None:
        self._pools = pools
        self._workers = workers
        self.host = 0.0

    def on_path(self, pool: Pool, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """The load on a task's path and the resource that binds it: the lowest over the workers of the highest reading.

        All workers of a pool share its line and this host; those that are supervisors have a load of their own below.
        """
        load, binding = (
            self.beyond_pool(pool, priority) if pool.nested_supervisors or pool.source_paths else (self.host, "host")
        )
        own = pool.load()
        return (own, pool.resource) if own >= load else (load, binding)

    def beyond_pool(self, pool: Pool, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """As `on_path`, but past the pool itself, which refuses nobody while a slot is free."""
        load, binding = self.host, "host"
        if pool.nested_supervisors and len(pool.nested_supervisors) == len(pool.workers):
            below, name = min((_nested_load(worker, pool.task_type), worker.name) for worker in pool.nested_supervisors)
            if below > load:
                load, binding = below, f"worker:{name}"
        if pool.source_paths:
            drawn = min(_highest_reading(path, priority) for path in pool.source_paths)
            if drawn[0] > load:
                load, binding = drawn
        return load, binding

    def time_until_below(self, pool: Pool, priority: Priority, load: float) -> tuple[float, float]:
        """When what a worker draws on reads less than `load`, and how far apart runs fit in then: see `Source.time_until_below`.

        Both are 0 if there is a worker of which nothing that it draws on is short: then the pool's own pace counts.
        """
        return min(
            (_path_time_until_below(pool, path, priority, load) for path in pool.source_paths), default=(0.0, 0.0)
        )

    def limiting_resource(self, resource: str) -> str:
        """What has to be relieved for `resource` to be: of a pool whose runs wait for what they draw on, that.

        A line fills before a busy key as it does before busy workers; more workers would help only the second.
        """
        pool = next((pool for pool in self._pools.values() if pool.resource == resource), None)
        if pool is None or not pool.source_paths or not pool.slots:
            return resource
        short = [_first_blocked(path) for path in pool.source_paths]
        return next((name for name in short if name is not None), resource) if None not in short else resource

    def readings(self) -> tuple[Reading, ...]:
        """Every reading: one a pool, one a worker with a gate of its own, one a source, and the host's."""
        pools = [Reading(pool.resource, pool.load()) for pool in self._pools.values()]
        below = [
            Reading(f"worker:{worker.name}", max(_nested_load(worker, task_type) for task_type in worker.task_types))
            for worker in self._workers.values()
            if worker.handler.load is not None
        ]
        sources = {
            part: None for worker in self._workers.values() for source in worker.sources for part in source.accounts
        }
        drawn = [Reading(source.name, source.load()[0]) for source in sources]
        return (*pools, *below, *drawn, Reading("host", self.host))


def _highest_reading(path: tuple[LoadSource, ...], priority: Priority) -> tuple[float, str]:
    """The highest reading of what a worker draws on, and what it is of."""
    return max(((source.load(priority)[0], source.name) for source in path), default=(0.0, "host"))


def _path_time_until_below(
    pool: Pool, path: tuple[LoadSource, ...], priority: Priority, load: float
) -> tuple[float, float]:
    """When the last that is short of what a worker draws on has room, and how far apart runs fit in there."""
    last = 0.0, 0.0
    for source in path:
        seconds, each = source.time_until_below(priority, load)
        if seconds or not source.may_start(Priority.LOW):  # else it is not what is short
            last = max(last, (seconds, each * max(1.0, pool.calls_per_run.get(source, 1.0))))
    return last


def _first_blocked(path: tuple[LoadSource, ...]) -> str | None:
    """The first of what a worker draws on that bears no more runs, those of the lowest rung at least."""
    return next((source.name for source in path if not source.may_start(Priority.LOW)), None)


def _nested_load(worker: WorkerAgent, task_type: str) -> float:
    """The load that a worker's own gate reads, if it has one."""
    load = worker.handler.load
    return 0.0 if load is None else load(task_type)
