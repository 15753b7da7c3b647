"""An account that lets nobody through for long: what waits for it stays where it is, and is done afterwards."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from tests.support.task_plane import now, virtual

from forebay import BackpressureSupervisor, Budget, Deadline, Priority, Task, TaskStatus, Upstream, Verdict, clock
from forebay.breaker import BreakerRules
from forebay.quota import Price

TASKS = 30
SERVED = 10  # calls, and then nobody is let through
SHUT = 1_200.0  # seconds


def account() -> Upstream:
    """Its provider says that its money is spent."""
    return Upstream("key")


def breaker() -> Upstream:
    """It fails, and is left alone."""
    return Upstream("key", breaker=BreakerRules(reset_timeout=2 * SHUT, max_reset_timeout=2 * SHUT))


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
            desk = next(iter(key.core.accounts))
            if len(begun) == SERVED and make is account:
                desk.suspend(SHUT)
            if len(begun) == SERVED and make is breaker:
                desk.account.breaker.trip(now())

    async with BackpressureSupervisor(overflow="memory://", max_queue_size=4) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=1)
        tickets = [await supervisor.submit(Task("work")) for _ in range(TASKS)]
        await asyncio.sleep(SHUT - 60.0)
        assert Counter(ticket.status for ticket in tickets)[TaskStatus.SUCCEEDED] == len(begun) == SERVED
        assert not any(ticket.done() and ticket.status is not TaskStatus.SUCCEEDED for ticket in tickets)
        assert supervisor.statistics().limited_by == "upstream:key"
        await asyncio.sleep(2 * SHUT)
        assert {ticket.status for ticket in tickets} == {TaskStatus.SUCCEEDED}


HOUR = 3_600.0
A_DOLLAR = {"model": Price(input=500_000, output=500_000)}  # a call of one token each way


def until_the_hour() -> float:
    return HOUR - clock.wall_time() % HOUR


def spender(key: Upstream, begun: list[Priority]) -> Callable[[Task], Awaitable[None]]:
    async def handler(task: Task) -> None:
        begun.append(task.priority)
        async with key.call("model", input_tokens=1, output_tokens=1) as call:
            await asyncio.sleep(1.0)
            call.settle(input_tokens=1, output_tokens=1)

    return handler


@virtual
async def test_what_waits_for_money_is_done_in_the_hours_that_follow() -> None:
    key = Upstream("key", budget=Budget(usd=SERVED, per="hour"), prices=A_DOLLAR)
    begun: list[Priority] = []
    async with BackpressureSupervisor(overflow="memory://", max_queue_size=4) as supervisor:
        supervisor.register_worker("worker", handler=spender(key, begun), task_types=["work"], max_concurrent=1)
        await asyncio.sleep(until_the_hour())
        tickets = [await supervisor.submit(Task("work")) for _ in range(TASKS)]
        for hour in (1, 2, 3):
            await asyncio.sleep(HOUR - 60.0 if hour == 1 else HOUR)
            assert Counter(ticket.status for ticket in tickets)[TaskStatus.SUCCEEDED] == len(begun) == hour * SERVED


@virtual
async def test_nothing_but_a_deadline_or_its_caller_ends_a_wait_for_money() -> None:
    key = Upstream("key", budget=Budget(usd=1, per="hour"), prices=A_DOLLAR)
    begun: list[Priority] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=spender(key, begun), task_types=["work"], max_concurrent=1)
        await asyncio.sleep(until_the_hour())
        spends = await supervisor.submit(Task("work"))
        hasty = await supervisor.submit(Task("work", deadline=Deadline.within(60.0)))
        leaves = await supervisor.submit(Task("work"))
        patient = await supervisor.submit(Task("work"))
        began = now()
        assert (await spends).success
        assert (await hasty).status is TaskStatus.EXPIRED
        assert now() - began == pytest.approx(60.0, abs=0.1)
        leaves.cancel()
        assert (await leaves).status is TaskStatus.CANCELLED
        assert patient.status is TaskStatus.WAITING
        assert supervisor.statistics().limited_by == "upstream:key"
        assert (await patient).success
        assert now() - began == pytest.approx(HOUR, abs=10.0)
    assert len(begun) == 2


@virtual
async def test_who_is_refused_for_money_hears_when_there_will_be_more_and_a_share_is_kept_for_the_best() -> None:
    key = Upstream("key", budget=Budget(usd=SERVED, per="hour", reserved_share=0.2), prices=A_DOLLAR)
    begun: list[Priority] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=spender(key, begun), task_types=["work"], max_concurrent=1)
        for _ in range(8):
            await supervisor.run(Task("work"))
        ticket = await supervisor.submit(Task("work"))
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.limited_by == "upstream:key"
        assert ticket.retry_after == pytest.approx(until_the_hour())
        assert supervisor.system_load() == 1.0
        for _ in range(2):
            await supervisor.run(Task("work", priority=Priority.HIGH))
        ticket = await supervisor.submit(Task("work", priority=Priority.CRITICAL))
        assert ticket.verdict is Verdict.REJECTED


@virtual
async def test_for_money_that_never_comes_back_nobody_waits() -> None:
    key = Upstream("key", budget=Budget(usd=SERVED), prices=A_DOLLAR)
    async with BackpressureSupervisor(max_queue_size=TASKS) as supervisor:
        supervisor.register_worker("worker", handler=spender(key, []), task_types=["work"], max_concurrent=1)
        results = [await ticket for ticket in [await supervisor.submit(Task("work")) for _ in range(SERVED + 5)]]
        assert [result.success for result in results] == [True] * SERVED + [False] * 5
        assert "overspent" in str(results[-1].error)
        assert (await supervisor.submit(Task("work"))).retry_after is None
