"""Storms of fan-outs: one result for each task, within the limit, nothing left behind, and nothing stands still."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation import fan_out_storm


@pytest.mark.parametrize(
    "seed", [seed if seed < 60 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(300)]
)
def test_no_width_limit_quorum_hedge_or_departure_breaks_a_promise(seed: int) -> None:
    try:
        fan_out_storm.run(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.fan_out_storm {seed}")
        raise


def test_the_storms_cover_all_outcomes() -> None:
    """Otherwise they would prove nothing."""
    happened = sum((fan_out_storm.run(seed).happened for seed in range(48)), Counter[str]())
    assert {
        "result succeeded", "result failed", "result expired", "result rejected", "quorum reached",
        "quorum not reached", "left", "reader cancelled", "hedges", "hedges that won", "SupervisorClosed",
    } <= set(+happened)  # fmt: skip
