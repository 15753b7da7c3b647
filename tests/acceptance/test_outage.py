"""An outage of five minutes: what callers see, how often the provider is asked, and how service returns."""

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

BEGINS, ENDS, WATCHED_UNTIL = 60.0, 360.0, 480.0  # seconds: the outage, and the end of the test
CALLERS = 20
TAKES = 2.0  # seconds of an accepted call
MAX_WAIT = 60.0  # the defaults, in the queue and for retries


@dataclass
class CallEnd:
    """How a call ended: with a status, or with a rejection by the upstream."""

    began: float
    ended: float
    to: int | Overloaded

    @property
    def waited(self) -> float:
        return self.ended - self.began


class OutageHarness:
    """Callers that make one call after another, and come back after the Retry-After of a rejection."""

    def __init__(self, status: int, *, answers_in: float = 0.1, max_concurrent: int | None = None) -> None:
        self.status = status
        self.answers_in = answers_in
        self.upstream = Upstream("openai", provider="openai", max_concurrent=max_concurrent)
        self.sent: list[float] = []
        self.came: list[CallEnd] = []
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
            await asyncio.sleep(TAKES)
            return httpx2.Response(200, json={"usage": {"prompt_tokens": 9, "completion_tokens": 9}})
        await asyncio.sleep(self.answers_in)
        return httpx2.Response(self.status, json={"error": {"message": "down for a while"}})

    async def _caller(self) -> None:
        loop = asyncio.get_running_loop()
        while (began := loop.time()) < WATCHED_UNTIL:
            pause = 1.0
            try:
                answer = await self.client.post(URL, json=REQUEST)
                self.came.append(CallEnd(began, loop.time(), answer.status_code))
            except Overloaded as error:
                self.came.append(CallEnd(began, loop.time(), error))
                pause = error.retry_after or pause
            self.states |= {account.account.breaker.state(loop.time()) for account in self.upstream.core.accounts}
            await asyncio.sleep(pause)

    def served(self, since: float, until: float) -> int:
        return sum(call.to == 200 for call in self.came if since <= call.ended < until)

    def sent_in_minute(self) -> Counter[int]:
        return Counter(int(at // 60) for at in self.sent)


@pytest.fixture(params=[(503, None), (529, None), (503, 8)], ids=["503", "529", "503 of a limit that is known"])
def outage(request: pytest.FixtureRequest) -> OutageHarness:
    status, slots = request.param
    return OutageHarness(status, max_concurrent=slots)


def test_in_an_outage_only_a_few_calls_are_sent(outage: OutageHarness) -> None:
    sent = outage.sent_in_minute()
    assert sent[1] <= 60  # calls in flight, and what the retry budget allows
    assert all(6 <= sent[minute] <= 13 for minute in range(2, 6)), sent  # one in five seconds, to find the end


def test_no_call_waits_longer_than_allowed(outage: OutageHarness) -> None:
    in_queue, backoff, periodic = MAX_WAIT, MAX_WAIT, 5.0  # the bounds of the upstream and of its retries, in seconds
    assert max(call.waited for call in outage.came) <= in_queue + backoff + periodic
    late = [call for call in outage.came if BEGINS + 2 * MAX_WAIT <= call.began < ENDS - 10.0]
    assert max(call.waited for call in late) <= 5.0


def test_a_rejection_gives_the_reason_and_a_retry_after(outage: OutageHarness) -> None:
    late = [call.to for call in outage.came if BEGINS + 2 * MAX_WAIT <= call.began < ENDS - 10.0]
    refusals = [error for error in late if isinstance(error, Overloaded)]
    assert len(refusals) >= 0.9 * len(late)  # the others were periodic retries, and got the provider's answer
    for error in refusals:
        assert "its provider has throttled every call for" in error.reason
        assert error.limited_by is not None
        assert error.limited_by.endswith(":outage")
        assert error.retry_after is not None
        assert 0.0 < error.retry_after <= 15.0


def test_throttling_is_no_fault_and_opens_no_breaker(outage: OutageHarness) -> None:
    assert outage.states == {BreakerState.CLOSED}


def test_service_is_back_within_half_a_minute(outage: OutageHarness) -> None:
    before = outage.served(BEGINS - 30.0, BEGINS)
    assert outage.served(ENDS + 30.0, ENDS + 60.0) >= 0.95 * before
    assert outage.served(ENDS, ENDS + 15.0) > 0
    assert left(outage.upstream) == NOTHING


@pytest.mark.parametrize("slots", [None, 8])
def test_a_provider_that_throttles_after_three_seconds_gets_few_calls_too(slots: int | None) -> None:
    outage = OutageHarness(503, answers_in=3.0, max_concurrent=slots)  # each call counts as accepted after a second
    sent = outage.sent_in_minute()
    assert all(sent[minute] <= 60 for minute in range(2, 6)), sent
    assert outage.served(ENDS + 30.0, ENDS + 60.0) >= 0.95 * outage.served(BEGINS - 30.0, BEGINS)


def test_a_broken_provider_is_left_to_the_breaker() -> None:
    outage = OutageHarness(500)
    assert BreakerState.OPEN in outage.states
    sent = outage.sent_in_minute()
    assert all(sent[minute] <= 60 for minute in range(2, 6)), sent  # probes, and their retries
    assert outage.served(ENDS, ENDS + 60.0) > 0  # the breaker stays open for a minute at most
    assert outage.served(ENDS + 60.0, ENDS + 90.0) >= 0.95 * outage.served(BEGINS - 30.0, BEGINS)
