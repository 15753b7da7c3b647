"""Load: how full each resource is, and which one limits a task."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from forebay._hooks import call_hook
from forebay._validate import is_number
from forebay.interfaces import LoadSource, Reading
from forebay.supervisor.pool import POOL_PREFIX
from forebay.supervisor.spill import store_load
from forebay.task import Priority

if TYPE_CHECKING:
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.spill.store_load import StoreLoad
    from forebay.supervisor.worker import WorkerAgent


class SystemLoad:
    """The load of one supervisor's resources, computed from its pools and workers.

    Attributes:
        host: the lag of the event loop over the lag that is allowed, as the loop monitor measured it.
    """

    __slots__ = ("_overflow", "_pools", "_workers", "host")

    def __init__(self, pools: Mapping[str, Pool], workers: Mapping[str, WorkerAgent]) -> None:
        self._pools = pools
        self._workers = workers
        self._overflow: StoreLoad | None = None
        self.host = 0.0

    def add_overflow(self, load: StoreLoad) -> None:
        """Show the load of the overflow among the others. It limits nothing but what goes there."""
        self._overflow = load

    def record_host(self, load: float) -> None:
        """Record the lag of the event loop over the lag that is allowed. Callable from any thread."""
        self.host = load

    def on_path(
        self, pool: Pool, priority: Priority = Priority.NORMAL, *, nested: bool = False, tenant: str | None = None
    ) -> tuple[float, str]:
        """Return the load on the path of a task of `tenant`, `nested` or not, and the resource that limits it.

        The load of a path is its highest reading. Each worker has a path: its pool, the host, the sources that its
        calls use and, if it is a supervisor, its own load. The worker with the lowest load counts.
        """
        if pool.nested_supervisors or pool.source_paths:
            load, resource = self.beyond_pool(pool, priority)
        else:
            load, resource = self.host, "host"
        own = pool.load(priority, nested=nested, tenant=tenant)
        return (own, pool.resource) if own >= load else (load, resource)

    def beyond_pool(self, pool: Pool, priority: Priority = Priority.NORMAL) -> tuple[float, str]:
        """Return `on_path` without the reading of the pool, which rejects nothing while a slot is free."""
        load, resource = self.host, "host"
        if pool.nested_supervisors and len(pool.nested_supervisors) == len(pool.workers):
            below, name = min((_nested_load(worker, pool.task_type), worker.name) for worker in pool.nested_supervisors)
            if below > load:
                load, resource = below, f"worker:{name}"
        if pool.source_paths:
            used = min(_highest_reading(path, priority) for path in pool.source_paths)
            if used[0] > load:
                load, resource = used
        return load, resource

    def time_until_below(self, pool: Pool, priority: Priority, load: float) -> tuple[float, float]:
        """Return the seconds until the sources of a worker read less than `load`, and those between two runs from then.

        Both are 0 if some worker has no source that is short: then the pool's own rate counts. See
        `LoadSource.time_until_below`.
        """
        paths = pool.source_paths
        return min((_path_time_until_below(pool, path, priority, load) for path in paths), default=(0.0, 0.0))

    def limiting_resource(self, resource: str) -> str:
        """Return the cause of the load on `resource`: for a pool whose runs all wait for a source, the source.

        Its queue fills up because of the source, and more workers would not help. For any other resource, the cause is
        the resource itself.
        """
        pool = self._pools.get(resource.removeprefix(POOL_PREFIX)) if resource.startswith(POOL_PREFIX) else None
        if pool is None or not pool.source_paths or not pool.slots:
            return resource
        blocked = [_first_blocked(path) for path in pool.source_paths]
        names = [source.name for source in blocked if source is not None]
        return names[0] if len(names) == len(blocked) else resource

    def blocking_source(self, pool: Pool) -> str | None:
        """Return the source that keeps runs of the pool from starting, on whatever worker, and the part that is short.

        A source does so if no run of the lowest priority may start, or if tasks wait though a slot is free: what the
        source allows now and then goes to the next run at once. None if some worker has no such source: then more slots
        would serve what waits.
        """
        if not pool.source_paths or not pool.slots:
            return None
        idle = {tuple(worker.sources) for worker in pool.held_back_workers()}
        blocked = [_first_blocked(path) or (_fullest(path) if path in idle else None) for path in pool.source_paths]
        if any(source is None for source in blocked) or (source := blocked[0]) is None:
            return None
        part = source.load(Priority.LOW)[1]
        return source.name if part == "nothing" else f"{source.name}:{part}"

    def readings(self) -> tuple[Reading, ...]:
        """Return every reading: of each pool, each nested supervisor, each load source, the overflow, and the host."""
        pools = [Reading(pool.resource, pool.load()) for pool in self._pools.values()]
        nested = [
            Reading(f"worker:{worker.name}", max(_nested_load(worker, task_type) for task_type in worker.task_types))
            for worker in self._workers.values()
            if worker.handler.load is not None
        ]
        accounts = {
            account: None
            for worker in self._workers.values()
            for source in worker.sources
            for account in source.accounts
        }
        sources = [Reading(account.name, account.load()[0]) for account in accounts]
        overflow = [] if self._overflow is None else [Reading(store_load.RESOURCE, self._overflow.load())]
        return (*pools, *nested, *sources, *overflow, Reading("host", self.host))


def _highest_reading(path: tuple[LoadSource, ...], priority: Priority) -> tuple[float, str]:
    """Return the highest reading of the sources that a worker uses, and the name of that source."""
    return max(((source.load(priority)[0], source.name) for source in path), default=(0.0, "host"))


def _fullest(path: tuple[LoadSource, ...]) -> LoadSource | None:
    """Return the source with the highest load."""
    return max(path, key=lambda source: source.load(Priority.LOW)[0], default=None)


def _path_time_until_below(
    pool: Pool, path: tuple[LoadSource, ...], priority: Priority, load: float
) -> tuple[float, float]:
    """Return `SystemLoad.time_until_below` for the sources of one worker: the last one that is short counts."""
    last = 0.0, 0.0
    for source in path:
        seconds, each = source.time_until_below(priority, load)
        if seconds or not source.may_start(Priority.LOW):  # otherwise this source is not short
            last = max(last, (seconds, each * max(1.0, pool.calls_per_run.get(source, 1.0))))
    return last


def _first_blocked(path: tuple[LoadSource, ...]) -> LoadSource | None:
    """Return the first source for which no run of the lowest priority may start."""
    return next((source for source in path if not source.may_start(Priority.LOW)), None)


def _nested_load(worker: WorkerAgent, task_type: str) -> float:
    """Return the load of the nested supervisor that a worker stands for; 0.0 if it stands for none."""
    load = worker.handler.load
    if load is None:
        return 0.0
    reading = call_hook(f"load of worker {worker.name!r}", load, task_type)
    return reading if is_number(reading) else 1.0  # one that cannot be read counts as full
