"""An account that lets nobody through for long: what waits for it stays where it is, and is done afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable

import pytest
from tests.acceptance.house import now, virtual

from forebay import BackpressureSupervisor, Task, TaskStatus, Upstream
from forebay.breaker import BreakerRules

TASKS = 30
SERVED = 10  # calls, and then nobody is let through
SHUT = 1_200.0  # seconds


def account() -> Upstream:
    """Its provider says that its money is spent."""
    return Upstream("key")


def breaker() -> Upstream:
    """It fails, and is left alone."""
    return Upstream("key", breaker=BreakerRules(cool_off=2 * SHUT, ceiling=2 * SHUT))


@pytest.mark.parametrize("make", [account, breaker])
@virtual
async def test_no_run_begins_only_to_be_refused(make: Callable[[], Upstream]) -> None:
    key = make()
    begun: list[float] = []

    async def handler(_: Task) -> None:
        begun.append(now())
        async with key.call("model") as call:
            await asyncio.sleep(1.0)
            call.settle(input_tokens=1, output_tokens=1)
            desk = next(iter(key.books))
            if len(begun) == SERVED and make is account:
                desk.stop(SHUT)
            if len(begun) == SERVED and make is breaker:
                desk.account.breaker.trip(now())

    async with BackpressureSupervisor(overflow="memory://", max_queue_size=4) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=1)
        tickets = [await supervisor.submit(Task("work")) for _ in range(TASKS)]
        await asyncio.sleep(SHUT - 60.0)
        assert Counter(ticket.status for ticket in tickets)[TaskStatus.SUCCEEDED] == len(begun) == SERVED
        assert not any(ticket.done() and ticket.status is not TaskStatus.SUCCEEDED for ticket in tickets)
        assert supervisor.statistics().binding == "upstream:key"
        await asyncio.sleep(2 * SHUT)
        assert {ticket.status for ticket in tickets} == {TaskStatus.SUCCEEDED}
