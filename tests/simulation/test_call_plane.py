"""A supervisor and an upstream on one simulated key: limits, goodput under overload, and the effect of each part."""

from __future__ import annotations

import itertools

import pytest
from tests.simulation.agent_fleet import CALLER_TIMEOUT, MODEL, AgentFleet, capacity, provider_config

from forebay.simulation.provider.provider_config import CapacityStep, ProviderConfig, SimulatedRateLimit, Unit

SEEDS = range(1)


def settled(fleet: AgentFleet) -> bool:
    """Return True if calls hold no resources."""
    account = fleet.upstream.core.accounts.account(MODEL).account
    return account.in_flight == account.expected_calls == len(account.queue) == 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", SEEDS)
def test_goodput_is_that_of_an_oracle_at_any_load(seed: int) -> None:
    config = provider_config()
    shares = []
    for times in (1, 3, 10):
        fleet = AgentFleet(config, times * capacity(config), seed=seed, minutes=4.0).run()
        shares.append(fleet.per_second() / capacity(config))
        assert fleet.failed == 0
        assert fleet.refusals <= 0.02 * fleet.calls  # the limit is unknown and must be probed
        assert settled(fleet)
    assert shares[-1] >= 0.95, shares
    for less, more in itertools.pairwise(shares):
        assert more >= 0.95 * less, shares


@pytest.mark.parametrize("seed", SEEDS)
def test_without_a_limit_on_calls_the_same_fleet_collapses(seed: int) -> None:
    """The negative control: a key that cannot be overloaded would prove nothing."""
    fleet = AgentFleet(provider_config(), 3 * capacity(provider_config()), seed=seed, minutes=4.0, limited=False).run()
    assert fleet.per_second() < 0.7 * capacity(provider_config())


@pytest.mark.slow
def test_the_start_gate_keeps_goodput_with_many_workers() -> None:
    offered = 3 * capacity(provider_config())
    gated = AgentFleet(provider_config(), offered, minutes=4.0, workers=1000).run()
    open_ = AgentFleet(provider_config(), offered, minutes=4.0, workers=1000, max_start_wait=1e9).run()
    assert gated.per_second() >= 0.95 * capacity(provider_config())
    assert open_.per_second() < 0.5 * capacity(provider_config())  # all start, and most end too late for their callers


def test_runs_do_not_start_faster_than_they_end_on_a_small_key() -> None:
    config = provider_config(3)
    fleet = AgentFleet(config, 7 * capacity(config), minutes=3.0, workers=24, max_queue_size=12).run()
    assert fleet.share(120, 180) >= 0.9


@pytest.mark.parametrize("seed", SEEDS)
def test_goodput_follows_a_key_that_loses_half_of_its_slots_for_a_while(seed: int) -> None:
    config = provider_config(capacity_steps=(CapacityStep(at=90, slots=10), CapacityStep(at=200, slots=20)))
    fleet = AgentFleet(config, 3 * capacity(provider_config()), seed=seed, minutes=6.0).run()
    full = capacity(provider_config())
    assert fleet.per_second(60, 90) >= 0.9 * full
    assert fleet.per_second(120, 200) >= 0.9 * full / 2
    assert fleet.per_second(250) >= 0.9 * full


@pytest.mark.parametrize("seed", SEEDS)
def test_goodput_recovers_after_an_outage(seed: int) -> None:
    config = provider_config(capacity_steps=(CapacityStep(at=90, slots=0), CapacityStep(at=150, slots=20)))
    fleet = AgentFleet(config, 3 * capacity(provider_config()), seed=seed, minutes=6.0).run()
    assert fleet.per_second(150 + 60) >= 0.95 * capacity(provider_config())
    assert settled(fleet)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_rate_limit_in_headers_is_used_fully_and_not_exceeded(seed: int) -> None:
    rate = SimulatedRateLimit(unit=Unit.REQUESTS, amount=600)
    config = ProviderConfig(slots=1000, ttft=0.5, tpot=0.01, rate_limits=(rate,))
    # After five minutes calls beyond the quota are tried once; `test_misleading_headers.py` has what that costs.
    fleet = AgentFleet(config, 3 * 600 / 60 / 4, seed=seed, minutes=4.5).run()
    assert fleet.refusals <= 0.005 * fleet.calls
    assert fleet.per_second(120) * 4 >= 0.98 * 600 / 60
    assert fleet.failed == 0


def test_caller_timeouts_are_longer_than_a_run() -> None:
    """Otherwise a fleet without goodput would say nothing about the start gate."""
    assert CALLER_TIMEOUT > 4 * 1.5 * 5
