"""A provider that refuses everything for five minutes: what its callers see, how often it is asked, when it is back."""

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

BEGINS, ENDS, TILL = 60.0, 360.0, 480.0  # seconds: the outage, and what is watched
CALLERS = 20
TAKES = 2.0  # seconds of a call that is served
LONGEST_WAIT = 60.0  # the default: in the line, and for retries


@dataclass
class Came:
    """What a call came to: a status, or the refusal of the upstream."""

    began: float
    ended: float
    to: int | Overloaded

    @property
    def waited(self) -> float:
        return self.ended - self.began


class Outage:
    """Callers in a row of calls each, who come again when they are told to."""

    def __init__(self, status: int, *, answers_in: float = 0.1, max_concurrent: int | None = None) -> None:
        self.status = status
        self.answers_in = answers_in
        self.upstream = Upstream("openai", provider="openai", max_concurrent=max_concurrent)
        self.sent: list[float] = []
        self.came: list[Came] = []
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
        while (began := loop.time()) < TILL:
            pause = 1.0
            try:
                answer = await self.client.post(URL, json=REQUEST)
                self.came.append(Came(began, loop.time(), answer.status_code))
            except Overloaded as error:
                self.came.append(Came(began, loop.time(), error))
                pause = error.retry_after or pause
            self.states |= {desk.account.breaker.state(loop.time()) for desk in self.upstream.core.accounts}
            await asyncio.sleep(pause)

    def served(self, since: float, until: float) -> int:
        return sum(call.to == 200 for call in self.came if since <= call.ended < until)

    def sent_in_minute(self) -> Counter[int]:
        return Counter(int(at // 60) for at in self.sent)


@pytest.fixture(params=[(503, None), (529, None), (503, 8)], ids=["503", "529", "503 of a limit that is known"])
def outage(request: pytest.FixtureRequest) -> Outage:
    status, slots = request.param
    return Outage(status, max_concurrent=slots)


def test_in_an_outage_only_a_few_calls_are_sent(outage: Outage) -> None:
    sent = outage.sent_in_minute()
    assert sent[1] <= 60  # what was under way, and what the retry budget allows
    assert all(6 <= sent[minute] <= 13 for minute in range(2, 6)), sent  # once in five seconds, to find its end


def test_no_call_waits_longer_than_allowed(outage: Outage) -> None:
    in_line, asleep, knock = LONGEST_WAIT, LONGEST_WAIT, 5.0  # the upstream's bound, and that of its retries
    assert max(call.waited for call in outage.came) <= in_line + asleep + knock
    late = [call for call in outage.came if BEGINS + 2 * LONGEST_WAIT <= call.began < ENDS - 10.0]
    assert max(call.waited for call in late) <= 5.0


def test_a_rejection_gives_the_reason_and_a_retry_after(outage: Outage) -> None:
    late = [call.to for call in outage.came if BEGINS + 2 * LONGEST_WAIT <= call.began < ENDS - 10.0]
    refusals = [error for error in late if isinstance(error, Overloaded)]
    assert len(refusals) >= 0.9 * len(late)  # the others knocked, and have the provider's own answer
    for error in refusals:
        assert "its provider has throttled every call for" in error.reason
        assert error.limited_by is not None
        assert error.limited_by.endswith(":outage")
        assert error.retry_after is not None
        assert 0.0 < error.retry_after <= 15.0


def test_throttling_is_no_fault_and_opens_no_breaker(outage: Outage) -> None:
    assert outage.states == {BreakerState.CLOSED}


def test_service_is_back_within_half_a_minute(outage: Outage) -> None:
    before = outage.served(BEGINS - 30.0, BEGINS)
    assert outage.served(ENDS + 30.0, ENDS + 60.0) >= 0.95 * before
    assert outage.served(ENDS, ENDS + 15.0) > 0
    assert left(outage.upstream) == NOTHING


@pytest.mark.parametrize("slots", [None, 8])
def test_a_provider_that_throttles_after_three_seconds_gets_few_calls_too(slots: int | None) -> None:
    outage = Outage(503, answers_in=3.0, max_concurrent=slots)  # after a second each counts as let in, for the while
    sent = outage.sent_in_minute()
    assert all(sent[minute] <= 60 for minute in range(2, 6)), sent
    assert outage.served(ENDS + 30.0, ENDS + 60.0) >= 0.95 * outage.served(BEGINS - 30.0, BEGINS)


def test_a_broken_provider_is_left_to_the_breaker() -> None:
    outage = Outage(500)
    assert BreakerState.OPEN in outage.states
    sent = outage.sent_in_minute()
    assert all(sent[minute] <= 60 for minute in range(2, 6)), sent  # probes, and what the retry budget gives them
    assert outage.served(ENDS, ENDS + 60.0) > 0  # it sleeps for a minute at most
    assert outage.served(ENDS + 60.0, ENDS + 90.0) >= 0.95 * outage.served(BEGINS - 30.0, BEGINS)
