"""Invalid calls, quotas and prices, and jumps of the clock, by each way to call an upstream."""

from __future__ import annotations

import asyncio
import functools
import json
from collections.abc import AsyncIterator, Iterator
from typing import Any

import httpx2
import pytest
from tests.support.task_plane import approximately, now, virtual
from tests.unit.upstream.httpx_binding.wire import CHAT, NOTHING, REQUEST, URL, Reply, Script, left

from forebay import Overloaded, clock
from forebay.errors import InvalidAmount, InvalidQuota, InvalidSetting, NotGuardable
from forebay.quota import Budget, Price, Quota, prices
from forebay.simulation import simulate
from forebay.upstream import Upstream

PER_MINUTE = [Quota(requests=60, per="minute")]


# --- calls larger than their bucket ---


@virtual
async def test_a_bound_call_larger_than_its_bucket_is_rejected_at_once_with_advice() -> None:
    upstream = Upstream("key", provider="openai", models={"gpt-4o": [Quota(tokens=99, per="minute")]})
    script = Script(httpx2)
    began = now()
    with pytest.raises(Overloaded, match="larger than tokens per minute will ever be: ask for less") as rejection:
        await script.client(upstream).post(URL, json=REQUEST)
    assert isinstance(rejection.value, httpx2.HTTPError)
    assert rejection.value.retry_after is None
    assert now() == began
    assert not script.requests
    assert left(upstream) == NOTHING


def test_a_call_in_a_plain_thread_larger_than_its_bucket_is_rejected_too() -> None:
    upstream = Upstream("key", quotas=[Quota(tokens=99, per="minute")])
    with pytest.raises(Overloaded, match="larger than tokens per minute"), upstream.call(input_tokens=100):
        pass
    assert left(upstream) == NOTHING


@pytest.mark.parametrize("unit", ["requests", "input_tokens", "output_tokens", "tokens"])
def test_a_quota_of_0_is_rejected_where_it_is_made(unit: str) -> None:
    with pytest.raises(InvalidQuota, match="to let nothing through, leave the upstream out"):
        Upstream("key", quotas=[Quota(**{unit: 0}, per="minute", strict=False)])


# --- missing prices ---


@virtual
async def test_calls_of_a_model_without_a_price_are_counted_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    prices = {"known": Price(input=1.0, output=1.0)}
    upstream = Upstream("key", provider="openai", budget=Budget(usd=1), prices=prices, unmetered="allow")
    client = Script(httpx2).client(upstream)
    for model in ("custom-model", "custom-model", "known"):
        await client.post(URL, json={**REQUEST, "model": model})
    async with upstream.call("custom-model", input_tokens=5):
        pass
    assert upstream.statistics().unpriced == 3
    (record,) = caplog.records
    assert "'custom-model'" in record.message
    assert "prices=" in record.message


@virtual
async def test_a_budget_without_the_price_list_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prices, "_price_list", lambda: None)
    upstream = Upstream("key", provider="openai", budget=Budget(usd=1))
    with pytest.raises(Overloaded, match=r"install the price list \(pip install 'forebay\[prices\]'\)"):
        await Script(httpx2).client(upstream).post(URL, json=REQUEST)


@virtual
async def test_a_call_without_a_price_is_rejected_under_a_budget() -> None:
    upstream = Upstream("key", provider="openai", budget=Budget(usd=1))
    script = Script(httpx2)
    with pytest.raises(Overloaded, match="no price is known for model 'custom-model': give the upstream prices=") as it:
        await script.client(upstream).post(URL, json={**REQUEST, "model": "custom-model"})
    assert it.value.retry_after is None
    assert (it.value.limited_by or "").endswith(":unpriced")
    assert not script.requests
    assert upstream.statistics().unpriced == 1


@virtual
@pytest.mark.parametrize("settings", [{"unpriced": "warn"}, {"unmetered": "allow"}], ids=str)
async def test_a_call_without_a_price_never_passes_a_spent_budget(settings: Any) -> None:
    prices = {"known": Price(input=0, output=10_000)}
    upstream = Upstream("key", provider="openai", budget=Budget(usd=0.2), prices=prices, **settings)
    client = Script(httpx2).client(upstream)
    await client.post(URL, json={**REQUEST, "model": "custom-model"})
    async with upstream.call("known", output_tokens=20) as call:
        call.settle(input_tokens=0, output_tokens=20)
    with pytest.raises(Overloaded, match="would be overspent") as it:
        await client.post(URL, json={**REQUEST, "model": "custom-model"})
    assert (it.value.limited_by or "").endswith(":budget")


def test_what_happens_to_calls_without_a_price_is_warn_or_refuse() -> None:
    with pytest.raises(InvalidSetting, match="unpriced='allow'; it must be 'warn', 'refuse', or None"):
        Upstream("key", unpriced="allow")  # type: ignore[arg-type]


