"""The limit that the members of a ledger learn together."""

from __future__ import annotations

import itertools

from forebay.limit import AnswerCounts
from forebay.upstream.shared.ledger.ledger import AccountLedger
from forebay.upstream.shared.ledger.messages import (
    ExchangeReply,
    ExchangeRequest,
    LedgerTerms,
    LimitReply,
    LimitRequest,
    SlotReply,
    SlotRequest,
)

TERMS = LedgerTerms(limit="AdaptiveLimit")


class Members:
    """Members of one ledger, whose exchanges are all answered."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ledger: AccountLedger | None = None
        self.replies: dict[str, ExchangeReply] = {}
        self._sequence = itertools.count(1)

    def exchange(self, name: str, limit: LimitRequest | None = None, *, in_use: int = 0, wanted: int = 0) -> LimitReply:
        reply = self.replies.get(name)
        request = ExchangeRequest(
            ledger="l",
            member=name,
            sequence=next(self._sequence),
            epoch="" if reply is None else reply.epoch,
            terms=TERMS,
            slots=SlotRequest(in_use=in_use, held=in_use, wanted=wanted),
            limit=limit or LimitRequest(level=10.0),
        )
        if self.ledger is None:
            self.ledger = AccountLedger.open(self.now, request)
        self.replies[name] = self.ledger.exchange(self.now, request)
        learned = self.replies[name].limit
        assert learned is not None
        return learned

    def slots(self, name: str) -> SlotReply:
        slots = self.replies[name].slots
        assert slots is not None
        return slots


def test_the_limit_begins_with_that_of_the_first_member() -> None:
    members = Members()
    assert members.exchange("a", LimitRequest(level=7.5)).level == 7.5
    assert members.exchange("b", LimitRequest(level=10.0)).level == 7.5


def test_rises_of_all_members_add_up() -> None:
    members = Members()
    for name in "ab":
        members.exchange(name)
    members.exchange("a", LimitRequest(epoch=0, raised=2.0))
    assert members.exchange("b", LimitRequest(epoch=0, raised=3.0)).level == 15.0


def test_rises_back_to_a_level_that_has_held_lead_no_further_however_many_make_them() -> None:
    members = Members()
    for name in "abc":
        members.exchange(name)
    back = LimitRequest(epoch=0, returned=2.0, returns_to=12.5)
    assert [members.exchange(name, back).level for name in "abc"] == [12.0, 12.5, 12.5]
    assert members.exchange("a", LimitRequest(epoch=0, raised=0.25)).level == 12.75
    assert members.exchange("a", LimitRequest(epoch=0, returned=1.0, returns_to=11.0)).level == 12.75


def test_the_answers_of_all_members_add_up_until_a_cut() -> None:
    members = Members()
    for name in "ab":
        members.exchange(name)
    members.exchange("a", LimitRequest(epoch=0, answers=AnswerCounts(4, 1, 1)))
    assert members.exchange("b", LimitRequest(epoch=0, answers=AnswerCounts(2, 2))).answers == AnswerCounts(6, 3, 1)
    assert members.exchange("a", LimitRequest(epoch=0, cut=8.0, answers=AnswerCounts(1))).answers == AnswerCounts(1)
    assert members.exchange("b", LimitRequest(epoch=0, answers=AnswerCounts(5, 5))).answers == AnswerCounts(1)


def test_the_first_cut_of_an_epoch_counts_and_no_other() -> None:
    members = Members()
    for name in "abc":
        members.exchange(name)
    assert members.exchange("a", LimitRequest(epoch=0, cut=8.0)) == LimitReply(epoch=1, level=8.0)
    assert members.exchange("b", LimitRequest(epoch=0, cut=6.0)) == LimitReply(epoch=1, level=8.0)
    assert members.exchange("c", LimitRequest(epoch=0, raised=4.0)) == LimitReply(epoch=1, level=8.0)
    assert members.exchange("b", LimitRequest(epoch=1, cut=5.0)) == LimitReply(epoch=2, level=5.0)


def test_a_rise_after_a_cut_counts() -> None:
    members = Members()
    members.exchange("a")
    assert members.exchange("a", LimitRequest(epoch=0, cut=6.0, raised=0.5)).level == 6.5


def test_the_limit_is_never_above_the_most_nor_below_one() -> None:
    members = Members()
    members.exchange("a")
    assert members.exchange("a", LimitRequest(epoch=0, raised=50.0, most=20.0)).level == 20.0
    assert members.exchange("a", LimitRequest(epoch=0, cut=0.25)).level == 1.0


def test_slots_follow_the_limit() -> None:
    members = Members()
    for name in "ab":
        members.exchange(name, in_use=0, wanted=20)
    members.exchange("a", in_use=5, wanted=20)
    members.exchange("b", LimitRequest(epoch=0, raised=4.5), wanted=20)
    assert [members.slots(name).allowed for name in "ab"] == [5, 7]
    assert members.replies["b"].limit == LimitReply(epoch=0, level=14.5, others=5)


def test_no_member_has_a_slot_in_a_silence_and_one_has_a_slot_after_it() -> None:
    members = Members()
    for name in "ab":
        members.exchange(name)
    members.exchange("a", LimitRequest(epoch=0, cut=1.0, silence=2.0), wanted=5)
    assert members.slots("a").allowed == 0
    assert members.exchange("b", wanted=5).silence == 2.0
    assert members.slots("b").allowed == 0
    members.now += 2.0
    members.exchange("b", wanted=5)
    members.exchange("a", wanted=5)
    assert members.slots("a").allowed + members.slots("b").allowed == 1


def test_a_store_that_has_lost_its_data_is_told_the_limit_by_the_first_member() -> None:
    members = Members()
    members.exchange("a")
    members.ledger = None
    assert members.exchange("a", LimitRequest(epoch=4, level=33.0, cut=2.0)).level == 33.0
