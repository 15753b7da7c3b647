"""Promise 3 on the call plane, for callers with deadlines: a whole upstream, at many times the load.

The published figures come from `python -m bench goodput` and `recovery`; these are the same runs, fewer of them.
"""

from __future__ import annotations

import pytest
from bench.calls.plant import Callers
from bench.calls.scenarios import CALL, SLOTS, provider
from bench.calls.whole import Whole

from forebay.sim.config import ProviderConfig

MINUTES = 3.0
REFUSING = provider()
SHARING = provider(overcommit=None, run_on=True)  # it works on for those who have hung up


def used(config: ProviderConfig, *, times: float, patience: float, tells: bool = True) -> float:
    """The share of the slots that was put to use, once all is under way."""
    callers = Callers(rate=lambda _: times * SLOTS / CALL, minutes=MINUTES, patience=patience)
    record = Whole(config, callers, seed=1, tells=tells).run()
    return record.work(60, 60 * MINUTES) / SLOTS


@pytest.mark.slow
def test_goodput_stays_when_callers_with_deadlines_bring_ten_times_the_load() -> None:
    assert used(REFUSING, times=10, patience=60) >= 0.95


@pytest.mark.slow
def test_a_provider_that_slows_down_and_works_on_for_those_who_left_is_kept_useful() -> None:
    assert used(SHARING, times=10, patience=60) >= 0.7


@pytest.mark.parametrize("config", [REFUSING, SHARING], ids=["refusing", "sharing"])
def test_where_nobody_tells_the_upstream_its_deadline_the_same_load_collapses(config: ProviderConfig) -> None:
    """The negative control: all wait as long as they may, and are sent when hardly any time is left."""
    assert used(config, times=3, patience=30, tells=False) < 0.4
