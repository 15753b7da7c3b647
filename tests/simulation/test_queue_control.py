"""Tasks with deadlines: with estimates, and where bursts may wait, more of them end in time."""

from __future__ import annotations

import pytest
from bench.queue.deadline_run import Case, DeadlineRun, Outcome
from bench.queue.policies import OURS

STRICT = "expected wait"  # every queue is judged as one that stands


def outcome(policy: str = OURS, *, load: float, bursts: bool = False, estimates: str = "none", seed: int) -> Outcome:
    return DeadlineRun(Case(policy=policy, load=load, bursts=bursts, estimates=estimates, seed=seed)).run()


@pytest.mark.parametrize("seed", range(2))
def test_of_bursts_that_could_be_served_more_end_in_time_than_with_short_waits(seed: int) -> None:
    ours, strict = outcome(load=0.9, bursts=True, seed=seed), outcome(STRICT, load=0.9, bursts=True, seed=seed)
    assert ours.in_time >= 1.1 * strict.in_time
    assert ours.work >= 1.05 * strict.work


@pytest.mark.parametrize("seed", range(2))
def test_a_steady_overload_is_served_as_well_as_with_short_waits(seed: int) -> None:
    ours, strict = outcome(load=3.0, seed=seed), outcome(STRICT, load=3.0, seed=seed)
    assert ours.in_time >= 0.95 * strict.in_time
    assert ours.work >= 0.9 * strict.work


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("estimates", ["exact", "rough", "three times too high"])
def test_with_estimates_more_tasks_end_in_time(estimates: str, seed: int) -> None:
    assert outcome(load=2.0, estimates=estimates, seed=seed).in_time >= 1.1 * outcome(load=2.0, seed=seed).in_time


@pytest.mark.parametrize("seed", range(2))
def test_useless_estimates_cost_little(seed: int) -> None:
    useless, none = outcome(load=2.0, estimates="useless", seed=seed), outcome(load=2.0, seed=seed)
    assert useless.in_time >= 0.93 * none.in_time
