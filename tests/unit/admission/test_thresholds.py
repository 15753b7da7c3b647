"""The ladder."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.admission import PriorityThresholds
from forebay.errors import InvalidThreshold
from forebay.task import Priority

THRESHOLDS = st.floats(0.01, 1.0)


def test_its_numbers() -> None:
    ladder = PriorityThresholds(0.8)
    assert {rung.name: ladder.threshold_for(rung) for rung in Priority} == {
        "CRITICAL": 1.0,
        "HIGH": 0.9,
        "NORMAL": 0.8,
        "LOW": 0.6,
    }


@given(THRESHOLDS)
def test_better_work_is_never_refused_sooner(threshold: float) -> None:
    rungs = [PriorityThresholds(threshold).threshold_for(rung) for rung in Priority]
    assert rungs == sorted(rungs, reverse=True)
    assert all(0 < rung <= 1 for rung in rungs)


@given(THRESHOLDS, st.sampled_from(Priority), st.floats(0, 2))
def test_it_refuses_from_its_load_on_and_not_below(threshold: float, rung: Priority, load: float) -> None:
    ladder = PriorityThresholds(threshold)
    assert ladder.rejects(rung, load) == (load >= ladder.threshold_for(rung))
    assert ladder.rejects(rung, ladder.threshold_for(rung))


@given(st.integers(1, 100))
def test_a_load_that_is_exactly_three_quarters_of_the_threshold_refuses_low(percent: int) -> None:
    assert PriorityThresholds(percent / 100).rejects(Priority.LOW, 3 * percent / 400)


@pytest.mark.parametrize("threshold", [0, -1, 1.0001, float("nan"), "0.8", None, True])
def test_a_threshold_that_cannot_be_meant(threshold: Any) -> None:
    with pytest.raises(InvalidThreshold):
        PriorityThresholds(threshold)
