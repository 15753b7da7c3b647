"""The fault window compared with a plain count of all calls, and the Wilson bound."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.breaker import FaultWindow
from forebay.breaker.triggers import wilson_lower_bound

CALLS = st.lists(st.tuples(st.floats(0, 4), st.booleans()), max_size=200)  # seconds since the last one; a fault?


@given(calls=CALLS, seconds=st.integers(1, 12), span=st.integers(1, 40))
def test_the_window_counts_like_a_list_of_all_calls(calls: list[tuple[float, bool]], seconds: int, span: int) -> None:
    window = FaultWindow(seconds=seconds, span=span)
    now, history = 1000.0, []
    for pause, faulty in calls:
        now += pause
        history.append((now, faulty))
        (window.add_fault if faulty else window.add_success)(now)

        recent = [faulty for at, faulty in history if math.floor(at) > math.floor(now) - seconds]
        assert window.recent() == (len(recent), sum(recent))
        if faulty:
            for back in {1, span // 2 + 1, span}:
                assert window.faults_among(back) == sum(faulty for _, faulty in history[-back:])


@given(calls=CALLS)
def test_the_window_keeps_no_more_than_its_bounds(calls: list[tuple[float, bool]]) -> None:
    window = FaultWindow(seconds=5, span=10)
    now = 0.0
    for pause, faulty in calls:
        now += pause
        (window.add_fault if faulty else window.add_success)(now)
        assert len(window._buckets) <= 5
        assert len(window._faulty) <= 10


def test_a_clock_that_goes_back_a_little_loses_no_fault() -> None:
    window = FaultWindow(seconds=2, span=10)
    for now in (5.0, 4.0, 5.5, 4.9):
        window.add_fault(now)
    assert window.recent() == (4, 4)


@pytest.mark.parametrize(
    ("faults", "calls", "expected"),
    [(0, 10, 0.0), (5, 5, 0.5655), (1, 20, 0.0089), (4, 5, 0.3755), (50, 1000, 0.0381), (10, 10, 0.7225)],
)
def test_the_wilson_bound_has_the_published_values(faults: int, calls: int, expected: float) -> None:
    assert wilson_lower_bound(faults, calls) == pytest.approx(expected, abs=1e-4)
