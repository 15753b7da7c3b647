"""Demand: the slots that the tasks of some types ask for, for whoever adds and removes workers."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Final

from forebay.interfaces import Demand, RecordState, TaskStore

if TYPE_CHECKING:
    from forebay.supervisor.admission_controller import AdmissionController
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.load import SystemLoad
    from forebay.supervisor.pool import Pool

_PAGE: Final = 1000  # leased records that are listed at a time


async def measure_demand(
    dispatcher: Dispatcher, admission: AdmissionController, pools: Collection[Pool], *, ask_overflow: bool
) -> Demand:
    """Return the demand of the tasks of `pools`; with `ask_overflow`, of those in the overflow too.

    Raises:
        StoreUnavailable: the overflow cannot be asked.
    """
    types = {pool.task_type for pool in pools}
    spilled, elsewhere = 0, None
    if ask_overflow and (spill := dispatcher.spill) is not None:
        store = spill.stored.store
        depths = await store.depths()
        spilled = sum(count for (task_type, _, _), count in depths.items() if task_type in types)
        elsewhere = await _leased_elsewhere(
            store, types, held={lease.record.task_id for lease in spill.stored.leases.held()}
        )
    workers = {worker for pool in pools for worker in pool.workers}
    return Demand(
        slots=sum(worker.slots for worker in workers),
        running=sum(worker.current_tasks for worker in workers),
        queued=sum(pool.waiting_for_slots + admission.room.waiting(pool.task_type) for pool in pools),
        spilled=spilled,
        elsewhere=elsewhere,
        refused=sum(pool.refused for pool in pools),
        service=_service(pools),
        limited_by=_bottleneck(dispatcher.load, pools),
        host=dispatcher.load.host,
    )


async def _leased_elsewhere(store: TaskStore, types: Collection[str], *, held: Collection[str]) -> int:
    """Return how many records of `types` are leased, and not `held` here."""
    count, after = 0, None
    while page := await store.list_records(RecordState.LEASED, _PAGE, after=after):
        count += sum(each.record.task_type in types and each.record.task_id not in held for each in page)
        if len(page) < _PAGE:
            break
        after = page[-1].position
    return count


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
