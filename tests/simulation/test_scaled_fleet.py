"""Fleets that an autoscaler scales: surges are met, sines do not turn it around, and nothing is bought in vain."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.simulation import scaled_fleet
from tests.simulation.scaled_fleet import WINDOW, ScaledFleet

from forebay.interfaces import Demand
from forebay.scale import decision

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own
SEEDS = [seed if seed < 5 else pytest.param(seed, marks=pytest.mark.slow) for seed in range(30)]


@pytest.mark.parametrize("seed", SEEDS)
def test_no_load_and_no_shortage_breaks_a_promise(seed: int) -> None:
    try:
        scaled_fleet.run(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m tests.simulation.scaled_fleet {seed}")
        raise


@pytest.mark.slow
def test_the_fleets_cover_all_outcomes() -> None:
    """Otherwise they would prove nothing."""
    happened = sum((scaled_fleet.run(seed).happened for seed in range(5, 15)), Counter[str]())
    assert {
        "surges met", "replicas removed", "reversals", "held by the quota", "held by the budget", "held by the breaker",
        "replicas not bought",
    } <= set(+happened)  # fmt: skip


# --- negative controls ------------------------------------------------------------------------------------------------


def test_a_fleet_that_is_not_frozen_buys_what_a_budget_cannot_feed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decision.ScaleDecider, "_bottleneck", lambda _self, _now: None)
    fleet = ScaledFleet(3)
    with pytest.raises(AssertionError, match="nobody has noticed"):
        fleet.run()
    assert fleet.bought() > 0


def test_by_what_runs_alone_a_surge_is_not_met_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The slots that are taken, as the utilization of a CPU would be; and one, or the first replica never starts."""

    def taken(demand: Demand, **_: object) -> float:
        return float(demand.elsewhere or min(1, demand.spilled))

    monkeypatch.setattr("forebay.scale.autoscaler.slots_asked", taken)
    fleet = ScaledFleet(0)
    fleet.seconds = 600.0
    with pytest.raises(AssertionError, match="a surge by"):
        fleet.run()
    assert fleet.met_after() > 2 * WINDOW
