"""Rate limit headers that leave out the period, contradict each other, or are wrong cost little goodput."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable

import pytest

from forebay import Overloaded, Upstream
from forebay.testing import now, virtual
from forebay.upstream import HttpRequest, HttpResponse

CALLERS = 40
REQUEST_HEADERS = {"Authorization": "Bearer sk-1", "Content-Type": "application/json"}
BODY = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 100}
USAGE = {"prompt_tokens": 9, "completion_tokens": 9}

Answer = Callable[[str], HttpResponse]


def answer(limit: int, remaining: int, reset: float, *, status: int = 200, retry_after: float = 0.0) -> HttpResponse:
    headers = {
        "content-type": "application/json",
        "x-ratelimit-limit-requests": str(limit),
        "x-ratelimit-remaining-requests": str(remaining),
        "x-ratelimit-reset-requests": f"{reset:.3f}s",
    }
    if retry_after:
        headers["retry-after"] = f"{retry_after:.0f}"
    body = {"usage": USAGE} if status == 200 else {"error": {"message": "slow"}}
    return HttpResponse(status, headers, json.dumps(body).encode())


class Window:
    """A limit of so many requests in each window of `period` seconds, with true headers."""

    def __init__(self, limit: int, period: float) -> None:
        self.limit, self.period, self.number, self.count = limit, period, -1.0, 0

    def __call__(self, _: str) -> HttpResponse:
        number, seconds = divmod(now(), self.period)
        if number != self.number:
            self.number, self.count = number, 0
        self.count += 1
        remaining, status = max(0, self.limit - self.count), 200 if self.count <= self.limit else 429
        return answer(self.limit, remaining, self.period - seconds, status=status)


class Bucket:
    """A limit of so many requests that come back evenly over `period` seconds, with true headers."""

    def __init__(self, limit: int, period: float) -> None:
        self.limit, self.period, self.level, self.at = limit, period, float(limit), now()

    def __call__(self, _: str) -> HttpResponse:
        self.level = min(self.limit, self.level + (now() - self.at) * self.limit / self.period)
        self.at = now()
        accepted = self.level >= 1
        self.level -= accepted
        reset = (self.limit - self.level) * self.period / self.limit
        return answer(self.limit, int(self.level), reset, status=200 if accepted else 429, retry_after=1.0)


class Fleet:
    """Callers that call again and again.

    Attributes:
        served: calls, by kind of caller.
        refused: calls that the provider refused.
        sent: calls that it got.
    """

    def __init__(self) -> None:
        self.served: Counter[str] = Counter()
        self.refused = self.sent = 0
        self.measured_from = 0.0
        self.random = random.Random(7)
        self.upstream = Upstream("llm", provider="openai")

    async def run(self, respond: Answer, *, minutes: float, few: int = 0, measured_from: float = 0.0) -> None:
        """Let `few` callers of the kind "few", and the others of the kind "many", call; count from `measured_from`."""
        self.measured_from, until = now() + measured_from, now() + 60.0 * minutes
        async with asyncio.TaskGroup() as group:
            for number in range(CALLERS):
                group.create_task(self._call_until(until, "few" if number < few else "many", respond))

    async def _call_until(self, until: float, kind: str, respond: Answer) -> None:
        async def transport(_: HttpRequest) -> HttpResponse:
            await asyncio.sleep(self.random.uniform(0.02, 0.1))
            response = respond(kind)
            if now() >= self.measured_from:
                self.sent += 1
                self.refused += response.status == 429
            if response.status == 200:
                await asyncio.sleep(self.random.uniform(0.5, 1.5))
            return response

        request = HttpRequest(
            "POST", "https://provider.test/v1/chat/completions", REQUEST_HEADERS, json.dumps(BODY).encode()
        )
        await asyncio.sleep(self.random.uniform(0.0, 5.0))
        while now() < until:
            try:
                response = await self.upstream.send(request, transport)
                self.served[kind] += response.status == 200 and self.measured_from <= now() <= until
            except Overloaded:
                pass
            await asyncio.sleep(self.random.uniform(0.5, 1.5))


UNLIMITED = 40 / 2.06 * 60  # calls a minute that are served if nothing is refused and nobody waits


@pytest.mark.parametrize("shape", [Window, Bucket])
@pytest.mark.parametrize("limit", [2, 4, 5, 10, 20])
@virtual
async def test_a_limit_of_a_few_a_second_is_not_taken_for_one_a_minute(
    limit: int, shape: Callable[[int, float], Answer]
) -> None:
    fleet = Fleet()
    await fleet.run(shape(limit, 1.0), minutes=3, measured_from=60.0)
    assert fleet.served["many"] >= 0.8 * 2 * min(60 * limit, UNLIMITED)
    assert fleet.refused <= 0.02 * fleet.sent


@pytest.mark.parametrize("few", [2, 8])
@virtual
async def test_a_small_pool_behind_the_same_model_holds_up_no_callers_of_a_large_one(few: int) -> None:
    fleet, pool = Fleet(), Bucket(20, 60.0)
    await fleet.run(lambda kind: pool(kind) if kind == "few" else answer(10_000, 9_990, 0.06), minutes=3, few=few)
    assert fleet.served["many"] >= 0.9 * 3 * UNLIMITED * (CALLERS - few) / CALLERS


@virtual
async def test_headers_that_waver_while_everything_is_accepted_hold_up_nobody() -> None:
    fleet = Fleet()
    await fleet.run(lambda _: answer(1_000, fleet.random.randrange(3), 86_400.0), minutes=2, measured_from=60.0)
    assert fleet.served["many"] >= 0.95 * UNLIMITED


@virtual
async def test_a_low_limit_of_which_nothing_is_used_while_everything_is_accepted_holds_up_nobody() -> None:
    fleet = Fleet()
    await fleet.run(lambda _: answer(5, 4, 60.0), minutes=2, measured_from=60.0)
    assert fleet.served["many"] >= 0.95 * UNLIMITED


@pytest.mark.parametrize(
    ("limit", "period", "shape"),
    [
        (60, 60.0, Window),
        (60, 60.0, Bucket),
        pytest.param(600, 60.0, Window, marks=pytest.mark.slow),
        pytest.param(600, 60.0, Bucket, marks=pytest.mark.slow),
        pytest.param(2_000, 3600.0, Window, marks=pytest.mark.slow),
    ],
)
@virtual
async def test_a_limit_that_is_right_is_used_fully_and_costs_few_refused_trial_calls(
    limit: int, period: float, shape: Callable[[int, float], Answer]
) -> None:
    fleet = Fleet()
    await fleet.run(shape(limit, period), minutes=20)
    assert fleet.served["many"] >= 0.97 * max(limit, 20 * 60 * limit / period)
    assert fleet.refused <= 0.01 * fleet.sent


@pytest.mark.parametrize(("asked", "waited"), [(30.0, 1.0), (90.0, None)])
@virtual
async def test_a_retry_after_is_not_waited_for_once_one_was_too_long(asked: float, waited: float | None) -> None:
    upstream, refused_at = Upstream("llm", provider="openai"), list[float]()

    async def call(refusals: int, retry_after: float = 30.0) -> HttpResponse:
        """Make a call that is refused so many times."""
        statuses = iter([429] * refusals + [200])

        async def transport(_: HttpRequest) -> HttpResponse:
            await asyncio.sleep(0.05)
            status = next(statuses)
            if status == 429:
                refused_at.append(now())
            body = {"usage": USAGE} if status == 200 else {"error": {"message": "slow"}}
            return HttpResponse(status, {"retry-after": f"{retry_after:.0f}"}, json.dumps(body).encode())

        url = "https://provider.test/v1/chat/completions"
        return await upstream.send(HttpRequest("POST", url, REQUEST_HEADERS, json.dumps(BODY).encode()), transport)

    first = asyncio.create_task(call(refusals=1))
    await asyncio.sleep(3.0)
    await call(refusals=0)  # so 30 s was too long
    await first
    assert now() - refused_at[-1] >= 30.0
    response = await call(refusals=1, retry_after=asked)
    if waited is None:
        assert response.status == 429
    else:
        assert response.status == 200
        assert now() - refused_at[-1] <= waited
