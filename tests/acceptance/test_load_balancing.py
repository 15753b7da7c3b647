"""Fallbacks with a weight: calls are shared by several accounts, by their room."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from typing import Any

import pytest
from tests.support.task_plane import approximately, now, virtual

from forebay import Fallback, Overloaded, Quota, Upstream
from forebay.errors import InvalidSetting
from forebay.interfaces import Outcome
from forebay.upstream.call_request import CallOutcome, CallRequest

A_MINUTE = 60.0


def pair(*, weight: float = 1.0, first: dict[str, Any] | None = None, second: dict[str, Any] | None = None) -> Upstream:
    other = Upstream("b", **(second or {}))
    return Upstream("a", fallback=Fallback(other, weight=weight), **(first or {}))


def in_flight(upstream: Upstream) -> int:
    (fallback,) = upstream.fallbacks
    assert not isinstance(fallback.to, str)
    cores = (upstream.core, fallback.to.core)
    return sum(each.account.in_flight + len(each.account.queue) for core in cores for each in core.accounts)


async def served_by(upstream: Upstream, *, seconds: float = 0.0, **how: Any) -> str:
    async with upstream.call("m", **how) as call:
        await asyncio.sleep(seconds)
        return call.upstream.name


async def shares(upstream: Upstream, calls: int) -> Counter[str]:
    return Counter([await served_by(upstream) for _ in range(calls)])


@virtual
async def test_a_full_account_gets_no_call_while_another_has_room() -> None:
    upstream = pair(first={"max_concurrent": 1}, second={"max_concurrent": 3})
    names = await asyncio.gather(*(served_by(upstream, seconds=5.0) for _ in range(4)))
    assert Counter(names) == {"a": 1, "b": 3}
    assert now() == approximately(5.0)
    assert in_flight(upstream) == 0


@virtual
async def test_a_quota_that_is_used_up_leaves_the_calls_to_the_other_account() -> None:
    upstream = pair(
        first={"quotas": [Quota(requests=10, per="minute")]}, second={"quotas": [Quota(requests=30, per="minute")]}
    )
    found = await shares(upstream, 39)
    assert now() == 0.0
    assert found["a"] <= 10
    assert found["b"] <= 30


@virtual
async def test_calls_wait_where_they_are_sent_soonest() -> None:
    slow = {"quotas": [Quota(requests=1, per="minute")]}
    quick = {"quotas": [Quota(requests=60, per="minute")]}
    upstream = pair(first=slow, second=quick)
    found = Counter(await asyncio.gather(*(served_by(upstream) for _ in range(61 + 20))))
    assert now() < 25.0
    assert found["b"] >= 79


@virtual
async def test_a_queued_call_moves_to_an_account_that_has_become_free() -> None:
    upstream = pair(first={"max_concurrent": 1}, second={"max_concurrent": 1})
    long = asyncio.create_task(served_by(upstream, seconds=1000.0))
    short = asyncio.create_task(served_by(upstream, seconds=2.0))
    await asyncio.sleep(1.0)
    waiting = [asyncio.create_task(served_by(upstream)) for _ in range(2)]
    names = await asyncio.gather(*waiting)
    assert names == [await short] * 2
    assert now() < 10.0
    long.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await long
    assert in_flight(upstream) == 0


async def open_breaker(upstream: Upstream) -> None:
    shared = upstream.core.accounts.account("m")
    while shared.account.breaker.ready(now()):
        permit = await shared.acquire(CallRequest())
        shared.settle(permit, CallOutcome(kind=Outcome.FAULT))


@virtual
async def test_an_account_with_an_open_breaker_gets_nothing_until_it_recovers() -> None:
    upstream = pair()
    await open_breaker(upstream)
    assert await shares(upstream, 20) == {"b": 20}
    await asyncio.sleep(A_MINUTE)
    found = await shares(upstream, 200)
    assert found["a"] > 50


@virtual
async def test_if_all_accounts_reject_a_call_the_soonest_retry_is_named() -> None:
    once = [Quota(requests=1, per="hour")]
    upstream = pair(first={"quotas": once, "max_wait": 10.0}, second={"quotas": once, "max_wait": 10.0})
    assert sorted([await served_by(upstream) for _ in range(2)]) == ["a", "b"]
    with pytest.raises(Overloaded, match=r"a: .*; b: |b: .*; a: ") as caught:
        await served_by(upstream)
    assert caught.value.retry_after is not None


def test_in_a_plain_thread_calls_are_shared_too() -> None:
    upstream = pair(first={"quotas": [Quota(requests=1, per="hour")]})
    names = []
    for _ in range(20):
        with upstream.call("m") as call:
            names.append(call.upstream.name)
    assert names.count("a") <= 1
    assert len(names) == 20


@virtual
async def test_a_guarded_function_that_fails_at_one_account_is_tried_at_the_other_at_once() -> None:
    upstream = pair()
    tried = []

    @upstream.guard
    async def ask(*, upstream: Upstream) -> str:
        tried.append(upstream.name)
        if len(tried) == 1:
            raise ConnectionError
        return upstream.name

    assert await ask(upstream=upstream) == tried[1]
    assert sorted(tried) == ["a", "b"]
    assert now() == 0.0


@pytest.mark.parametrize("weight", [0, -1.0, float("nan"), float("inf"), True, "2"])
def test_a_weight_is_a_positive_number(weight: Any) -> None:
    with pytest.raises(InvalidSetting, match="weight"):
        Fallback(Upstream("b"), weight=weight)


def test_a_weight_and_a_threshold_contradict_each_other() -> None:
    with pytest.raises(InvalidSetting, match="load_threshold"):
        Fallback(Upstream("b"), weight=1.0, load_threshold=0.5)
