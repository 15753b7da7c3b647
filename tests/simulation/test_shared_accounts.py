"""Several upstreams, each as a process of its own, on the ledgers of one store that fails or loses replies."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Sequence

import pytest

from forebay import Budget, Overloaded, Price, Quota, Upstream, clock
from forebay.errors import StoreUnavailable
from forebay.simulation import simulate
from forebay.simulation.loop.virtual_loop import virtual_loop
from forebay.upstream.shared.ledger.messages import LEASE, ExchangeReply, ExchangeRequest
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore

pytestmark = pytest.mark.slow

AMOUNT, PERIOD = 600, 60.0
LIMIT = 20


class FaultyStore:
    """A process's way to a store: some of its requests, and of its replies, are lost, or all of them."""

    where = "the faulty store"

    def __init__(self, store: MemoryLedgerStore, *, losses: float = 0.0) -> None:
        self.store = store
        self.losses = losses
        self.is_away = False

    def exchange(self, requests: Sequence[ExchangeRequest]) -> Sequence[ExchangeReply]:
        draw = clock.draw()
        if self.is_away or draw < self.losses:
            raise StoreUnavailable(where=self.where, why="it is away", advice="Wait.")
        replies = self.store.exchange(requests)
        if draw > 1.0 - self.losses:
            raise StoreUnavailable(where=self.where, why="its reply was lost", advice="Wait.")
        return replies

    def close(self) -> None:
        pass

    def reset_after_fork(self) -> None:
        pass


class Fleet:
    """Processes that call one account as often as they may, and what they have sent."""

    def __init__(self, processes: int, *, losses: float = 0.0, call_time: float = 0.5) -> None:
        self.call_time = call_time
        self.store = MemoryLedgerStore()
        self.ways = [FaultyStore(self.store, losses=losses) for _ in range(processes)]
        self.upstreams = [
            Upstream("openai", quotas=[Quota(requests=AMOUNT, per="minute")], max_concurrent=LIMIT, shared=way)
            for way in self.ways
        ]
        self.sent: list[list[float]] = [[] for _ in range(processes)]
        self.in_flight = self.peak = 0
        self.tasks: list[list[asyncio.Task[None]]] = [[] for _ in range(processes)]

    def start(self, process: int, callers: int) -> None:
        self.tasks[process] += [asyncio.create_task(self._call(process)) for _ in range(callers)]

    async def _call(self, process: int) -> None:
        while True:
            try:
                async with self.upstreams[process].call():
                    self.sent[process].append(clock.now())
                    self.in_flight += 1
                    self.peak = max(self.peak, self.in_flight)
                    try:
                        await asyncio.sleep(self.call_time)
                    finally:
                        self.in_flight -= 1
            except Overloaded as error:
                await asyncio.sleep(error.retry_after or 1.0)

    def kill(self, process: int) -> None:
        """End a process without a word to the store; its calls are cut off."""
        link = self.upstreams[process].core.link
        assert link is not None
        link.begin_close()
        for task in self.tasks[process]:
            task.cancel()

    def set_away(self, *, is_away: bool) -> None:
        """Let the store go away for all processes, or come back."""
        for way in self.ways:
            way.is_away = is_away

    @property
    def times(self) -> list[float]:
        return sorted(time for times in self.sent for time in times)

    def overshoot_since_the_start(self) -> float:
        """Return by what share more was sent until any moment than the quota had granted by then, at most."""
        return max(number / (AMOUNT + AMOUNT * time / PERIOD) - 1.0 for number, time in enumerate(self.times, 1))


def overshoot(times: Sequence[float]) -> float:
    """Return by what share more was sent in any span of time than the quota grants, at most."""
    worst = 0.0
    for first, start in enumerate(times):
        for span in (1.0, 10.0, PERIOD, 120.0):
            sent = bisect_right(times, start + span) - first
            worst = max(worst, sent / (AMOUNT + AMOUNT * span / PERIOD) - 1.0)
    return worst


