"""Several processes on one key share the limits that headers show, and the rate that refusals show, as one would."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Final

import pytest
from tests.simulation.test_shared_accounts import FaultyStore

from forebay import Overloaded, Quota, Upstream
from forebay.simulation import simulate
from forebay.testing import now
from forebay.upstream import HttpRequest, HttpResponse
from forebay.upstream.call_request import CallRequest
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore

LIMIT: Final = 240  # requests a minute
CALLERS: Final = 60  # in all; each makes a call every 1.4 s, if it need not wait, which is ten times the limit
WARM_UP: Final = 60.0  # seconds
MINUTES: Final = 5.0
URL: Final = "https://provider.test/v1/chat/completions"
HEADERS: Final = {"Authorization": "Bearer sk-1", "Content-Type": "application/json"}
BODY: Final = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 100}
ANSWER: Final = {"usage": {"prompt_tokens": 9, "completion_tokens": 9}}
REFUSED: Final = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}


@dataclass(slots=True, kw_only=True)
class Provider:
    """A provider with one limit of requests a minute, as a bucket or in windows.

    Attributes:
        headers: its answers tell the limit.
        retry_after: its refusals tell when the next call fits.
        windows: the limit resets at each full minute, instead of refilling all the time.
    """

    headers: bool = True
    retry_after: bool = True
    windows: bool = False
    level: float = LIMIT
    at: float = 0.0

    def answer(self) -> HttpResponse:
        """Answer one call."""
        if self.windows:
            if now() // 60.0 != self.at // 60.0:
                self.level = LIMIT
            reset = 60.0 - now() % 60.0
        else:
            self.level = min(LIMIT, self.level + (now() - self.at) * LIMIT / 60.0)
        self.at = now()
        is_accepted = self.level >= 1.0
        self.level -= is_accepted
        if not self.windows:
            reset = (LIMIT - self.level) * 60.0 / LIMIT
        headers = {"content-type": "application/json"}
        if self.headers:
            headers["x-ratelimit-limit-requests"] = str(LIMIT)
            headers["x-ratelimit-remaining-requests"] = str(int(self.level))
            headers["x-ratelimit-reset-requests"] = f"{reset:.3f}s"
        if not is_accepted and self.retry_after:
            wait = reset if self.windows else (1.0 - self.level) * 60.0 / LIMIT
            headers["retry-after-ms"] = str(int(wait * 1000) + 1)
        body = ANSWER if is_accepted else REFUSED
        return HttpResponse(200 if is_accepted else 429, headers, json.dumps(body).encode())


@dataclass(slots=True)
class Fleet:
    """Processes on one key of a provider.

    Attributes:
        served: calls, by process.
        refused: by the provider.
        sent: to it.
        learned: by process: the names of the limits in its statistics that headers have shown.
    """

    upstreams: Sequence[Upstream]
    ways: Sequence[FaultyStore]
    provider: Provider
    random: random.Random
    served: list[int] = field(default_factory=list)
    refused: int = 0
    sent: int = 0
    learned: list[list[str]] = field(default_factory=list)

    def begin(self) -> None:
        """Begin to count."""
        self.served, self.refused, self.sent = [0] * len(self.upstreams), 0, 0

    async def call(self, process: int) -> None:
        """Make calls, one after the other."""

        async def transport(_: HttpRequest) -> HttpResponse:
            await asyncio.sleep(self.random.uniform(0.02, 0.1))
            response = self.provider.answer()
            self.sent += 1
            self.refused += response.status == 429
            await asyncio.sleep(self.random.uniform(0.5, 1.5) if response.status == 200 else 0.0)
            return response

        request = HttpRequest("POST", URL, HEADERS, json.dumps(BODY).encode())
        await asyncio.sleep(self.random.uniform(0.0, 5.0))
        while True:
            try:
                response = await self.upstreams[process].send(request, transport)
                self.served[process] += response.status == 200
            except Overloaded as error:
                await asyncio.sleep(min(5.0, error.retry_after or 1.0))
            await asyncio.sleep(self.random.uniform(0.0, 0.5))

    @property
    def goodput(self) -> int:
        return sum(self.served)

    @property
    def share_refused(self) -> float:
        return self.refused / self.sent

    @property
    def fairness(self) -> float:
        """Jain's index of what the processes were served."""
        return self.goodput**2 / (len(self.served) * sum(served**2 for served in self.served))


