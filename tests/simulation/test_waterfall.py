"""The waterfall: how long CRITICAL tasks wait while three times as much is offered as can be served."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import pytest
from tests.support.supervisor_checks import check_supervisor
from tests.support.task_plane import now, results, virtual

from forebay import BackpressureSupervisor, Priority, Task, Ticket
from forebay.testing import EventRecord


async def _waits(supervisor: BackpressureSupervisor, slots: int, rng: random.Random, **worker: Any) -> list[float]:
    """Return how long CRITICAL tasks waited at three times the load that `slots` can serve, in mean service times."""

    async def handler(task: Task) -> None:
        if task.priority is Priority.CRITICAL:
            waits.append(now() - task.payload)
        await asyncio.sleep(rng.expovariate(1.0))

    waits: list[float] = []
    supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=slots, **worker)
    async with supervisor:
        record = EventRecord(supervisor)
        tickets: list[Ticket] = []
        while len(tickets) < 300 * slots:
            await asyncio.sleep(rng.expovariate(3.0 * slots))
            # A fifth of the capacity is a fifteenth of what is offered.
            better = rng.random() < 1 / 15
            priority = Priority.CRITICAL if better else rng.choice((Priority.NORMAL, Priority.LOW))
            ticket = supervisor.submit_nowait(Task("work", now(), priority=priority))
            assert ticket or not better
            tickets.append(ticket)
        await results([ticket for ticket in tickets if ticket])
    check_supervisor(record, tickets=tickets)
    return sorted(waits)


@virtual
@pytest.mark.parametrize("slots", [5, 15])
async def test_at_three_times_the_load_critical_tasks_wait_at_most_a_service_time(slots: int) -> None:
    waits = await _waits(BackpressureSupervisor(), slots, random.Random(slots), reserve=slots // 5)
    assert waits[int(0.99 * len(waits))] <= 1.0
