"""Storms of retries: every task ends once, within its attempts and the retry budget, and holds no slot meanwhile."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation import retry_storm


@pytest.mark.parametrize(
    "seed", [seed if seed < 60 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(500)]
)
def test_no_failure_cancellation_or_drain_of_a_storm_breaks_a_promise(seed: int) -> None:
    try:
        retry_storm.run(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.retry_storm {seed}")
        raise


def test_the_storms_cover_all_outcomes() -> None:
    """Otherwise they would prove nothing."""
    happened = sum((retry_storm.run(seed).happened for seed in range(30)), Counter[str]())
    assert {
        "retried", "retries", "zombies", "budget used up", "succeeded", "failed", "timed_out", "cancelled", "expired",
        "drained", "drained within a limit", "SupervisorClosed",
    } <= set(+happened)  # fmt: skip
