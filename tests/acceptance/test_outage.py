"""An outage of five minutes: what callers see, how many calls are sent meanwhile, and how fast service recovers."""

from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from tests.unit.upstream.httpx_binding.wire import NOTHING, REQUEST, URL, left

from forebay import Overloaded
from forebay.breaker import BreakerState
from forebay.simulation import simulate
from forebay.upstream import Upstream

BEGINS, ENDS, DURATION = 60.0, 360.0, 480.0  # seconds: the outage, and the whole simulation
CALLERS = 20
LATENCY = 2.0  # seconds of a successful call
LONGEST_WAIT = 60.0  # the default: in the queue, and for retries


@dataclass
class EndedCall:
    """An ended call: its times, and its status or the rejection by the upstream."""

    began: float
    ended: float
    result: int | Overloaded

    @property
    def waited(self) -> float:
        return self.ended - self.began


class Outage:
    """A simulated outage, with callers that call one call after the other and obey Retry-After."""

    def __init__(self, status: int, *, refusal_latency: float = 0.1, max_concurrent: int | None = None) -> None:
        self.status = status
        self.refusal_latency = refusal_latency
        self.upstream = Upstream("openai", provider="openai", max_concurrent=max_concurrent)
        self.sent: list[float] = []
        self.ended: list[EndedCall] = []
        self.states: set[BreakerState] = set()
        simulate(self._main, seed=1)

    async def _main(self) -> None:
        self.client: Any = self.upstream.bind(httpx2.AsyncClient(transport=httpx2.MockTransport(self._answer)))
        async with asyncio.TaskGroup() as group:
            for _ in range(CALLERS):
                group.create_task(self._caller())

    async def _answer(self, _: Any) -> Any:
        now = asyncio.get_running_loop().time()
        self.sent.append(now)
        if not BEGINS <= now < ENDS:
            await asyncio.sleep(LATENCY)
            return httpx2.Response(200, json={"usage": {"prompt_tokens": 9, "completion_tokens": 9}})
        await asyncio.sleep(self.refusal_latency)
        return httpx2.Response(self.status, json={"error": {"message": "down for a while"}})

    async def _caller(self) -> None:
        loop = asyncio.get_running_loop()
        while (began := loop.time()) < DURATION:
            pause = 1.0
            try:
                answer = await self.client.post(URL, json=REQUEST)
                self.ended.append(EndedCall(began, loop.time(), answer.status_code))
            except Overloaded as error:
                self.ended.append(EndedCall(began, loop.time(), error))
                pause = error.retry_after or pause
            self.states |= {shared.account.breaker.state(loop.time()) for shared in self.upstream.core.accounts}
            await asyncio.sleep(pause)

    def served(self, since: float, until: float) -> int:
        return sum(call.result == 200 for call in self.ended if since <= call.ended < until)

    def sent_in_minute(self) -> Counter[int]:
        return Counter(int(at // 60) for at in self.sent)


@pytest.fixture(params=[(503, None), (529, None), (503, 8)], ids=["503", "529", "503 with a configured limit"])
def outage(request: pytest.FixtureRequest) -> Outage:
    status, slots = request.param
    return Outage(status, max_concurrent=slots)


def test_few_calls_are_sent_during_an_outage(outage: Outage) -> None:
    sent = outage.sent_in_minute()
    assert sent[1] <= 60  # calls in flight, and the retry budget
    assert all(6 <= sent[minute] <= 13 for minute in range(2, 6)), sent  # once in five seconds, to find its end


def test_no_caller_waits_longer_than_the_configured_bounds(outage: Outage) -> None:
    queued, retrying, trial = LONGEST_WAIT, LONGEST_WAIT, 5.0  # the bounds of the queue, of retries and of a trial call
    assert max(call.waited for call in outage.ended) <= queued + retrying + trial
    late = [call for call in outage.ended if BEGINS + 2 * LONGEST_WAIT <= call.began < ENDS - 10.0]
    assert max(call.waited for call in late) <= 5.0


def test_a_rejection_names_the_outage_and_has_a_retry_after(outage: Outage) -> None:
    late = [call.result for call in outage.ended if BEGINS + 2 * LONGEST_WAIT <= call.began < ENDS - 10.0]
    rejections = [error for error in late if isinstance(error, Overloaded)]
    assert len(rejections) >= 0.9 * len(late)  # the others were trial calls, with the reply of the provider
    for error in rejections:
        assert "its provider has throttled every call for" in error.reason
        assert error.limited_by is not None
        assert error.limited_by.endswith(":outage")
        assert error.retry_after is not None
        assert 0.0 < error.retry_after <= 15.0


def test_an_outage_opens_no_breaker(outage: Outage) -> None:
    assert outage.states == {BreakerState.CLOSED}


def test_service_recovers_within_half_a_minute(outage: Outage) -> None:
    before = outage.served(BEGINS - 30.0, BEGINS)
    assert outage.served(ENDS + 30.0, ENDS + 60.0) >= 0.95 * before
    assert outage.served(ENDS, ENDS + 15.0) > 0
    assert left(outage.upstream) == NOTHING


@pytest.mark.parametrize("slots", [None, 8])
def test_few_calls_are_sent_to_a_provider_that_throttles_slowly(slots: int | None) -> None:
    # A call without an answer for a second counts as accepted until it is throttled.
    outage = Outage(503, refusal_latency=3.0, max_concurrent=slots)
    sent = outage.sent_in_minute()
    assert all(sent[minute] <= 60 for minute in range(2, 6)), sent
    assert outage.served(ENDS + 30.0, ENDS + 60.0) >= 0.95 * outage.served(BEGINS - 30.0, BEGINS)


def test_a_failing_provider_opens_the_breaker() -> None:
    outage = Outage(500)
    assert BreakerState.OPEN in outage.states
    sent = outage.sent_in_minute()
    assert all(sent[minute] <= 60 for minute in range(2, 6)), sent  # probes, and their retries
    assert outage.served(ENDS, ENDS + 60.0) > 0  # the breaker stays open for a minute at most
    assert outage.served(ENDS + 60.0, ENDS + 90.0) >= 0.95 * outage.served(BEGINS - 30.0, BEGINS)
