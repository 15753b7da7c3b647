"""The promises of an account for each way to call it, and for what providers answer. See `test_account`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from tests.support.account_backends import AccountProcesses, OpenAccounts
from tests.support.call_driver import CallDriver
from tests.support.task_plane import now, virtual
from tests.unit.upstream.httpx_binding.wire import CHAT, REQUEST, URL, USAGE, Reply, Script

from forebay import BackpressureSupervisor, Overloaded, Priority, Task, Upstream
from forebay.breaker import BreakerRules
from forebay.interfaces import Outcome
from forebay.limit import AimdLimit, FixedLimit, GradientLimit, Grant, Limit, VegasLimit
from forebay.quota import Budget, Price, Quota
from forebay.retry import Retry
from forebay.upstream import Fallback, HttpRequest, HttpResponse
from forebay.upstream.provider_key_limits import ProviderKeyLimits

EXCHANGES = 0.25  # seconds of virtual time that a few exchanges with a store may take
HEARTBEAT = 1.0  # seconds after which what one process has returned is known to another
PRICES = {"gpt-4o": Price(input=10_000, output=0)}  # 0.30 USD for a request of `wire`
QUICKLY = Retry(base_delay=0.01)
ANSWER = HttpResponse(200, {"Content-Type": "application/json"}, json.dumps(CHAT).encode())


def request(**fields: Any) -> HttpRequest:
    headers = {"Authorization": "Bearer sk", "Content-Type": "application/json"}
    return HttpRequest("POST", URL, headers, json.dumps({**REQUEST, **fields}).encode())


async def post(client: Any, *, key: str = "sk", **fields: Any) -> Any:
    headers = {"authorization": f"Bearer {key}"}
    return await client.post(URL, json={**REQUEST, **fields}, headers=headers)


# --- ways to call ---


async def call_by_permit(upstream: Upstream, script: Script) -> None:
    async with upstream.call("gpt-4o", input_tokens=30, output_tokens=100) as call:
        script.next(None)
        call.settle(input_tokens=30, output_tokens=20)


async def call_by_client(upstream: Upstream, script: Script) -> None:
    async with script.client(upstream) as client:
        assert (await post(client)).status_code == 200


async def call_by_transport(upstream: Upstream, script: Script) -> None:
    async def send(request: HttpRequest) -> HttpResponse:
        script.next(request)
        return ANSWER

    assert await upstream.send(request(), send) is ANSWER


@pytest.mark.parametrize("way", [call_by_permit, call_by_client, call_by_transport])
@virtual
async def test_a_call_of_any_kind_is_counted_and_paid_once(
    processes: AccountProcesses, way: Callable[[Upstream, Script], Any]
) -> None:
    quotas = [Quota(requests=100, per="day"), Quota(tokens=10_000, per="day")]
    upstreams = processes.open(quotas=quotas, budget=Budget(usd=100), prices=PRICES)
    script = Script(httpx2)
    for _ in range(3):
        for upstream in upstreams:
            await way(upstream, script)
    await asyncio.sleep(4 * HEARTBEAT)
    sent = 3 * processes.count
    assert len(script.requests) == sent
    statistics = [upstream.statistics() for upstream in upstreams]
    assert [each.spent_usd for each in statistics] == pytest.approx([0.3 * sent] * processes.count)
    assert [(row.sent, row.succeeded, row.in_flight) for each in statistics for row in each.accounts] == [
        (3, 3, 0)
    ] * processes.count
    requests, tokens = statistics[-1].accounts[0].quotas
    assert requests.remaining == pytest.approx(100 - sent, abs=0.1)
    assert tokens.remaining == pytest.approx(10_000 - sent * USAGE["total_tokens"], abs=5.0)
    CallDriver(*upstreams).check()


@virtual
async def test_a_request_that_is_rejected_is_not_sent(processes: AccountProcesses) -> None:
    upstreams = processes.open(provider="openai", quotas=[Quota(requests=1, per="day")])
    script = Script(httpx2)
    await post(script.client(upstreams[0]))
    await asyncio.sleep(4 * HEARTBEAT)
    with pytest.raises(Overloaded) as rejection:
        async with asyncio.timeout(300.0):
            await post(script.client(upstreams[-1]))
    assert str(rejection.value.limited_by).endswith(":requests per day")
    assert len(script.requests) == 1


@virtual
async def test_a_guarded_function_is_retried_with_backoff(accounts: OpenAccounts) -> None:
    search = accounts.open(retry=Retry(max_attempts=4, base_delay=1.0))
    tries: list[float] = []

    @search.guard
    async def look_up(what: str) -> str:
        tries.append(now())
        if len(tries) < 3:
            raise ConnectionError
        return what

    assert await look_up("rivers") == "rivers"
    assert len(tries) == 3
    CallDriver(search).check()


@virtual
async def test_a_guarded_function_that_keeps_failing_raises_its_own_exception(accounts: OpenAccounts) -> None:
    search = accounts.open(retry=Retry(max_attempts=3, base_delay=0.1))
    tries = 0

    @search.guard
    async def look_up() -> None:
        nonlocal tries
        tries += 1
        raise ConnectionError("gone")

    with pytest.raises(ConnectionError, match="gone"):
        await look_up()
    assert tries == 3
    CallDriver(search).check()


class SdkError(Exception):
    """An exception with an answer, as SDKs raise it."""

    def __init__(self, status: int, **headers: str) -> None:
        super().__init__("no")
        self.status_code = status
        self.headers = headers


@virtual
async def test_a_guarded_function_reports_throttling_by_its_exception(accounts: OpenAccounts) -> None:
    search = accounts.open("search", retry=Retry(max_attempts=1))
    tries: list[float] = []

    @search.guard
    async def look_up() -> str:
        tries.append(now())
        if len(tries) <= 3:
            raise RuntimeError("the tool failed") from SdkError(429, **{"retry-after": "1"})
        return "found"

    assert await look_up() == "found"  # throttled attempts use up none
    account = search.statistics().accounts[0]
    assert (account.throttled, account.failed, account.breaker) == (3, 0, "closed")
    assert tries[1] - tries[0] >= 1.0
    CallDriver(search).check()


# --- what a provider answers ---


@virtual
async def test_each_attempt_is_counted_by_its_outcome(accounts: OpenAccounts) -> None:
    upstream = accounts.open(provider="openai", retry=QUICKLY)
    limited = Reply.error(429, x_ratelimit_remaining_requests="0", retry_after="0.01")
    client = Script(httpx2, Reply.error(500), limited, Reply.error(529), Reply(), Reply.error(400)).client(upstream)
    await post(client)
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.succeeded, account.throttled, account.failed) == (4, 1, 2, 1)
    await post(client)  # an error of the caller is no failure of the provider
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.succeeded, account.throttled, account.failed) == (5, 1, 2, 1)


@virtual
async def test_a_429_with_retry_after_pauses_the_account(accounts: OpenAccounts) -> None:
    script = Script(httpx2, Reply.error(429, "requests per minute", retry_after="20"), Reply())
    client = script.client(accounts.open(provider="openai", retry=QUICKLY))
    began = now()
    first = asyncio.create_task(post(client))
    await asyncio.sleep(1.0)
    second = asyncio.create_task(post(client))
    assert (await first).status_code == (await second).status_code == 200
    assert now() - began >= 20.0
    assert len(script.requests) <= 4  # one or two may try whether the pause is true


@virtual
async def test_a_throttled_attempt_uses_no_quota(accounts: OpenAccounts) -> None:
    upstream = accounts.open(quotas=[Quota(tokens=1_000, per="day")], retry=QUICKLY)
    client = Script(httpx2, Reply.error(503), Reply.error(529), Reply()).client(upstream)
    assert (await post(client)).status_code == 200
    await asyncio.sleep(2 * HEARTBEAT)
    (level,) = upstream.statistics().accounts[0].quotas
    assert level.remaining == pytest.approx(1_000 - USAGE["total_tokens"], abs=1.0)
    CallDriver(upstream).check()


@virtual
async def test_requests_that_are_refused_for_what_they_ask_delay_no_others(accounts: OpenAccounts) -> None:
    upstream = accounts.open(provider="openai", quotas=[Quota(requests=60, per="minute")])
    seconds: list[float] = []

    async def provider(request: HttpRequest) -> HttpResponse:
        await asyncio.sleep(0.5)
        is_large = json.loads(request.body)["max_tokens"] > 1_000
        return HttpResponse(429, {"retry-after": "1"}, b"extra usage is required") if is_large else ANSWER

    async def ask_for_too_much() -> None:
        while now() < 90.0:
            with contextlib.suppress(Overloaded, TimeoutError):
                async with asyncio.timeout(120.0):
                    await upstream.send(request(max_tokens=65_536), provider)
            await asyncio.sleep(1.0)

    async def ask() -> None:
        began = now()
        assert await upstream.send(request(), provider) is ANSWER
        seconds.append(now() - began)

    async with asyncio.TaskGroup() as group:
        for _ in range(3):
            group.create_task(ask_for_too_much())
        while now() < 100.0:
            group.create_task(ask())
            await asyncio.sleep(2.0)
    assert max(seconds) <= 5.0
    CallDriver(upstream).check()


@virtual
async def test_an_open_breaker_rejects_queued_calls_at_once_and_closes_again(accounts: OpenAccounts) -> None:
    upstream = accounts.open(max_concurrent=1, breaker=BreakerRules(reset_timeout=10.0))

    async def fails() -> None:
        async with upstream.call():
            await asyncio.sleep(1.0)
            raise ConnectionError

    outcomes = await asyncio.gather(*(fails() for _ in range(9)), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["ConnectionError"] * 5 + ["Overloaded"] * 4
    assert upstream.statistics().accounts[0].breaker == "open"
    calls = CallDriver(upstream)
    with pytest.raises(Overloaded) as rejection:
        await calls.call()
    assert rejection.value.limited_by == "upstream:llm:breaker"
    assert rejection.value.retry_after is not None
    await asyncio.sleep(rejection.value.retry_after)
    for _ in range(2):
        await calls.call()
    assert upstream.statistics().accounts[0].breaker == "closed"
    calls.check()


@virtual
async def test_ignored_failures_do_not_open_the_breaker(accounts: OpenAccounts) -> None:
    upstream = accounts.open()

    async def call_ignored() -> None:
        async with upstream.call() as call:
            call.ignored()
            raise ValueError("ours")

    for _ in range(20):
        with pytest.raises(ValueError, match="ours"):
            await call_ignored()
    assert upstream.statistics().accounts[0].breaker == "closed"


# --- limits ---


class ThreeCalls(Limit):
    """A limit of a user: three calls at a time."""

    def __init__(self) -> None:
        super().__init__(initial_limit=3)
        self.outcomes: list[Outcome] = []

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        del now, grant, slowdown
        self.outcomes.append(outcome)


@virtual
async def test_a_limit_of_the_users_own_bounds_calls_and_observes_each(processes: AccountProcesses) -> None:
    limits: list[ThreeCalls] = []

    def make() -> ThreeCalls:
        limits.append(ThreeCalls())
        return limits[-1]

    calls = CallDriver(*processes.open(limit=make))
    await asyncio.gather(*(calls.start() for _ in range(10)))
    assert calls.peak == 3
    assert [outcome for limit in limits for outcome in limit.outcomes] == [Outcome.SUCCESS] * 10
    calls.check()


GIVEN_LIMITS: dict[str, Callable[[], Limit | Callable[[], Limit]]] = {
    "a FixedLimit": lambda: FixedLimit(10),
    "an AimdLimit": lambda: AimdLimit(initial_limit=10),
    "a GradientLimit": lambda: GradientLimit(initial_limit=10),
    "a VegasLimit": lambda: VegasLimit(initial_limit=10),
    "AimdLimit": lambda: AimdLimit,
    "GradientLimit": lambda: GradientLimit,
    "VegasLimit": lambda: VegasLimit,
    "a lambda": lambda: lambda: FixedLimit(10),
}


@pytest.mark.parametrize("given", GIVEN_LIMITS)
@virtual
async def test_each_limit_can_be_given_as_an_object_or_as_a_callable(accounts: OpenAccounts, given: str) -> None:
    calls = CallDriver(accounts.open(limit=GIVEN_LIMITS[given]()))
    await asyncio.gather(*(calls.start() for _ in range(30)))
    assert 1 <= calls.peak <= 30
    calls.check()


class Busy:
    """A provider that takes five calls at a time, for half a second each."""

    def __init__(self) -> None:
        self.in_flight = self.served = self.refused = 0

    async def __call__(self, request: HttpRequest) -> HttpResponse:
        del request
        if self.in_flight >= 5:
            self.refused += 1
            return HttpResponse(429, {}, b'{"error": {"message": "too many concurrent requests"}}')
        self.in_flight += 1
        await asyncio.sleep(0.5)
        self.in_flight -= 1
        self.served += 1
        return ANSWER


@virtual
async def test_a_limit_that_is_learned_uses_a_provider_with_few_refusals(processes: AccountProcesses) -> None:
    provider = Busy()
    upstreams = processes.open(provider="openai")

    async def ask(upstream: Upstream) -> None:
        while now() < 40.0:
            await upstream.send(request(), provider)

    await asyncio.gather(*(ask(upstream) for upstream in upstreams for _ in range(10)))
    assert provider.served >= 0.8 * 5 * 40.0 / 0.5
    if processes.count == 1:
        assert provider.refused <= 0.1 * provider.served
    CallDriver(*upstreams).check()


# --- API keys ---


@virtual
async def test_each_api_key_has_its_quotas(processes: AccountProcesses) -> None:
    limits = {"Bearer paid": ProviderKeyLimits("paid", quotas=[Quota(requests=4, per="day")])}
    upstreams = processes.open(provider="openai", quotas=[Quota(requests=2, per="day")], key_limits=limits)
    clients = [Script(httpx2).client(upstream) for upstream in upstreams]
    served = {"one": 0, "other": 0, "paid": 0}
    for key in served:
        for attempt in range(6):
            try:
                async with asyncio.timeout(300.0):
                    served[key] += (await post(clients[attempt % len(clients)], key=key)).status_code == 200
            except Overloaded:
                pass
    assert served == {"one": 2, "other": 2, "paid": 4}


# --- several accounts ---


@pytest.mark.parametrize("settings", [{}, {"max_concurrent": 5}, {"quotas": [Quota(requests=1_000, per="minute")]}])
@virtual
async def test_idle_accounts_share_calls_by_their_weights(accounts: OpenAccounts, settings: dict[str, Any]) -> None:
    other = accounts.open("b", **settings)
    upstream = accounts.open("a", fallback=Fallback(other, weight=3.0), **settings)
    served: Counter[str] = Counter()
    for _ in range(400):
        async with upstream.call("m") as call:
            served[call.upstream.name] += 1
    assert served["b"] == pytest.approx(300, abs=40)


# --- with a supervisor ---


@virtual
async def test_calls_have_the_priority_of_their_task(accounts: OpenAccounts) -> None:
    upstream = accounts.open(max_concurrent=1)
    admitted: list[str] = []

    async def agent(task: Task) -> None:
        async with upstream.call():
            admitted.append(task.payload)
            await asyncio.sleep(1.0)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=9)
        first = supervisor.submit_nowait(Task("work", "first"))
        await asyncio.sleep(EXCHANGES)
        await asyncio.gather(
            first,
            supervisor.run(Task("work", "low", priority=Priority.LOW)),
            supervisor.run(Task("work", "high", priority=Priority.HIGH)),
        )
    assert admitted == ["first", "high", "low"]


@virtual
async def test_calls_of_an_earlier_run_go_before_those_of_later_runs(accounts: OpenAccounts) -> None:
    upstream = accounts.open(max_concurrent=1, max_start_wait=1e9)
    ended: list[int] = []

    async def agent(task: Task) -> None:
        for _ in range(4):
            async with upstream.call():
                await asyncio.sleep(1.0)
        ended.append(task.payload)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=4)
        began = now()
        tickets = [supervisor.submit_nowait(Task("work", number)) for number in range(4)]
        times = [(await ticket, now() - began)[1] for ticket in tickets]
    assert ended == [0, 1, 2, 3]
    assert times[0] < 8.0  # 13 if all took turns


@virtual
async def test_a_full_account_rejects_new_tasks(accounts: OpenAccounts) -> None:
    upstream = accounts.open(quotas=[Quota(requests=6, per="minute")], max_wait=60.0)

    async def agent(_: Task) -> None:
        async with upstream.call():
            await asyncio.sleep(0.1)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=20)
        await supervisor.run(Task("work"))
        tickets = [supervisor.submit_nowait(Task("work")) for _ in range(40)]
        rejected = [ticket for ticket in tickets if not ticket]
        assert rejected
        assert {ticket.limited_by for ticket in rejected} == {"upstream:llm"}
        assert supervisor.system_load() >= 0.8
        assert "upstream:llm" in {reading.resource for reading in supervisor.readings()}
        for ticket in tickets:
            if ticket:
                assert (await ticket).success


@virtual
async def test_each_task_has_its_budget(processes: AccountProcesses) -> None:
    upstreams = processes.open(task_budget=Budget(usd=1.0), prices={"m": Price(input=0, output=1_000)})
    sent: dict[str, int] = {}

    async def agent(task: Task) -> None:
        for attempt in range(12):
            async with upstreams[attempt % len(upstreams)].call("m", output_tokens=100):
                sent[task.payload] = sent.get(task.payload, 0) + 1
            await asyncio.sleep(HEARTBEAT)

    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("worker", handler=agent, task_types=["work"], max_concurrent=2)
        results = [await supervisor.submit_nowait(Task("work", name)) for name in ("one", "other")]
    assert sent == {"one": 10, "other": 10}
    assert not any(result.success for result in results)
    CallDriver(*upstreams).check()
