"""Retries: what an attempt leaves behind, how many there may be, their order, and which failures count.

The call flow is driven as the transports drive it; the attempts have scripted results.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import pytest
from tests.support.task_plane import approximately, now, run_ready, virtual
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, Reply, Script

from forebay import Deadline, Overloaded, Priority, clock
from forebay.breaker import BreakerRules, consecutive_faults
from forebay.errors import CallMisused, InvalidAmount
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.quota import Budget, Price, Quota
from forebay.quota.quota_doubt import QuotaDoubt
from forebay.retry import Retry, RetryPermission
from forebay.simulation import simulate
from forebay.upstream import Upstream
from forebay.upstream.accounts.account import Account
from forebay.upstream.call_request import AttemptResult, CallOutcome, CallRequest, Permit
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

CALL = Charge(input_tokens=10, output_tokens=10, tokens=20)


def account(upstream: Upstream, model: str = "") -> Account:
    return upstream.core.accounts.account(model).account


def route(upstream: Upstream, request: CallRequest) -> PlainRoute:
    return PlainRoute(upstream, upstream.core.accounts.account(""), request)


def fault() -> AttemptResult:
    """Return a failed attempt that is retryable and uses up an attempt."""
    return AttemptResult(error=ConnectionError("gone"), retryable=True, outcome=CallOutcome(kind=Outcome.FAULT))


def success() -> AttemptResult:
    return AttemptResult(value="done", outcome=CallOutcome(kind=Outcome.SUCCESS, used=CALL, latency=1.0))


def rate_limited(retry_after: float | None = None) -> AttemptResult:
    """Return an attempt throttled because a quota of the provider is used up."""
    outcome = CallOutcome(kind=Outcome.IGNORED, rate_limited=True, retry_after=retry_after, usd=0.0)
    error = ConnectionError("429")
    return AttemptResult(error=error, retryable=True, uses_attempt=False, retry_after=retry_after, outcome=outcome)


def congested() -> AttemptResult:
    """Return an attempt throttled because too many of our calls are in flight."""
    outcome = CallOutcome(kind=Outcome.OVERLOAD, released=True, usd=0.0)
    return AttemptResult(error=ConnectionError("529"), retryable=True, uses_attempt=False, outcome=outcome)


class Calls:
    """Makes calls through one upstream. Their attempts have the given results, one after the other; then they succeed.

    Attributes:
        sent: name and time of each attempt.
    """

    def __init__(self, upstream: Upstream, *results: Callable[[], AttemptResult], seconds: float = 0.1) -> None:
        self.upstream = upstream
        self.results = list(results)
        self.seconds = seconds
        self.sent: list[tuple[str, float]] = []

    async def call(self, name: str = "", **how: Any) -> Any:
        """Make one call, to its end."""

        async def attempt(_: PlainRoute, __: Permit) -> AttemptResult:
            self.sent.append((name, now()))
            await asyncio.sleep(self.seconds)
            return (self.results.pop(0) if self.results else success)()

        return await self.upstream.runner.run(
            route(self.upstream, self.upstream.core.request("", CALL, **how)), attempt
        )


# --- what an attempt leaves behind ---


@virtual
async def test_the_retry_after_of_one_call_blocks_all_but_a_few_trial_calls() -> None:
    upstream = Upstream("llm")
    ends = now() + 20.0
    calls = Calls(upstream)
    calls.results = [lambda: rate_limited(ends - now()) if now() < ends else success()] * 200
    async with asyncio.TaskGroup() as group:
        for _ in range(100):
            group.create_task(calls.call())
            await asyncio.sleep(0.1)
    refused = [at for _, at in calls.sent if at < ends - 0.2]
    assert len(refused) <= 8
    assert len([at for _, at in calls.sent if at >= ends - 0.2]) >= 100


@virtual
async def test_a_retry_waits_at_least_as_long_as_retry_after() -> None:
    upstream = Upstream("llm", retry=Retry(base_delay=0.001))
    calls = Calls(
        upstream, lambda: AttemptResult(error=OSError(), retryable=True, retry_after=9.0, outcome=fault().outcome)
    )
    await calls.call()
    (_, first), (_, second) = calls.sent
    assert second - first >= 9.0


@virtual
async def test_only_the_last_attempt_of_a_call_counts_for_the_breaker() -> None:
    upstream = Upstream("llm", retry=Retry(max_attempts=3, base_delay=0.01), breaker=BreakerRules())
    calls = Calls(upstream, *[fault, success] * 8)
    for _ in range(8):
        assert await calls.call() == "done"
    assert upstream.statistics().accounts[0].breaker == "closed"


# --- retry budgets ---


@virtual
async def test_no_retry_storm_while_a_provider_fails() -> None:
    upstream = Upstream("llm", retry=Retry(base_delay=0.01), breaker=BreakerRules(triggers=(consecutive_faults(1000),)))
    calls = Calls(upstream, *[fault] * 1000)
    for _ in range(50):
        with pytest.raises(ConnectionError):
            await calls.call()
    assert len(calls.sent) <= 50 + 0.2 * 50 + 10


@virtual
async def test_a_retry_of_a_failed_call_that_helps_uses_up_no_budget() -> None:
    upstream = Upstream("llm", retry=Retry(base_delay=0.01))
    for _ in range(100):
        assert await Calls(upstream, fault).call() == "done"
    assert now() < 60.0


@virtual
async def test_retries_that_seldom_help_are_bounded_by_the_budget() -> None:
    upstream = Upstream(
        "llm", retry=Retry(base_delay=0.001), breaker=BreakerRules(triggers=(consecutive_faults(1000),))
    )
    calls = Calls(upstream, *[fault, fault, fault, fault, success] * 100, seconds=0.01)
    served = 0
    for _ in range(100):
        with contextlib.suppress(ConnectionError):
            served += await calls.call() == "done"
    assert len(calls.sent) <= 100 + 0.2 * 100 + 10 + served


@virtual
async def test_a_throttled_call_waits_for_its_retry_rather_than_fail() -> None:
    upstream = Upstream("llm", max_concurrent=1000, retry=Retry(base_delay=0.01, max_total_delay=600.0))
    calls = Calls(upstream, *[congested] * 100)
    assert await asyncio.gather(*(calls.call() for _ in range(50))) == ["done"] * 50
    assert len(calls.sent) == 150  # retries of calls that are then accepted are not limited


@virtual
async def test_no_retry_storm_while_a_provider_throttles() -> None:
    upstream = Upstream("llm", max_concurrent=1000, retry=Retry(base_delay=0.01))
    calls = Calls(upstream, *[congested] * 10_000)
    outcomes = await asyncio.gather(*(calls.call() for _ in range(50)), return_exceptions=True)
    assert all(isinstance(outcome, ConnectionError) for outcome in outcomes)
    assert len([at for _, at in calls.sent if at < 60.0]) <= 50 + 0.2 * 50 + 10 + 60 / 5  # one in five seconds tries


@virtual
async def test_once_a_call_is_accepted_all_calls_throttled_before_may_retry() -> None:
    upstream = Upstream("llm", max_concurrent=100, retry=Retry(base_delay=0.01, max_total_delay=600.0))
    calls = Calls(upstream, *[congested] * 100)
    await asyncio.gather(*(calls.call() for _ in range(80)))
    assert calls.sent[-1][1] - calls.sent[100][1] <= 2.0


@virtual
async def test_an_accepted_retry_of_a_throttled_call_uses_up_no_budget() -> None:
    upstream = Upstream("llm", retry=Retry(base_delay=0.01))
    for _ in range(100):
        assert await Calls(upstream, congested).call() == "done"
    assert now() < 60.0


@virtual
async def test_throttled_calls_use_up_no_retry_of_failed_ones() -> None:
    upstream = Upstream("llm", max_concurrent=1000, retry=Retry(base_delay=0.01, max_total_delay=5.0))
    throttled = Calls(upstream, *[congested] * 10_000)
    await asyncio.gather(*(throttled.call() for _ in range(50)), return_exceptions=True)
    assert await Calls(upstream, fault).call() == "done"


@virtual
async def test_no_call_waits_for_a_retry_beyond_its_deadline() -> None:
    upstream = Upstream("llm", max_concurrent=1000, retry=Retry(base_delay=0.01, max_total_delay=30.0))
    calls = Calls(upstream, *[congested] * 10_000)
    others = asyncio.gather(*(calls.call() for _ in range(50)), return_exceptions=True)
    await asyncio.sleep(5.0)
    began = now()
    with pytest.raises((ConnectionError, Overloaded)):
        await calls.call(deadline=Deadline.within(10.0))
    assert now() - began <= 10.0 + 1e-3
    await others


def balances(upstream: Upstream) -> tuple[float, float]:
    """Return the retries left in the budgets for failed and for throttled calls."""
    budgets = upstream.core.accounts.account("").retries._budgets
    at = clock.now()
    return budgets.faults.balance(at), budgets.throttles.balance(at)


async def reject_retry(upstream: Upstream, result: Callable[[], AttemptResult]) -> None:
    """Make a call whose first attempt has this result, and which gets no second permit."""
    call = asyncio.create_task(Calls(upstream, result).call())
    await asyncio.sleep(0.2)  # the first attempt has ended, and a retry is due
    upstream.core.accounts.account("").suspend(60.0)
    with pytest.raises(Overloaded):
        await call


async def cancel_retry(upstream: Upstream, result: Callable[[], AttemptResult]) -> None:
    """Make a call whose first attempt has this result, and cancel it before the second."""
    call = asyncio.create_task(Calls(upstream, result).call())
    await asyncio.sleep(0.2)
    call.cancel()
    await asyncio.wait([call])


@pytest.mark.parametrize("result", [fault, congested])
@pytest.mark.parametrize("end", [reject_retry, cancel_retry])
@virtual
async def test_a_retry_that_is_not_sent_returns_to_its_budget(
    end: Callable[[Upstream, Callable[[], AttemptResult]], Awaitable[None]], result: Callable[[], AttemptResult]
) -> None:
    upstream = Upstream("llm", retry=Retry(base_delay=20.0))
    before = balances(upstream)
    await end(upstream, result)
    first = 0.2  # what a first attempt adds
    assert balances(upstream) == pytest.approx((before[0] + first, before[1] + first))


@pytest.mark.parametrize("end", [reject_retry, cancel_retry])
@virtual
async def test_a_periodic_retry_that_gets_no_permit_is_left_to_another_call(
    end: Callable[[Upstream, Callable[[], AttemptResult]], Awaitable[None]],
) -> None:
    upstream = Upstream("llm", max_concurrent=1, retry=Retry(base_delay=0.001))
    budgets = upstream.core.accounts.account("").retries._budgets
    while budgets.throttles.withdraw(now()):  # the budget is empty, so the only retry is the periodic one
        pass

    async def takes_the_slot() -> None:
        await asyncio.sleep(0.05)  # while the other is being throttled
        await Calls(upstream, seconds=1.0).call(priority=Priority.CRITICAL)

    other = asyncio.create_task(takes_the_slot())
    await end(upstream, congested)
    await other
    assert budgets.request_retry(now(), throttled_at=now()) is RetryPermission.PERIODIC
    assert budgets.request_retry(now(), throttled_at=now()) is RetryPermission.DENIED


@pytest.mark.parametrize("result", [fault, congested])
def test_a_retry_that_is_not_sent_returns_to_its_budget_in_a_thread_too(result: Callable[[], AttemptResult]) -> None:
    upstream = Upstream("llm", retry=Retry(base_delay=0.001))
    before = balances(upstream)

    def attempt(_: PlainRoute, __: Permit) -> AttemptResult:
        attempted = result()
        upstream.core.accounts.account("").suspend(60.0)
        return attempted

    with pytest.raises(Overloaded) as kept:  # its frames keep the call flow open, as a debugger does
        upstream.runner.run_blocking(route(upstream, upstream.core.request("", CALL)), attempt)
    assert balances(upstream) == pytest.approx((before[0] + 0.2, before[1] + 0.2))
    assert kept.value.retry_after is not None


@virtual
async def test_a_retry_that_was_sent_stays_withdrawn_after_a_cancellation() -> None:
    upstream = Upstream("llm", retry=Retry(base_delay=0.001))
    before, _ = balances(upstream)
    call = asyncio.create_task(Calls(upstream, fault, seconds=1.0).call())
    await asyncio.sleep(1.5)  # during the second attempt
    call.cancel()
    await asyncio.wait([call])
    assert balances(upstream)[0] == pytest.approx(before + 0.2 - 1.0)


# --- order ---


@virtual
async def test_a_retry_goes_before_calls_that_arrived_later() -> None:
    upstream = Upstream("llm", max_concurrent=1, retry=Retry(base_delay=0.5))
    calls = Calls(upstream, congested, seconds=1.0)
    first = asyncio.create_task(calls.call("first"))
    await run_ready()
    others = [asyncio.create_task(calls.call(f"{number}")) for number in range(5)]
    await asyncio.gather(first, *others)
    names = [name for name, _ in calls.sent]
    assert names[0] == "first"
    assert names.index("first", 1) <= 2  # one may have been sent during its backoff


@virtual
async def test_a_retry_does_not_go_before_calls_of_higher_priority() -> None:
    upstream = Upstream("llm", max_concurrent=1, retry=Retry(base_delay=0.5))
    calls = Calls(upstream, congested, seconds=1.0)
    first = asyncio.create_task(calls.call("first"))
    await run_ready()
    others = [asyncio.create_task(calls.call(f"{number}", priority=Priority.HIGH)) for number in range(3)]
    await asyncio.gather(first, *others)
    assert [name for name, _ in calls.sent] == ["first", "0", "1", "2", "first"]


class Window:
    """A provider that counts the successes of each minute, and tells so in its headers."""

    def __init__(self, amount: int) -> None:
        self.amount, self.minute, self.count = amount, -1.0, 0

    def success(self) -> AttemptResult:
        minute, seconds = divmod(now(), 60.0)
        if minute != self.minute:
            self.minute, self.count = minute, 0
        if self.count == self.amount:
            return rate_limited(60.0 - seconds)
        self.count += 1
        header = RateLimitHeaders(
            unit="requests", limit=self.amount, remaining=self.amount - self.count, reset=60.0 - seconds
        )
        outcome = CallOutcome(kind=Outcome.SUCCESS, used=CALL, latency=1.0, rate_limit_headers=(header,))
        return AttemptResult(value="done", outcome=outcome)

    async def learn(self, calls: Calls, *, doubted: bool = False) -> float:
        """Let the upstream learn the window; return its end, half a second after its start.

        `doubted`: a call may be sent as a trial when it is used up.
        """
        calls.results = [self.success] * 30
        for _ in range(30):
            await calls.call()
            await asyncio.sleep(4.0)
        account(calls.upstream).quotas._observed["requests"].doubt = QuotaDoubt(0.0 if doubted else 1e12, 20.0, 1.0)
        await asyncio.sleep(60.5 - now() % 60.0)
        return now() + 59.5


@pytest.mark.parametrize("result", [fault, congested])
@virtual
async def test_a_retry_keeps_its_place_in_a_window_that_others_would_use_up(
    result: Callable[[], AttemptResult],
) -> None:
    window, calls = Window(20), Calls(Upstream("llm", retry=Retry(base_delay=2.0)))
    end = await window.learn(calls)
    calls.sent.clear()
    calls.results = [*[window.success] * 18, result, result, *[window.success] * 40]
    async with asyncio.TaskGroup() as group:
        for number in range(30):
            group.create_task(calls.call(f"{number}"))
            await asyncio.sleep(0.2 if number == 19 else 0.02)  # the last ten ask while two are in their backoff
    times = {name: [at for other, at in calls.sent if other == name] for name, _ in calls.sent}
    for failed in ("18", "19"):
        assert len(times[failed]) == 2
        assert times[failed][1] < end
    assert min(times[f"{number}"][0] for number in range(20, 30)) >= end


@virtual
async def test_a_call_that_is_refused_for_a_quota_waits_on_for_it_as_if_it_had_not_been_sent() -> None:
    window, calls = Window(20), Calls(Upstream("llm"))
    end = await window.learn(calls, doubted=True)
    calls.sent.clear()
    calls.results = [window.success] * 40
    async with asyncio.TaskGroup() as group:
        for number in range(25):
            group.create_task(calls.call(f"{number}"))
            await asyncio.sleep(0.02)
    early = [name for name, at in calls.sent if at < end][20:]
    assert early == ["20"]
    assert [name for name, at in calls.sent if end <= at < end + 0.25] == ["20", "21", "22", "23", "24"]


@virtual
async def test_a_call_that_is_not_retried_is_no_trial_call() -> None:
    window, calls = Window(20), Calls(Upstream("llm"))
    end = await window.learn(calls, doubted=True)
    calls.results = [window.success] * 20
    for _ in range(20):
        await calls.call()
    async with calls.upstream.call():
        assert now() >= end


@virtual
async def test_a_call_that_leaves_in_its_backoff_keeps_no_place() -> None:
    window, calls = Window(20), Calls(Upstream("llm"))
    end = await window.learn(calls)
    calls.results = [
        *[window.success] * 19,
        lambda: AttemptResult(error=OSError(), retryable=True, retry_after=40.0, outcome=fault().outcome),
        window.success,
    ]
    for _ in range(19):
        await calls.call()
    leaving = asyncio.create_task(calls.call("leaves"))
    await asyncio.sleep(1.0)
    waiting = asyncio.create_task(calls.call("waits"))
    await asyncio.sleep(1.0)
    assert [name for name, _ in calls.sent[-2:]] == ["", "leaves"]
    leaving.cancel()
    await waiting
    assert now() < end - 40.0


# --- failures that do not count ---


@virtual
async def test_a_rejection_by_a_nested_upstream_is_no_fault_of_the_guarded_one() -> None:
    behind = Upstream("behind", quotas=[Quota(tokens=10, per="minute")])
    guarded = Upstream("guarded")
    tries = 0

    @guarded.guard
    async def work() -> None:
        nonlocal tries
        tries += 1
        async with behind.call(input_tokens=100):
            pass

    for _ in range(9):
        with pytest.raises(Overloaded, match="behind"):
            await work()
    assert tries == 9
    assert guarded.statistics().accounts[0].breaker == "closed"


@virtual
async def test_an_error_of_a_nested_upstream_is_no_fault_of_the_guarded_one() -> None:
    await check_blame(Reply.error(500))


@pytest.mark.parametrize("reply", [Reply.error(402), Reply.error(429), httpx.ReadError("cut")])
@virtual
async def test_no_failure_of_a_nested_upstream_is_a_fault_of_the_guarded_one(reply: Any) -> None:
    await check_blame(reply)


async def check_blame(reply: Reply | Exception) -> None:
    model = Upstream("model", provider="openai", retry=Retry(max_attempts=2, max_total_delay=2.0))
    script = Script(httpx, reply)
    client = script.client(model)
    search = Upstream("search", max_concurrent=50)
    tries = 0

    @search.guard
    async def research() -> None:
        nonlocal tries
        tries += 1
        response = await client.post(URL, json=REQUEST)
        try:
            response.raise_for_status()
        except httpx.HTTPError as error:
            raise RuntimeError("no answer") from error

    @search.guard
    async def look_up() -> str:
        return "found"

    with pytest.raises((RuntimeError, httpx.ReadError)):
        await research()
    assert tries == 1, "the outer upstream has retried what the inner one had retried"
    for _ in range(20):
        with pytest.raises((RuntimeError, httpx.ReadError, Overloaded)):
            await research()
    assert await look_up() == "found"
    (used,) = search.statistics().accounts
    assert (used.breaker, used.failed, used.throttled) == ("closed", 0, 0)


@virtual
async def test_failed_calls_teach_nothing_about_latency() -> None:
    upstream = Upstream("llm")
    for _ in range(20):
        with pytest.raises(ConnectionError):
            await _overloaded_call(upstream)
    assert account(upstream).latency_model.expected(100) is None


async def _overloaded_call(upstream: Upstream) -> None:
    async with upstream.call() as call:
        call.settle(input_tokens=10, output_tokens=100)
        call.overloaded()
        raise ConnectionError


# --- mistakes of the caller ---


@virtual
async def test_a_negative_cost_is_rejected_and_nothing_stays_reserved() -> None:
    upstream = Upstream("llm", budget=Budget(usd=10.0), prices={"m": Price(input=1.0, output=1.0)})
    for _ in range(9):
        with pytest.raises(InvalidAmount):
            await _call_costing(upstream, -1.0)
    assert account(upstream, "m").in_flight == 0
    assert upstream.statistics().spent_usd == pytest.approx(9 * 2e-6)
    assert upstream.statistics().accounts[0].breaker == "closed"


async def _call_costing(upstream: Upstream, usd: float) -> None:
    async with upstream.call("m", input_tokens=1, output_tokens=1) as call:
        call.settle(input_tokens=1, output_tokens=1, usd=usd)


@virtual
async def test_a_call_entered_twice_at_the_same_moment_is_entered_once() -> None:
    upstream = Upstream("tool", max_concurrent=1)
    holder = asyncio.create_task(Calls(upstream, seconds=1.0).call())
    await run_ready()
    call = upstream.call()

    async def enter() -> None:
        async with call:
            pass

    outcomes = await asyncio.gather(enter(), enter(), return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [type(None), CallMisused]
    await holder
    assert account(upstream).in_flight == 0


@virtual
async def test_a_deadline_that_passes_behind_the_head_of_the_queue_rejects_its_call_then() -> None:
    upstream = Upstream("tool", max_concurrent=1, max_wait=600.0)
    calls = Calls(upstream, seconds=100.0)
    holder = asyncio.create_task(calls.call())
    await run_ready()
    head = asyncio.create_task(calls.call(priority=Priority.HIGH))
    await run_ready()
    began = now()
    with pytest.raises(Overloaded, match="deadline"):
        async with asyncio.timeout(50.0):
            await upstream.runner.run(route(upstream, CallRequest(deadline=began + 5.0)), _never)
    assert now() - began == approximately(5.0)
    await asyncio.gather(holder, head)


async def _never(_: PlainRoute, __: Permit) -> AttemptResult:
    raise AssertionError


def test_the_seed_alone_decides_when_calls_are_sent() -> None:
    def times(seed: int) -> list[float]:
        async def main() -> list[float]:
            calls = Calls(Upstream("llm"), *[fault] * 5)
            await asyncio.gather(*(calls.call() for _ in range(3)))
            return [at for _, at in calls.sent]

        return simulate(main, seed=seed)

    assert times(1) == times(1) != times(2)
