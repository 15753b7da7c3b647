"""Storms on the call plane: providers that mislead, punish or change, callers that fail, and money."""

from __future__ import annotations

from types import ModuleType

import pytest
from tests.simulation import blame_storm, control_storm, money_storm
from tests.simulation.call_surge import seeds


def run(storm: ModuleType, seed: int) -> None:
    try:
        storm.run(seed)
    except BaseException as failure:
        failure.add_note(f"Repeat it with: .venv/bin/python -m {storm.__name__} {seed}")
        raise


@pytest.mark.parametrize("seed", seeds(len(control_storm.CASES), 1))
def test_what_a_provider_can_serve_is_used_and_nobody_hammers_it(seed: int) -> None:
    run(control_storm, seed)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [201, 229, 257, 341, 425, 453, 537, 901, 985])
def test_a_capacity_that_dips_for_seconds_is_not_taken_for_a_rate_for_long(seed: int) -> None:
    storm = control_storm.ControlStorm(seed)
    assert storm.name == "slots, dips"
    run(control_storm, seed)


@pytest.mark.parametrize("seed", seeds(len(blame_storm.KINDS), 1))
def test_callers_models_and_requests_that_fail_do_not_harm_the_others(seed: int) -> None:
    run(blame_storm, seed)


@pytest.mark.parametrize("seed", seeds(6, 1))
def test_no_budget_is_passed_and_what_is_used_up_stays_used_up(seed: int) -> None:
    run(money_storm, seed)
