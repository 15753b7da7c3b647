"""The stoppages of calls that a process shares: what it reports, and what it takes over."""

from __future__ import annotations

import math
from typing import Final

import pytest

from forebay.breaker import BreakerRules, BreakerState, consecutive_faults
from forebay.interfaces import Charge, Outcome
from forebay.limit import Grant
from forebay.quota import RateLimiter
from forebay.upstream.call_request import CallRequest, Permit
from forebay.upstream.shared.leases.call_stoppage import CallStoppage
from forebay.upstream.shared.leases.leased_breaker import LeasedBreaker
from forebay.upstream.shared.leases.leased_pause import LeasedPause
from forebay.upstream.shared.leases.leased_stoppages import LeasedStoppages
from forebay.upstream.shared.leases.leased_suspension import LeasedSuspension
from forebay.upstream.shared.ledger.stoppage_messages import StoppageReply, StoppageRequest

RULES: Final = BreakerRules(triggers=(consecutive_faults(3),), reset_timeout=8.0, probes=2)
UNTIL: Final = 1e9  # seconds at which the lease ends: far away
KIND: Final = "it"


class Member:
    """A process, and a ledger that answers as the test says."""

    def __init__(self, stoppage: CallStoppage) -> None:
        self.shared = LeasedStoppages({KIND: stoppage})
        self.exchange(0.0, StoppageReply(epoch=0))

    def report(self, now: float, waiting: int = 0) -> StoppageRequest:
        return self.shared.report(now, waiting)[KIND]

    def exchange(self, now: float, reply: StoppageReply, waiting: int = 0) -> StoppageRequest:
        request = self.report(now, waiting)
        self.answer(now, request, reply)
        return request

    def answer(self, now: float, request: StoppageRequest, reply: StoppageReply) -> None:
        self.shared.receive(now, UNTIL, {KIND: request}, {KIND: reply})


def new_breaker(draw: float = 0.0) -> LeasedBreaker:
    return LeasedBreaker(RULES, draw=lambda: draw)


def end_calls(breaker: LeasedBreaker, now: float, *outcomes: Outcome) -> None:
    for outcome in outcomes:
        breaker.record(now, outcome, breaker.allow(now))


FAULT, SUCCESS = Outcome.FAULT, Outcome.SUCCESS


def test_calls_are_reported_once() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    end_calls(breaker, 1.0, FAULT, SUCCESS)
    request = member.report(1.0)
    assert (request.calls, request.faults, request.changed) == (2, 1, False)
    assert member.report(1.0).calls == 0


def test_faults_of_others_count_with_its_own() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    end_calls(breaker, 1.0, FAULT)
    member.exchange(1.0, StoppageReply(epoch=0, calls=2, faults=2))
    assert breaker.state(1.0) is BreakerState.OPEN


def test_calls_of_others_are_not_reported_as_its_own() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    member.exchange(1.0, StoppageReply(epoch=0, calls=5, faults=2))
    assert member.report(1.0).calls == 0


def test_an_opening_is_reported_at_once_and_only_once() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    end_calls(breaker, 1.0, FAULT, FAULT, FAULT)
    assert member.shared.ask_at(1.0, waiting=False) == 1.0
    request = member.report(2.0)
    assert (request.changed, request.openings, request.seconds) == (True, 1, 3.0)
    assert not member.report(2.0).changed
    assert member.shared.ask_at(2.0, waiting=False) == math.inf


def test_a_fault_is_reported_soon() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    end_calls(breaker, 1.0, FAULT)
    assert member.shared.ask_at(1.0, waiting=False) == pytest.approx(1.05)


def test_an_opening_of_another_process_opens_it_for_the_same_time() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    member.exchange(1.0, StoppageReply(epoch=1, openings=1, seconds=6.0))
    assert breaker.retry_after(1.0) == 6.0
    assert breaker.allow(1.0) == 0
    assert not member.report(1.0).changed


