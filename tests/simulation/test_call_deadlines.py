"""Goodput of callers with deadlines under overload, through an upstream and through a supervisor.

The published numbers come from `python -m bench deadlines`, `goodput` and `recovery`; these are the same runs, fewer.
"""

from __future__ import annotations

from functools import partial

import pytest
from bench import deadlines
from bench.calls.scenarios import provider

from forebay.simulation.provider.provider_config import ProviderConfig

REFUSING_PROVIDER = provider()
SHARING_PROVIDER = provider(overcommit=None, finish_abandoned=True)
share_of_slots = partial(deadlines.share_of_slots, seed=1)


@pytest.mark.slow
def test_goodput_stays_at_ten_times_the_load_of_callers_with_deadlines() -> None:
    assert share_of_slots(REFUSING_PROVIDER, load=10, timeout=60) >= 0.95


@pytest.mark.slow
@pytest.mark.parametrize("overflow", [None, "memory://"], ids=["rejected", "stored"])
@pytest.mark.parametrize(("load", "timeout"), [(1.5, 20), (3, 20), (10, 20), (3, 60), (10, 60)])
def test_tasks_start_in_time_or_not_at_all(load: float, timeout: float, overflow: str | None) -> None:
    """Otherwise the longest-waiting tasks would start just before their deadlines, and a third would end in time."""
    run = deadlines.TaskRun(load=load, timeout=timeout, seed=1, overflow=overflow)
    assert run.share_of_slots() >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("load", [1.5, 3, 10])
def test_calls_with_tight_deadlines_are_sent_early_or_not_at_all(load: float) -> None:
    """Calls sent with half of their twenty seconds left would be cut off in a third of the cases."""
    assert share_of_slots(REFUSING_PROVIDER, load=load, timeout=20) >= 0.9


@pytest.mark.slow
def test_goodput_stays_on_a_provider_that_slows_down_and_finishes_abandoned_calls() -> None:
    assert share_of_slots(SHARING_PROVIDER, load=10, timeout=60) >= 0.8


@pytest.mark.parametrize("config", [REFUSING_PROVIDER, SHARING_PROVIDER], ids=["refusing", "sharing"])
def test_without_deadlines_on_calls_the_same_load_collapses(config: ProviderConfig) -> None:
    """The negative control: calls wait as long as possible, and are sent just before their deadlines."""
    assert share_of_slots(config, load=3, timeout=30, with_deadlines=False) < 0.4
