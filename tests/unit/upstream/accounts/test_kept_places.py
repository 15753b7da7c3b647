"""The places of calls in their backoff: what others leave to them, and when they lose them."""

from __future__ import annotations

import pytest

from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import HeldCharge, Quota, RateLimiter
from forebay.task import Priority
from forebay.upstream.accounts.kept_places import KeptPlaces
from forebay.upstream.call_request import CallRequest


def test_a_place_is_held_from_calls_of_its_priority_and_worse_until_its_call_is_back() -> None:
    places, failed = KeptPlaces(), CallRequest(priority=Priority.NORMAL)
    places.keep(0.0, failed, back_at=5.0)
    assert places.held_from(1.0, CallRequest()) == [HeldCharge(failed.charge, 5.0)]
    assert places.held_from(1.0, CallRequest(priority=Priority.LOW))
    assert not places.held_from(1.0, CallRequest(priority=Priority.HIGH))
    assert not places.held_from(1.0, CallRequest(retries=1))
    places.drop(failed)
    assert not places.held_from(1.0, CallRequest())


def test_a_call_that_does_not_come_back_loses_its_place() -> None:
    places = KeptPlaces()
    places.keep(0.0, CallRequest(), back_at=5.0)
    assert places.next_end() == 6.0
    assert not places.held_from(6.0, CallRequest())
    assert not places


def test_the_places_that_are_kept_are_bounded() -> None:
    places = KeptPlaces()
    for _ in range(1_000):
        places.keep(0.0, CallRequest(), back_at=5.0)
    assert len(places) <= 100
    places.keep(60.0, late := CallRequest(), back_at=65.0)
    assert late in places


def used_window() -> RateLimiter:
    """Return a limiter that knows of a window with 2 of 60 requests left, which ends at second 60."""
    limiter = RateLimiter()
    for at, remaining in ((0.0, 4), (10.0, 3), (20.0, 2)):
        header = RateLimitHeaders(unit="requests", limit=60, remaining=remaining, reset=60.0 - at)
        reservation = limiter.reserve(at, Charge())
        limiter.update_from_headers(at, [header], reservation)
        limiter.settle(at, reservation, Charge())
    return limiter


@pytest.mark.parametrize(("held", "wait"), [(1, 0.0), (2, 40.2)])
def test_what_is_held_in_a_window_is_left(held: int, wait: float) -> None:
    limiter = used_window()
    assert limiter.wait(20.0, Charge(), held=[HeldCharge(Charge(), 30.0)] * held).seconds == pytest.approx(wait)


def test_nothing_is_held_in_a_window_for_a_call_that_comes_back_after_it() -> None:
    assert used_window().wait(20.0, Charge(), held=[HeldCharge(Charge(), 61.0)] * 5).seconds == 0.0


def test_a_bucket_holds_what_does_not_come_back_in_time() -> None:
    limiter = RateLimiter([Quota(tokens=60, per="minute")])
    limiter.reserve(0.0, Charge(tokens=50))
    assert limiter.wait(0.0, Charge(tokens=5), held=[HeldCharge(Charge(tokens=8), 2.0)]).seconds == pytest.approx(3.0)
    assert limiter.wait(0.0, Charge(tokens=5), held=[HeldCharge(Charge(tokens=8), 8.0)]).seconds == 0.0


def test_a_full_quota_is_never_held_altogether() -> None:
    limiter = RateLimiter([Quota(requests=5, per="minute")])
    assert limiter.wait(0.0, Charge(), held=[HeldCharge(Charge(), 1.0)] * 10).seconds == 0.0
