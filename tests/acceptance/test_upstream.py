"""Calls of an upstream: slots, quotas, faults, budgets, and tasks that make calls."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from tests.support.call_driver import CallDriver
from tests.support.task_plane import run_ready, virtual

from forebay import Priority
from forebay.errors import InvalidSetting
from forebay.quota import Quota
from forebay.upstream import Upstream
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount


def shared_account(upstream: Upstream) -> ThreadSafeAccount:
    return upstream.core.accounts.account("")


def left(upstream: Upstream) -> tuple[int, int]:
    """Return the number of calls in flight and in the queue."""
    return shared_account(upstream).account.in_flight, len(shared_account(upstream).account.queue)


# --- faults ---


class SdkError(Exception):
    """An exception with an answer, as SDKs raise it."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__("no")
        self.status_code = status
        self.headers = headers


@virtual
async def test_a_wrong_request_of_a_guarded_function_is_neither_retried_nor_a_fault() -> None:
    search = Upstream("search")
    tries = 0

    @search.guard
    async def look_up() -> None:
        nonlocal tries
        tries += 1
        raise SdkError(400)

    for _ in range(20):
        with pytest.raises(SdkError):
            await look_up()
    assert tries == 20
    assert search.statistics().accounts[0].breaker == "closed"


@virtual
async def test_a_permit_taken_by_hand_reports_throttling_by_the_exception_that_leaves_its_block() -> None:
    llm = Upstream("llm")
    for _ in range(20):
        with pytest.raises(SdkError):
            async with llm.call("", input_tokens=10):
                raise SdkError(503)
    account = llm.statistics().accounts[0]
    assert (account.throttled, account.failed, account.breaker) == (20, 0, "closed")


# --- budgets ---


# --- with a supervisor ---


@virtual
async def test_no_run_starts_while_its_first_call_would_wait_too_long() -> None:
    upstream = Upstream("llm", quotas=[Quota(requests=20, per="second")], max_concurrent=100)
    recorder = CallDriver(upstream)
    await recorder.call()
    calls = [asyncio.create_task(recorder.call(priority=Priority.LOW)) for _ in range(50)]
    await run_ready(3)
    assert left(upstream) == (20, 30)  # one more LOW call waits 1.5 s; a run starts below 0.25 s
    assert [priority for priority in Priority if shared_account(upstream).may_start(priority)] == list(Priority)[:-1]
    for call in calls[23:]:
        call.cancel()
    await run_ready(3)
    assert [priority for priority in Priority if shared_account(upstream).may_start(priority)] == list(Priority)
    await asyncio.wait(calls)


# --- bad input ---


@pytest.mark.parametrize(
    "settings",
    [
        {"max_concurrent": 0},
        {"max_concurrent": True},
        {"max_wait": 0.0},
        {"max_wait": float("inf")},
        {"quotas": [5]},
        {"models": {"gpt": [None]}},
        {"weights": {"acme": 0.0}},
        {"weights": {"acme": "3"}},
        {"weights": ["acme"]},
        {"max_concurrent": "8"},
        {"max_wait": "60"},
        {"max_start_wait": "1"},
        {"max_start_wait": -1},
        {"quotas": Quota(requests=5, per="minute")},
        {"models": {"gpt": Quota(requests=5, per="minute")}},
        {"models": ["gpt"]},
        {"budget": 25},
        {"tenant_budget": {"usd": 25}},
        {"task_budget": "25"},
        {"retry": 3},
        {"breaker": 5},
        {"fallback": "gpt-4o-mini"},
        {"fallback": 5},
    ],
)
def test_an_invalid_setting_is_rejected_by_name(settings: dict[str, Any]) -> None:
    (name,) = settings
    with pytest.raises(InvalidSetting, match=rf"Upstream 'llm' was given {name}(\[.*\])?=.*; it must be "):
        Upstream("llm", **settings)


def test_the_error_for_a_fallback_that_is_a_string_shows_the_string() -> None:
    with pytest.raises(InvalidSetting, match=r"fallback='gpt-4o-mini'"):
        Upstream("llm", fallback="gpt-4o-mini")  # type: ignore[arg-type]


def test_max_start_wait_may_be_0() -> None:
    assert Upstream("llm", max_start_wait=0).core.settings.max_start_wait == 0


def test_an_upstream_needs_a_name() -> None:
    with pytest.raises(InvalidSetting):
        Upstream("")
