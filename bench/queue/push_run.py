"""One run with bursts of CRITICAL tasks that cannot be stored, on a worker whose queue others fill."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final
from unittest.mock import patch

from forebay import BackpressureSupervisor, Priority, Task
from forebay.simulation import simulate
from forebay.supervisor.admission_controller import AdmissionController
from forebay.supervisor.pool import Pool
from forebay.supervisor.ticket import Refusal, Ticket

SLOTS: Final = 20
SECONDS: Final = 240.0  # of the run; a service takes one on average
_SHARE: Final = 0.2  # of the capacity, for CRITICAL tasks
_try_admit: Final = AdmissionController._try_admit  # noqa: SLF001 - what is compared is inside


@dataclass(frozen=True)
class PushCase:
    """The tasks that are offered, and whether a rejected one pushes a worse one out of the queue."""

    burst: int  # CRITICAL tasks at once
    load: float  # NORMAL and LOW tasks, times the capacity
    queue: int | None  # `max_queue_size`; None: 100
    pushes: bool
    seed: int = 0


def _last_worse(pool: Pool, priority: Priority) -> Ticket | None:
    """Return the last task in the queue that has a worse priority."""
    worse = [entry for entry in pool.queue.entries() if entry[3] > priority]
    return max(worse, key=lambda entry: (entry[3], entry[0], entry[1]))[2] if worse else None


@contextlib.contextmanager
def _pushing(supervisor: BackpressureSupervisor) -> Iterator[None]:
    """Have a task that would be rejected push the last worse one out to the overflow."""
    spilling = set[asyncio.Task[Any]]()

    def try_admit(admission: AdmissionController, ticket: Ticket, pool: Pool, *, may_spill: bool) -> Refusal | None:
        refusal = _try_admit(admission, ticket, pool, may_spill=may_spill)
        while refusal is not None and not refusal.may_spill:
            worse = _last_worse(pool, ticket.task.priority)
            if worse is None:
                break
            task = worse.task
            worse.cancel("pushed out")
            spilled = supervisor.submit(Task(task.task_type, task.payload, priority=task.priority))
            spilling.add(asyncio.ensure_future(spilled))
            refusal = _try_admit(admission, ticket, pool, may_spill=may_spill)
        return refusal

    with patch.object(AdmissionController, "_try_admit", try_admit):
        yield


def share_rejected(case: PushCase) -> float:
    """Simulate a run; return the share of CRITICAL tasks that were rejected."""
    return simulate(lambda: _run(case), seed=case.seed)


async def _run(case: PushCase) -> float:
    loop, draws = asyncio.get_running_loop(), random.Random(case.seed)
    verdicts: list[bool] = []
    supervisor = BackpressureSupervisor(overflow="memory://", max_queue_size=case.queue)

    async def handler(_: Task) -> None:
        await asyncio.sleep(draws.expovariate(1.0))

    async def others() -> None:
        while loop.time() - started < SECONDS:
            await supervisor.submit(Task("work", priority=draws.choice((Priority.NORMAL, Priority.LOW))))
            await asyncio.sleep(draws.expovariate(case.load * SLOTS))

    async def bursts() -> None:
        while loop.time() - started < SECONDS:
            await asyncio.sleep(draws.expovariate(_SHARE * SLOTS / case.burst))
            tasks = [Task("work", priority=Priority.CRITICAL) for _ in range(case.burst)]
            verdicts.extend(not supervisor.submit_nowait(task) for task in tasks)

    with _pushing(supervisor) if case.pushes else contextlib.nullcontext():
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=SLOTS)
        async with supervisor:
            started = loop.time()
            await asyncio.gather(others(), bursts())
    return sum(verdicts) / len(verdicts)
