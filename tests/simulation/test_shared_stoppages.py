"""Several processes that share an account stop their calls together, and probe together."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

import pytest
from tests.simulation.test_shared_accounts import FaultyStore

from forebay import Overloaded, Upstream, clock
from forebay.interfaces import Outcome
from forebay.simulation import simulate
from forebay.upstream.call_request import CallOutcome, CallRequest
from forebay.upstream.shared.ledger.stoppage_state import StoppageState
from forebay.upstream.shared.stores.memory_store import MemoryLedgerStore

FAILS = (20.0, 80.0)  # seconds from the start in which the provider fails
REFUSES = (20.0, 90.0)  # seconds from the start from which it refuses calls, for 30 seconds each
SUSPENSION = 30.0  # seconds of a suspension


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
        self._tasks: list[asyncio.Task[None]] = []
        self.sent: list[tuple[float, int, Outcome]] = []  # time, process, and outcome of each call
        self.rejected: list[tuple[float, int, str | None]] = []  # time, process, and reason

    @property
    def now(self) -> float:
        return clock.now() - self._start

    def outcome_of(self, process: int, sent_at: float) -> CallOutcome:  # noqa: ARG002 - all reach the provider
        """Return what becomes of a call."""
        return self._answer(sent_at)

    async def call(self, process: int) -> None:
        """Make one call, which takes about a tenth of a second."""
        account = self.accounts[process]
        try:
            permit = await account.acquire(CallRequest())
        except Overloaded as error:
            self.rejected.append((self.now, process, error.limited_by))
            return
        sent_at = self.now
        outcome = self.outcome_of(process, sent_at)
        await asyncio.sleep(0.05 + 0.1 * clock.draw())
        if outcome.spend_cap:
            account.record_spend_cap(permit, SUSPENSION, certain=True)
        account.settle(permit, outcome)
        self.sent.append((sent_at, process, outcome.kind))

    async def run(self, until: float, rate: float, processes: Sequence[int] = ()) -> None:
        """Let processes, or all of them, together begin `rate` calls a second, at random times."""
        calling = processes or range(len(self.accounts))
        while self.now < until:
            await asyncio.sleep(2 * clock.draw() / rate)
            process = calling[int(clock.draw() * len(calling))]
            self._tasks.append(asyncio.create_task(self.call(process)))

    def set_away(self, *, away: bool) -> None:
        """Let the store fail, or come back, for all processes."""
        for way in self.ways:
            way.is_away = away

    def count(self, since: float, until: float, process: int | None = None) -> int:
        """Return the calls that were sent in a span."""
        return sum(since <= at < until and process in (None, number) for at, number, _ in self.sent)

    def states(self) -> set[str]:
        return {account.account.breaker.state(clock.now()).value for account in self.accounts}

    def stoppage(self, kind: str) -> StoppageState:
        """Return what the ledger has of a stoppage."""
        (ledger,) = self.store.ledgers.values()
        return ledger.state.stoppages[kind]


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
@pytest.mark.parametrize("seed", [1, 2])
def test_an_outage_opens_the_breaker_of_four_processes_as_often_as_that_of_one(seed: int, losses: float) -> None:
    one, four = run_through_outage(1, seed, shared=False), run_through_outage(4, seed, losses=losses)
    assert len(openings(four)) <= len(openings(one)) + 1
    assert openings(four)[0][1] <= openings(one)[0][1] + 6  # calls that failed before it opened
    assert {probes for _, probes in openings(four)[1:]} == {1}
    assert four.states() == {"closed"}


def test_processes_that_do_not_share_find_an_outage_out_each_for_itself() -> None:
    one, four = run_through_outage(1, 1, shared=False), run_through_outage(4, 1, shared=False)
    assert sum(calls for _, calls in openings(four)) >= 3 * sum(calls for _, calls in openings(one))


def refusing(at: float) -> CallOutcome:
    """Answer as a provider that refuses every call for 30 seconds, twice, and says for how long."""
    since = next((since for since in REFUSES if since <= at < since + 30.0), None)
    if since is None:
        return CallOutcome(kind=Outcome.SUCCESS)
    return CallOutcome(kind=Outcome.OVERLOAD, rate_limited=True, retry_after=since + 30.0 - at)


def run_through_refusals(
    processes: int, seed: int, rate: float, *, shared: bool = True, losses: float = 0.0
) -> tuple[Fleet, list[int]]:
    """Return the processes, and the calls that were refused in each span."""

    async def main() -> Fleet:
        fleet = Fleet(processes, refusing, shared=shared, losses=losses)
        await fleet.run(150.0, rate)
        return fleet

    fleet = simulate(main, seed=seed)
    return fleet, [
        sum(kind is Outcome.OVERLOAD and since <= at < since + 30.0 for at, _, kind in fleet.sent) for since in REFUSES
    ]


@pytest.mark.parametrize("seed", [1, 2])
def test_four_processes_are_refused_as_often_as_one_while_a_provider_asks_them_to_wait(seed: int) -> None:
    _, one = run_through_refusals(1, seed, 2.0, shared=False)
    four, refused = run_through_refusals(4, seed, 2.0)
    assert sum(refused) <= sum(one) + 2
    assert four.count(51.0, 90.0) >= 0.9 * 2.0 * 39.0


@pytest.mark.parametrize("losses", [0.0, 0.1])
@pytest.mark.parametrize("seed", [1, 2])
def test_many_calls_of_four_processes_find_a_pause_nearly_as_soon_as_those_of_one(seed: int, losses: float) -> None:
    _, one = run_through_refusals(1, seed, 20.0, shared=False)
    _, four = run_through_refusals(4, seed, 20.0, losses=losses)
    assert sum(four) <= 1.6 * sum(one)


def test_processes_that_do_not_share_are_refused_each_for_itself() -> None:
    _, one = run_through_refusals(1, 1, 2.0, shared=False)
    _, four = run_through_refusals(4, 1, 2.0, shared=False)
    assert sum(four) >= 3 * sum(one)


def spent(at: float) -> CallOutcome:
    """Answer as a provider at which the account's money is spent for a minute."""
    since, until = FAILS
    return (
        CallOutcome(kind=Outcome.IGNORED, spend_cap=True) if since <= at < until else CallOutcome(kind=Outcome.SUCCESS)
    )


