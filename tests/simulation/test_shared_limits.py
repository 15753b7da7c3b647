"""Several processes that learn the limit of one account together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace

import pytest
from bench.calls.scenarios import SCENARIOS
from bench.calls.upstream_run import UpstreamRun
from tests.simulation.test_shared_accounts import FaultyStore

from forebay import Overloaded, Upstream, clock
from forebay.interfaces import Outcome
from forebay.limit import AimdLimit
from forebay.simulation import simulate
from forebay.upstream.call_request import CallOutcome, CallRequest
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore


@pytest.mark.slow
def test_four_processes_get_the_goodput_of_one_and_equal_shares() -> None:
    found = replace(SCENARIOS["steady"], minutes=4.0)
    one = UpstreamRun(found.config, found.callers("upstream"), seed=5).run()
    four = UpstreamRun(found.config, found.callers("upstream"), seed=5, processes=4, shared=MemoryLedgerStore())
    record = four.run()
    assert record.work(60, 240) >= 0.95 * one.work(60, 240)
    assert record.share_refused(60, 240) <= 0.06
    assert four.fairness() >= 0.95


def _seconds() -> float:
    return 0.5 + clock.draw()


class Fleet:
    """Processes that learn the limit of one account, at a provider that serves `capacity` calls at a time."""

    def __init__(
        self, processes: int, capacity: int, *, losses: float = 0.0, seconds: Callable[[], float] = _seconds
    ) -> None:
        self.seconds = seconds
        self.store = MemoryLedgerStore()
        self.ways = [FaultyStore(self.store, losses=losses) for _ in range(processes)]
        upstreams = [Upstream("llm", shared=way) for way in self.ways]
        self.accounts = [upstream.core.accounts.account("m") for upstream in upstreams]
        self._upstreams = upstreams
        self.capacity = capacity
        self.in_flight = self.most_in_flight = 0
        self.served = [0] * processes
        self.sent = self.refused = 0

    async def call(self, process: int) -> None:
        """Make calls one after the other; a refusal comes at once."""
        account = self.accounts[process]
        while True:
            try:
                permit = await account.acquire(CallRequest())
            except Overloaded as error:
                await asyncio.sleep(error.retry_after or 1.0)
                continue
            self.sent += 1
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            refused = self.in_flight > self.capacity
            await asyncio.sleep(0.05 if refused else self.seconds())
            self.in_flight -= 1
            account.settle(permit, CallOutcome(kind=Outcome.OVERLOAD if refused else Outcome.SUCCESS))
            self.served[process] += not refused
            self.refused += refused

    def start(self, callers: int) -> list[asyncio.Task[None]]:
        return [asyncio.create_task(self.call(process)) for process in range(len(self.served)) for _ in range(callers)]


def test_a_refusal_that_all_processes_see_cuts_the_limit_once() -> None:
    async def main() -> list[int]:
        store = MemoryLedgerStore()
        upstreams = [Upstream("llm", limit=AimdLimit, shared=FaultyStore(store)) for _ in range(4)]
        accounts = [upstream.core.accounts.account("m") for upstream in upstreams]
        permits = [(account, await account.acquire(CallRequest())) for account in accounts for _ in range(2)]
        await asyncio.sleep(1.0)
        for account, permit in permits:
            account.settle(permit, CallOutcome(kind=Outcome.OVERLOAD))
        await asyncio.sleep(5.0)
        return [account.account.limit.limit(clock.now()) for account in accounts]

    assert simulate(main, seed=1) == [8, 8, 8, 8]  # of 10


def test_a_process_that_starts_late_has_the_limit_that_the_others_have_learned() -> None:
    async def main() -> int:
        fleet = Fleet(4, 40)
        late = fleet.accounts[3]
        tasks = [asyncio.create_task(fleet.call(process)) for process in range(3) for _ in range(20)]
        await asyncio.sleep(60.0)
        tasks.append(asyncio.create_task(fleet.call(3)))
        await asyncio.sleep(2.0)
        return late.account.limit.limit(clock.now())

    assert 30 <= simulate(main, seed=1) <= 45


@pytest.mark.parametrize("losses", [0.0, 0.1])
def test_processes_find_the_capacity_together_and_share_it(losses: float) -> None:
    async def main() -> Fleet:
        fleet = Fleet(4, 40, losses=losses)
        fleet.start(20)
        await asyncio.sleep(60.0)
        fleet.served = [0, 0, 0, 0]
        await asyncio.sleep(60.0)
        return fleet

    fleet = simulate(main, seed=2)
    assert sum(fleet.served) >= 0.9 * 60 * 40
    assert min(fleet.served) >= 0.8 * sum(fleet.served) / 4


def test_in_an_outage_one_call_is_tried_at_a_time_by_all_processes() -> None:
    async def main() -> Fleet:
        fleet = Fleet(4, 40)
        fleet.start(20)
        await asyncio.sleep(30.0)
        fleet.capacity = 0
        await asyncio.sleep(30.0)
        fleet.sent = fleet.most_in_flight = 0
        await asyncio.sleep(60.0)
        return fleet

    fleet = simulate(main, seed=3)
    assert fleet.most_in_flight == 1
    assert 1 <= fleet.sent <= 60


def test_while_the_store_is_away_each_process_goes_on_with_its_share_of_the_limit() -> None:
    async def main() -> tuple[list[int], int]:
        fleet = Fleet(4, 40)
        fleet.start(20)
        await asyncio.sleep(60.0)
        for way in fleet.ways:
            way.is_away = True
        await asyncio.sleep(10.0)
        fleet.served = [0, 0, 0, 0]
        await asyncio.sleep(60.0)
        served = fleet.served
        for way in fleet.ways:
            way.is_away = False
        await asyncio.sleep(20.0)
        (ledger,) = fleet.store.ledgers.values()
        return served, int(ledger.state.limit)

    served, limit = simulate(main, seed=4)
    assert min(served) >= 0.8 * 60 * 10
    assert 30 <= limit <= 45


def run_in_step(processes: int, slots: int) -> Fleet:
    """Return processes with twice as many callers as slots, whose calls all take a second, after two minutes."""

    async def main() -> Fleet:
        fleet = Fleet(processes, slots, seconds=lambda: 1.0)
        fleet.start(max(2, 2 * slots // processes))
        await asyncio.sleep(60.0)
        fleet.served, fleet.refused = [0] * processes, 0
        await asyncio.sleep(60.0)
        return fleet

    return simulate(main, seed=5)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "slots"), [(2, 1), (2, 3), (2, 5), (4, 1), (4, 3)])
def test_processes_whose_calls_end_in_step_are_refused_as_rarely_as_one(processes: int, slots: int) -> None:
    one, several = run_in_step(1, slots), run_in_step(processes, slots)
    assert several.refused <= 2 * one.refused + 0.02 * sum(several.served) + 2  # of a minute
    assert sum(several.served) >= 0.97 * sum(one.served)