def test_an_opening_of_another_process_comes_before_its_own() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    request = member.report(1.0)
    end_calls(breaker, 1.0, FAULT, FAULT, FAULT)
    member.answer(1.0, request, StoppageReply(epoch=1, openings=1, seconds=7.5))
    assert breaker.retry_after(1.0) == 7.5
    assert not member.report(1.0).changed


def test_an_opening_that_is_not_accepted_gives_way_to_that_of_another_process() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    end_calls(breaker, 1.0, FAULT, FAULT, FAULT)
    member.exchange(1.0, StoppageReply(epoch=1, openings=1, seconds=7.5))
    assert breaker.retry_after(1.0) == 7.5


def test_an_opening_since_the_request_stands_when_its_reply_comes() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    request = member.report(1.0)
    end_calls(breaker, 1.0, FAULT, FAULT, FAULT)
    member.answer(1.0, request, StoppageReply(epoch=0))
    assert breaker.state(1.0) is BreakerState.OPEN
    assert member.report(1.0).changed


def test_calls_sent_before_an_opening_of_another_process_do_not_count_after_it() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    epochs = [breaker.allow(1.0) for _ in range(3)]
    member.exchange(1.0, StoppageReply(epoch=1, openings=1, seconds=6.0))
    member.exchange(1.0, StoppageReply(epoch=2))
    for epoch in epochs:
        breaker.record(2.0, FAULT, epoch)
    assert breaker.state(2.0) is BreakerState.CLOSED
    assert member.report(2.0).faults == 0


def half_open() -> tuple[LeasedBreaker, Member]:
    breaker = new_breaker()
    member = Member(breaker)
    member.exchange(1.0, StoppageReply(epoch=1, openings=1, seconds=6.0))
    return breaker, member


def test_a_call_needs_a_probe_of_the_ledger_while_it_is_half_open() -> None:
    breaker, member = half_open()
    assert not member.shared.needs_probe(6.9)
    assert member.shared.needs_probe(7.0)
    assert breaker.ready(7.0)  # it may ask for one
    assert member.exchange(7.0, StoppageReply(epoch=1, openings=1, probes=1), waiting=3).wanted == 3
    assert not member.shared.needs_probe(7.0)
    assert breaker.allow(7.0)
    assert member.shared.needs_probe(7.0)


def test_it_is_not_ready_while_other_processes_have_all_probes() -> None:
    breaker, member = half_open()
    member.exchange(7.0, StoppageReply(epoch=1, openings=1, elsewhere=2), waiting=1)
    assert not breaker.ready(7.0)
    assert breaker.retry_after(7.0, probe_duration=1.5) == 1.5
    member.exchange(7.5, StoppageReply(epoch=1, openings=1, elsewhere=1))
    assert breaker.ready(7.5)


def test_a_probe_that_no_call_waits_for_is_returned_soon() -> None:
    _, member = half_open()
    member.exchange(7.0, StoppageReply(epoch=1, openings=1, probes=1), waiting=1)
    assert member.shared.ask_at(7.0, waiting=False) == pytest.approx(7.05)
    request = member.report(7.1)
    assert (request.probes, request.wanted) == (0, 0)
    assert member.shared.needs_probe(7.1)


def test_the_success_of_a_probe_is_reported_at_once_and_counts_with_those_of_others() -> None:
    breaker, member = half_open()
    member.exchange(7.0, StoppageReply(epoch=1, openings=1, probes=1), waiting=1)
    end_calls(breaker, 7.0, SUCCESS)
    assert member.shared.ask_at(7.0, waiting=False) == 7.0
    request = member.exchange(7.0, StoppageReply(epoch=2))  # the other one had succeeded before
    assert request.passes == 1
    assert breaker.state(7.0) is BreakerState.CLOSED
    assert not member.report(7.0).changed


def test_successes_of_others_count_with_its_own() -> None:
    breaker, member = half_open()
    member.exchange(7.0, StoppageReply(epoch=1, openings=1, passed=1, probes=1), waiting=1)
    end_calls(breaker, 7.0, SUCCESS)
    assert breaker.state(7.0) is BreakerState.CLOSED
    assert member.report(7.0).openings == 0


