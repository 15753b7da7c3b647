"""Demand: the slots that the tasks of some types ask for, for whoever adds and removes workers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TYPE_CHECKING

from forebay.interfaces import Demand

if TYPE_CHECKING:
    from forebay.supervisor.admission_controller import AdmissionController
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.load import SystemLoad
    from forebay.supervisor.pool import Pool
    from forebay.supervisor.tenants import Tenants


async def measure_demand(
    dispatcher: Dispatcher, admission: AdmissionController, pools: Collection[Pool], *, ask_overflow: bool
) -> Demand:
    """Return the demand of the tasks of `pools`; with `ask_overflow`, of those in the overflow too.

    Raises:
        StoreUnavailable: the overflow cannot be asked.
    """
    types = {pool.task_type for pool in pools}
    asleep = {pool.task_type for pool in pools if pool.paused}
    waiting, spilled, paused = Counter[str](), Counter[str](), Counter[str]()  # by tenant
    elsewhere = None
    for pool in pools:
        waiting.update(pool.waiting_by_tenant())
    if ask_overflow and (spill := dispatcher.spill) is not None:
        store = spill.stored.store
        depths, leased = await store.depths(), await store.leased()
        for (task_type, _, tenant), count in depths.items():
            if task_type in types:
                (paused if task_type in asleep else spilled)[tenant] += count
        if store.durable:  # what ends with this process, no other one can use
            held = Counter(lease.record.task_type for lease in spill.stored.leases.held())
            elsewhere = sum(max(0, leased.get(name, 0) - held[name]) for name in types)
    startable = _Startable(dispatcher.tenants)
    queued, stored, stored_paused = startable.take(waiting), startable.take(spilled), startable.take(paused)
    workers = {worker for pool in pools for worker in pool.workers}
    return Demand(
        slots=sum(worker.slots for worker in workers),
        running=sum(worker.current_tasks for worker in workers),
        queued=queued + sum(_unseen(pool) + admission.room.waiting(pool.task_type) for pool in pools),
        spilled=stored + stored_paused,
        paused=stored_paused,
        elsewhere=elsewhere,
        refused=sum(pool.refused for pool in pools),
        service=_service(pools),
        limited_by=_bottleneck(dispatcher.load, pools),
        host=dispatcher.load.host,
    )


class _Startable:
    """The tasks that would start if there were slots: of each tenant as many as its bound leaves."""

    def __init__(self, tenants: Tenants) -> None:
        self._tenants = tenants
        self._room: dict[str, float] = {}

    def take(self, waiting: Mapping[str, int]) -> int:
        """Return how many of the tasks that wait, by tenant, would start beside those that were counted before."""
        total = 0
        for tenant, count in waiting.items():
            room = self._room.setdefault(tenant, self._tenants.room(tenant))
            startable = count if count <= room else int(room)
            self._room[tenant] -= startable
            total += startable
        return total


def _unseen(pool: Pool) -> int:
    """Return the tasks of a pool that are on their way between its queue and the overflow."""
    return 0 if pool.paused else pool.reserved


def _service(pools: Iterable[Pool]) -> float | None:
    """Return the mean of the seconds for which a task holds its slot, weighted by the slots that are taken."""
    known = [(pool.service_times.occupancy, max(1, pool.running)) for pool in pools]
    measured = [(seconds, weight) for seconds, weight in known if seconds is not None]
    total = sum(weight for _, weight in measured)
    return sum(seconds * weight for seconds, weight in measured) / total if total else None


def _bottleneck(load: SystemLoad, pools: Iterable[Pool]) -> str | None:
    """Return what keeps the tasks of all the pools with work from starting or going on, for which slots are no help."""
    busy = [pool for pool in pools if pool.running or pool.waiting or pool.spilled]
    found = [load.blocking_source(pool) or _failed_worker(pool) for pool in busy]
    return found[0] if found and all(name is not None for name in found) else None


def _failed_worker(pool: Pool) -> str | None:
    """Return the first worker of a pool all of whose workers are FAILED."""
    failed = [worker for worker in pool.workers if worker.failed]
    return f"worker:{failed[0].name}" if failed and not pool.slots else None
