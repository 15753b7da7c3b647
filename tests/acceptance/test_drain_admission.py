"""An account that sends no call for long: the tasks that wait for it stay queued, and run afterwards."""

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
SERVED = 10  # calls, and then none is sent for a while
BLOCKED = 1_200.0  # seconds


def account() -> Upstream:
    """Return an upstream whose provider says that the quota is used up."""
    return Upstream("key")


def breaker() -> Upstream:
    """Return an upstream whose calls fail until its breaker opens."""
    return Upstream("key", breaker=BreakerRules(reset_timeout=2 * BLOCKED, max_reset_timeout=2 * BLOCKED))


@pytest.mark.parametrize("make", [account, breaker])
@virtual
async def test_no_run_starts_only_to_be_rejected(make: Callable[[], Upstream]) -> None:
    key = make()
    started: list[float] = []

    async def handler(_: Task) -> None:
        started.append(now())
        async with key.call("model") as call:
            await asyncio.sleep(1.0)
            call.settle(input_tokens=1, output_tokens=1)
            shared_account = next(iter(key.core.accounts))
            if len(started) == SERVED and make is account:
                shared_account.suspend(BLOCKED)
            if len(started) == SERVED and make is breaker:
                shared_account.account.breaker.trip(now())

    async with BackpressureSupervisor(overflow="memory://", max_queue_size=4) as supervisor:
        supervisor.register_worker("worker", handler=handler, task_types=["work"], max_concurrent=1)
        tickets = [await supervisor.submit(Task("work")) for _ in range(TASKS)]
        await asyncio.sleep(BLOCKED - 60.0)
        assert Counter(ticket.status for ticket in tickets)[TaskStatus.SUCCEEDED] == len(started) == SERVED
        assert not any(ticket.done() and ticket.status is not TaskStatus.SUCCEEDED for ticket in tickets)
        assert supervisor.statistics().limited_by == "upstream:key:model"
        await asyncio.sleep(2 * BLOCKED)
        assert {ticket.status for ticket in tickets} == {TaskStatus.SUCCEEDED}


HOUR = 3_600.0
A_DOLLAR = {"model": Price(input=500_000, output=500_000)}  # a call of one token each way


def until_the_hour() -> float:
    return HOUR - clock.wall_time() % HOUR


def spender(key: Upstream, started: list[Priority]) -> Callable[[Task], Awaitable[None]]:
    async def handler(task: Task) -> None:
        started.append(task.priority)
        async with key.call("model", input_tokens=1, output_tokens=1) as call:
            await asyncio.sleep(1.0)
            call.settle(input_tokens=1, output_tokens=1)

    return handler


@virtual
async def test_tasks_that_wait_for_the_budget_run_in_the_hours_that_follow() -> None:
    key = Upstream("key", budget=Budget(usd=SERVED, per="hour"), prices=A_DOLLAR)
    started: list[Priority] = []
    async with BackpressureSupervisor(overflow="memory://", max_queue_size=4) as supervisor:
        supervisor.register_worker("worker", handler=spender(key, started), task_types=["work"], max_concurrent=1)
        await asyncio.sleep(until_the_hour())
        tickets = [await supervisor.submit(Task("work")) for _ in range(TASKS)]
        for hour in (1, 2, 3):
            await asyncio.sleep(HOUR - 60.0 if hour == 1 else HOUR)
            assert Counter(ticket.status for ticket in tickets)[TaskStatus.SUCCEEDED] == len(started) == hour * SERVED


@virtual
async def test_only_a_deadline_or_the_caller_ends_a_wait_for_the_budget() -> None:
    key = Upstream("key", budget=Budget(usd=1, per="hour"), prices=A_DOLLAR)
    started: list[Priority] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=spender(key, started), task_types=["work"], max_concurrent=1)
        await asyncio.sleep(until_the_hour())
        spends = await supervisor.submit(Task("work"))
        hasty = await supervisor.submit(Task("work", deadline=Deadline.within(60.0)))
        leaves = await supervisor.submit(Task("work"))
        patient = await supervisor.submit(Task("work"))
        start = now()
        assert (await spends).success
        assert (await hasty).status is TaskStatus.EXPIRED
        assert now() - start == pytest.approx(60.0, abs=0.1)
        leaves.cancel()
        assert (await leaves).status is TaskStatus.CANCELLED
        assert patient.status is TaskStatus.WAITING
        assert supervisor.statistics().limited_by == "upstream:key:model"
        assert (await patient).success
        assert now() - start == pytest.approx(HOUR, abs=10.0)
    assert len(started) == 2


@virtual
async def test_a_rejection_by_the_budget_says_when_it_resets_and_a_share_is_kept_for_the_best_priority() -> None:
    key = Upstream("key", budget=Budget(usd=SERVED, per="hour", reserved_share=0.2), prices=A_DOLLAR)
    started: list[Priority] = []
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=spender(key, started), task_types=["work"], max_concurrent=1)
        for _ in range(8):
            await supervisor.run(Task("work"))
        ticket = await supervisor.submit(Task("work"))
        assert ticket.verdict is Verdict.REJECTED
        assert ticket.limited_by == "upstream:key:model"
        assert ticket.retry_after == pytest.approx(until_the_hour())
        assert supervisor.system_load() == 1.0
        for _ in range(2):
            await supervisor.run(Task("work", priority=Priority.HIGH))
        ticket = await supervisor.submit(Task("work", priority=Priority.CRITICAL))
        assert ticket.verdict is Verdict.REJECTED


@virtual
async def test_nothing_waits_for_a_budget_that_never_resets() -> None:
    key = Upstream("key", budget=Budget(usd=SERVED), prices=A_DOLLAR)
    async with BackpressureSupervisor(max_queue_size=TASKS) as supervisor:
        supervisor.register_worker("worker", handler=spender(key, []), task_types=["work"], max_concurrent=1)
        results = [await ticket for ticket in [await supervisor.submit(Task("work")) for _ in range(SERVED + 5)]]
        assert [result.success for result in results] == [True] * SERVED + [False] * 5
        assert "overspent" in str(results[-1].error)
        assert (await supervisor.submit(Task("work"))).retry_after is None
