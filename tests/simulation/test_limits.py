"""The adaptive limit compared with an ideal scheduler, and with limits that collapse.

The published numbers come from `python -m bench goodput` and `recovery`; these are the same runs, fewer of them.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import pytest
from bench import recovery
from bench.calls.limits import LIMITS, OURS, UPSTREAM
from bench.calls.scenarios import SCENARIOS
from bench.calls.upstream_run import UpstreamRun

from forebay.interfaces import Outcome
from forebay.limit import AdaptiveLimit, Grant

MIN_SHARES = {  # of the ideal scheduler's work; slightly less than measured, because these are single runs
    "steady": 0.97,
    "burst": 0.97,
    "halved and back": 0.94,
    "four times the capacity": 0.9,
    "silent slowdown": 0.97,
    "concurrency-bound": 0.95,
    "3 % background refusals": 0.96,
    "outage of a minute": 0.95,
    "slow whatever our load": 0.94,
    "baseline 25 % too short": 0.93,
}


MOST_REFUSED = {  # least of the reference's work, and most of the calls refused, where refusals say little
    "refuses after 30 s": (0.93, 0.1),
    "40,000 tokens in flight": (0.93, 0.6),
    "10 replicas of 5": (0.95, 0.45),
    "50 replicas of 1": (0.45, 0.45),
    "1 slot for 3 s of each 20": (0.95, 0.06),
    "1 slot for new calls, 3 s of each 20": (0.85, 0.25),
    "1 slot": (0.95, 0.1),
    "2 slots": (0.95, 0.06),
    "3 slots": (0.95, 0.05),
    "2 slots, shared": (0.8, 0.0),
    "latency noise of 0.8": (0.93, 0.01),
}


def share(scenario: str, limit: str, *, seed: int = 5) -> float:
    found = SCENARIOS[scenario]
    record = found.run(limit, LIMITS[limit](found.config.slots), seed)
    return record.work(60, 600) / found.run("oracle", None, seed).work(60, 600)


@pytest.mark.parametrize("scenario", MIN_SHARES)
def test_the_adaptive_limit_gets_the_goodput_of_an_oracle(scenario: str) -> None:
    assert share(scenario, OURS) >= MIN_SHARES[scenario]


@pytest.mark.parametrize("scenario", MOST_REFUSED)
def test_the_adaptive_limit_gets_what_can_be_had_where_refusals_say_little(scenario: str) -> None:
    found, (least, most) = SCENARIOS[scenario], MOST_REFUSED[scenario]
    record = found.run(OURS, AdaptiveLimit(), 5)
    assert record.work(60, 600) >= least * found.run("oracle", None, 5).work(60, 600)
    assert record.share_refused(60, 600) <= most


@pytest.mark.slow
def test_the_adaptive_limit_follows_a_capacity_that_goes_up_and_down_within_a_minute() -> None:
    found = SCENARIOS["15 to 105 slots, a sine of a minute"]
    record = found.run(OURS, AdaptiveLimit(), 5)
    assert record.work(60, 600) >= 0.88 * found.run("oracle", None, 5).work(60, 600)
    assert record.share_refused(60, 600) <= 0.25


@pytest.mark.slow
def test_an_upstream_sees_no_limit_where_there_is_none() -> None:
    """Check an hour of calls whose latency varies much by chance, through a whole upstream."""
    found = SCENARIOS["no limit, latency noise of 0.8"]
    record = UpstreamRun(found.config, found.callers(UPSTREAM), seed=1).run()
    assert record.work(60, 3600) >= 0.95 * found.run("oracle", None, 1).work(60, 3600)


@pytest.mark.slow
def test_goodput_is_monotone_in_the_offered_load() -> None:
    shares = []
    for load in (1.0, 2.0, 4.0, 10.0):
        found = replace(SCENARIOS["steady"], offered=load)
        record = found.run(OURS, AdaptiveLimit(), 1)
        shares.append(record.work(60, 600) / found.run("oracle", None, 1).work(60, 600))
    assert min(shares) >= 0.95
    assert all(more >= 0.95 * less for less, more in itertools.pairwise(shares))


@pytest.mark.parametrize("limit", ["Vegas", "timeout AIMD"])
def test_latency_based_limits_fail_on_language_models(limit: str) -> None:
    assert share("steady", limit) < 0.4


def test_a_few_background_refusals_ruin_plain_aimd() -> None:
    assert share("1 % background refusals", "AIMD") < 0.7


@pytest.mark.parametrize("shares", [True, False], ids=["sharing", "throttling"])
def test_goodput_recovers_within_ninety_seconds(shares: bool) -> None:  # noqa: FBT001 - a parameter
    assert recovery.seconds(recovery.one((OURS, 1, shares))) <= 90


def test_a_semaphore_with_uncapped_retries_never_recovers() -> None:
    """The negative control: a provider that cannot be overloaded would prove nothing."""
    record = recovery.one((recovery.CONTROL, 1, True))
    assert recovery.seconds(record) == math.inf
    assert record.work(540, 660) < 0.2 * record.work(60, 120)


class CountingLimit(AdaptiveLimit):
    """A limit that counts how often each permit is reported to it."""

    def __init__(self) -> None:
        super().__init__()
        self.given: list[Grant] = []
        self.observed: Counter[int] = Counter()
        self.accepted_count: Counter[int] = Counter()

    def grant(self, now: float, in_flight: int) -> Grant:
        self.given.append(super().grant(now, in_flight))
        return self.given[-1]

    def accepted(self, now: float, grant: Grant) -> None:
        self.accepted_count[id(grant)] += 1
        super().accepted(now, grant)

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        self.observed[id(grant)] += 1
        super().observe(now, grant, outcome, slowdown=slowdown)


@pytest.mark.parametrize("scenario", ["bursts of 529", "outage of a minute"])
def test_every_permit_is_observed_once(scenario: str) -> None:
    limit = CountingLimit()
    SCENARIOS[scenario].run(OURS, limit, 2)
    assert max(limit.observed.values()) == 1
    assert max(limit.accepted_count.values()) == 1
    assert len(limit.given) - len(limit.observed) <= limit.limit(600.0)  # permits of calls that were still in flight
