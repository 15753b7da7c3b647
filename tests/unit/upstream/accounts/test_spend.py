"""Budgets that accounts share, and the suspension of an account whose money at the provider is spent."""

from __future__ import annotations

import pytest

from forebay.breaker import UPSTREAM_RULES, Breaker
from forebay.interfaces import Outcome
from forebay.limit import FixedLimit
from forebay.quota import Budget, RateLimiter
from forebay.task import Priority
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.spend import ThreadSafeBudget
from forebay.upstream.accounts.spend_suspension import SpendSuspension
from forebay.upstream.call_request import Admitted, CallBudget, CallOutcome, CallRequest, Permit, Rejected

SUCCESS = CallOutcome(kind=Outcome.SUCCESS)
SPEND_CAP = CallOutcome(kind=Outcome.IGNORED, spend_cap=True, usd=0.0)
FAULT = CallOutcome(kind=Outcome.FAULT)


def account_of(*budgets: CallBudget) -> Account:
    return Account(
        "upstream:test",
        limit=FixedLimit(10),
        quotas=RateLimiter(),
        breaker=Breaker(UPSTREAM_RULES, draw=lambda: 0.0),
        budgets=lambda _: budgets,
        max_wait=60.0,
        draw=lambda: 0.0,
    )


class LastMomentBudget(ThreadSafeBudget):
    """A shared budget of which another account takes a dollar between the check and the reservation of this one."""

    def can_afford(self, usd: float, priority: Priority) -> bool:
        affordable = super().can_afford(usd, priority)
        self.try_reserve(1.0, priority)
        return affordable


def test_two_accounts_that_both_see_the_last_dollar_spend_it_once() -> None:
    other, last = ThreadSafeBudget("the budget of a", Budget(usd=5)), LastMomentBudget("the budget of b", Budget(usd=1))
    account = account_of(other, last)
    answer = account.try_acquire(0.0, CallRequest(usd=1.0))
    assert isinstance(answer, Rejected)
    assert answer.limited_by == "budget"
    assert last.reserved() == (1, 1.0), "the other account's"
    assert other.reserved() == (0, 0.0), "it took from neither"
    assert (account.in_flight, account.counts.sent) == (0, 0)


def test_dollars_that_calls_under_way_hold_may_be_returned_soon() -> None:
    budget = ThreadSafeBudget("the budget of a", Budget(usd=10, per="day", reserved_share=0.1))
    held = budget.try_reserve(6.0, Priority.NORMAL)
    assert held is not None
    soon = budget.rejection(5.0, Priority.NORMAL).retry_after
    assert soon is not None
    assert soon <= 6.0
    for too_much in (9.5, 10.5):  # nothing that is returned makes room for that
        later = budget.rejection(too_much, Priority.NORMAL).retry_after
        assert later is None or later != pytest.approx(4.0, abs=2.0)
    held.settle(6.0)
    later = budget.rejection(5.0, Priority.NORMAL).retry_after
    assert later == pytest.approx(budget.resets_in(), abs=1.0)


class Suspended:
    """An account that its provider has refused for money, with short names for the operations of a test."""

    def __init__(self) -> None:
        self.account = account_of()
        permit = self.admit(0.0)
        self.account.suspend(0.0, 60.0)
        self.account.settle(0.0, permit, SPEND_CAP)

    def admit(self, now: float, *, free: bool = False) -> Permit:
        answer = self.account.try_acquire(now, CallRequest(free=free))
        assert isinstance(answer, Admitted), answer
        return answer.permit

    def reject(self, now: float) -> Rejected:
        answer = self.account.try_acquire(now, CallRequest())
        assert isinstance(answer, Rejected), answer
        return answer


@pytest.fixture
def suspended() -> Suspended:
    return Suspended()


def test_a_refusal_for_money_counts_as_throttled(suspended: Suspended) -> None:
    assert suspended.account.counts.throttled == 1


def test_after_a_suspension_one_call_goes_until_it_has_succeeded(suspended: Suspended) -> None:
    assert suspended.reject(59.0).retry_after == 1.0
    probe = suspended.admit(60.0)
    assert suspended.reject(60.0).retry_after == 1.0
    suspended.account.settle(61.0, probe, SUCCESS)
    for _ in range(10):
        suspended.admit(61.0)


def test_a_probe_whose_answer_has_begun_ends_the_suspension(suspended: Suspended) -> None:
    suspended.account.answer_began(61.0, suspended.admit(60.0))
    suspended.admit(61.0)


