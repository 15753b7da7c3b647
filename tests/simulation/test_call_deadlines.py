"""Promise 3 for callers with deadlines, at many times the load: a whole upstream, and a supervisor.

The published figures come from `python -m bench deadlines`, `goodput` and `recovery`; these are the same runs, fewer.
"""

from __future__ import annotations

from functools import partial

import pytest
from bench import deadlines
from bench.calls.scenarios import provider

from forebay.simulation.provider.provider_config import ProviderConfig

REFUSING = provider()
SHARING = provider(overcommit=None, run_on=True)  # it works on for those who have hung up
used = partial(deadlines.used, seed=1)


@pytest.mark.slow
def test_goodput_stays_when_callers_with_deadlines_bring_ten_times_the_load() -> None:
    assert used(REFUSING, times=10, patience=60) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("overflow", [None, "memory://"], ids=["rejected", "stored"])
@pytest.mark.parametrize(("times", "patience"), [(1.5, 20), (3, 20), (10, 20), (3, 60), (10, 60)])
def test_tasks_are_begun_in_time_or_not_at_all(times: float, patience: float, overflow: str | None) -> None:
    """Else what waits longest, inside or outside, is begun when hardly any time is left: a third would be of use."""
    tasks = deadlines.Tasks(times=times, patience=patience, seed=1, overflow=overflow)
    assert tasks.used() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("times", [1.5, 3, 10])
def test_callers_in_a_hurry_are_sent_early_or_not_at_all(times: float) -> None:
    """With half of their twenty seconds left when they are sent, a third of the calls would be cut off."""
    assert used(REFUSING, times=times, patience=20) >= 0.9


@pytest.mark.slow
def test_a_provider_that_slows_down_and_works_on_for_those_who_left_is_kept_useful() -> None:
    assert used(SHARING, times=10, patience=60) >= 0.8


@pytest.mark.parametrize("config", [REFUSING, SHARING], ids=["refusing", "sharing"])
def test_where_nobody_tells_the_upstream_its_deadline_the_same_load_collapses(config: ProviderConfig) -> None:
    """The negative control: all wait as long as they may, and are sent when hardly any time is left."""
    assert used(config, times=3, patience=30, tells=False) < 0.4
