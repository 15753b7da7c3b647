"""Settings of a shared account that change while processes use it, in virtual time."""

from __future__ import annotations

import asyncio

import pytest
from tests.support.task_plane import virtual

from forebay import Budget, Overloaded, Price, Quota, Upstream, clock
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore
from forebay.upstream.shared.stores.store import LedgerStore

PRICES = {"m": Price(input=0, output=1e6)}  # a dollar for each token


def upstream(store: LedgerStore, requests: int = 60, usd: float = 100.0, max_concurrent: int = 10) -> Upstream:
    """Return an upstream as a process has it, by settings of its own."""
    return Upstream(
        "openai",
        quotas=[Quota(requests=requests, per="minute")],
        max_concurrent=max_concurrent,
        budget=Budget(usd=usd),
        prices=PRICES,
        shared=store,
    )


async def call(made: Upstream, seconds: float = 0.0) -> float:
    """Make a call, and return when it was sent."""
    async with made.call("m", output_tokens=1) as sent:
        at = clock.now()
        await asyncio.sleep(seconds)
        sent.settle(input_tokens=0, output_tokens=1)
    return at


def reload(old: Upstream, new: Upstream) -> Upstream:
    """Let an upstream with other settings replace another one, as a reload of a gateway does."""
    new.core.adopt(old.core, accounts=True)
    return new


@virtual
async def test_no_call_fails_while_processes_change_their_settings_one_after_the_other() -> None:
    store = MemoryLedgerStore()
    first, second = old = (
        upstream(store),
        upstream(store),
    )  # an upstream that is collected tells no more in virtual time
    await asyncio.gather(call(first), call(second))
    in_progress = [asyncio.create_task(call(each, 60.0)) for each in (first, second)]
    await asyncio.sleep(0.1)
    began = clock.now()
    first = reload(first, upstream(store, requests=600, usd=200.0, max_concurrent=20))
    waiting = asyncio.create_task(call(first))
    await asyncio.sleep(2.0)
    assert await call(second) <= clock.now()  # by the old settings
    assert not waiting.done()
    second = reload(second, upstream(store, requests=600, usd=200.0, max_concurrent=20))
    sent = [await waiting, await call(second)]
    assert max(sent) - began < 4.0
    assert await asyncio.gather(*in_progress)
    await asyncio.sleep(2.0)
    await call(first)
    await asyncio.sleep(2.0)
    assert first.statistics().spent_usd == pytest.approx(8.0)
    del old


@virtual
async def test_calls_in_progress_by_the_old_settings_count_for_the_new_limit() -> None:
    store = MemoryLedgerStore()
    first, second = upstream(store), upstream(store)
    old = [asyncio.create_task(call(each, 30.0)) for each in (first, second) for _ in range(2)]
    await asyncio.sleep(0.5)
    first = reload(first, upstream(store, max_concurrent=5))
    second = reload(second, upstream(store, max_concurrent=5))
    began = clock.now()
    new = [asyncio.create_task(call(each, 1.0)) for each in (first, second) for _ in range(4)]
    sent = sorted([await each for each in new])
    assert [round(at - began) for at in sent] == [0, 1, 2, 3, 4, 5, 6, 7]
    await asyncio.gather(*old)


@virtual
async def test_calls_in_progress_since_before_the_last_two_reloads_keep_no_call_out() -> None:
    store = MemoryLedgerStore()
    first, second = old = upstream(store), upstream(store)
    in_progress = [asyncio.create_task(call(each, 60.0)) for each in old]
    await asyncio.sleep(0.5)
    for requests, usd in ((600, 200.0), (300, 150.0)):
        first = reload(first, upstream(store, requests=requests, usd=usd))
        second = reload(second, upstream(store, requests=requests, usd=usd))
        began = clock.now()
        assert max(await asyncio.gather(call(first), call(second))) - began < 4.0
    await asyncio.gather(*in_progress)


@virtual
async def test_a_process_that_never_gets_the_new_settings_is_an_error_that_names_both() -> None:
    store = MemoryLedgerStore()
    first, second = upstream(store), upstream(store)
    await asyncio.gather(call(first), call(second))
    first = reload(first, upstream(store, requests=600))

    async def stay() -> None:
        while True:
            await call(second)
            await asyncio.sleep(1.0)

    staying = asyncio.create_task(stay())
    with pytest.raises(Overloaded, match=r"600 requests in .* here, 60 requests in .* there"):
        await call(first)
    staying.cancel()


@virtual
async def test_a_process_that_starts_with_other_settings_is_rejected_at_once() -> None:
    store = MemoryLedgerStore()
    await call(upstream(store))
    began = clock.now()
    with pytest.raises(Overloaded, match="its settings differ"):
        await call(upstream(store, requests=600))
    assert clock.now() - began < 1.0
