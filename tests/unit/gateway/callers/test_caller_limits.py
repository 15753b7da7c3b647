"""The limits of a caller: rates, calls in progress and money, over all targets."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.task_plane import virtual

from forebay import Budget, Quota, Upstream, clock
from forebay.errors import Overloaded
from forebay.gateway.callers.caller_limits import CallerHold, CallerLimits
from forebay.interfaces import Charge, Outcome
from forebay.task import Priority
from forebay.upstream.call_request import CallOutcome, CallRequest, Unmetered


def needs(tokens: int = 0, *, within: float = 600.0, usd: float = 0.0, **how: object) -> CallRequest:
    charge = Charge(input_tokens=tokens, tokens=tokens)
    return CallRequest(charge=charge, usd=usd, deadline=clock.now() + within, **how)  # type: ignore[arg-type]


def acme(**how: object) -> CallerLimits:
    return CallerLimits("tenant:acme", "tenant 'acme'", **how)  # type: ignore[arg-type]


async def call(limits: CallerLimits, seconds: float = 1.0, tokens: int = 0, used: Charge | None = None) -> float:
    """Make a call, and return when it was sent."""
    async with CallerHold([limits], needs(tokens), lambda: used):
        sent = clock.now()
        await asyncio.sleep(seconds)
    return sent


@virtual
async def test_calls_beyond_a_rate_wait_for_it() -> None:
    limits = acme(quotas=[Quota(requests=60, per="minute")])
    began = clock.now()
    sent = sorted(await asyncio.gather(*(call(limits) for _ in range(70))))
    assert sent[59] == began
    assert sent[69] - began == pytest.approx(10.0, abs=0.1)
    assert limits.in_progress == 0


@virtual
async def test_no_more_calls_than_max_concurrent_are_in_progress() -> None:
    limits = acme(max_concurrent=3)
    began = clock.now()
    sent = sorted(await asyncio.gather(*(call(limits) for _ in range(9))))
    assert [round(at - began) for at in sent] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


@virtual
async def test_any_number_of_calls_may_be_in_progress() -> None:
    limits = acme(max_concurrent=10**30)
    sent = await asyncio.gather(*(call(limits) for _ in range(20)))
    assert len(set(sent)) == 1
    limits.change(quotas=[], max_concurrent=10**24, budget=None)
    limits.change(quotas=[], max_concurrent=1, budget=None)
    sent = sorted(await asyncio.gather(*(call(limits) for _ in range(2))))
    assert sent[1] - sent[0] == pytest.approx(1.0, abs=0.01)


@virtual
async def test_a_call_that_would_wait_longer_than_its_caller_is_rejected_with_a_retry_after() -> None:
    limits = acme(quotas=[Quota(requests=1, per="minute")])
    await call(limits)
    with pytest.raises(Overloaded) as caught:
        await limits.acquire(needs(within=20.0))
    assert caught.value.limited_by == "tenant:acme:requests per minute"
    assert caught.value.retry_after is not None
    assert caught.value.retry_after > 30.0


@virtual
async def test_tokens_that_were_reserved_and_not_used_come_back() -> None:
    limits = acme(quotas=[Quota(tokens=1000, per="minute")])
    await call(limits, tokens=1000, used=Charge(input_tokens=10, tokens=10))
    async with asyncio.timeout(0.1):
        await call(limits, 0.0, tokens=900)


@virtual
async def test_a_call_that_was_not_sent_takes_nothing() -> None:
    limits = acme(quotas=[Quota(requests=1, per="minute")])
    await call(limits, used=Charge(requests=0))
    async with asyncio.timeout(0.1):
        await call(limits, 0.0)


@virtual
async def test_what_was_taken_of_one_caller_is_returned_if_another_rejects_the_call() -> None:
    key, tenant = acme(max_concurrent=1), acme(quotas=[Quota(requests=1, per="minute")])
    await call(tenant)
    with pytest.raises(Overloaded):
        async with CallerHold([key, tenant], needs(within=5.0)):
            pass
    assert key.in_progress == 0


@virtual
async def test_a_call_that_leaves_the_queue_takes_nothing() -> None:
    limits = acme(max_concurrent=1)
    async with asyncio.TaskGroup() as group:
        group.create_task(call(limits, 2.0))
        await asyncio.sleep(0.5)
        leaving = group.create_task(call(limits))
        await asyncio.sleep(0.5)
        leaving.cancel()
    assert limits.is_fresh()


@virtual
async def test_better_calls_go_first() -> None:
    limits = acme(max_concurrent=1)
    order: list[Priority] = []

    async def one(priority: Priority) -> None:
        async with CallerHold([limits], needs(priority=priority)):
            order.append(priority)
            await asyncio.sleep(1.0)

    await asyncio.gather(*(one(priority) for priority in (Priority.NORMAL, Priority.LOW, Priority.LOW, Priority.HIGH)))
    assert order == [Priority.NORMAL, Priority.HIGH, Priority.LOW, Priority.LOW]


@virtual
async def test_a_spent_budget_rejects_before_anything_else_is_taken() -> None:
    limits = acme(budget=Budget(usd=1.0, per="day"), max_concurrent=1)
    assert limits.budget is not None
    held = limits.budget.try_reserve(0.9, Priority.NORMAL)
    assert held is not None
    held.settle(0.9)
    with pytest.raises(Overloaded, match="budget of tenant 'acme'") as caught:
        await limits.acquire(needs(usd=0.2))
    assert caught.value.limited_by == "tenant:acme:budget"
    (await limits.acquire(needs(usd=0.2, free=True))).release()
    assert limits.in_progress == 0


@virtual
async def test_a_budget_that_is_spent_while_a_call_waits_for_its_target_is_named_as_that_of_the_caller() -> None:
    limits = acme(budget=Budget(usd=1.0))
    target = Upstream("openai", max_concurrent=1).core.accounts.account("m")
    first = await target.acquire(needs(usd=0.4, budgets=limits.budgets))
    waiting = asyncio.create_task(target.acquire(needs(usd=0.6, budgets=limits.budgets)))
    await asyncio.sleep(0.1)
    target.settle(first, CallOutcome(kind=Outcome.SUCCESS, usd=0.9))
    with pytest.raises(Overloaded, match=r"^Rejected: the budget of tenant 'acme' would be overspent") as caught:
        await waiting
    assert caught.value.limited_by == "tenant:acme:budget"


@virtual
async def test_a_call_that_cannot_be_counted_is_rejected_at_once() -> None:
    limits = acme(quotas=[Quota(tokens=1000, per="minute")])
    with pytest.raises(Overloaded) as caught:
        await limits.acquire(needs(unmetered=Unmetered("its body is no JSON", "unreadable")))
    assert caught.value.limited_by == "tenant:acme:unreadable"


@virtual
async def test_without_limits_nothing_is_held() -> None:
    limits = acme()
    assert (await limits.acquire(needs())).permit is None
    assert (limits.is_metered, limits.budgets) == (False, ())


# --- other limits ---


@virtual
async def test_a_change_refills_no_rate() -> None:
    limits = acme(quotas=[Quota(requests=10, per="minute")])
    for _ in range(10):
        await call(limits, 0.0)
    limits.change(quotas=[Quota(requests=20, per="minute")])
    began = clock.now()
    sent = sorted(await asyncio.gather(*(call(limits, 0.0) for _ in range(11))))
    assert sent[9] == began
    assert sent[10] - began == pytest.approx(3.0, abs=0.1)


@virtual
async def test_a_change_keeps_what_was_spent() -> None:
    limits = acme(budget=Budget(usd=1.0, per="day"))
    assert limits.budget is not None
    held = limits.budget.try_reserve(0.9, Priority.NORMAL)
    assert held is not None
    held.settle(0.9)
    limits.change(budget=Budget(usd=2.0, per="month"))
    assert limits.budget.spent() == pytest.approx(0.9)
    with pytest.raises(Overloaded):
        await limits.acquire(needs(usd=1.2))


@virtual
async def test_a_lower_number_of_calls_holds_once_those_in_progress_have_ended() -> None:
    limits = acme(max_concurrent=3)
    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(call(limits, 1.0))
        await asyncio.sleep(0.5)
        limits.change(max_concurrent=1)
        began = clock.now()
        later = [group.create_task(call(limits, 1.0)) for _ in range(2)]
    assert sorted(round(task.result() - began, 1) for task in later) == [0.5, 1.5]


@virtual
async def test_a_budget_that_is_taken_away_and_comes_back_has_spent_what_it_had() -> None:
    limits = acme(budget=Budget(usd=1.0, per="day"))
    assert limits.budget is not None
    held = limits.budget.try_reserve(0.5, Priority.NORMAL)
    limits.change()
    assert not limits.budgets
    assert held is not None
    held.settle(0.9)  # meanwhile
    assert not limits.is_fresh()
    limits.change()
    limits.change(budget=Budget(usd=1.0, per="day"))
    assert limits.budget is not None
    assert limits.budget.spent() == pytest.approx(0.9)
