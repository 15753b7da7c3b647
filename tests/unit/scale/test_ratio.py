"""The ratio step, as a table."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.errors import InvalidSetting
from forebay.scale import desired_replicas
from forebay.scale.ratio import whole_replicas


@pytest.mark.parametrize(
    ("current", "reading", "target", "wanted"),
    [
        # The cases that Kubernetes documents.
        (1, 200.0, 100.0, 2),
        (4, 200.0, 100.0, 8),
        (4, 50.0, 100.0, 2),
        (50, 90.0, 75.0, 60),
        # Rounded up, in both directions.
        (3, 0.8, 0.7, 4),
        (10, 0.5, 0.7, 8),
        (10, 0.0, 0.7, 0),
        # Noise of the arithmetic asks for nothing.
        (6, 4.2 / 6 * 1.5, 0.7, 9),
        (10, 0.42, 0.7, 6),
        (3, 0.1 * 3, 0.1, 9),
        (100, 0.7 * 1.3, 0.7, 130),
    ],
)
def test_the_ratio_of_reading_and_target_says_how_many(
    current: int, reading: float, target: float, wanted: int
) -> None:
    assert desired_replicas(current=current, reading=reading, target=target) == wanted


@pytest.mark.parametrize(
    ("reading", "wanted"), [(1.1, 10), (0.9, 10), (1.1 + 1e-12, 10), (1.11, 12), (0.89, 9), (1.0, 10)]
)
def test_a_tenth_of_the_target_is_no_reason_for_a_change(reading: float, wanted: int) -> None:
    assert desired_replicas(current=10, reading=reading, target=1.0) == wanted


def test_the_tolerance_may_be_none() -> None:
    assert desired_replicas(current=10, reading=1.01, target=1.0, tolerance=0.0) == 11
    assert desired_replicas(current=10, reading=1.0, target=1.0, tolerance=0.0) == 10


@pytest.mark.parametrize(
    ("current", "reading", "wanted"), [(4, 10.0, 8), (4, 0.01, 3), (4, 1.0, 4), (1, 1.0, 3), (20, 1.0, 8), (0, 0.0, 3)]
)
def test_bounds_hold_within_the_tolerance_too(current: int, reading: float, wanted: int) -> None:
    assert desired_replicas(current=current, reading=reading, target=1.0, minimum=3, maximum=8) == wanted


def test_six_replicas_at_their_target_need_no_seventh() -> None:
    assert 4.2 / 0.7 > 6.0
    assert whole_replicas(4.2 / 0.7) == 6
    assert whole_replicas(6.001) == 7
    assert whole_replicas(1e-6) == 1
    assert whole_replicas(0.0) == 0


@given(replicas=st.integers(1, 10_000), target=st.floats(0.01, 100.0))
def test_what_a_number_of_replicas_needs_is_that_number(replicas: int, target: float) -> None:
    assert desired_replicas(current=1, reading=replicas * target, target=target, tolerance=0.0) == replicas


@pytest.mark.parametrize("reading", [math.inf, 1e308])
def test_a_reading_beyond_all_bounds_asks_for_the_maximum(reading: float) -> None:
    assert desired_replicas(current=10, reading=reading, target=0.1, maximum=40) == 40
    assert desired_replicas(current=0, reading=reading, target=0.1, minimum=2, maximum=40) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": 0.0}, "target.*positive"),
        ({"target": -1.0}, "target.*positive"),
        ({"target": math.nan}, "target.*positive"),
        ({"minimum": 9, "maximum": 4}, "maximum.*at least the minimum, 9"),
        ({"reading": math.nan}, "reading.*a number"),
        ({"reading": math.inf}, "reading.*finite, unless there is a maximum"),
    ],
)
def test_what_has_no_answer_is_said(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        desired_replicas(**{"current": 3, "reading": 1.0, "target": 0.7, **arguments})
