"""Fifty callers empty the bucket of a key whose limit nobody tells, and share what it gains from then on.

The network brings calls and answers in any order: a call that was sent later may arrive earlier, and a refusal may come
back after a call that was sent much later has been accepted.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Final

import httpx
import pytest

from forebay import Upstream
from forebay.simulation import simulate

CALLERS: Final = 50
SIZE: Final = 100  # requests in a period, and at once
URL: Final = "https://provider.test/v1/chat/completions"
REFUSED: Final = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
ANSWER: Final = {
    "id": "c",
    "created": 1,
    "model": "m",
    "object": "chat.completion",
    "choices": [{"index": 0, "message": {"role": "assistant", "content": "x"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A provider, and how it is called.

    Attributes:
        period: seconds in which the bucket is filled.
        retry_after: the header of its refusals: "ms", "seconds", or "" for none.
        delay: seconds on average that a message takes each way, and an eighth of the longest.
        calls: of each caller.
    """

    period: float = 60.0
    retry_after: str = "ms"
    delay: float = 0.0
    calls: int = 3

    @property
    def schedule(self) -> float:
        """Seconds that the bucket needs for the calls that it does not hold at first."""
        return (self.calls * CALLERS - SIZE) * self.period / SIZE


@dataclass(slots=True)
class Run:
    """What became of the calls."""

    failures: Counter[str] = field(default_factory=Counter)
    accepted: int = 0
    refused: int = 0
    seconds: float = 0.0


class UntoldBucket(httpx.AsyncBaseTransport):
    """A transport to a bucket that is full at first, and that only refusals show."""

    def __init__(self, case: Case, seed: int, run: Run) -> None:
        self._case, self._run = case, run
        self._random = random.Random(seed)
        self._left, self._rate, self._at = float(SIZE), SIZE / case.period, 0.0

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one request."""
        del request
        await self._travel()
        wait = self._take(asyncio.get_running_loop().time())
        await self._travel()
        if not wait:
            return httpx.Response(200, json=ANSWER)
        headers = {"content-type": "application/json"}
        if self._case.retry_after == "ms":
            headers["retry-after-ms"] = str(math.ceil(wait * 1000))
        elif self._case.retry_after == "seconds":
            headers["retry-after"] = str(math.ceil(wait))
        return httpx.Response(429, headers=headers, content=json.dumps(REFUSED).encode())

    async def _travel(self) -> None:
        if self._case.delay:
            await asyncio.sleep(min(8 * self._case.delay, self._random.expovariate(1 / self._case.delay)))

    def _take(self, now: float) -> float:
        """Take a token, and return 0; or return the seconds until there is one."""
        self._left, self._at = min(SIZE, self._left + (now - self._at) * self._rate), now
        if self._left < 1:
            self._run.refused += 1
            return (1 - self._left) / self._rate
        self._left -= 1
        self._run.accepted += 1
        return 0.0


def run(case: Case, seed: int, *, max_wait: float = 60.0) -> Run:
    """Run the callers, and return what became of their calls."""
    ended = Run()

    async def call(client: httpx.AsyncClient, number: int) -> None:
        body = {"model": "m", "messages": [{"role": "user", "content": f"river {number}"}]}
        for _ in range(case.calls):
            response = await client.post(URL, headers={"Authorization": "Bearer sk-1"}, json=body)
            response.raise_for_status()

    async def main() -> None:
        upstream = Upstream("key", provider="openai", max_wait=max_wait)
        async with httpx.AsyncClient(transport=UntoldBucket(case, seed, ended)) as client:
            bound = upstream.bind(client)
            callers = (call(bound, number) for number in range(CALLERS))
            results = await asyncio.gather(*callers, return_exceptions=True)
        ended.failures += Counter(type(each).__name__ for each in results if isinstance(each, BaseException))
        ended.seconds = asyncio.get_running_loop().time()

    simulate(main, seed=seed)
    return ended


def check(case: Case, seed: int) -> None:
    ended = run(case, seed)
    assert not ended.failures
    assert ended.accepted == case.calls * CALLERS


CASES: Final = [
    Case(period=period, retry_after=retry_after, delay=delay)
    for period in (1.0, 10.0, 60.0)
    for retry_after in ("ms", "seconds", "")
    for delay in (0.005, 0.1, 0.25)
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_untold_bucket_fails_nobody_and_accepts_each_call_once(case: Case) -> None:
    check(case, seed=1)


@pytest.mark.parametrize(
    ("case", "seed"),
    [
        (Case(delay=0.25), 11),
        (Case(delay=0.25, retry_after=""), 4),
        (Case(delay=0.25, retry_after=""), 10),
        (Case(delay=0.1, retry_after=""), 44),
    ],
    ids=str,
)
def test_a_burst_whose_refusals_are_late_makes_no_rate_far_too_low(case: Case, seed: int) -> None:
    check(case, seed)


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES, ids=str)
def test_an_untold_bucket_fails_nobody_whatever_the_order_of_messages(case: Case) -> None:
    for seed in range(25):
        check(case, seed)