def use(times: Sequence[float], begin: float, end: float) -> float:
    """Return the share of what was refilled in a span of time that was used."""
    return (bisect_right(times, end) - bisect_right(times, begin)) / ((end - begin) * AMOUNT / PERIOD)


@pytest.mark.parametrize("losses", [0.0, 0.1])
def test_processes_share_a_quota_and_use_all_of_it(losses: float) -> None:
    async def main() -> Fleet:
        fleet = Fleet(4, losses=losses)
        for process in range(4):
            fleet.start(process, 20)
        await asyncio.sleep(200.0)
        return fleet

    fleet = simulate(main, seed=1)
    assert overshoot(fleet.times) <= 0.001
    assert use(fleet.times, 90.0, 190.0) >= 0.98
    assert fleet.peak <= LIMIT
    shares = [len(times) / len(fleet.times) for times in fleet.sent]
    assert min(shares) >= 0.2


def test_what_a_killed_process_held_is_free_for_the_others_when_its_lease_ends() -> None:
    async def main() -> Fleet:
        fleet = Fleet(4)
        for process in range(4):
            fleet.start(process, 20)
        await asyncio.sleep(100.0)
        fleet.kill(0)
        await asyncio.sleep(LEASE + 100.0)
        return fleet

    fleet = simulate(main, seed=2)
    assert fleet.peak <= LIMIT
    assert overshoot(fleet.times) <= 0.001
    assert use(fleet.times, 100.0 + LEASE, 200.0) >= 0.98


def test_while_the_store_is_away_processes_keep_their_fair_shares_and_pass_no_limit_when_it_is_back() -> None:
    async def main() -> Fleet:
        fleet = Fleet(4)
        for process in range(4):
            fleet.start(process, 20)
        await asyncio.sleep(100.0)
        fleet.set_away(is_away=True)
        await asyncio.sleep(100.0)
        fleet.set_away(is_away=False)
        await asyncio.sleep(100.0)
        return fleet

    fleet = simulate(main, seed=3)
    assert overshoot(fleet.times) <= 0.001
    assert fleet.peak <= LIMIT
    assert use(fleet.times, 110.0, 195.0) >= 0.9
    assert use(fleet.times, 205.0, 295.0) >= 0.98


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("seconds", [LEASE - 0.4, LEASE + 3.0, 2 * LEASE])
def test_the_first_process_that_reaches_its_store_again_gets_nothing_that_others_have_used(
    seconds: float, seed: int
) -> None:
    async def main() -> Fleet:
        fleet = Fleet(4, call_time=0.02)
        for process in range(4):
            fleet.start(process, 8)
        await asyncio.sleep(100.0)
        fleet.set_away(is_away=True)
        await asyncio.sleep(seconds)
        fleet.set_away(is_away=False)
        await asyncio.sleep(30.0)
        return fleet

    fleet = simulate(main, seed=seed)
    assert fleet.overshoot_since_the_start() <= 0.001
    assert fleet.peak <= LIMIT
    assert use(fleet.times, 100.0 + seconds + 5.0, 130.0 + seconds) >= 0.98


def test_a_process_that_starts_while_the_store_is_away_has_no_share() -> None:
    async def main() -> Fleet:
        fleet = Fleet(3)
        fleet.ways[2].is_away = True
        for process in range(3):
            fleet.start(process, 10)
        await asyncio.sleep(30.0)
        return fleet

    fleet = simulate(main, seed=4)
    assert fleet.sent[2] == []
    assert fleet.sent[0]


def test_a_store_that_comes_back_empty_grants_nothing_twice() -> None:
    async def main() -> Fleet:
        fleet = Fleet(4)
        for process in range(4):
            fleet.start(process, 20)
        await asyncio.sleep(100.0)
        fleet.store.ledgers.clear()
        await asyncio.sleep(100.0)
        return fleet

    fleet = simulate(main, seed=5)
    assert overshoot(fleet.times) <= 0.001
    assert fleet.peak <= LIMIT
    assert use(fleet.times, 105.0, 195.0) >= 0.98