@virtual
async def test_what_cannot_be_read_may_pass_where_a_missing_price_is_refused() -> None:
    upstream = Upstream("key", provider="openai", budget=Budget(usd=1), unmetered="allow", unpriced="refuse")
    client = Script(httpx2).client(upstream)
    await client.post(URL, content=b"packed", headers={"content-encoding": "gzip", "content-type": "application/json"})
    with pytest.raises(Overloaded, match=r"no price is known .*\(unpriced='warn' lets such calls pass"):
        await client.post(URL, json={**REQUEST, "model": "custom-model"})
    assert upstream.statistics().unpriced == 2


@virtual
async def test_a_call_that_uses_something_without_a_price_is_counted_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    usage = {"prompt_tokens": 30, "completion_tokens": 20, "prompt_tokens_details": {"audio_tokens": 5}}
    reply = Reply(body=[json.dumps({**CHAT, "usage": usage}).encode()])
    upstream = Upstream("key", provider="openai", budget=Budget(usd=1), prices={"*": Price(input=1, output=1)})
    client = Script(httpx2, reply).client(upstream)
    for _ in range(2):
        await client.post(URL, json=REQUEST)
    statistics = upstream.statistics()
    assert (statistics.unpriced, statistics.used.unpriced) == (2, 2)
    (record,) = caplog.records
    assert "no price is known for some of what calls of model 'gpt-4o' use" in record.message


@virtual
async def test_a_guarded_function_is_rejected_under_a_budget() -> None:
    upstream = Upstream("key", budget=Budget(usd=1), prices={"*": Price(input=1, output=1)})
    with pytest.raises(Overloaded, match="it names no model"):
        upstream.guard(lambda: 1)()


def test_only_a_bounded_number_of_models_without_a_price_is_remembered(caplog: pytest.LogCaptureFixture) -> None:
    upstream = Upstream("key", budget=Budget(usd=1))
    for number in range(1_500):
        with upstream.call(f"invented-{number}"):
            pass
    assert sum(record.name == "forebay" for record in caplog.records) == 1_000  # asyncio may report other tests' tasks
    assert upstream.statistics().unpriced == 1_500


def test_without_a_budget_a_missing_price_does_not_warn(caplog: pytest.LogCaptureFixture) -> None:
    upstream = Upstream("key")
    upstream.call("custom-model", input_tokens=5)
    assert upstream.statistics().unpriced == 0
    assert not caplog.records


# --- clocks ---


def test_a_leap_in_time_serves_the_queue_and_refills_each_quota_once() -> None:
    """Check it as on a laptop that slept for an hour."""

    async def main() -> None:
        upstream = Upstream("key", quotas=[Quota(requests=2, per="minute")], max_wait=3600.0)
        loop: Any = asyncio.get_running_loop()
        sent: list[float] = []

        async def call() -> None:
            async with upstream.call():
                sent.append(now())

        async with asyncio.TaskGroup() as group:
            for _ in range(8):
                group.create_task(call())
            await asyncio.sleep(1.0)
            assert len(sent) == 2
            loop.stall(3600.0)
        woke = [at for at in sent if at >= 3600.0]
        assert len([at for at in woke if at < 3602.0]) == 2  # the bucket, not the calls that an hour of quota allows
        assert max(sent) == approximately(woke[0] + 120.0)
        assert left(upstream) == NOTHING

    simulate(main)


@pytest.mark.parametrize("by", [-86_400.0, -10.0, 10.0, 86_400.0])
def test_a_jump_of_the_wall_clock_during_a_call_loses_no_dollars(by: float, monkeypatch: pytest.MonkeyPatch) -> None:
    wall = 1_000_000.0
    monkeypatch.setattr(clock, "wall_time", lambda: wall)
    upstream = Upstream("key", budget=Budget(usd=100, per="day"), prices={"m": Price(input=1e6, output=1e6)})
    with upstream.call("m", input_tokens=10, output_tokens=10) as call:
        wall += by
        call.settle(input_tokens=10, output_tokens=5)
    assert left(upstream) == NOTHING
    assert upstream.core.budgets.upstream_budget is not None
    assert upstream.core.budgets.upstream_budget.reserved() == (0, 0.0)
    with upstream.call("m", input_tokens=50):  # the rest of the budget is available
        pass


NO_TOKENS = [-1, -100_000_000, float("nan"), float("inf"), -0.5, 10**400, 10**10, "5", None, True]


