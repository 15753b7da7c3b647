"""The limits that the members of a ledger observe together from headers."""

from __future__ import annotations

import itertools

import pytest

from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.messages import (
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    QuotaReply,
    QuotaRequest,
)
from forebay.upstream.shared.ledger.observed_messages import ObservedRemaining, ObservedReply, ObservedRequest

AMOUNT, SECONDS = 100.0, 50.0  # two a second
MARGIN = 1.0  # a hundredth


class Members:
    """Members of one ledger, whose exchanges are all answered."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ledger: AccountLedger | None = None
        self.replies: dict[str, ExchangeReply] = {}
        self._sequence = itertools.count(1)

    def exchange(  # noqa: PLR0913 - what a member reports
        self,
        name: str,
        *,
        used: float = 0.0,
        needed: float = 0.0,
        under_way: float = 0.0,
        remaining: float | None = None,
        counted: float | None = None,
        throttled: bool = False,
        amount: float = AMOUNT,
        ends_in: float | None = None,
        is_changed: bool = False,
        doubt: float | None = None,
    ) -> QuotaReply:
        """Make an exchange, and return the state of the limit; a header is as old as the exchange."""
        before = self.replies.get(name)
        known = before.observed[0] if before is not None else None
        since = (0.0 if known is None else known.counted) if counted is None else counted
        seen = None if remaining is None else ObservedRemaining(remaining, 0.0, since, throttled)
        request = ExchangeRequest(
            ledger="l",
            member=name,
            sequence=next(self._sequence),
            epoch="" if before is None else before.epoch,
            terms=LedgerTerms(),
            quotas=(QuotaRequest(used=used, needed=needed, wanted=needed),),
            observed=(
                ObservedRequest(
                    unit="requests",
                    amount=amount,
                    seconds=SECONDS,
                    epoch=-1 if known is None else known.epoch,
                    ends_in=ends_in,
                    is_changed=is_changed,
                    under_way=under_way,
                    seen=seen,
                    doubt=doubt,
                ),
            ),
        )
        if self.ledger is None:
            self.ledger = AccountLedger.open(self.now, request)
        self.replies[name] = self.ledger.exchange(self.now, request)
        return self.replies[name].quotas[0]

    def told(self, name: str) -> ObservedReply:
        return self.replies[name].observed[0]


def test_a_limit_begins_with_what_a_header_says_to_be_left() -> None:
    members = Members()
    assert members.exchange("a", remaining=60.0).level == 60.0
    assert members.exchange("b", remaining=60.0).level == 60.0


def test_a_process_that_joins_is_told_the_limit_before_its_first_header() -> None:
    members = Members()
    members.exchange("a", remaining=60.0, ends_in=30.0)
    members.exchange("b")
    assert members.told("b") == members.told("a")
    assert members.told("b").ends_in == 30.0


def test_what_is_left_is_granted_once() -> None:
    members = Members()
    members.exchange("a", remaining=10.0)
    members.exchange("b")
    assert members.exchange("a", needed=8.0).held == 8.0
    assert members.exchange("b", needed=8.0).wait > 0.0


def test_a_call_as_large_as_the_whole_limit_is_granted_whatever_the_number_of_processes() -> None:
    members = Members()
    for name in "abcde":
        members.exchange(name, remaining=AMOUNT)
    assert members.exchange("c", needed=AMOUNT).held == AMOUNT


def test_the_use_of_another_process_that_a_header_has_not_counted_corrects_nothing() -> None:
    members = Members()
    members.exchange("a", remaining=60.0)
    members.exchange("b")
    members.exchange("b", used=20.0)
    assert members.exchange("a", remaining=60.0).level == 40.0  # its call was sent before it knew of that use
    assert members.exchange("a", remaining=60.0).level == 60.0  # this one was not


def test_what_others_hold_and_may_have_used_corrects_nothing() -> None:
    members = Members()
    members.exchange("a", remaining=60.0)
    members.exchange("b", needed=20.0)
    assert members.exchange("a", remaining=41.0).level == 40.0
    assert members.exchange("a", remaining=59.0).level == 40.0


def test_less_than_the_count_explains_is_believed_at_once_and_once() -> None:
    members = Members()
    members.exchange("a", remaining=60.0)
    members.exchange("b")
    assert members.exchange("a", remaining=30.0).level == pytest.approx(31.0)  # a header leaves out a fraction
    assert members.exchange("b", remaining=30.0).level == pytest.approx(31.0)


def test_after_a_refusal_what_others_hold_is_not_left_besides() -> None:
    members = Members()
    members.exchange("a", remaining=60.0)
    members.exchange("b", needed=20.0)
    assert members.exchange("a", remaining=0.0, throttled=True).level == -19.0


def test_calls_in_flight_that_a_header_has_not_counted_correct_nothing() -> None:
    members = Members()
    members.exchange("a", remaining=60.0)
    assert members.exchange("a", used=10.0, under_way=10.0, remaining=60.0, counted=10.0).level == 50.0


def test_a_window_refills_at_its_end_and_is_used_a_moment_later() -> None:
    members = Members()
    members.exchange("a", remaining=0.0, ends_in=10.0)
    members.now += 1.0
    assert members.exchange("a", needed=5.0).wait == pytest.approx(9.2)
    members.now += 9.1
    assert members.exchange("a", needed=5.0).level == AMOUNT
    members.now += 0.2
    assert members.exchange("a", needed=5.0).held == 5.0


def test_a_limit_that_refills_all_the_time_keeps_its_margin() -> None:
    members = Members()
    members.exchange("a", remaining=10.0)
    assert members.exchange("a", needed=10.0).wait == pytest.approx(MARGIN * SECONDS / AMOUNT)


def test_of_two_processes_that_learn_something_else_the_first_one_counts() -> None:
    members = Members()
    members.exchange("a", remaining=60.0)
    members.exchange("b")
    assert members.exchange("a", amount=200.0, is_changed=True).level == 160.0
    members.exchange("b", amount=50.0, is_changed=True)
    assert members.told("b").amount == 200.0


def test_a_limit_that_one_process_has_disproved_holds_up_none() -> None:
    members = Members()
    members.exchange("a", remaining=60.0)
    members.exchange("b")
    members.exchange("a", doubt=600.0)
    members.exchange("b")
    assert members.told("b").doubt == 600.0
    members.exchange("b", doubt=0.0)
    members.exchange("a")
    assert members.told("a").doubt == 0.0