def test_a_late_success_elsewhere_lets_calls_probe_earlier() -> None:
    breaker, member = half_open()
    member.exchange(2.0, StoppageReply(epoch=1, openings=1, seconds=0.0, passed=1))
    assert breaker.state(2.0) is BreakerState.HALF_OPEN


def test_a_probe_that_hangs_is_reported_with_the_successes_so_far() -> None:
    breaker, member = half_open()
    member.exchange(7.0, StoppageReply(epoch=1, openings=1, passed=1, probes=1), waiting=1)
    assert breaker.allow(7.0)
    request = member.report(7.0 + RULES.probe_timeout)
    assert (request.changed, request.openings, request.passed) == (True, 2, 1)


def test_what_was_not_counted_is_reported_again() -> None:
    breaker = new_breaker()
    member = Member(breaker)
    end_calls(breaker, 1.0, FAULT, FAULT, FAULT)
    assert member.report(1.0).changed
    member.shared.keep_unreported()
    assert member.report(1.0).changed


def refuse(pause: LeasedPause, now: float, sent_at: float, *, retry_after: float = 0.0) -> None:
    pause.record_refused(now, sent_at, retry_after=retry_after, certain=True)


def tell(teller: CallStoppage, listener: Member, now: float, *, later: float = 0.0) -> None:
    """Let a process take over what another has told `later` seconds before, in the next epoch."""
    told = teller.describe(now)
    reply = StoppageReply(
        epoch=1 + listener.report(now + later).epoch,
        openings=told.openings,
        seconds=max(0.0, told.seconds - later),
        details=told.details,
        age=later,
    )
    listener.exchange(now + later, reply)


def test_a_silence_of_another_process_holds_for_as_long() -> None:
    teller, pause = LeasedPause(), LeasedPause()
    refuse(teller, 10.0, 9.9)
    tell(teller, Member(pause), 10.0, later=0.125)
    assert pause.wait(10.125) == pytest.approx(0.125)
    assert pause.silent


def test_the_trial_call_of_another_process_doubles_the_silence() -> None:
    teller, pause = LeasedPause(), LeasedPause()
    refuse(teller, 10.0, 9.9)
    tell(teller, Member(pause), 10.0)
    pause.record_sent(10.25)
    refuse(pause, 10.3, 10.25)
    assert pause.wait(10.3) == pytest.approx(0.5)


def test_a_call_sent_before_the_silence_of_another_process_does_not_lengthen_it() -> None:
    teller, pause = LeasedPause(), LeasedPause()
    refuse(teller, 10.0, 9.9)
    member = Member(pause)
    tell(teller, member, 10.0, later=0.125)
    refuse(pause, 10.2, 10.05)
    assert pause.wait(10.2) == pytest.approx(0.05)
    assert not member.report(10.2).changed


def test_a_retry_after_that_was_right_is_believed_by_all() -> None:
    teller, pause = LeasedPause(), LeasedPause()
    refuse(teller, 0.0, 0.0, retry_after=4.0)
    teller.record_sent(1.0)
    refuse(teller, 1.0, 1.0, retry_after=3.0)  # early: it was right
    teller.record_accepted(4.1)
    member = Member(pause)
    tell(teller, member, 4.1)
    refuse(pause, 10.0, 9.9, retry_after=20.0)
    assert pause.wait(10.0) == pytest.approx(20.0)


def test_an_accepted_call_that_was_sent_after_it_ends_the_silence_of_another_process() -> None:
    teller, pause = LeasedPause(), LeasedPause()
    refuse(teller, 10.0, 9.9)
    member = Member(pause)
    tell(teller, member, 10.0, later=0.125)
    assert pause.record_accepted(9.95) is None
    assert pause.record_accepted(10.05) is not None  # sent before this process knew
    request = member.report(10.2)
    assert (request.changed, request.openings) == (True, 0)