@virtual
@pytest.mark.parametrize("tokens", NO_TOKENS)
@pytest.mark.parametrize("name", ["input_tokens", "output_tokens"])
async def test_a_report_of_an_impossible_usage_is_an_error_that_holds_nothing(name: str, tokens: Any) -> None:
    upstream = Upstream(
        "key", budget=Budget(usd=100), prices={"m": Price(input=1e6, output=1e6)}, quotas=PER_MINUTE, max_concurrent=1
    )
    for _ in range(6):  # no fault of the provider either, which would open the breaker
        with pytest.raises(InvalidSetting, match=name):
            async with upstream.call("m", input_tokens=1, output_tokens=1) as call:
                call.settle(**{"input_tokens": 0, "output_tokens": 0, name: tokens})
        with pytest.raises(InvalidSetting, match=name):
            upstream.call("m", **{name: tokens})
    assert left(upstream) == NOTHING
    assert upstream.core.budgets.upstream_budget is not None
    assert upstream.core.budgets.upstream_budget.reserved() == (0, 0.0)
    assert upstream.statistics().spent_usd == pytest.approx(12.0)  # as reserved


@virtual
@pytest.mark.parametrize("usd", [-1.0, float("nan"), float("inf"), 10**400, "1"])
async def test_a_report_of_an_impossible_price_holds_no_dollars(usd: Any) -> None:
    upstream = Upstream("key", budget=Budget(usd=100), prices={"m": Price(input=1e6, output=1e6)})
    with pytest.raises(InvalidAmount):
        async with upstream.call("m", input_tokens=1) as call:
            call.settle(input_tokens=1, output_tokens=0, usd=usd)
    assert upstream.core.budgets.upstream_budget is not None
    assert upstream.core.budgets.upstream_budget.reserved() == (0, 0.0)


@virtual
async def test_a_part_of_a_token_counts_as_a_whole_one() -> None:
    upstream = Upstream("key", budget=Budget(usd=100), prices={"m": Price(input=1e6, output=1e6)})
    async with upstream.call("m", input_tokens=1) as call:
        call.settle(input_tokens=1.5, output_tokens=0)  # type: ignore[arg-type]
    assert upstream.statistics().spent_usd == pytest.approx(2.0)


# --- resets and Retry-After ---


@virtual
@pytest.mark.parametrize("reset", ["1999-01-01T00:00:00Z", "-5s", "0s", "Wed, 21 Oct 2015 07:28:00 GMT"])
async def test_a_reset_in_the_past_blocks_no_call(reset: str) -> None:
    upstream = Upstream("key", provider="openai", quotas=PER_MINUTE)
    headers = {
        "x-ratelimit-limit-requests": "60",
        "x-ratelimit-remaining-requests": "59",
        "x-ratelimit-reset-requests": reset,
        "retry-after": "Wed, 21 Oct 2015 07:28:00 GMT",
    }
    client = Script(httpx2, Reply.error(429, "requests per min", **headers), Reply(headers=headers)).client(upstream)
    began = now()
    for _ in range(5):
        assert (await client.post(URL, json=REQUEST)).status_code == 200
    assert now() - began <= 5.0


@virtual
async def test_a_retry_after_of_a_day_is_passed_on_and_costs_other_calls_a_pause_before_a_trial() -> None:
    upstream = Upstream("key", provider="openai", quotas=PER_MINUTE)
    client = Script(httpx2, Reply.error(429, "requests per day", retry_after="86400"), Reply()).client(upstream)
    assert (await client.post(URL, json=REQUEST)).headers["retry-after"] == "86400"
    began = now()
    assert (await client.post(URL, json=REQUEST)).status_code == 200
    assert now() - began == approximately(0.25)


# --- plain functions ---


def test_a_generator_function_cannot_be_guarded() -> None:
    upstream = Upstream("key")

    def lines() -> Iterator[str]:
        yield "a"

    async def events() -> AsyncIterator[str]:
        yield "a"

    for function in (lines, events):
        with pytest.raises(NotGuardable, match=rf"{function.__name__}.*a generator.*upstream\.call"):
            upstream.guard(function)


def test_a_plain_function_that_returns_an_awaitable_is_rejected() -> None:
    upstream = Upstream("key")

    async def work(question: str) -> str:
        return question

    def ask() -> Any:
        return work("why")

    with pytest.raises(NotGuardable, match=r"ask.*an awaitable"):
        upstream.guard(ask)()
    assert left(upstream) == NOTHING


def test_an_object_that_is_not_callable_cannot_be_guarded() -> None:
    tool: Any = object()
    with pytest.raises(NotGuardable, match=r"object.*not callable.*Guard the function that it calls"):
        Upstream("key").guard(tool)


class Agent:
    """An object with an asynchronous `__call__`."""

    async def __call__(self, question: str) -> str:
        await asyncio.sleep(2.0)
        return question


@virtual
async def test_a_guarded_object_with_an_asynchronous_call_holds_its_permit_until_it_returns() -> None:
    upstream = Upstream("key", max_concurrent=1)
    ask = upstream.guard(Agent())
    began = now()
    assert list(await asyncio.gather(ask("a"), ask("b"))) == ["a", "b"]
    assert now() - began == approximately(4.0)
    partial = upstream.guard(functools.partial(Agent().__call__, "c"))
    assert await partial() == "c"
