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

from forebay import Overloaded, Quota, Retry, Upstream
from forebay.simulation import simulate
from forebay.testing import now

AMOUNT: Final = 20_000  # output tokens a minute
PATIENT: Final = 3_600.0  # seconds
RATE: Final = AMOUNT / 60.0
URL: Final = {
    "anthropic": "https://llm.example/v1/messages",
    "openai-compatible": "https://llm.example/v1/chat/completions",
}


class Provider(httpx.AsyncBaseTransport):
    """A provider without limits that makes as much output as each request says.

    Attributes:
        sent: the time and the output of each call, in the order in which they came.
    """

    def __init__(self) -> None:
        self.sent: list[tuple[float, int]] = []

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        made = json.loads(await request.aread())["makes"]
        self.sent.append((now(), made))
        await asyncio.sleep(1.0 + made / 500)
        usage = {"prompt_tokens": 10, "completion_tokens": made, "input_tokens": 10, "output_tokens": made}
        return httpx.Response(200, json={"id": "c", "choices": [], "usage": usage})

    def most_within(self, seconds: float) -> int:
        """Return the most output of the calls that came within so many seconds."""
        starts = [at for at, _ in self.sent]
        return max(sum(made for at, made in self.sent if start <= at <= start + seconds) for start in starts)

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
        self._url = URL[provider]
        upstream = Upstream("llm", provider=provider, quotas=[quota], max_concurrent=100)
        self._client = upstream.bind(httpx.AsyncClient(transport=self.transport, timeout=PATIENT))

    async def post(self, makes: int, max_tokens: int | None) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "makes": makes}
        if max_tokens is not None:
            body["max_tokens"] = max_tokens
        try:
            self.results[(await self._client.post(self._url, json=body)).status_code] += 1
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
        request = client.post(
            URL["openai-compatible"], headers={"authorization": "Bearer K"}, json=body, timeout=timeout
        )
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