def test_a_probe_that_is_refused_suspends_again(suspended: Suspended) -> None:
    probe = suspended.admit(60.0)
    suspended.account.suspend(61.0, 60.0)
    suspended.account.settle(61.0, probe, SPEND_CAP)
    assert suspended.reject(61.0).retry_after == 60.0


@pytest.mark.parametrize("end", [FAULT, CallOutcome(kind=Outcome.IGNORED, released=True, usd=0.0)])
def test_a_probe_that_shows_nothing_makes_room_for_another(suspended: Suspended, end: CallOutcome) -> None:
    suspended.account.settle(61.0, suspended.admit(60.0), end)
    suspended.admit(61.0)
    suspended.reject(61.0)


def test_a_probe_without_an_answer_is_followed_by_another_after_a_minute(suspended: Suspended) -> None:
    suspended.admit(60.0)
    suspended.reject(119.0)
    suspended.admit(121.0)
    suspended.reject(122.0)


def test_a_free_call_passes_a_suspension_and_does_not_end_it(suspended: Suspended) -> None:
    suspended.account.settle(60.0, suspended.admit(60.0, free=True), SUCCESS)
    suspended.admit(60.0)
    suspended.reject(60.0)


def test_a_call_that_was_sent_before_the_suspension_does_not_end_it() -> None:
    account = account_of()
    early = account.try_acquire(0.0, CallRequest())
    assert isinstance(early, Admitted)
    account.suspend(0.0, 60.0)
    account.settle(1.0, early.permit, SUCCESS)
    assert isinstance(account.try_acquire(1.0, CallRequest()), Rejected)


class Doubtful:
    """A suspension whose refusals do not say whose money they mean, with short names for the operations of a test."""

    def __init__(self) -> None:
        self.suspension = SpendSuspension()
        self.account = account_of()

    def permit(self, now: float, *, size: int = 100) -> Permit:
        answer = self.account.try_acquire(now, CallRequest(size=size))
        assert isinstance(answer, Admitted), answer
        self.suspension.record_sent(answer.permit)
        self.account.settle(now, answer.permit, SUCCESS)
        return answer.permit

    def accept(self, now: float) -> None:
        self.suspension.record_accepted(self.permit(now))

    def refuse(self, now: float, *, size: int = 100) -> float | None:
        """Refuse a call; return the seconds for which calls are suspended then, or None."""
        suspended = self.suspension.confirm(now, self.permit(now, size=size), 60.0, certain=False)
        if suspended is None:
            return None
        self.suspension.begin(now, suspended.seconds)
        return suspended.seconds

    def time_left(self, now: float, *, size: int) -> float | None:
        return self.suspension.time_left(now, CallRequest(size=size), probe_duration=1.0)


def test_a_doubtful_suspension_is_short_at_first_and_grows_up_to_a_minute() -> None:
    doubtful = Doubtful()
    assert doubtful.refuse(0.0) is None
    assert doubtful.refuse(2.0) == 2.0
    assert doubtful.refuse(40.0) == 10.0
    assert doubtful.refuse(1_000.0) == 60.0


def test_refusals_are_believed_only_after_twice_the_longest_time_between_accepted_calls() -> None:
    doubtful = Doubtful()
    for at in (0.0, 1.0, 11.0, 12.0):
        doubtful.accept(at)
    assert [doubtful.refuse(at) for at in (13.0, 20.0, 32.9)] == [None] * 3
    assert doubtful.refuse(33.1) is not None


def test_the_longest_time_between_accepted_calls_is_forgotten_after_ten_minutes_at_most() -> None:
    doubtful = Doubtful()
    for at in (0.0, 30.0, *range(31, 640)):
        doubtful.accept(at)
    assert doubtful.refuse(640.0) is None
    assert doubtful.refuse(642.5) is not None


def test_a_request_of_the_size_that_was_refused_is_the_last_to_be_a_probe() -> None:
    doubtful = Doubtful()
    doubtful.refuse(0.0, size=100)
    assert doubtful.refuse(40.0, size=100) == 10.0
    assert doubtful.time_left(50.0, size=100) == 10.0
    assert doubtful.time_left(50.0, size=101) is None
    assert doubtful.time_left(50.0, size=0) is None  # its size is not known
    assert doubtful.time_left(60.0, size=100) is None
