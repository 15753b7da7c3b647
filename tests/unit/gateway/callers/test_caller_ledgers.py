"""The limits of a caller that several processes share, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.task_plane import virtual

from forebay import Budget, Quota, Upstream, clock
from forebay.errors import InvalidSetting, Overloaded
from forebay.gateway.callers.caller_ledgers import CallerLedgers
from forebay.gateway.callers.caller_limits import CallerHold, CallerLimits
from forebay.interfaces import Charge
from forebay.task import Priority
from forebay.upstream.call_request import CallRequest
from forebay.upstream.shared.leases.link import LedgerLink
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore


def ledgers(store: MemoryLedgerStore) -> CallerLedgers:
    """Return the ledgers as another process has them."""
    return CallerLedgers(LedgerLink(store, "callers"))


def acme(store: MemoryLedgerStore, **how: object) -> CallerLimits:
    """Return the limits of one caller as another process has them."""
    return CallerLimits("tenant:acme", "tenant 'acme'", ledgers=ledgers(store), **how)  # type: ignore[arg-type]


def needs(*, within: float = 600.0, usd: float = 0.0) -> CallRequest:
    return CallRequest(charge=Charge(), usd=usd, deadline=clock.now() + within)


async def call(limits: CallerLimits, seconds: float = 0.0) -> float:
    """Make a call, and return when it was sent."""
    async with CallerHold([limits], needs()):
        sent = clock.now()
        await asyncio.sleep(seconds)
    return sent


@virtual
async def test_a_rate_is_one_for_all_processes() -> None:
    store, began = MemoryLedgerStore(), clock.now()
    processes = [acme(store, quotas=[Quota(requests=60, per="minute")]) for _ in range(3)]
    sent = sorted(await asyncio.gather(*(call(processes[number % 3]) for number in range(70))))
    assert sent[59] - began < 1.0
    assert sent[60] - began >= 1.0
    assert sent[69] - began == pytest.approx(10.0, abs=0.5)


@virtual
async def test_calls_in_progress_are_bounded_for_all_processes_together() -> None:
    store = MemoryLedgerStore()
    processes = [acme(store, max_concurrent=2) for _ in range(3)]
    in_progress = most = 0

    async def one(limits: CallerLimits) -> None:
        nonlocal in_progress, most
        async with CallerHold([limits], needs()):
            in_progress += 1
            most = max(most, in_progress)
            await asyncio.sleep(1.0)
            in_progress -= 1

    await asyncio.gather(*(one(limits) for limits in processes * 3))
    assert most == 2


@virtual
async def test_a_budget_is_one_for_all_processes() -> None:
    store = MemoryLedgerStore()
    first, second = (acme(store, budget=Budget(usd=10.0, per="day")) for _ in range(2))
    await spend(first, 6.0)
    await spend(second, 4.0)
    for limits in (first, second):
        with pytest.raises(Overloaded, match="budget of tenant 'acme'"):
            await limits.acquire(needs(usd=0.01))


@virtual
async def test_a_process_that_learns_that_a_budget_is_spent_names_its_caller() -> None:
    store = MemoryLedgerStore()
    first, second = (acme(store, budget=Budget(usd=10.0, per="day")) for _ in range(2))
    await spend(first, 10.0)
    target = Upstream("openai").core.accounts.account("m")
    request = needs(usd=1.0)
    request.budgets = second.budgets
    await second.acquire(request)  # it may be affordable, as far as this process knows
    with pytest.raises(Overloaded, match="budget of tenant 'acme'") as caught:
        await target.acquire(request)
    assert caught.value.limited_by == "tenant:acme:budget"


async def spend(limits: CallerLimits, usd: float) -> None:
    """Spend dollars of a budget, as the account of a target does, and let the ledger know."""
    budget = limits.budget
    assert budget is not None
    while (reserved := budget.try_reserve(usd, Priority.NORMAL)) is None:
        budget.wait(usd, Priority.NORMAL)  # type: ignore[union-attr]
        await asyncio.sleep(0.1)
    reserved.settle(usd)
    await asyncio.sleep(1.0)


@virtual
async def test_a_budget_begins_with_what_was_spent_before_once_for_all_processes() -> None:
    store = MemoryLedgerStore()
    budget = Budget(usd=10.0, per="day")
    processes = [acme(store, budget=budget, spent=lambda _per, _at: 6.0) for _ in range(3)]
    for limits in processes:
        await spend(limits, 1.0)
    assert processes[-1].budget is not None
    assert processes[-1].budget.spent() == pytest.approx(9.0)


@virtual
async def test_a_changed_rate_keeps_what_was_used_and_is_no_conflict_meanwhile() -> None:
    store, rate = MemoryLedgerStore(), Quota(requests=60, per="minute")
    first, second = (acme(store, quotas=[rate]) for _ in range(2))
    await asyncio.gather(*(call(first) for _ in range(60)))
    first.change(quotas=[Quota(requests=120, per="minute")])
    began = clock.now()
    await asyncio.gather(*(call(first) for _ in range(60)))
    assert clock.now() - began < 2.0
    with pytest.raises(Overloaded, match="requests per minute"):
        await first.acquire(needs(within=0.1))
    await call(second)  # by the old rate, until it learns of the new one
    second.change(quotas=[Quota(requests=120, per="minute")])
    began = clock.now()
    await asyncio.gather(*(call(second) for _ in range(20)))
    assert clock.now() - began > 5.0


@virtual
async def test_another_max_wait_counts_for_the_next_call() -> None:
    store, rate = MemoryLedgerStore(), Quota(requests=1, per="minute")
    limits = acme(store, quotas=[rate])
    await call(limits)
    limits.change(quotas=[rate], max_wait=5.0)
    with pytest.raises(Overloaded, match="max_wait"):
        await limits.acquire(needs())


@virtual
async def test_a_caller_without_limits_needs_no_ledger() -> None:
    store = MemoryLedgerStore()
    await call(acme(store))
    assert store.ledgers == {}


@virtual
async def test_no_name_of_a_caller_is_in_the_store() -> None:
    store = MemoryLedgerStore()
    limits = acme(store, quotas=[Quota(requests=60, per="minute")], budget=Budget(usd=10.0))
    await call(limits)
    await spend(limits, 1.0)
    assert len(store.ledgers) == 2
    assert not any("acme" in key for key in store.ledgers)


def test_a_url_of_no_store_is_an_error_of_the_gateway() -> None:
    with pytest.raises(InvalidSetting, match="gateway was given shared"):
        CallerLedgers.open("memory://")
