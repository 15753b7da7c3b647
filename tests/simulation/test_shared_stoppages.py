"""Several processes that share an account stop their calls together, and probe together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest
from tests.simulation.test_shared_accounts import FaultyStore

from forebay import Overloaded, Upstream, clock
from forebay.interfaces import Outcome
from forebay.simulation import simulate
from forebay.upstream.call_request import CallOutcome, CallRequest
from forebay.upstream.shared.memory_store import MemoryLedgerStore

FAILS = (20.0, 80.0)  # seconds from the start in which the provider fails


class Fleet:
    """Processes that call one account at a steady rate, at a provider that answers as it is told.

    Args:
        processes: how many.
        answer: returns the outcome of a call that is sent at a time, in seconds from the start.
        shared: they share the account; otherwise each has one of its own.
        losses: share of the requests to the store, and of the replies, that are lost.
    """

    def __init__(
        self,
        processes: int,
        answer: Callable[[float], CallOutcome],
        *,
        shared: bool = True,
        losses: float = 0.0,
        **settings: object,
    ) -> None:
        self.store = MemoryLedgerStore()
        self.ways = [FaultyStore(self.store, losses=losses) for _ in range(processes)]
        upstreams = [
            Upstream("llm", max_concurrent=40, shared=way if shared else None, **settings)  # type: ignore[arg-type]
            for way in self.ways
        ]
        self._upstreams = upstreams
        self.accounts = [upstream.core.accounts.account("m") for upstream in upstreams]
        self._answer = answer
        self._start = clock.now()
        self.sent: list[tuple[float, int, Outcome]] = []  # time, process, and outcome of each call
        self.rejected: list[tuple[float, int, str | None]] = []  # time, process, and reason

    @property
    def now(self) -> float:
        return clock.now() - self._start

    async def call(self, process: int) -> None:
        """Make one call, which takes about a tenth of a second."""
        account = self.accounts[process]
        try:
            permit = await account.acquire(CallRequest())
        except Overloaded as error:
            self.rejected.append((self.now, process, error.limited_by))
            return
        sent_at = self.now
        outcome = self._answer(sent_at)
        await asyncio.sleep(0.05 + 0.1 * clock.draw())
        account.settle(permit, outcome)
        self.sent.append((sent_at, process, outcome.kind))

    async def run(self, seconds: float, rate: float) -> None:
        """Let all processes together begin `rate` calls a second, each at random times."""
        tasks = []
        until = self.now + seconds
        while self.now < until:
            await asyncio.sleep(2 * clock.draw() / rate)
            process = int(clock.draw() * len(self.accounts))
            tasks.append(asyncio.create_task(self.call(process)))
        await asyncio.gather(*tasks)

    def count(self, since: float, until: float) -> int:
        """Return the calls that were sent in a span."""
        return sum(since <= at < until for at, _, _ in self.sent)

    def states(self) -> set[str]:
        return {account.account.breaker.state(clock.now()).value for account in self.accounts}


def failing(at: float) -> CallOutcome:
    since, until = FAILS
    return CallOutcome(kind=Outcome.FAULT if since <= at < until else Outcome.SUCCESS)


def run_through_outage(processes: int, seed: int, *, shared: bool = True, losses: float = 0.0) -> Fleet:
    async def main() -> Fleet:
        fleet = Fleet(processes, failing, shared=shared, losses=losses)
        await fleet.run(160.0, 20.0)
        return fleet

    return simulate(main, seed=seed)


def openings(fleet: Fleet) -> list[tuple[int, int]]:
    """Return the processes and the calls of each group of failed calls: a group is followed by seconds of silence."""
    groups: list[tuple[int, int]] = []
    latest = -10.0
    for at, process, kind in sorted(fleet.sent, key=lambda call: call[0]):
        if kind is Outcome.FAULT:
            groups = [*groups, (process, 1)] if at > latest + 4.0 else [*groups[:-1], (process, groups[-1][1] + 1)]
            latest = at
    return groups


@pytest.mark.parametrize("losses", [0.0, 0.1])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_an_outage_opens_the_breaker_of_four_processes_as_often_as_that_of_one(seed: int, losses: float) -> None:
    one, four = run_through_outage(1, seed, shared=False), run_through_outage(4, seed, losses=losses)
    assert len(openings(four)) <= len(openings(one)) + 1
    assert openings(four)[0][1] <= openings(one)[0][1] + 6  # calls that failed before it opened
    assert {probes for _, probes in openings(four)[1:]} == {1}
    assert four.states() == {"closed"}


def test_processes_that_do_not_share_find_an_outage_out_each_for_itself() -> None:
    one, four = run_through_outage(1, 1, shared=False), run_through_outage(4, 1, shared=False)
    assert sum(calls for _, calls in openings(four)) >= 3 * sum(calls for _, calls in openings(one))
