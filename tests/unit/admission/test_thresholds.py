"""The priority thresholds."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.admission import PriorityThresholds
from forebay.errors import InvalidThreshold
from forebay.task import Priority

THRESHOLDS = st.floats(0.01, 1.0)


def test_the_thresholds_for_a_threshold_of_0_8() -> None:
    thresholds = PriorityThresholds(0.8)
    assert {priority.name: thresholds.threshold_for(priority) for priority in Priority} == {
        "CRITICAL": 1.0,
        "HIGH": 0.9,
        "NORMAL": 0.8,
        "LOW": 0.6,
    }


@given(THRESHOLDS)
def test_a_higher_priority_is_never_rejected_sooner(threshold: float) -> None:
    loads = [PriorityThresholds(threshold).threshold_for(priority) for priority in Priority]
    assert loads == sorted(loads, reverse=True)
    assert all(0 < load <= 1 for load in loads)


@given(THRESHOLDS, st.sampled_from(Priority), st.floats(0, 2))
def test_a_priority_is_rejected_from_its_threshold_on(threshold: float, priority: Priority, load: float) -> None:
    thresholds = PriorityThresholds(threshold)
    assert thresholds.rejects(priority, load) == (load >= thresholds.threshold_for(priority))
    assert thresholds.rejects(priority, thresholds.threshold_for(priority))


@given(st.integers(1, 100))
def test_a_load_of_exactly_three_quarters_of_the_threshold_rejects_low(percent: int) -> None:
    assert PriorityThresholds(percent / 100).rejects(Priority.LOW, 3 * percent / 400)


@pytest.mark.parametrize("threshold", [0, -1, 1.0001, float("nan"), "0.8", None, True])
def test_an_invalid_threshold_is_rejected(threshold: Any) -> None:
    with pytest.raises(InvalidThreshold):
        PriorityThresholds(threshold)
