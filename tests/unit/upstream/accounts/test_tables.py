"""Bounded tables forget nothing that they protect: money spent by a tenant, and quotas used by a key or a model."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from forebay import clock
from forebay.interfaces import Charge, Outcome
from forebay.quota import Budget, Prices, Quota
from forebay.retry import Retry
from forebay.task import Priority
from forebay.testing import virtual
from forebay.upstream.accounts import account_registry, spend
from forebay.upstream.accounts.account_registry import AccountRegistry
from forebay.upstream.accounts.spend import UpstreamBudgets
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.accounts.usage_recorder import UsageRecorder
from forebay.upstream.call_request import CallOutcome, CallRequest, Rejected
from forebay.upstream.upstream_settings import UpstreamSettings

NORMAL = Priority.NORMAL
CENT = Budget(usd=0.01, per="day")


def tenant(name: str) -> CallRequest:
    return CallRequest(tenant=name)


def spend_all(budgets: UpstreamBudgets, request: CallRequest) -> None:
    for budget in budgets.for_request(request):
        reservation = budget.try_reserve(0.01, NORMAL)
        assert reservation is not None
        reservation.settle(0.01)


def can_spend(budgets: UpstreamBudgets, request: CallRequest) -> bool:
    return all(budget.can_afford(0.01, NORMAL) for budget in budgets.for_request(request))


@pytest.mark.slow
def test_a_spent_tenant_stays_spent_after_a_hundred_thousand_others() -> None:
    budgets = UpstreamBudgets("llm", None, CENT, None)
    spend_all(budgets, tenant("spender"))
    for number in range(100_000):
        spend_all(budgets, tenant(f"other {number}"))
    assert not can_spend(budgets, tenant("spender"))


@pytest.fixture
def few_tenants(monkeypatch: pytest.MonkeyPatch) -> UpstreamBudgets:
    monkeypatch.setattr(spend, "_MAX_TENANTS", 50)
    monkeypatch.setattr(spend, "_MAX_TASKS", 50)
    return UpstreamBudgets("llm", None, CENT, Budget(usd=0.01))


def test_tenants_that_have_spent_nothing_are_forgotten_first(few_tenants: UpstreamBudgets) -> None:
    spend_all(few_tenants, tenant("spender"))
    for number in range(1_000):
        few_tenants.for_request(tenant(f"visitor {number}"))
    gc.collect()
    assert len(few_tenants.all_budgets()) == 50
    assert not can_spend(few_tenants, tenant("spender"))


def test_a_tenant_with_a_call_in_flight_is_not_forgotten(few_tenants: UpstreamBudgets) -> None:
    (budget,) = few_tenants.for_request(tenant("spender"))
    reservation = budget.try_reserve(0.01, NORMAL)
    assert reservation is not None
    for number in range(1_000):
        few_tenants.for_request(tenant(f"visitor {number}"))
    reservation.settle(0.01)
    del budget, reservation
    gc.collect()
    assert not can_spend(few_tenants, tenant("spender"))


def test_tenants_beyond_the_bound_share_one_budget(few_tenants: UpstreamBudgets) -> None:
    for number in range(50):
        spend_all(few_tenants, tenant(f"spender {number}"))
    assert can_spend(few_tenants, tenant("another"))
    spend_all(few_tenants, tenant("another"))
    assert not can_spend(few_tenants, tenant("yet another"))
    (shared,) = few_tenants.for_request(tenant("yet another"))
    assert "all tenants beyond 50 share" in shared.rejection(0.01, NORMAL).reason
    assert all(not can_spend(few_tenants, tenant(f"spender {number}")) for number in range(50))


def test_in_the_next_period_the_table_has_room_again(
    few_tenants: UpstreamBudgets, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(60):
        if can_spend(few_tenants, tenant(f"spender {number}")):
            spend_all(few_tenants, tenant(f"spender {number}"))
    tomorrow = clock.wall_time() + 86_400.0
    monkeypatch.setattr(clock, "wall_time", lambda: tomorrow)
    for number in range(50):
        spend_all(few_tenants, tenant(f"new spender {number}"))


@pytest.mark.usefixtures("few_tenants")
def test_of_tasks_the_one_whose_last_call_is_longest_ago_is_forgotten() -> None:
    budgets = UpstreamBudgets("llm", None, None, Budget(usd=0.01))
    for number in range(60):
        spend_all(budgets, CallRequest(task_id=f"task {number}"))
        assert not can_spend(budgets, CallRequest(task_id="task 0"))
    gc.collect()
    assert len(budgets.all_budgets()) == 50


# --- quotas ---


def registry_of(*quotas: Quota) -> AccountRegistry:
    settings = UpstreamSettings("llm", models={"spent": quotas}, quotas=quotas)
    recorder = UsageRecorder("llm", Prices())
    return AccountRegistry(
        settings, UpstreamBudgets("llm", None, None, None), Retry(), recorder=recorder, draw=lambda: 0.0
    )


def use(account: ThreadSafeAccount) -> None:
    """Make a call that the provider answers with an error (404, 401)."""
    permit = account._try_acquire(CallRequest(), _no_waiter, sole_account=True)
    assert not isinstance(permit, tuple)
    account.settle(permit, CallOutcome(kind=Outcome.IGNORED, used=Charge(), usd=0.0))


def _no_waiter(*_: object) -> Any:
    raise AssertionError("the call should not wait")


def may_call(account: ThreadSafeAccount) -> bool:
    return not account.account.quotas.wait(clock.now(), Charge()).seconds


def use_others(registry: AccountRegistry, others: int) -> None:
    for number in range(others):
        use(registry.account(f"no-such-model-{number}", f"junk {number}"))
    gc.collect()


@virtual
async def test_a_spent_quota_stays_spent_after_a_thousand_other_models_and_keys() -> None:
    registry = registry_of(Quota(requests=1, per="day"))
    use(registry.account("spent", "key"))
    use_others(registry, 1_001)
    assert not may_call(registry.account("spent", "key"))


@pytest.mark.slow
@virtual
async def test_a_spent_quota_stays_spent_after_a_hundred_thousand_others() -> None:
    registry = registry_of(Quota(requests=1, per="day"))
    use(registry.account("spent", "key"))
    use_others(registry, 100_000)
    assert not may_call(registry.account("spent", "key"))


@virtual
async def test_keys_beyond_the_bound_share_an_account(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_registry, "_MAX_LEVELS", 50)
    registry = registry_of(Quota(requests=1, per="day"))
    for number in range(50):
        use(registry.account("spent", f"key {number}"))
    use(registry.account("spent", "another"))
    assert registry.account("spent", "another") is registry.account("spent", "yet another")
    assert not may_call(registry.account("spent", "yet another"))
    assert [account.name for account in registry].count("upstream:llm:others:spent") == 1


@virtual
async def test_full_quotas_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_registry, "_MAX_LEVELS", 50)
    monkeypatch.setattr(account_registry, "_CACHED", 10)
    registry = registry_of(Quota(requests=1, per="second"))
    for number in range(500):
        use(registry.account("spent", f"key {number}"))
        await asyncio.sleep(0.1)
    assert registry._shared == {}


@virtual
async def test_accounts_that_never_succeeded_are_dropped_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(account_registry, "_CACHED", 10)
    registry = registry_of()
    account = registry.account("model", "key")
    account.account.counts.succeeded += 1
    account.account.suspend(clock.now(), 1_000.0)
    del account
    for number in range(1_000):
        use(registry.account("model", f"junk {number}"))
    gc.collect()
    assert isinstance(registry.account("model", "key").account.blocking_reason(clock.now(), 0.0, NORMAL), Rejected)
