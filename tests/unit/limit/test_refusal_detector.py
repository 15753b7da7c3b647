"""The refusal detector tells an overload from stray refusals."""

from __future__ import annotations

import itertools

import pytest

from forebay.limit import Grant
from forebay.limit.adaptive.refusal_detector import RefusalDetector

IN_FLIGHT = 50
EVERY = 0.14  # seconds from one call to the next
REFUSED_AFTER = 0.1  # seconds


class Calls:
    """Calls that are sent one after the other, each refused at once or accepted."""

    def __init__(self) -> None:
        self.detector = RefusalDetector()
        self.now = 0.0

    def refuse(self, in_flight: int = IN_FLIGHT) -> None:
        self.now += EVERY
        self.detector.record_refusal(self.now + REFUSED_AFTER, Grant(self.now, in_flight))

    def accept(self, in_flight: int = IN_FLIGHT) -> None:
        self.now += EVERY
        self.detector.record_accepted(Grant(self.now, in_flight), current=True)

    def answer(self, calls: int, one_in: int | None, in_flight: int = IN_FLIGHT) -> None:
        """Refuse one in `one_in` of so many calls."""
        for n in range(1, calls + 1):
            if one_in is not None and n % one_in == 0:
                self.refuse(in_flight)
            else:
                self.accept(in_flight)


def used_to(one_in: int | None, calls: int = 2000) -> Calls:
    made = Calls()
    made.answer(calls, one_in)
    return made


def refusals_until_overload(calls: Calls, **expected: float) -> int:
    for n in itertools.count(1):
        calls.refuse()
        if calls.detector.is_overload(**expected):
            return n
    raise AssertionError


@pytest.mark.parametrize(("one_in", "refusals"), [(None, 3), (100, 4), (33, 6)])
def test_more_stray_refusals_need_more_evidence(one_in: int | None, refusals: int) -> None:
    assert abs(refusals_until_overload(used_to(one_in)) - refusals) <= 1


def test_one_expected_refusal_is_enough_where_stray_ones_are_rare() -> None:
    assert refusals_until_overload(used_to(None), expected_among=50) == 1
    assert refusals_until_overload(used_to(33), expected_among=3) == 1  # one in ten rounds of three has a stray one
    assert refusals_until_overload(used_to(33), expected_among=50) > 1


@pytest.mark.parametrize("one_in", [20, 33, 100])
def test_regular_stray_refusals_become_the_background(one_in: int) -> None:
    calls = used_to(one_in, 1000)
    for _ in range(5000 // one_in):
        calls.answer(one_in, one_in)
        assert not calls.detector.is_overload()
    assert calls.detector.background == pytest.approx(1 / one_in, rel=0.5)


def test_where_half_as_many_calls_in_flight_are_refused_as_often_the_limit_may_rise() -> None:
    calls = used_to(2)
    assert calls.detector.saturated
    calls.answer(250, 2, in_flight=24)
    assert not calls.detector.saturated
    calls.detector.reset()
    calls.answer(250, 2)
    assert not calls.detector.is_overload()


def test_where_half_as_many_calls_in_flight_are_refused_less_often_the_background_is_too_high_still() -> None:
    calls = used_to(2)
    calls.answer(600, 5, in_flight=24)
    calls.answer(300, 2)
    assert calls.detector.saturated


def test_refusals_that_nothing_contradicts_are_no_background() -> None:
    calls = used_to(None)
    refusals_until_overload(calls)
    for _ in range(200):
        calls.accept(IN_FLIGHT - 1)  # fewer are accepted: the provider is full at IN_FLIGHT
    assert calls.detector.background < 0.001


def test_a_refusal_is_not_contradicted_by_more_in_flight_seconds_later() -> None:
    """Check that a capacity that rises is not taken for a background of refusals."""
    calls = used_to(None)
    calls.refuse()
    calls.now += 10.0
    calls.accept(IN_FLIGHT + 1)
    assert calls.detector.background < 0.001


def test_a_refusal_with_more_in_flight_than_ever_accepted_is_no_background() -> None:
    calls = used_to(None)
    calls.refuse(IN_FLIGHT + 5)
    calls.accept(IN_FLIGHT + 5)
    assert calls.detector.background < 0.001


def test_a_call_that_was_refused_itself_does_not_count_as_in_flight() -> None:
    """Check it with a provider that holds fifty calls, while the fifty-first is refused all the time."""
    calls = used_to(None)
    for _ in range(50):
        calls.now += EVERY
        sent = calls.now
        calls.detector.record_refusal(sent + REFUSED_AFTER, Grant(sent, IN_FLIGHT + 1))
        calls.detector.record_accepted(Grant(sent + 0.05, IN_FLIGHT + 1), current=True)  # one has ended meanwhile
    assert calls.detector.background < 0.001


def test_a_call_that_is_refused_after_a_later_one_was_accepted_was_not_in_flight_with_it() -> None:
    detector = RefusalDetector()
    for now in range(1, 200):
        # Acceptances arrive at once, refusals later, and ten calls in flight are served.
        detector.record_accepted(Grant(now + 0.05, 11), current=True)
        detector.record_refusal(now + 0.1, Grant(now, 11))
    assert detector.background < 0.03


def test_a_share_of_refusals_is_put_up_with_up_to_a_third() -> None:
    """Check that many small servers behind a load balancer may refuse a quarter of the calls, and not half."""
    calls = used_to(4, 1000)
    calls.detector.reset()
    for _ in range(400):
        calls.answer(4, 4)
        assert not calls.detector.is_overload()
    calls.answer(200, 2)
    assert calls.detector.is_overload()
    assert calls.detector.saturated
