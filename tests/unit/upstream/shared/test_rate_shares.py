"""The rate that the members of a ledger learn together, and their shares of it."""

from __future__ import annotations

import itertools

import pytest

from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.messages import ExchangeReply, ExchangeRequest, LedgerTerms
from forebay.upstream.shared.ledger.rate_messages import RateReply, RateRequest, SharedRate
from forebay.upstream.shared.ledger.rate_shares import fair_rates


class Members:
    """Members of one ledger, whose exchanges are all answered."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ledger: AccountLedger | None = None
        self.replies: dict[str, ExchangeReply] = {}
        self._sequence = itertools.count(1)

    def exchange(
        self, name: str, learned: SharedRate | None = None, *, demand: float = 0.0, counted: int = 0, trial: float = 0.0
    ) -> RateReply:
        before = self.replies.get(name)
        epoch = -1 if before is None or before.rate is None else before.rate.epoch
        request = ExchangeRequest(
            ledger="l",
            member=name,
            sequence=next(self._sequence),
            epoch="" if before is None else before.epoch,
            terms=LedgerTerms(),
            rate=RateRequest(epoch=epoch, counted=counted, demand=demand, learned=learned, trial=trial),
        )
        if self.ledger is None:
            self.ledger = AccountLedger.open(self.now, request)
        reply = self.replies[name] = self.ledger.exchange(self.now, request)
        assert reply.rate is not None
        return reply.rate


def test_members_with_the_same_demand_have_the_same_share() -> None:
    members = Members()
    for name in "abcd":
        members.exchange(name, SharedRate(rate=8.0), demand=10.0)
    assert [members.exchange(name, demand=10.0).share for name in "abcd"] == [0.25] * 4


def test_what_one_member_does_not_ask_for_is_shared_by_those_that_do() -> None:
    members = Members()
    members.exchange("a", SharedRate(rate=8.0), demand=1.0)
    members.exchange("b", demand=10.0)
    assert members.exchange("a", demand=1.0).share == 1 / 8
    assert members.exchange("b", demand=10.0).share == 7 / 8


def test_members_without_calls_take_nothing_from_others() -> None:
    members = Members()
    members.exchange("a", SharedRate(rate=8.0), demand=10.0)
    for name in "bcde":
        members.exchange(name)
    assert members.exchange("a", demand=10.0).share == 1.0
    assert members.exchange("b").share == 0.5  # if it begins to call


def test_a_member_that_is_not_seen_any_more_takes_nothing_from_others() -> None:
    members = Members()
    members.exchange("a", SharedRate(rate=8.0), demand=10.0)
    members.exchange("b", demand=10.0)
    members.now += 2.0
    assert members.exchange("a", demand=10.0).share == 1.0


@pytest.mark.parametrize("demands", [(1.0, 1.0, 1.0), (0.5, 3.0, 9.0), (4.0, 4.0, 4.0), (20.0, 0.25, 0.25)])
def test_fair_rates_are_the_whole_and_nobody_gets_less_than_others_unless_it_asks_for_less(
    demands: tuple[float, ...],
) -> None:
    asked = dict(zip("abc", demands, strict=True))
    parts = fair_rates(6.0, asked)
    assert sum(parts.values()) == pytest.approx(6.0)
    assert all(part >= asked[name] or part == max(parts.values()) for name, part in parts.items())


def test_of_two_that_learn_from_the_same_refusals_the_first_one_counts() -> None:
    members = Members()
    members.exchange("a")
    members.exchange("b")
    members.exchange("a", SharedRate(rate=8.0))
    members.exchange("b", SharedRate(rate=3.0))
    told = members.exchange("b")
    assert told.learned == SharedRate(rate=8.0)
    assert members.exchange("b", SharedRate(rate=3.0)).learned == SharedRate(rate=3.0)


def test_a_process_that_joins_is_told_the_rate_and_its_age() -> None:
    members = Members()
    members.exchange("a", SharedRate(rate=8.0))
    members.now += 2.0
    told = members.exchange("b")
    assert (told.learned, told.age) == (SharedRate(rate=8.0), 2.0)


def test_the_calls_of_all_are_counted() -> None:
    members = Members()
    members.exchange("a", counted=5)
    assert members.exchange("b", counted=-1).counted == 4


def test_one_member_tries_at_a_time_why_calls_are_refused() -> None:
    members = Members()
    members.exchange("a")
    members.exchange("b")
    assert members.exchange("a", trial=2.5).trial == 0.0
    assert members.exchange("b", trial=2.5).trial == 2.5
    members.now += 2.5
    assert members.exchange("b", trial=2.5).trial == 0.0