def run(  # noqa: PLR0913 - what a run differs in
    callers: Sequence[int],
    provider: Callable[[], Provider] = Provider,
    *,
    seed: int,
    is_shared: bool = True,
    losses: float = 0.0,
    quotas: Sequence[Quota] = (),
    minutes: float = MINUTES,
    script: Callable[[Fleet], None] | None = None,
) -> Fleet:
    """Run processes with so many callers each, and return what happened after the warm-up; `script` runs then."""

    async def main() -> Fleet:
        store = MemoryLedgerStore()
        ways = [FaultyStore(store, losses=losses) for _ in callers]
        upstreams = [
            Upstream("llm", provider="openai", quotas=list(quotas), shared=way if is_shared else None) for way in ways
        ]
        fleet = Fleet(upstreams, ways, provider(), random.Random(seed))
        fleet.begin()
        tasks = [
            asyncio.create_task(fleet.call(process)) for process, number in enumerate(callers) for _ in range(number)
        ]
        await asyncio.sleep(WARM_UP)
        fleet.begin()
        if script is not None:
            script(fleet)
        await asyncio.sleep(60.0 * minutes)
        fleet.learned = [
            [level.name for account in upstream.statistics().accounts for level in account.quotas if level.learned]
            for upstream in upstreams
        ]
        for task in tasks:
            task.cancel()
        return fleet

    return simulate(main, seed=seed)


def windows() -> Provider:
    return Provider(windows=True)


def abrupt() -> Provider:
    return Provider(windows=True, retry_after=False)


def untold() -> Provider:
    return Provider(headers=False)


def silent() -> Provider:
    return Provider(headers=False, retry_after=False)


def alone(provider: Callable[[], Provider], seed: int, minutes: float = MINUTES) -> Fleet:
    """Return a run of one process that shares nothing."""
    return run([CALLERS], provider, seed=seed, is_shared=False, minutes=minutes)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("processes", [2, 5])
@pytest.mark.parametrize("provider", [Provider, windows])
def test_limits_that_headers_show_are_used_by_several_processes_as_by_one(
    provider: Callable[[], Provider], processes: int, seed: int
) -> None:
    one, fleet = alone(provider, seed), run([CALLERS // processes] * processes, provider, seed=seed)
    assert fleet.goodput >= 0.97 * one.goodput
    assert fleet.share_refused <= one.share_refused + 0.02
    assert fleet.fairness >= 0.95
    assert fleet.learned == [["requests per minute"]] * processes


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
def test_processes_that_share_nothing_are_refused_far_more_often(seed: int) -> None:
    apart = run([CALLERS // 5] * 5, abrupt, seed=seed, is_shared=False, minutes=3.0)
    together = run([CALLERS // 5] * 5, abrupt, seed=seed, minutes=3.0)
    assert apart.share_refused >= 0.08
    assert together.share_refused <= 0.03


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize(("provider", "minutes"), [(untold, 5.0), (silent, 10.0)])
@pytest.mark.parametrize("processes", [2, 5])
def test_a_rate_that_no_header_tells_is_used_by_several_processes_as_by_one(
    provider: Callable[[], Provider], minutes: float, processes: int, seed: int
) -> None:
    one = alone(provider, seed, minutes)
    fleet = run([CALLERS // processes] * processes, provider, seed=seed, minutes=minutes)
    assert fleet.goodput >= 0.97 * one.goodput
    assert fleet.share_refused <= one.share_refused + 0.02
    assert fleet.fairness >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("provider", [Provider, windows, untold])
def test_idle_processes_take_nothing_from_a_busy_one(provider: Callable[[], Provider]) -> None:
    one, fleet = alone(provider, 1), run([CALLERS, 0, 0, 0, 0], provider, seed=1)
    assert fleet.goodput >= 0.95 * one.goodput
    assert fleet.share_refused <= one.share_refused + 0.02


@pytest.mark.slow
def test_a_store_that_loses_requests_and_replies_changes_little() -> None:
    one, fleet = alone(Provider, 3), run([12] * 5, seed=3, losses=0.1)
    assert fleet.goodput >= 0.95 * one.goodput
    assert fleet.share_refused <= one.share_refused + 0.03
    assert fleet.fairness >= 0.95


@pytest.mark.slow
def test_while_the_store_is_away_each_process_goes_on_with_its_share() -> None:
    def take_away(fleet: Fleet) -> None:
        for way in fleet.ways:
            way.is_away = True

    fleet = run([12] * 5, seed=4, minutes=2.0, script=take_away)
    assert fleet.goodput >= 0.9 * 2 * LIMIT
    assert fleet.share_refused <= 0.05
    assert fleet.fairness >= 0.95


@pytest.mark.slow
def test_a_given_quota_holds_beside_limits_that_headers_show() -> None:
    fleet = run([12] * 5, seed=5, minutes=2.0, quotas=[Quota(requests=100, per="minute")])
    assert 0.97 * 200 <= fleet.goodput <= 202
    assert fleet.refused == 0


def test_a_process_that_joins_begins_with_what_others_have_learned() -> None:
    def join(fleet: Fleet) -> None:
        asyncio.get_running_loop().create_task(acquire(fleet.upstreams[1]))

    async def acquire(upstream: Upstream) -> None:
        await upstream.core.accounts.account("gpt-4o", "Bearer sk-1").acquire(CallRequest())

    assert run([30, 0], seed=6, minutes=0.05, script=join).learned == [["requests per minute"]] * 2