def run_without_money(processes: int, seed: int, *, shared: bool = True, losses: float = 0.0) -> Fleet:
    async def main() -> Fleet:
        fleet = Fleet(processes, spent, shared=shared, losses=losses)
        await fleet.run(120.0, 20.0)
        return fleet

    return simulate(main, seed=seed)


def refusals(fleet: Fleet) -> list[float]:
    return [at for at, _, kind in fleet.sent if kind is Outcome.IGNORED]


@pytest.mark.parametrize("losses", [0.0, 0.1])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_suspension_holds_for_four_processes_and_they_probe_together(seed: int, losses: float) -> None:
    fleet = run_without_money(4, seed, losses=losses)
    at_first = [at for at in refusals(fleet) if at < FAILS[0] + 1.0]
    assert len(at_first) <= 6  # calls that were under way
    assert len(refusals(fleet)) - len(at_first) == 1  # one probe for all
    assert {limited_by for _, _, limited_by in fleet.rejected} == {"upstream:llm:budget"}
    assert fleet.count(85.0, 120.0, process=3) > 0


def test_processes_that_do_not_share_probe_each_for_itself() -> None:
    fleet = run_without_money(4, 1, shared=False)
    assert len([at for at in refusals(fleet) if at >= FAILS[0] + 2.0]) == 4


@pytest.mark.parametrize(
    ("answer", "limited_by"),
    [(failing, "upstream:llm:breaker"), (spent, "upstream:llm:budget"), (refusing, None)],
    ids=["breaker", "suspension", "pause"],
)
def test_a_process_that_starts_while_calls_are_stopped_sends_none(
    answer: Callable[[float], CallOutcome], limited_by: str | None
) -> None:
    async def main() -> Fleet:
        fleet = Fleet(4, answer)
        await fleet.run(30.0, 20.0, processes=(0, 1, 2))
        late = asyncio.create_task(fleet.run(31.5, 20.0, processes=(3,)))
        await fleet.run(31.5, 20.0, processes=(0, 1, 2))
        await late
        return fleet

    fleet = simulate(main, seed=5)
    assert fleet.count(30.0, 31.5, process=3) == 0
    assert {reason for _, process, reason in fleet.rejected if process == 3} == ({limited_by} if limited_by else set())


