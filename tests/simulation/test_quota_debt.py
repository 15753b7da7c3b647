"""A given quota holds however much calls use beyond their estimates, and a learned one although callers leave."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import Callable, Coroutine
from typing import Any, Final

import httpx
import pytest

from forebay import Deadline, Overloaded, Quota, Retry, Upstream
from forebay.simulation import simulate
from forebay.testing import now

AMOUNT: Final = 20_000  # output tokens a minute
PATIENT: Final = 3_600.0  # seconds
RATE: Final = AMOUNT / 60.0
CHAT: Final = "https://llm.example/v1/chat/completions"
URL: Final = {
    "anthropic": "https://llm.example/v1/messages",
    "openai-compatible": CHAT,
}


class Provider(httpx.AsyncBaseTransport):
    """A provider without limits that makes as much output as each request says.

    Attributes:
        sent: the time and the output of each call, in the order in which they came.
        seconds: returns how long a call takes that makes so much output.
    """

    def __init__(self) -> None:
        self.seconds: Callable[[int], float] = lambda made: 1.0 + made / 500
        self.sent: list[tuple[float, int]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        made = json.loads(await request.aread())["makes"]
        self.sent.append((now(), made))
        await asyncio.sleep(self.seconds(made))
        usage = {"prompt_tokens": 10, "completion_tokens": made, "input_tokens": 10, "output_tokens": made}
        return httpx.Response(200, json={"id": "c", "choices": [], "usage": usage})

    def excess(self) -> float:
        """Return by how much the output of any span has passed the quota's promise at most."""
        total, lowest, most = 0.0, 0.0, -float("inf")
        for at, made in self.sent:
            lowest = min(lowest, total - RATE * at)
            total += made
            most = max(most, total - RATE * at - lowest)
        return most - AMOUNT


class Fleet:
    """Callers of one upstream, whose output is all that counts."""

    def __init__(self, provider: str, quota: Quota) -> None:
        self.transport = Provider()
        self.results: Counter[Any] = Counter()
        self.rejections: list[Overloaded] = []
        self._url = URL.get(provider, CHAT)
        upstream = Upstream("llm", provider=provider, quotas=[quota], max_concurrent=100)
        self.client = upstream.bind(httpx.AsyncClient(transport=self.transport, timeout=PATIENT))

    async def post(self, makes: int, max_tokens: int | None) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "makes": makes}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        try:
            self.results[(await self.client.post(self._url, json=body)).status_code] += 1
        except Overloaded as error:
            self.results["rejected"] += 1
            self.rejections.append(error)

    async def tiny_answers(self, until: float) -> None:
        """Lower what calls are estimated to make: one tiny answer a second, with a large bound."""
        async with asyncio.TaskGroup() as group:
            while now() < until:
                group.create_task(self.post(2, 4_000))
                await asyncio.sleep(1.0)

    async def attack(self) -> None:
        """Send a burst of large calls every ten minutes, behind tiny answers."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.tiny_answers(3_600.0))
            for start in range(200, 3_600, 600):
                group.create_task(self.burst(start))

    async def burst(self, start: float) -> None:
        await asyncio.sleep(start - now())
        await asyncio.gather(*(self.post(4_000, 4_000) for _ in range(80)))


def run(provider: str, quota: Quota, attack: Callable[[Fleet], Coroutine[Any, Any, None]]) -> Fleet:
    fleet = Fleet(provider, quota)
    simulate(lambda: attack(fleet))
    return fleet


@pytest.mark.parametrize("provider", URL)
def test_what_calls_use_beyond_their_reservations_is_paid_back_in_full(provider: str) -> None:
    fleet = run(provider, Quota(output_tokens=AMOUNT, per="minute"), Fleet.attack)
    in_flight = 80 * 4_000
    assert fleet.transport.excess() <= in_flight
    total = sum(made for _, made in fleet.transport.sent)
    assert total <= AMOUNT + RATE * 3_600 + in_flight, "the excess of each burst is paid back before the next one"
    rejected = [error for error in fleet.rejections if error.retry_after]
    assert rejected
    assert all(error.limited_by == "upstream:llm:output tokens per minute" for error in rejected)
    assert max(error.retry_after or 0.0 for error in rejected) > 600.0, "as long as paying back takes"


def test_a_quota_that_forgives_debts_is_passed_in_the_long_run() -> None:
    """The negative control: the attack passes a quota whose debt is forgiven beyond one amount."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("forebay.quota.bucket.Bucket.lowest", property(lambda self: -self.amount))
        fleet = run("anthropic", Quota(output_tokens=AMOUNT, per="minute"), Fleet.attack)
    assert sum(made for _, made in fleet.transport.sent) > AMOUNT + RATE * 3_600 + 80 * 4_000


