"""The cache of accounts and budgets: it stays bounded, and an entry in use is never made a second time."""

from __future__ import annotations

import asyncio
import gc
from typing import Any

import pytest

from forebay import Budget, Fallback, Overloaded, Upstream
from forebay.quota import Price
from forebay.testing import virtual
from forebay.upstream.weak_lru import WeakLRU


class Entry:
    """An entry of the cache."""

    def __init__(self, key: int) -> None:
        self.key = key


def test_only_the_latest_entries_are_kept() -> None:
    cache = WeakLRU[int, Entry](10)
    for key in range(100):
        cache.get(key, Entry)
    gc.collect()
    assert [entry.key for entry in cache.values()] == list(range(90, 100))


def test_a_recently_used_entry_stays() -> None:
    cache = WeakLRU[int, Entry](10)
    for key in range(1, 100):
        cache.get(0, Entry)
        cache.get(key, Entry)
    assert 0 in [entry.key for entry in cache.values()]


def test_an_entry_in_use_is_found_however_many_came_since() -> None:
    cache = WeakLRU[int, Entry](10)
    held = cache.get(0, Entry)
    for key in range(1, 100):
        cache.get(key, Entry)
    assert cache.get(0, Entry) is held
    assert held in cache.values()


# --- accounts and budgets ---


async def call_others(upstream: Upstream, **how: Any) -> None:
    """Make calls for more accounts and tenants than the cache keeps."""
    for number in range(10_001):
        async with upstream.call(f"model-{number % 1_001}", tenant=f"tenant-{number}", **how):
            pass


@virtual
async def test_an_account_that_a_call_holds_is_not_opened_a_second_time() -> None:
    upstream = Upstream("llm", models={"own": []}, max_concurrent=1)
    later = upstream.call("own")  # it has its account, and has not requested a permit
    await call_others(upstream)
    async with upstream.call("own"):
        entering = asyncio.create_task(later.__aenter__())
        await asyncio.sleep(1.0)
        assert not entering.done()  # there is one slot
        assert [account.in_flight for account in upstream.statistics().accounts if account.name.endswith(":own")] == [1]
    await entering
    await later.__aexit__(None, None, None)


@virtual
async def test_dollars_that_a_call_reserved_are_not_available_a_second_time() -> None:
    prices = {"*": Price(input=1_000_000, output=0)}
    upstream = Upstream("llm", tenant_budget=Budget(usd=1), prices=prices)
    async with upstream.call("model", input_tokens=1, tenant="acme"):
        await call_others(upstream)
        with pytest.raises(Overloaded, match="overspent"):
            async with upstream.call("model", input_tokens=1, tenant="acme"):
                pass


def test_the_load_source_of_a_run_stays_the_same_however_many_others_there_are() -> None:
    upstream = Upstream("llm", models={"a": [], "b": []}, fallback=Fallback("b", models="a"))
    accounts = [upstream.core.accounts.account("a"), upstream.core.accounts.account("b")]
    any_of = upstream.runner.resolver.any_of(accounts)
    for number in range(1_001):
        upstream.runner.resolver.any_of([upstream.core.accounts.account(f"model-{number}"), accounts[1]])
    assert upstream.runner.resolver.any_of(accounts) is any_of
