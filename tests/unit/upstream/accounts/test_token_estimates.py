"""The estimates of an account are corrected by the usage of its calls."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.interfaces import Charge
from forebay.upstream.accounts.token_estimates import TokenEstimates


def test_the_ratio_of_input_tokens_follows_the_observed_usage() -> None:
    estimates = TokenEstimates()
    assert estimates.input_ratio == 1.0
    for _ in range(200):
        estimates.observe(0.0, 100, Charge(input_tokens=150))
    assert estimates.input_ratio == pytest.approx(1.5, abs=0.01)
    estimates.observe(0.0, 0, Charge(input_tokens=10))
    estimates.observe(0.0, 10, Charge(input_tokens=0))
    estimates.observe(0.0, 1, Charge(input_tokens=10**9))
    assert estimates.input_ratio < 2.0


@given(observed=st.lists(st.tuples(st.integers(-5, 10**9), st.integers(-5, 10**9)), max_size=50))
def test_the_ratio_of_input_tokens_stays_within_reason(observed: list[tuple[int, int]]) -> None:
    estimates = TokenEstimates()
    for estimated, used in observed:
        estimates.observe(0.0, estimated, Charge(input_tokens=used))
    assert 0.7 - 1e-9 <= estimates.input_ratio <= 10.0 + 1e-9


def test_the_output_of_a_typical_call_is_known_after_five_calls() -> None:
    estimates = TokenEstimates()
    for tokens in (100, 200, 300, 400):
        estimates.observe(0.0, 10, Charge(output_tokens=tokens))
        assert estimates.output_tokens is None
    estimates.observe(0.0, 10, Charge(output_tokens=500))
    assert estimates.output_tokens == 300


def test_texts_with_few_tokens_lower_what_others_reserve_by_a_third_at_most() -> None:
    estimates = TokenEstimates()
    for _ in range(200):
        estimates.observe(0.0, 1_000, Charge(input_tokens=10))
    assert estimates.input_ratio == pytest.approx(0.7)


def test_the_largest_output_is_forgotten_in_time_also_if_no_call_is_sent() -> None:
    estimates = TokenEstimates()
    estimates.observe(0.0, 10, Charge(output_tokens=128_000))
    estimates.observe(0.0, 10, Charge(output_tokens=100))
    assert estimates.largest_output(0.0) == pytest.approx(126_720)
    assert estimates.largest_output(600.0) == pytest.approx(63_360)
    assert estimates.largest_output(6_000.0) < 130
    estimates.observe(6_000.0, 10, Charge(output_tokens=300))
    assert estimates.largest_output(6_000.0) == pytest.approx(300)
