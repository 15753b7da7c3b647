"""The decisions of a ledger, one by one."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.messages import (
    LEASE,
    BudgetReply,
    BudgetRequest,
    BudgetTerms,
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    QuotaRequest,
    QuotaTerms,
    SlotReply,
    SlotRequest,
)
from forebay.upstream.shared.ledger.periods import period_end, period_start
from forebay.upstream.shared.ledger.slot_shares import fair_shares

START = 1_767_225_600.0  # 2026-01-01T00:00:00Z


class Harness:
    """A ledger, and members that ask it."""

    def __init__(self, terms: LedgerTerms) -> None:
        self.terms = terms
        self.now = START
        self.ledger: AccountLedger | None = None
        self.sequence = 0
        self.epoch = ""
        self.members = 0

    def ask(
        self,
        member: str,
        *,
        quota: QuotaRequest | None = None,
        slots: SlotRequest | None = None,
        budget: BudgetRequest | None = None,
        priority: int = 2,
    ) -> ExchangeReply:
        self.sequence += 1
        request = ExchangeRequest(
            ledger="l",
            member=member,
            sequence=self.sequence,
            epoch=self.epoch,
            members=self.members,
            terms=self.terms,
            priority=priority,
            quotas=() if quota is None else (quota,),
            slots=slots,
            budget=budget,
        )
        if self.ledger is None:
            self.ledger = AccountLedger.open(self.now, request)
        return self.ledger.exchange(self.now, request)


def quotas(amount: float = 60.0) -> Harness:
    return Harness(LedgerTerms(quotas=(QuotaTerms("requests", amount, 60.0),)))


def need(needed: float, *, used: float = 0.0) -> QuotaRequest:
    return QuotaRequest(used=used, needed=needed, wanted=needed)


def let_leases_end(ledger: Harness, *, but: str) -> None:
    """Let the leases of all members end but that of one with a budget, which goes on asking."""
    for _ in range(int(LEASE) + 1):
        ledger.now += 1.0
        ledger.ask(but, budget=dollars())


def slots_of(reply: ExchangeReply) -> SlotReply:
    assert reply.slots is not None
    return reply.slots


def budget_of(reply: ExchangeReply) -> BudgetReply:
    assert reply.budget is not None
    return reply.budget


# --- quotas ---


def test_what_is_held_does_not_refill_meanwhile() -> None:
    ledger = quotas()
    assert ledger.ask("a", quota=need(40.0)).quotas[0].held == 40.0
    ledger.now += LEASE - 1.0
    assert ledger.ask("b", quota=need(0.0)).quotas[0].level == 20.0


def test_what_a_dead_member_held_counts_as_used() -> None:
    ledger = quotas()
    ledger.ask("a", quota=need(40.0))
    ledger.now += LEASE + 1.0
    assert ledger.ask("b", quota=need(0.0)).quotas[0].level == pytest.approx(20.0)
    ledger.now += 60.0
    assert ledger.ask("b", quota=need(0.0)).quotas[0].level == 60.0


def test_a_member_that_was_away_reports_what_it_held_only_once() -> None:
    ledger = quotas()
    ledger.ask("a", quota=need(40.0))
    ledger.now += LEASE + 1.0
    reply = ledger.ask("a", quota=QuotaRequest(used=45.0))
    assert reply.quotas[0].level == pytest.approx(20.0 - 5.0)


def test_a_need_is_met_as_a_whole_or_not_at_all() -> None:
    ledger = quotas()
    ledger.ask("a", quota=need(50.0))
    reply = ledger.ask("b", quota=need(30.0))
    assert reply.quotas[0].held == 0.0
    assert reply.quotas[0].wait == pytest.approx(20.0)
    assert reply.retry_in == pytest.approx(0.25)


def test_members_are_served_in_the_order_in_which_they_began_to_wait_those_of_a_better_priority_first() -> None:
    ledger = quotas()
    ledger.ask("x", quota=need(60.0))
    ledger.ask("x", quota=QuotaRequest(used=60.0))
    assert ledger.ask("late", quota=need(2.0), priority=2).retry_in is not None
    ledger.now += 0.1
    assert ledger.ask("later", quota=need(2.0), priority=2).retry_in is not None
    assert ledger.ask("high", quota=need(2.0), priority=1).retry_in is not None
    ledger.now += 1.0
    for name in ("later", "late"):
        assert ledger.ask(name, quota=need(2.0)).quotas[0].held == 0.0
    ledger.now += 1.0
    assert ledger.ask("later", quota=need(2.0)).quotas[0].held == 0.0
    assert ledger.ask("high", quota=need(2.0), priority=1).quotas[0].held == 2.0


def test_an_account_that_its_store_has_lost_is_empty_at_first() -> None:
    ledger = quotas()
    ledger.epoch = "another"
    assert ledger.ask("a", quota=need(1.0)).quotas[0].held == 0.0


# --- slots ---


@pytest.mark.parametrize(
    ("limit", "demands", "shares"),
    [
        (10, [2, 3], [2, 3]),
        (10, [20, 20], [5, 5]),
        (10, [1, 20, 20], [1, 5, 4]),
        (10, [0, 20], [0, 10]),
        (2, [5, 5, 5], [1, 1, 0]),
        (3, [5, 5], [2, 1]),
    ],
)
def test_slots_are_shared_fairly(limit: int, demands: list[int], shares: list[int]) -> None:
    assert fair_shares(limit, demands) == shares


def test_a_member_that_has_more_than_its_share_starts_no_more_calls() -> None:
    ledger = Harness(LedgerTerms(max_concurrent=4))
    assert slots_of(ledger.ask("a", slots=SlotRequest(wanted=9))).allowed == 4
    assert slots_of(ledger.ask("b", slots=SlotRequest(wanted=9))).allowed == 0
    assert slots_of(ledger.ask("a", slots=SlotRequest(in_use=4, held=4, wanted=9))).allowed == 2
    assert slots_of(ledger.ask("b", slots=SlotRequest(wanted=9))).allowed == 0
    ledger.ask("a", slots=SlotRequest(in_use=3, held=3, wanted=9))
    assert slots_of(ledger.ask("b", slots=SlotRequest(wanted=9))).allowed == 1


def test_members_take_turns_if_there_are_fewer_slots() -> None:
    ledger = Harness(LedgerTerms(max_concurrent=1))
    served = []
    for _ in range(6):
        for name in ("a", "b", "c"):
            ledger.now += 0.1
            reply = slots_of(ledger.ask(name, slots=SlotRequest(wanted=1)))
            if reply.allowed:
                served.append(name)
                ledger.now += 0.1
                ledger.ask(name, slots=SlotRequest(in_use=1, held=1, wanted=2))
                ledger.now += 0.1
                ledger.ask(name, slots=SlotRequest(wanted=1))
    assert {served.count(name) for name in "abc"} <= {len(served) // 3, len(served) // 3 + 1}


def test_the_slots_of_a_dead_member_are_free_when_its_lease_ends() -> None:
    ledger = Harness(LedgerTerms(max_concurrent=4))
    ledger.ask("a", slots=SlotRequest(wanted=4))
    for _ in range(6):
        ledger.now += 1.0
        reply = ledger.ask("b", slots=SlotRequest(wanted=4))
    assert slots_of(reply).allowed == 4


def test_after_all_leases_have_ended_those_who_have_not_come_back_keep_their_share_for_a_moment() -> None:
    ledger = Harness(LedgerTerms(max_concurrent=4))
    for name in "ab":
        ledger.ask(name, slots=SlotRequest(wanted=4))
    ledger.now += 100.0
    assert slots_of(ledger.ask("a", slots=SlotRequest(wanted=4))).allowed == 2
    ledger.now += 3.0
    assert slots_of(ledger.ask("a", slots=SlotRequest(in_use=2, held=2, wanted=4))).allowed == 4


# --- members that are absent, since their store was away ---

AWAY = LEASE + 3.0  # so that each has used 3.25 seconds of its share: a lease is not used to its very end


def used_up(members: str) -> Harness:
    """Return a ledger of which nothing is left, and that each of its members has asked lately."""
    ledger = quotas()
    for name in members:
        ledger.ask(name, quota=need(0.0))
    ledger.ask(members[0], quota=need(60.0))
    ledger.ask(members[0], quota=QuotaRequest(used=60.0))
    for name in members:
        ledger.ask(name, quota=need(0.0))
    return ledger


def test_the_first_to_come_back_is_not_granted_what_others_may_have_used_of_their_share() -> None:
    ledger = used_up("abc")
    ledger.now += AWAY
    ledger.ask("a", quota=need(0.0))
    free = AWAY - 2 * 3.25 / 3
    assert ledger.ask("a", quota=need(free)).quotas[0].held == pytest.approx(free)
    assert ledger.ask("a", quota=need(1.0, used=free)).retry_in is not None


def test_a_member_that_comes_back_is_expected_until_it_has_repeated_what_was_not_answered() -> None:
    ledger = used_up("ab")
    ledger.now += AWAY
    ledger.ask("a", quota=need(0.0))
    ledger.ask("b", quota=need(0.0))  # as it was before: it does not say what it used since
    assert ledger.ask("a", quota=need(AWAY - 3.25 / 2 + 0.1)).quotas[0].held == 0.0
    ledger.ask("b", quota=need(0.0))
    assert ledger.ask("a", quota=need(AWAY)).quotas[0].held == AWAY


def test_members_that_do_not_come_back_are_expected_for_a_moment_only() -> None:
    ledger = used_up("ab")
    ledger.now += AWAY
    ledger.ask("a", quota=need(0.0))
    ledger.now += 1.5
    assert ledger.ask("a", quota=need(AWAY)).quotas[0].held == 0.0
    ledger.now += 0.6
    assert ledger.ask("a", quota=need(AWAY)).quotas[0].held == AWAY


def test_members_that_ended_while_others_went_on_are_not_expected_after_their_store_was_away() -> None:
    ledger = Harness(LedgerTerms(max_concurrent=4))
    for name in "ab":
        ledger.ask(name, slots=SlotRequest(wanted=4))
    for _ in range(6):
        ledger.now += 1.0
        ledger.ask("b", slots=SlotRequest(wanted=4))
    ledger.now += AWAY
    assert slots_of(ledger.ask("b", slots=SlotRequest(wanted=4))).allowed == 4


def test_a_member_whose_lease_lasts_is_not_granted_the_slots_of_one_whose_lease_ended_meanwhile() -> None:
    ledger = Harness(LedgerTerms(max_concurrent=4))
    for name in "abab":
        ledger.ask(name, slots=SlotRequest(in_use=2, held=2, wanted=4))
        ledger.now += 0.4
    ledger.now += LEASE - 0.6  # the lease of a has ended, and that of b has not
    assert slots_of(ledger.ask("b", slots=SlotRequest(in_use=2, held=2, wanted=4))).allowed == 2


def test_the_first_to_come_back_is_not_granted_what_others_may_have_spent_of_their_share() -> None:
    ledger = budgets(per="day")
    ledger.ask("a", budget=dollars(10.0))
    ledger.ask("b", budget=dollars(10.0))
    ledger.ask("a", budget=dollars(10.0, spent=10.0))  # 90 are left, of which each may spend a half
    ledger.ask("b", budget=dollars(10.0))
    ledger.now += AWAY
    assert budget_of(ledger.ask("a", budget=dollars(45.1))).held == 0.0
    assert budget_of(ledger.ask("a", budget=dollars(45.0))).held == 45.0
    ledger.ask("b", budget=dollars())
    ledger.ask("b", budget=dollars(spent=45.0))
    assert budget_of(ledger.ask("a", budget=dollars(spent=45.0))).spent == 100.0


def test_a_store_that_comes_back_empty_expects_the_members_that_the_first_one_knew() -> None:
    ledger = Harness(
        LedgerTerms(quotas=(QuotaTerms("requests", 60.0, 60.0),), max_concurrent=4, budget=BudgetTerms(100.0, "day"))
    )
    ledger.epoch, ledger.members = "another", 2
    known = BudgetRequest(period=START, known_spent=40.0, needed=31.0, wanted=31.0)
    reply = ledger.ask("a", quota=need(0.0), slots=SlotRequest(wanted=4), budget=known)
    assert slots_of(reply).allowed == 2
    assert budget_of(reply).held == 0.0
    ledger.ask("b", quota=need(0.0), slots=SlotRequest(), budget=known)
    ledger.ask("b", quota=need(0.0), slots=SlotRequest(), budget=dollars())
    reply = ledger.ask("a", quota=need(0.0), slots=SlotRequest(in_use=2, held=2, wanted=4), budget=dollars(60.0))
    assert slots_of(reply).allowed == 4
    assert budget_of(reply).held == 60.0


# --- money ---


def budgets(usd: float = 100.0, *, per: str | None = None, reserved_share: float = 0.0) -> Harness:
    return Harness(LedgerTerms(budget=BudgetTerms(usd, per, reserved_share)))


def dollars(
    needed: float = 0.0, *, spent: float = 0.0, reserved: float = 0.0, important: bool = False, **alerts: Any
) -> BudgetRequest:
    return BudgetRequest(
        period=START,
        spent=spent,
        reserved=reserved,
        needed=needed,
        wanted=max(needed, reserved),
        important=important,
        **alerts,
    )


def test_what_a_dead_member_held_is_free_and_what_it_has_spent_stays_spent() -> None:
    ledger = budgets(per="day")
    ledger.ask("a", budget=dollars(60.0))
    ledger.ask("a", budget=dollars(50.0, spent=10.0))
    assert budget_of(ledger.ask("b", budget=dollars(60.0))).held == 0.0
    let_leases_end(ledger, but="b")
    reply = budget_of(ledger.ask("b", budget=dollars(90.0)))
    assert (reply.held, reply.spent) == (90.0, 10.0)


def test_what_was_spent_after_a_lease_is_counted_all_the_same() -> None:
    ledger = budgets(per="day")
    ledger.ask("a", budget=dollars(60.0))
    let_leases_end(ledger, but="b")
    ledger.ask("b", budget=dollars(90.0))
    ledger.ask("a", budget=dollars(spent=60.0))
    reply = budget_of(ledger.ask("b", budget=dollars(spent=90.0)))
    assert reply.spent == 150.0
    assert budget_of(ledger.ask("b", budget=dollars(1.0))).held == 0.0


def test_the_reserved_share_is_granted_to_important_calls_alone() -> None:
    ledger = budgets(per="day", reserved_share=0.2)
    assert budget_of(ledger.ask("a", budget=dollars(81.0))).held == 0.0
    assert budget_of(ledger.ask("a", budget=dollars(81.0, important=True))).held == 81.0


def test_others_are_told_that_money_is_missing() -> None:
    ledger = budgets(per="day")
    ledger.ask("a", budget=dollars(60.0))
    ledger.ask("b", budget=dollars(60.0))
    assert budget_of(ledger.ask("a", budget=dollars(60.0))).recall


def test_a_new_period_begins_with_nothing_spent() -> None:
    ledger = budgets(per="hour")
    ledger.ask("a", budget=dollars(60.0))
    ledger.ask("a", budget=dollars(spent=60.0))
    ledger.now += 3600.0
    reply = budget_of(ledger.ask("b", budget=BudgetRequest()))
    assert (reply.spent, reply.period) == (0.0, START + 3600.0)
    assert budget_of(ledger.ask("a", budget=dollars(spent=5.0))).spent == 0.0  # it was spent in the hour before


def test_the_member_whose_exchange_passes_the_share_gives_the_alert_and_no_other() -> None:
    ledger = budgets(per="day")
    for name in "ab":
        ledger.ask(name, budget=dollars(25.0, alert=0.5))
    assert budget_of(ledger.ask("a", budget=dollars(spent=25.0, alert=0.5))).alert == 0.0
    assert budget_of(ledger.ask("b", budget=dollars(spent=25.0, alert=0.5))).alert == 0.5
    reply = budget_of(ledger.ask("a", budget=dollars(alert=0.5)))
    assert (reply.alert, reply.alerted) == (0.0, 0.5)
    assert budget_of(ledger.ask("b", budget=dollars(exhausted=True))).alert == 1.0
    assert budget_of(ledger.ask("a", budget=dollars(exhausted=True))).alert == 0.0
    ledger.now += 86_400.0
    assert budget_of(ledger.ask("a", budget=BudgetRequest(alert=0.5))).alerted == 0.0


def test_an_alert_that_a_member_knows_of_is_not_given_again_by_a_ledger_that_is_new() -> None:
    ledger = budgets(per="day")
    log = BudgetRequest(logged_period=START, logged_spent=60.0, alert=0.5, alerted=0.5)
    reply = budget_of(ledger.ask("a", budget=log))
    assert (reply.spent, reply.alert) == (60.0, 0.0)
    lost = budgets(per="day")
    lost.epoch = "another"
    known = BudgetRequest(period=START, known_spent=60.0, alert=0.5, alerted=0.5)
    assert budget_of(lost.ask("a", budget=known)).alert == 0.0


def test_a_clock_that_was_ahead_does_not_refill_a_budget() -> None:
    ledger = budgets(per="hour")
    ledger.ask("a", budget=dollars(60.0))
    ledger.ask("a", budget=dollars(spent=60.0))
    ledger.now += 3600.0
    ledger.ask("a", budget=BudgetRequest(period=START + 3600.0, spent=1.0))
    ledger.now -= 3600.0
    reply = budget_of(ledger.ask("b", budget=BudgetRequest()))
    assert (reply.spent, reply.period) == (61.0, START)


def test_spend_that_its_store_has_lost_is_what_the_members_knew() -> None:
    ledger = budgets(per="day")
    ledger.ask("new", budget=dollars(spent=1.0))
    ledger.epoch = "another"
    reply = budget_of(ledger.ask("old", budget=BudgetRequest(period=START, spent=2.0, known_spent=30.0)))
    assert reply.spent == 33.0


@pytest.mark.parametrize("per", ["hour", "day", "month"])
def test_periods_are_those_of_the_calendar(per: str) -> None:
    for day in range(0, 4000, 7):
        now = START + day * 86400.0 + 4321.0
        moment = dt.datetime.fromtimestamp(now, dt.UTC)
        first = {"hour": moment.replace(minute=0, second=0), "day": moment.replace(hour=0, minute=0, second=0)}
        start = first.get(per, moment.replace(day=1, hour=0, minute=0, second=0))
        assert period_start(per, now) == start.timestamp()
        end = period_end(per, start.timestamp())
        assert end is not None
        assert now < end == period_start(per, end)


def test_a_ledger_whose_quotas_are_full_and_whose_period_is_over_may_be_forgotten() -> None:
    ledger = quotas()
    ledger.ask("a", quota=need(60.0))
    assert ledger.ledger is not None
    expires_at = ledger.ledger.expires_at()
    assert expires_at is not None
    assert expires_at > START + 3600.0
    endless = budgets()
    endless.ask("a", budget=dollars())
    assert endless.ledger is not None
    assert endless.ledger.expires_at() is None
