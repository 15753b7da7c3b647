"""Booked seats."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.admission import RetryAfterSchedule

RATES = st.floats(0.01, 1000.0)
CHANCES = st.floats(0, 1, exclude_max=True)


@given(RATES, st.lists(CHANCES, min_size=2, max_size=100))
def test_no_seat_is_given_twice_and_none_sooner_than_it_falls_free(rate: float, chances: list[float]) -> None:
    seats = RetryAfterSchedule()
    waits = [seats.reserve(50.0, rate, chance) or 0.0 for chance in chances]
    for place, wait in enumerate(waits, start=1):
        seat = place / (0.97 * rate)
        assert seat <= wait * (1 + 1e-9)
        assert wait <= 1.1 * seat * (1 + 1e-9)


def test_without_jitter_seats_are_one_drain_interval_apart() -> None:
    seats = RetryAfterSchedule()
    waits = [seats.reserve(0.0, 2.0, 0.0) for _ in range(3)]
    assert waits == [pytest.approx(n / 1.94) for n in (1, 2, 3)]


def test_seats_that_nobody_asked_for_are_not_kept() -> None:
    seats = RetryAfterSchedule()
    seats.reserve(0.0, 2.0, 0.0)
    assert seats.reserve(1000.0, 2.0, 0.0) == pytest.approx(1 / 1.94)


def test_those_who_come_in_between_go_behind() -> None:
    seats = RetryAfterSchedule()
    first = seats.reserve(0.0, 1.0, 0.0) or 0.0
    second = seats.reserve(0.5, 1.0, 0.0) or 0.0
    assert 0.5 + second == pytest.approx(first + 1 / 0.97)


@pytest.mark.parametrize("rate", [None, 0, 0.0])
def test_while_the_rate_is_unknown_there_is_no_answer_and_no_seat_is_taken(rate: float | None) -> None:
    seats = RetryAfterSchedule()
    assert seats.reserve(0.0, rate, 0.5) is None
    assert seats.reserve(0.0, 1.0, 0.0) == pytest.approx(1 / 0.97)
