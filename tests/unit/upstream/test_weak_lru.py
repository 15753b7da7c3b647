"""The bounded cache: thousands of accounts and budgets, and never two for one key while one is in use."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from forebay import Budget, Fallback, Overloaded, Upstream
from forebay.quota import Price
from forebay.testing import virtual
from forebay.upstream.weak_lru import WeakLRU


class Thing:
    """A cached value."""

    def __init__(self, key: int) -> None:
        self.key = key


def test_the_most_recent_values_are_kept_and_no_more() -> None:
    kept = WeakLRU[int, Thing](10)
    for key in range(100):
        kept.get(key, Thing)
    gc.collect()
    assert [thing.key for thing in kept.values()] == list(range(90, 100))


def test_a_recently_used_value_stays() -> None:
    kept = WeakLRU[int, Thing](10)
    for key in range(1, 100):
        kept.get(0, Thing)
        kept.get(key, Thing)
    assert 0 in [thing.key for thing in kept.values()]


def test_a_value_that_is_held_is_found_however_old_it_is() -> None:
    kept = WeakLRU[int, Thing](10)
    held = kept.get(0, Thing)
    for key in range(1, 100):
        kept.get(key, Thing)
    assert kept.get(0, Thing) is held
    assert held in kept.values()


# --- accounts and budgets ---


async def fill_caches(upstream: Upstream, **how: Any) -> None:
    """Use more accounts, and more tenants, than are kept."""
    for number in range(10_001):
        async with upstream.call(f"model-{number % 1_001}", tenant=f"tenant-{number}", **how):
            pass


@virtual
async def test_an_account_that_a_call_is_about_to_use_is_not_opened_a_second_time() -> None:
    upstream = Upstream("llm", models={"own": []}, max_concurrent=1)
    later = upstream.call("own")  # it has its account, and no permit yet
    await fill_caches(upstream)
    async with upstream.call("own"):
        entering = asyncio.create_task(later.__aenter__())
        await asyncio.sleep(1.0)
        assert not entering.done()  # the only slot is taken
        assert [account.in_flight for account in upstream.statistics().accounts if account.name.endswith(":own")] == [1]
    await entering
    await later.__aexit__(None, None, None)


@virtual
async def test_the_budget_of_a_call_in_flight_does_not_exist_twice() -> None:
    prices = {"*": Price(input=1_000_000, output=0)}
    upstream = Upstream("llm", tenant_budget=Budget(usd=1), prices=prices)
    async with upstream.call("model", input_tokens=1, tenant="acme"):
        await fill_caches(upstream)
        with pytest.raises(Overloaded, match="overspent"):
            async with upstream.call("model", input_tokens=1, tenant="acme"):
                pass


def test_the_load_source_of_a_run_stays_the_same_among_many_others() -> None:
    upstream = Upstream("llm", models={"a": [], "b": []}, fallback=Fallback("b", models="a"))
    accounts = [upstream.core.accounts.account("a"), upstream.core.accounts.account("b")]
    any_of = upstream.runner.resolver.any_of(accounts)
    for number in range(1_001):
        upstream.runner.resolver.any_of([upstream.core.accounts.account(f"model-{number}"), accounts[1]])
    assert upstream.runner.resolver.any_of(accounts) is any_of
