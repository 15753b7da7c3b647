"""The stoppages of calls that the members of a ledger share."""

from __future__ import annotations

import itertools
import math

import msgspec

from forebay.upstream.shared.ledger.ledger import AccountLedger, decode_ledger, encode_ledger
from forebay.upstream.shared.ledger.messages import LEASE, ExchangeReply, ExchangeRequest, LedgerTerms
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest

TERMS = LedgerTerms(limit="AdaptiveLimit", breaker="BreakerRules()")
KIND = "breaker"


class Members:
    """Members of one ledger, whose exchanges are all answered. Each reports the epoch that it was told last."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.ledger: AccountLedger | None = None
        self.replies: dict[str, StoppageReply] = {}
        self.requests: dict[str, ExchangeRequest] = {}
        self._sequence = itertools.count(1)

    def exchange(self, name: str, *, leaving: bool = False, **report: object) -> StoppageReply:
        """Return what the ledger answers to what a member reports; what it knows, if there is nothing new."""
        known = self.replies.get(name)
        about = {"epoch": -1 if known is None else known.epoch, "successes": 2, **report}
        request = ExchangeRequest(
            ledger="l",
            member=name,
            sequence=next(self._sequence),
            epoch="" if self.ledger is None else self.ledger.state.epoch,
            terms=TERMS,
            stoppages={KIND: StoppageRequest(**about)},  # type: ignore[arg-type]
            leaving=leaving,
        )
        reply = self.send(request)
        if reply.stoppages is not None:
            self.replies[name] = reply.stoppages[KIND]
        elif known is not None:
            self.replies[name] = StoppageReply(epoch=known.epoch)
        self.requests[name] = request
        return self.replies[name]

    def send(self, request: ExchangeRequest) -> ExchangeReply:
        if self.ledger is None:
            self.ledger = AccountLedger.open(self.now, request)
        return self.ledger.exchange(self.now, request)

    def join(self, names: str) -> None:
        for name in names:
            self.exchange(name)

    def open(self, name: str, seconds: float = 8.0, openings: int = 1) -> StoppageReply:
        return self.exchange(name, changed=True, openings=openings, seconds=seconds)


def test_calls_of_others_are_told_once() -> None:
    members = Members()
    members.join("abc")
    members.exchange("a", calls=5, faults=2)
    members.exchange("b", calls=1, faults=1)
    told = members.exchange("c")
    assert (told.calls, told.faults) == (6, 3)
    assert members.exchange("c").calls == 0
    own_left_out = members.exchange("a")
    assert (own_left_out.calls, own_left_out.faults) == (1, 1)


def test_calls_before_a_member_came_do_not_count_for_it() -> None:
    members = Members()
    members.exchange("a")
    members.exchange("a", calls=5, faults=5)
    assert members.exchange("b").faults == 0


def test_the_first_opening_holds_for_all_for_the_same_time() -> None:
    members = Members()
    members.join("ab")
    assert members.open("a", 8.0).accepted
    members.now += 3.0
    second = members.open("b", 6.0)
    assert (second.accepted, second.openings, second.seconds) == (False, 1, 5.0)


def test_a_member_that_comes_while_calls_are_stopped_is_told_so() -> None:
    members = Members()
    members.exchange("a")
    members.open("a", math.inf)
    told = members.exchange("b")
    assert (told.openings, told.seconds) == (1, math.inf)


def test_faults_of_an_earlier_epoch_do_not_count() -> None:
    members = Members()
    members.join("ab")
    members.open("a")
    members.exchange("a", changed=True, openings=0)
    members.exchange("b", epoch=0, calls=9, faults=9)
    assert members.exchange("a").faults == 0


def test_there_are_no_more_probes_than_the_rules_allow_in_all_processes() -> None:
    members = Members()
    members.join("abc")
    members.open("a", 2.0)
    assert members.exchange("b", openings=1, wanted=3).probes == 0  # it is not over yet
    members.now += 2.0
    assert members.exchange("b", openings=1, wanted=3, most_probes=2).probes == 2
    denied = members.exchange("c", openings=1, wanted=1, most_probes=2)
    assert (denied.probes, denied.elsewhere) == (0, 2)


def test_a_probe_that_is_returned_goes_to_another_member() -> None:
    members = Members()
    members.join("ab")
    members.open("a", 0.0)
    assert members.exchange("a", openings=1, wanted=1).probes == 1
    assert members.exchange("b", openings=1, wanted=1).probes == 0
    members.exchange("a", openings=1, wanted=0)
    assert members.exchange("b", openings=1, wanted=1).probes == 1


def test_the_probe_of_a_member_that_has_died_comes_back_with_its_lease() -> None:
    members = Members()
    members.join("ab")
    members.open("a", 0.0)
    members.exchange("a", openings=1, wanted=1)
    members.now += LEASE / 2
    assert members.exchange("b", openings=1, wanted=1).probes == 0
    members.now += LEASE / 2 + 0.1
    assert members.exchange("b", openings=1, wanted=1).probes == 1


def test_probes_of_several_members_close_it_together() -> None:
    members = Members()
    members.join("ab")
    members.open("a", 0.0)
    members.exchange("b")
    assert members.exchange("a", openings=1, passed=1, passes=1).openings == 1
    closed = members.exchange("b", openings=1, passed=1, passes=1)
    assert (closed.openings, closed.epoch) == (0, 2)
    assert members.exchange("a").openings == 0


def test_a_probe_that_fails_stops_the_calls_of_all_again() -> None:
    members = Members()
    members.join("ab")
    members.open("a", 0.0)
    members.exchange("b")
    members.open("b", 16.0, openings=2)
    told = members.exchange("a")
    assert (told.openings, told.seconds, told.probes) == (2, 16.0, 0)


def test_the_late_success_of_a_probe_lets_others_probe_at_once() -> None:
    members = Members()
    members.join("ab")
    members.open("a", 60.0)
    members.exchange("a", openings=1, seconds=0.0, passed=1, passes=1)
    told = members.exchange("b", openings=1, wanted=1)
    assert (told.seconds, told.passed, told.probes) == (0.0, 1, 1)


def test_a_request_that_is_repeated_counts_once() -> None:
    members = Members()
    members.join("ab")
    members.exchange("a", calls=3, faults=3)
    first = members.send(members.requests["a"])
    assert members.send(members.requests["a"]) == first
    assert members.exchange("b").faults == 3


def test_what_a_member_reports_as_it_leaves_holds_for_the_others() -> None:
    members = Members()
    members.join("ab")
    members.exchange("a", changed=True, openings=1, seconds=8.0, leaving=True)
    assert members.exchange("b").openings == 1


def test_the_newest_epoch_wins_if_the_store_has_forgotten_it() -> None:
    members = Members()
    members.join("ab")
    members.exchange("a", epoch=7, openings=3, seconds=20.0)
    told = members.exchange("b")
    assert (told.epoch, told.openings, told.seconds) == (7, 3, 20.0)


def test_a_member_that_knows_an_older_epoch_takes_over_the_newer_one() -> None:
    members = Members()
    members.join("ab")
    members.open("a")
    members.exchange("a", changed=True, openings=0)
    told = members.exchange("b", epoch=1, openings=1, seconds=5.0)
    assert (told.epoch, told.openings) == (2, 0)


def test_what_a_member_knows_before_its_first_exchange_holds_if_nobody_knows_more() -> None:
    members = Members()
    assert members.exchange("a", changed=True, openings=1, seconds=9.0).accepted
    assert members.exchange("b").openings == 1


def test_details_go_to_the_others_with_their_age() -> None:
    members = Members()
    members.join("ab")
    members.exchange("a", changed=True, openings=1, seconds=9.0, details=(1.5, -2.0))
    members.now += 4.0
    told = members.exchange("b")
    assert (told.details, told.age) == ((1.5, -2.0), 4.0)


def test_a_message_without_stoppages_changes_none() -> None:
    members = Members()
    members.exchange("a")
    members.open("a")
    old = ExchangeRequest(ledger="l", member="old", sequence=1, terms=TERMS)
    assert members.send(old).stoppages is None
    assert members.exchange("b").openings == 1


def test_stoppages_outlive_a_restart_of_the_store() -> None:
    members = Members()
    members.exchange("a")
    members.open("a", math.inf)
    assert members.ledger is not None
    members.ledger = decode_ledger(encode_ledger(members.ledger))
    assert members.exchange("b").seconds == math.inf


def test_a_ledger_of_before_has_no_stoppages() -> None:
    members = Members()
    members.exchange("a")
    assert members.ledger is not None
    kept = msgspec.msgpack.decode(encode_ledger(members.ledger))
    del kept["stoppages"]
    members.ledger = decode_ledger(msgspec.msgpack.encode(kept))
    assert members.exchange("b").openings == 0