def test_a_trial_call_elsewhere_lets_calls_wait() -> None:
    teller, pause = LeasedPause(), LeasedPause()
    refuse(teller, 10.0, 9.9)
    member = Member(pause)
    tell(teller, member, 10.0)
    assert member.shared.needs_probe(10.25)
    member.exchange(10.25, StoppageReply(epoch=1, openings=1, elsewhere=1), waiting=1)
    assert pause.wait(10.25) > 0.0
    assert not member.shared.needs_probe(10.25)


def test_refusals_of_others_in_a_row_begin_a_silence_with_its_own() -> None:
    pause = LeasedPause()
    member = Member(pause)
    pause.record_refused(10.0, 9.9, retry_after=0.0, certain=False)
    member.exchange(10.1, StoppageReply(epoch=0, calls=7, faults=7))
    pause.record_refused(10.2, 10.1, retry_after=0.0, certain=False)
    assert pause.silent


def test_accepted_calls_of_others_end_a_row_of_refusals() -> None:
    pause = LeasedPause()
    member = Member(pause)
    pause.record_refused(10.0, 9.9, retry_after=0.0, certain=False)
    member.exchange(10.1, StoppageReply(epoch=0, calls=9, faults=7))
    pause.record_refused(10.2, 10.1, retry_after=0.0, certain=False)
    assert not pause.silent


def send(suspension: LeasedSuspension, now: float, size: int = 0) -> Permit:
    charge = Charge()
    permit = Permit(
        CallRequest(charge=charge, size=size),
        now,
        Grant(now, 1, at_limit=False),
        1,
        RateLimiter(()).reserve(now, charge),
        (),
        suspension,
    )
    suspension.record_sent(permit)
    return permit


def test_a_suspension_of_another_process_holds_for_as_long() -> None:
    teller, suspension = LeasedSuspension(), LeasedSuspension()
    teller.begin(10.0, 30.0)
    tell(teller, Member(suspension), 12.0, later=3.0)
    assert suspension.time_left(15.0, probe_duration=1.0) == pytest.approx(25.0)


def test_a_call_like_the_one_that_was_refused_elsewhere_goes_last() -> None:
    teller, suspension = LeasedSuspension(), LeasedSuspension()
    teller.confirm(10.0, send(teller, 10.0, size=500), 30.0, certain=False)
    teller.begin(10.0, 10.0)
    tell(teller, Member(suspension), 10.0)
    assert suspension.time_left(20.0, CallRequest(size=400), probe_duration=1.0) is None
    assert suspension.time_left(20.0, CallRequest(size=500), probe_duration=1.0) == pytest.approx(10.0)


def test_no_probe_goes_while_another_process_has_one() -> None:
    teller, suspension = LeasedSuspension(), LeasedSuspension()
    teller.begin(10.0, 5.0)
    member = Member(suspension)
    tell(teller, member, 10.0)
    assert member.shared.needs_probe(15.0)
    member.exchange(15.0, StoppageReply(epoch=1, openings=1, elsewhere=1), waiting=1)
    assert suspension.time_left(15.0, probe_duration=1.5) == 1.5


def test_an_accepted_probe_ends_the_suspension_for_all() -> None:
    suspension = LeasedSuspension()
    member = Member(suspension)
    suspension.begin(10.0, 5.0)
    member.exchange(10.0, StoppageReply(epoch=1, accepted=True, openings=1, seconds=5.0))
    suspension.record_accepted(send(suspension, 15.0))
    request = member.report(15.5)
    assert (request.changed, request.openings) == (True, 0)


def test_the_end_of_a_suspension_elsewhere_ends_it_here() -> None:
    teller, suspension = LeasedSuspension(), LeasedSuspension()
    teller.begin(10.0, 30.0)
    member = Member(suspension)
    tell(teller, member, 10.0)
    member.exchange(11.0, StoppageReply(epoch=2))
    assert suspension.time_left(11.0, probe_duration=1.0) is None
    assert not member.shared.is_stopping(11.0)
