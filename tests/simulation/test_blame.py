"""Faults count for whom they belong to: hasty callers, dead models and poisoned requests do not harm the others."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Awaitable, Callable

import pytest
from bench.calls.scenarios import SCENARIOS, WARM_UP
from bench.calls.upstream_run import EXPECTED_OUTPUT, UpstreamRun, send_call

from forebay import Deadline, Overloaded, Upstream
from forebay.interfaces import Charge, Outcome
from forebay.retry import Retry
from forebay.testing import now, virtual
from forebay.upstream import HttpRequest, HttpResponse
from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.fallbacks.fallback_chain import PlainRoute

CALLERS = 40
MINUTES = 5
HEADERS = {"Authorization": "Bearer sk-1", "Content-Type": "application/json"}

Transport = Callable[[HttpRequest], Awaitable[HttpResponse]]


def request(model: str = "gpt-4o", text: str = "Rivers?") -> HttpRequest:
    body = {"model": model, "messages": [{"role": "user", "content": text}], "max_tokens": 100}
    return HttpRequest("POST", "https://provider.test/v1/chat/completions", HEADERS, json.dumps(body).encode())


def answer(status: int) -> HttpResponse:
    body = {"error": {"message": "boom"}} if status >= 400 else {"usage": {"prompt_tokens": 9, "completion_tokens": 9}}
    return HttpResponse(status, {"content-type": "application/json"}, json.dumps(body).encode())


class Callers:
    """Callers that call again and again for some minutes; each is of one kind.

    Attributes:
        sent: attempts, by kind.
        ends: `served`, `refused` or `failed`, by kind.
    """

    def __init__(self, upstream: Upstream) -> None:
        self.upstream = upstream
        self.sent: Counter[str] = Counter()
        self.ends: dict[str, Counter[str]] = {}
        self.draw = random.Random(7)

    async def run(self, kinds: dict[str, int], call: Callable[[str], tuple[HttpRequest, Transport]]) -> None:
        async with asyncio.TaskGroup() as group:
            for kind, count in kinds.items():
                self.ends[kind] = Counter()
                for _ in range(count):
                    group.create_task(self._caller(kind, call))

    async def _caller(self, kind: str, call: Callable[[str], tuple[HttpRequest, Transport]]) -> None:
        until = now() + 60.0 * MINUTES
        await asyncio.sleep(self.draw.uniform(0.0, 5.0))
        while now() < until:
            sent, transport = call(kind)
            try:
                served = (await self.upstream.send(sent, transport)).status == 200
                self.ends[kind]["served" if served else "failed"] += 1
            except Overloaded:
                self.ends[kind]["refused"] += 1
            except TimeoutError:
                self.ends[kind]["failed"] += 1
            await asyncio.sleep(self.draw.uniform(0.5, 1.5))


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5])
@virtual
async def test_hasty_callers_do_not_shut_the_account_for_the_others(share: float) -> None:
    callers = Callers(Upstream("llm", provider="openai", max_concurrent=1000))

    def call(kind: str) -> tuple[HttpRequest, Transport]:
        async def transport(_: HttpRequest) -> HttpResponse:
            callers.sent[kind] += 1
            async with asyncio.timeout(2.0 if kind == "hasty" else 60.0):
                await asyncio.sleep(callers.draw.uniform(4.0, 6.0))
            return answer(200)

        return request(), transport

    hasty = round(share * CALLERS)
    await callers.run({"hasty": hasty, "patient": CALLERS - hasty}, call)
    assert callers.ends["patient"].keys() == {"served"}
    assert callers.ends["hasty"].keys() == {"failed"}
    assert callers.sent["hasty"] <= 1.1 * callers.ends["hasty"].total()


@pytest.mark.parametrize("share", [0.05, 0.2, 0.6])
@virtual
async def test_a_model_that_is_down_does_not_shut_the_account_for_the_others(share: float) -> None:
    callers = Callers(Upstream("llm", provider="openai", retry=Retry(max_attempts=3, base_delay=0.2)))

    def call(kind: str) -> tuple[HttpRequest, Transport]:
        async def transport(_: HttpRequest) -> HttpResponse:
            callers.sent[kind] += 1
            await asyncio.sleep(callers.draw.uniform(0.5, 1.5))
            return answer(500 if kind == "dead" else 200)

        return request(kind), transport

    dead = round(share * CALLERS)
    await callers.run({"dead": dead, "alive": CALLERS - dead}, call)
    assert callers.ends["alive"].keys() == {"served"}
    assert callers.ends["dead"]["refused"] > callers.ends["dead"]["failed"]  # its own breaker opened
    assert callers.sent["dead"] < 1.5 * callers.ends["dead"].total()


@pytest.mark.parametrize("share", [0.05, 0.2])
@virtual
async def test_poisoned_requests_neither_open_the_breaker_nor_use_up_the_retries_of_the_others(share: float) -> None:
    callers = Callers(Upstream("llm", provider="openai", retry=Retry(max_attempts=3, base_delay=0.2)))

    def call(kind: str) -> tuple[HttpRequest, Transport]:
        tried = 0
        unlucky = callers.draw.random() < 0.02  # a call that one retry helps

        async def transport(_: HttpRequest) -> HttpResponse:
            nonlocal tried
            tried += 1
            callers.sent[kind] += 1
            await asyncio.sleep(callers.draw.uniform(0.5, 1.5))
            return answer(500 if kind == "poisoned" or (unlucky and tried == 1) else 200)

        return request(text=kind), transport

    poisoned = round(share * CALLERS)
    await callers.run({"poisoned": poisoned, "good": CALLERS - poisoned}, call)
    assert callers.ends["poisoned"].keys() == {"failed"}
    assert callers.ends["good"].keys() == {"served"}
    assert callers.sent.total() <= 1.25 * sum(end.total() for end in callers.ends.values())


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2, 4, 8])
@virtual
async def test_callers_that_always_get_a_429_neither_pause_nor_slow_the_others(count: int) -> None:
    callers = Callers(Upstream("llm", provider="openai"))

    def call(kind: str) -> tuple[HttpRequest, Transport]:
        async def transport(_: HttpRequest) -> HttpResponse:
            await asyncio.sleep(callers.draw.uniform(0.02, 0.1))
            if kind == "poisoned":
                return answer(429)
            await asyncio.sleep(callers.draw.uniform(0.5, 1.5))
            return answer(200)

        return request(text=kind), transport

    await callers.run({"poisoned": count, "good": CALLERS - count}, call)
    each = (60.0 * MINUTES - 2.5) / (0.06 + 1.0 + 1.0)  # calls of one caller that never waits
    assert callers.ends["good"]["served"] >= 0.9 * each * (CALLERS - count)


class TwoModels(UpstreamRun):
    """Callers of two models on one key, whose limit is one for both."""

    async def _call(self, tokens: tuple[int, int], process: int) -> None:
        upstream = self.upstreams[process]
        charge = Charge(input_tokens=tokens[0], output_tokens=EXPECTED_OUTPUT, tokens=tokens[0] + EXPECTED_OUTPUT)
        model, core = self._draws.choice(["gpt-4o", "gpt-4o-mini"]), upstream.core
        account = core.accounts.account(model)
        request = core.request(model, charge, deadline=Deadline.within(self.callers.timeout))

        async def attempt(_: PlainRoute, permit: Permit) -> AttemptResult:
            self.record.sent.append(now())
            result = await send_call(self.provider, account, permit, tokens)
            if result.outcome.kind is Outcome.OVERLOAD:
                self.record.refused.append(now())
            return result

        await upstream.runner.run(PlainRoute(upstream, account, request), attempt)


@pytest.mark.slow
@pytest.mark.parametrize(("scenario", "throttled"), [("steady", 0.03), ("quota-bound", 0.001)])
def test_two_models_share_the_limit_of_a_key(scenario: str, throttled: float) -> None:
    case, end = SCENARIOS[scenario], 60.0 * 10
    best = case.run("oracle", None, 0).work(WARM_UP, end)
    record = TwoModels(case.config, case.callers("upstream"), seed=0).run()
    assert record.work(WARM_UP, end) >= 0.95 * best
    assert record.share_refused(WARM_UP, end) <= throttled