def test_while_the_store_is_away_each_process_opens_and_closes_its_breaker_by_itself() -> None:
    async def main() -> tuple[set[str], Fleet]:
        fleet = Fleet(4, failing)
        await fleet.run(10.0, 40.0)
        fleet.set_away(away=True)
        await fleet.run(40.0, 40.0)
        meanwhile = fleet.states()
        await fleet.run(170.0, 40.0)
        fleet.set_away(away=False)
        await fleet.run(180.0, 40.0)
        return meanwhile, fleet

    meanwhile, fleet = simulate(main, seed=3)
    assert "closed" not in meanwhile
    assert min(fleet.count(150.0, 170.0, process=process) for process in range(4)) > 0
    assert fleet.states() == {"closed"}
    assert fleet.stoppage("breaker").openings == 0


def test_a_breaker_that_was_opened_while_the_store_was_away_is_open_for_all_when_it_is_back() -> None:
    async def main() -> tuple[Fleet, set[str]]:
        fleet = Fleet(4, failing)
        await fleet.run(10.0, 20.0)
        fleet.set_away(away=True)
        await fleet.run(35.0, 40.0, processes=(0,))
        fleet.set_away(away=False)
        await asyncio.sleep(3.0)
        return fleet, fleet.states()

    fleet, states = simulate(main, seed=4)
    assert fleet.stoppage("breaker").openings > 0
    assert "closed" not in states


def test_a_store_that_has_lost_its_data_is_told_that_calls_are_stopped() -> None:
    async def main() -> tuple[Fleet, int, set[str]]:
        fleet = Fleet(4, failing)
        await fleet.run(22.5, 20.0)
        before = fleet.stoppage("breaker").epoch
        fleet.store.ledgers.clear()
        await fleet.run(23.5, 20.0)
        return fleet, before, fleet.states()

    fleet, before, states = simulate(main, seed=4)
    assert fleet.stoppage("breaker").openings > 0
    assert fleet.stoppage("breaker").epoch >= before
    assert states == {"open"}


@pytest.mark.parametrize("answer", [failing, spent, refusing], ids=["breaker", "suspension", "pause"])
def test_processes_that_are_not_called_any_more_leave_though_their_calls_are_stopped(
    answer: Callable[[float], CallOutcome],
) -> None:
    async def main() -> list[str]:
        fleet = Fleet(2, answer)
        await fleet.run(25.0, 20.0)
        await asyncio.sleep(700.0)
        (ledger,) = fleet.store.ledgers.values()
        return list(ledger.state.members)

    assert simulate(main, seed=6) == []


class BrokenNetwork(Fleet):
    """Processes of which process 0 alone never reaches the provider, which works."""

    def __init__(self, processes: int) -> None:
        super().__init__(processes, lambda _: CallOutcome(kind=Outcome.SUCCESS))

    def outcome_of(self, process: int, sent_at: float) -> CallOutcome:
        """See `Fleet`. The calls of process 0 fail."""
        return super().outcome_of(process, sent_at) if process else CallOutcome(kind=Outcome.FAULT)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_process_whose_own_network_is_broken_does_not_stop_the_calls_of_the_others(seed: int) -> None:
    async def main() -> Fleet:
        fleet = BrokenNetwork(3)
        await fleet.run(5.0, 30.0, processes=(0,))  # nobody knows yet that the calls of others would succeed
        busy = asyncio.create_task(fleet.run(100.0, 30.0, processes=(0,)))
        await fleet.run(100.0, 4.0, processes=(1, 2))
        await busy
        return fleet

    fleet = simulate(main, seed=seed)
    since = 40.0  # the first openings are over
    assert not [reason for at, process, reason in fleet.rejected if at >= since and process]
    assert min(fleet.count(since, 100.0, process=process) for process in (1, 2)) > 60


def test_a_process_whose_calls_all_fail_stops_those_of_all_if_no_other_has_called() -> None:
    async def main() -> Fleet:
        fleet = BrokenNetwork(3)
        await fleet.run(4.0, 30.0, processes=(0,))
        await fleet.run(4.5, 20.0, processes=(1, 2))
        return fleet

    fleet = simulate(main, seed=1)
    assert fleet.stoppage("breaker").openings == 1
    assert fleet.count(0.0, 4.5, process=1) + fleet.count(0.0, 4.5, process=2) == 0