# --- refusals that name no rate ---


class Refusing(httpx.AsyncBaseTransport):
    """A provider that refuses some calls for what they ask for, as if for a rate, and accepts all others."""

    def __init__(self, retry_after: int) -> None:
        self.retry_after = retry_after

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        asks_too_much = json.loads(await request.aread())["asks_too_much"]
        await asyncio.sleep(0.5)
        if asks_too_much:
            error = {"message": "Extra usage is required for long contexts", "type": "rate_limit_error"}
            return httpx.Response(429, headers={"retry-after": str(self.retry_after)}, json={"error": error})
        usage = {"prompt_tokens": 1, "completion_tokens": 10}
        return httpx.Response(200, json={"id": "c", "choices": [], "usage": usage})


@pytest.mark.parametrize("retry_after", [1, 5, 20])
def test_calls_that_are_always_refused_do_not_use_up_a_given_quota(retry_after: int) -> None:
    upstream = Upstream("llm", quotas=[Quota(requests=60, per="minute")], max_concurrent=20)
    client = upstream.bind(httpx.AsyncClient(transport=Refusing(retry_after), timeout=PATIENT))
    served: Counter[bool] = Counter()

    async def call(*, asks_too_much: bool) -> bool:
        body = {"model": "m", "messages": [], "max_tokens": 20, "asks_too_much": asks_too_much}
        try:
            async with asyncio.timeout(120.0):
                return (await client.post(CHAT, json=body)).status_code == 200
        except (Overloaded, TimeoutError):
            return False

    async def agent_in_a_loop() -> None:
        await asyncio.sleep(10.0)
        while now() < 900.0:
            await call(asks_too_much=True)
            await asyncio.sleep(1.0)

    async def healthy_call() -> None:
        served[await call(asks_too_much=False)] += 1

    async def scene() -> None:
        async with asyncio.TaskGroup() as group:
            for _ in range(3):
                group.create_task(agent_in_a_loop())
            while now() < 900.0:
                group.create_task(healthy_call())
                await asyncio.sleep(2.0)

    simulate(scene)
    assert served[True] >= 0.99 * served.total()


# --- strict ---


@pytest.mark.parametrize("provider", [*URL, "openai", "azure"])
@pytest.mark.parametrize("unit", ["output_tokens", "tokens"])
def test_a_strict_quota_is_never_passed(provider: str, unit: str) -> None:
    quota = Quota(**{unit: AMOUNT}, per="minute", strict=True)
    fleet = run(provider, quota, Fleet.attack)
    assert fleet.transport.excess() <= 1e-6
    assert fleet.results[200] >= 300
    if unit == "output_tokens" or provider in URL:  # the others count max_tokens, and return nothing
        burst = sum(made for _, made in fleet.transport.sent if made > 2)
        assert burst >= 6 * 32_000, "what the tiny answers reserve comes back"


async def long_calls_that_make_little(fleet: Fleet) -> None:
    """Hold the quota for minutes with calls that make nothing, and send a burst when they end."""

    async def hold(start: float) -> None:
        await asyncio.sleep(start)
        await fleet.post(2, 4_000)

    async with asyncio.TaskGroup() as group:
        for number in range(50):
            group.create_task(hold(12.0 * number))
        await asyncio.sleep(600.0)
        for _ in range(200):
            group.create_task(fleet.post(4_000, 4_000))


def test_what_long_calls_hold_of_a_strict_quota_is_granted_once() -> None:
    fleet = Fleet("anthropic", Quota(output_tokens=AMOUNT, per="minute", strict=True))
    fleet.transport.seconds = lambda made: 620.0 if made == 2 else 9.0
    simulate(lambda: long_calls_that_make_little(fleet))
    assert fleet.transport.excess() <= 1e-6
    assert max(at for at, _ in fleet.transport.sent) > 600.0


def test_a_strict_quota_is_used_fully_by_calls_that_make_less_than_they_may() -> None:
    fleet = Fleet("anthropic", Quota(output_tokens=AMOUNT, per="minute", strict=True))

    async def callers() -> None:
        while now() < 300.0:
            await fleet.post(400, 1_000)
            await asyncio.sleep(1.0)

    async def scene() -> None:
        await asyncio.gather(*(callers() for _ in range(40)))

    simulate(scene)
    assert fleet.transport.excess() <= 1e-6
    assert sum(made for _, made in fleet.transport.sent) >= 0.97 * (AMOUNT + RATE * 300)


