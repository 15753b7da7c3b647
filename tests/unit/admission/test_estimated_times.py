"""Service times by estimate: which figure predicts them, and when none does."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay import Estimate
from forebay.admission import EstimatedTimes

SECONDS = st.floats(0.01, 1000.0)


def learned(*samples: tuple[float, Estimate]) -> EstimatedTimes:
    times = EstimatedTimes()
    for seconds, estimate in samples:
        times.record(seconds, estimate)
    return times


def seconds_of(times: EstimatedTimes, estimate: Estimate) -> float | None:
    """Return the median of what such a task is expected to take."""
    known = times.of(estimate)
    return None if known is None else known[1] * (known[0].median() or 0.0)


def of_tokens(count: int, *, seconds_per_token: float = 0.01) -> list[tuple[float, Estimate]]:
    sizes = [100 * 2 ** (number % 4) for number in range(count)]
    return [(seconds_per_token * tokens, Estimate(output_tokens=tokens)) for tokens in sizes]


def test_a_task_is_expected_to_take_its_tokens_times_the_seconds_for_each() -> None:
    times = learned(*of_tokens(8))
    assert seconds_of(times, Estimate(output_tokens=3000)) == pytest.approx(30.0)
    assert seconds_of(times, Estimate(output_tokens=10)) == pytest.approx(0.1)


def test_fewer_than_eight_tasks_predict_nothing() -> None:
    assert learned(*of_tokens(7)).of(Estimate(output_tokens=100)) is None


@given(st.floats(0.01, 100.0), st.integers(1, 1000))
def test_a_constant_factor_in_the_estimates_changes_nothing(seconds_per_token: float, factor: int) -> None:
    samples = of_tokens(20, seconds_per_token=seconds_per_token)
    too_high = [(seconds, Estimate(output_tokens=factor * made.output_tokens)) for seconds, made in samples]
    right = seconds_of(learned(*samples), Estimate(output_tokens=500))
    assert seconds_of(learned(*too_high), Estimate(output_tokens=500 * factor)) == pytest.approx(right)


@given(st.lists(st.tuples(SECONDS, st.integers(1, 100_000)), min_size=8, max_size=20))
def test_estimates_that_grow_where_times_fall_are_not_used(samples: list[tuple[float, int]]) -> None:
    falling = sorted((seconds for seconds, _ in samples), reverse=True)
    growing = sorted(tokens for _, tokens in samples)
    times = learned(*((t, Estimate(output_tokens=n)) for t, n in zip(falling, growing, strict=True)))
    assert times.of(Estimate(output_tokens=100)) is None


@pytest.mark.parametrize("step", [3, 7, 9, 11, 13, 17])
def test_estimates_that_say_nothing_are_not_used(step: int) -> None:
    samples = [(1.0 + number, 1 + step * number % 20) for number in range(20)]  # each size once, in another order
    times = learned(*((seconds, Estimate(output_tokens=tokens)) for seconds, tokens in samples))
    assert times.of(Estimate(output_tokens=10)) is None


def test_the_figure_that_predicts_best_is_used() -> None:
    samples = [
        (3.0 * calls, Estimate(calls=calls, output_tokens=1 + 7 * number % 20, input_tokens=100 * calls + 300))
        for number, calls in enumerate([1, 2, 4, 8, 16] * 4)
    ]
    assert seconds_of(learned(*samples), Estimate(calls=10, output_tokens=1, input_tokens=1)) == pytest.approx(30.0)


def test_a_task_without_the_figure_is_like_any_other() -> None:
    times = learned(*of_tokens(8))
    assert times.of(Estimate(calls=5)) is None


def test_a_figure_that_one_of_the_tasks_lacks_is_not_used() -> None:
    assert learned(*of_tokens(8), (1.0, Estimate(calls=1))).of(Estimate(output_tokens=100)) is None


@given(SECONDS)
def test_tasks_that_all_take_as_long_need_no_estimate(seconds: float) -> None:
    times = learned(*((seconds, Estimate(output_tokens=100 + number)) for number in range(20)))
    assert times.of(Estimate(output_tokens=100)) is None


def test_one_that_was_cut_off_counts_as_half_as_long_again() -> None:
    times = learned(*of_tokens(19))
    times.record(1.0, Estimate(output_tokens=100), timeout=True)
    known = times.of(Estimate(output_tokens=100))
    assert known is not None
    assert known[0].quantile(0.95) * known[1] == pytest.approx(1.5)
    assert known[0].optimistic() * known[1] == pytest.approx(1.0)


def test_only_the_latest_twenty_count() -> None:
    times = learned(*of_tokens(20), *of_tokens(20, seconds_per_token=0.5))
    assert seconds_of(times, Estimate(output_tokens=100)) == pytest.approx(50.0)


def test_a_figure_may_be_larger_than_any_float() -> None:
    times = learned(*of_tokens(12), *((10.0, Estimate(output_tokens=10**400)) for _ in range(8)))
    times.of(Estimate(output_tokens=10**400))