def test_a_slow_store_delays_calls_but_passes_no_limit() -> None:
    async def main() -> Fleet:
        virtual_loop().executor_delay = (0.2, 2.0)
        fleet = Fleet(4)
        for process in range(4):
            fleet.start(process, 20)
        await asyncio.sleep(300.0)
        return fleet

    fleet = simulate(main, seed=6)
    assert overshoot(fleet.times) <= 0.001
    assert fleet.peak <= LIMIT
    assert use(fleet.times, 0.0, 300.0) >= 0.5


class Spenders:
    """Processes that spend one budget, and what they have spent."""

    def __init__(self, processes: int, *, losses: float) -> None:
        self.store = MemoryLedgerStore()
        self.ways = [FaultyStore(self.store, losses=losses) for _ in range(processes)]
        self.upstreams = [
            Upstream(
                "openai",
                budget=Budget(usd=10.0, per="day"),
                prices={"m": Price(input=0, output=1000)},
                shared=way,
            )
            for way in self.ways
        ]
        self.spent = 0.0
        self.rejected = 0

    async def call(self, process: int, seconds: float = 0.3) -> None:
        while True:
            try:
                async with self.upstreams[process].call("m", output_tokens=40) as call:
                    await asyncio.sleep(seconds)
                    call.settle(input_tokens=0, output_tokens=25)
                    self.spent += 0.025
            except Overloaded:
                self.rejected += 1
                await asyncio.sleep(1.0)


@pytest.mark.parametrize("losses", [0.0, 0.1])
def test_processes_spend_one_budget_to_the_last_call_that_it_can_pay(losses: float) -> None:
    async def main() -> Spenders:
        spenders = Spenders(4, losses=losses)
        tasks = [asyncio.create_task(spenders.call(process)) for process in range(4) for _ in range(5)]
        await asyncio.sleep(120.0)
        for task in tasks:
            assert not task.done()
            task.cancel()
        await asyncio.sleep(5.0)
        return spenders

    spenders = simulate(main, seed=7)
    assert spenders.rejected > 0
    assert 10.0 - 0.04 <= round(spenders.spent, 6) <= 10.0
    (ledger,) = [each for each in spenders.store.ledgers.values() if each.state.terms.budget]
    assert round(ledger.state.spent, 6) == round(spenders.spent, 6)
    assert sum(member.usd for member in ledger.state.members.values()) == 0.0
    assert {round(upstream.statistics().spent_usd or 0.0, 6) for upstream in spenders.upstreams} == {
        round(spenders.spent, 6)
    }


@pytest.mark.parametrize("keeps_ledgers", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_the_first_process_that_reaches_its_store_again_gets_no_money_that_others_have_spent(
    seed: int, *, keeps_ledgers: bool
) -> None:
    async def main() -> Spenders:
        spenders = Spenders(4, losses=0.0)
        tasks = [asyncio.create_task(spenders.call(process)) for process in range(1, 4)]
        async with spenders.upstreams[0].call("m", output_tokens=0) as call:
            await asyncio.sleep(2.0)
            call.settle(input_tokens=0, output_tokens=0)
        for way in spenders.ways:
            way.is_away = True
        tasks += [asyncio.create_task(spenders.call(process)) for process in range(1, 4) for _ in range(10)]
        await asyncio.sleep(LEASE + 8.0)
        if not keeps_ledgers:
            spenders.store.ledgers.clear()
        for way in spenders.ways:
            way.is_away = False
        tasks += [asyncio.create_task(spenders.call(0, 0.01)) for _ in range(20)]
        await asyncio.sleep(60.0)
        for task in tasks:
            task.cancel()
        return spenders

    spenders = simulate(main, seed=seed)
    assert spenders.rejected > 0
    assert 10.0 - 0.04 <= round(spenders.spent, 6) <= 10.0