@pytest.mark.parametrize("max_tokens", [None, AMOUNT + 1])
def test_a_strict_quota_rejects_a_call_that_it_can_never_hold(max_tokens: int | None) -> None:
    fleet = Fleet("anthropic", Quota(output_tokens=AMOUNT, per="minute", strict=True))
    simulate(lambda: fleet.post(10, max_tokens))
    assert not fleet.transport.sent
    assert "max_tokens" in str(fleet.rejections[0])
    expected = "unbounded" if max_tokens is None else "output tokens per minute"
    assert fleet.rejections[0].limited_by == f"upstream:llm:{expected}"
    assert fleet.rejections[0].retry_after is None


def test_a_guarded_function_cannot_use_a_strict_quota_and_a_call_by_hand_declares_its_output() -> None:
    upstream = Upstream("llm", quotas=[Quota(output_tokens=AMOUNT, per="minute", strict=True)])

    async def scene() -> None:
        with pytest.raises(Overloaded, match="a guarded function does not tell") as rejection:
            upstream.guard(lambda: None)()
        assert rejection.value.limited_by == "upstream:llm:unbounded"
        async with upstream.call("m", output_tokens=15_000):
            with pytest.raises(Overloaded):
                async with upstream.call("m", output_tokens=5_001, deadline=Deadline(1.0)):
                    pass
        await asyncio.sleep(2.0)

    simulate(scene)


async def test_a_strict_quota_rejects_an_endpoint_whose_tokens_are_not_known() -> None:
    fleet = Fleet("openai", Quota(tokens=AMOUNT, per="minute", strict=True))
    with pytest.raises(Overloaded, match="its tokens are not known"):
        await fleet.client.post("https://llm.example/v1/threads/1/runs", json={"model": "m"})
    embedding = {"model": "m", "input": "x", "makes": 0}
    assert (await fleet.client.post("https://llm.example/v1/embeddings", json=embedding)).status_code == 200


# --- learned from headers ---


class WindowProvider(httpx.AsyncBaseTransport):
    """A provider of thirty calls in each minute, with true headers, that takes half a second."""

    def __init__(self) -> None:
        self.sent: Counter[int] = Counter()  # by minute

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        minute, seconds = divmod(now(), 60.0)
        self.sent[int(minute)] += 1
        count = self.sent[int(minute)]
        patience = min(0.5, request.extensions["timeout"]["read"] or 0.5)
        await asyncio.sleep(patience)
        if patience < 0.5:
            raise httpx.ReadTimeout("no answer in time", request=request)
        headers = {
            "x-ratelimit-limit-requests": "30",
            "x-ratelimit-remaining-requests": str(max(0, 30 - count)),
            "x-ratelimit-reset-requests": f"{60.0 - seconds:.1f}s",
        }
        if count > 30:
            headers["retry-after"] = str(int(60.0 - seconds) + 1)
            error = {"message": "Rate limit reached: requests per min", "code": "rate_limit_exceeded"}
            return httpx.Response(429, headers=headers, json={"error": error})
        usage = {"prompt_tokens": 1, "completion_tokens": 10}
        return httpx.Response(200, headers=headers, json={"id": "c", "choices": [], "usage": usage})


@pytest.mark.parametrize("leaving", ["cancelled", "timeout"])
def test_a_learned_quota_is_believed_although_nearly_all_callers_leave(leaving: str) -> None:
    transport = WindowProvider()
    upstream = Upstream("llm", provider="openai", max_concurrent=50, retry=Retry(max_attempts=1))
    client = upstream.bind(httpx.AsyncClient(transport=transport, timeout=PATIENT))

    async def call(seconds: float) -> None:
        body = {"model": "m", "messages": [], "max_tokens": 20}
        timeout = httpx.Timeout(None, read=seconds if leaving == "timeout" else None)
        request = client.post(CHAT, headers={"authorization": "Bearer K"}, json=body, timeout=timeout)
        with contextlib.suppress(Overloaded, TimeoutError, httpx.ReadTimeout):
            async with asyncio.timeout(None if leaving == "timeout" else seconds):
                await request

    async def callers(every: float, seconds: float) -> None:
        async with asyncio.TaskGroup() as group:
            while now() < 2_400.0:
                group.create_task(call(seconds))
                await asyncio.sleep(every)

    async def scene() -> None:
        await asyncio.gather(callers(60.0, 60.0), callers(0.2, 0.3))

    simulate(scene)
    assert max(transport.sent.values()) <= 60, "as many as a bucket of thirty a minute lets through"
    assert sum(transport.sent[minute] for minute in range(20, 40)) <= 1.1 * 20 * 30
