"""Flaky branches of a fan-out neither delay the healthy ones nor cost more retries than the budget allows."""

from __future__ import annotations

import pytest
from bench.fan_out import FAILURES, FLAKY, LARGEST, WIDTH, one


@pytest.mark.parametrize("kind", [kind for kind, failures in FAILURES.items() if failures])
@pytest.mark.parametrize("seed", range(3))
def test_one_flaky_branch_in_ten_delays_the_healthy_ones_by_less_than_a_tenth(kind: str, seed: int) -> None:
    without, flaky = one(("forebay", "none", seed)), one(("forebay", kind, seed))
    assert len(flaky.healthy) == WIDTH - FLAKY
    assert max(flaky.healthy) <= LARGEST * max(without.healthy)
    assert flaky.retries
    assert flaky.most_over_budget() <= 0
