"""The latency model: how long a call is expected to take, by its output tokens."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.clock import new_random
from forebay.upstream.accounts.latency import LatencyModel


def trained(calls: int, *, ttft: float, tpot: float, noise: float = 0.0) -> LatencyModel:
    draw = new_random(1)
    model = LatencyModel()
    for _ in range(calls):
        tokens = int(draw.expovariate(1 / 200)) + 1
        model.learn(tokens, (ttft + tokens * tpot) * draw.uniform(1 - noise, 1 + noise))
    return model


def test_it_expects_nothing_before_it_has_seen_enough_calls() -> None:
    assert trained(5, ttft=1.0, tpot=0.02).expected(100) is None


@pytest.mark.parametrize("tokens", [1, 50, 400, 4000])
def test_it_learns_the_time_to_the_first_token_and_per_further_token(tokens: int) -> None:
    model = trained(100, ttft=0.8, tpot=0.02)
    assert model.expected(tokens) == pytest.approx(0.8 + 0.02 * tokens, rel=1e-3)
    assert model.observe(tokens, 2 * (0.8 + 0.02 * tokens), light=False) == pytest.approx(2.0, rel=1e-3)


def test_with_noise_of_a_third_it_is_right_within_a_fifth() -> None:
    model = trained(300, ttft=0.8, tpot=0.02, noise=0.33)
    for tokens in (50, 200, 800):
        assert model.expected(tokens) == pytest.approx(0.8 + 0.02 * tokens, rel=0.2)


def test_it_follows_a_provider_that_has_become_slower() -> None:
    model = trained(100, ttft=0.8, tpot=0.02)
    draw = new_random(2)
    for _ in range(300):
        tokens = int(draw.expovariate(1 / 200)) + 1
        model.learn(tokens, 1.6 + 0.04 * tokens)
    assert model.expected(200) == pytest.approx(9.6, rel=0.05)


def test_slowdown_by_our_own_load_is_not_taken_for_normal() -> None:
    model = trained(100, ttft=0.8, tpot=0.02)
    for _ in range(300):
        slowdown = model.observe(200, 9.6, light=False)
    assert slowdown == pytest.approx(2.0)


def test_slowdowns_can_be_compared_however_wrong_the_first_dozen_of_calls_was() -> None:
    model = trained(12, ttft=10.0, tpot=0.2)
    slowdowns = [model.observe(tokens, 1.0 + 0.02 * tokens, light=False) for tokens in range(100, 500)]
    assert slowdowns == [pytest.approx(0.1)] * 400


CALLS = st.lists(st.tuples(st.integers(0, 100_000), st.floats(0, 1e5)), min_size=1, max_size=60)


@given(CALLS, st.integers(0, 100_000))
def test_it_expects_a_positive_time_after_any_calls(calls: list[tuple[int, float]], tokens: int) -> None:
    model = LatencyModel()
    for seen, seconds in calls:
        model.learn(seen, seconds)
    expected = model.expected(tokens)
    assert expected is None or 0 < expected < 1e12
