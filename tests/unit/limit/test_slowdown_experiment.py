"""The experiment on slow calls: it tells our own load from other reasons, and from chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from forebay.clock import new_random
from forebay.limit import Grant
from forebay.limit.adaptive.slowdown_experiment import ExperimentResult, SlowdownExperiment, rank_z


@dataclass
class Provider:
    """A provider that always has as many calls in flight as the limit allows, or as there are; each takes a second."""

    slowdown: Callable[[float], float]  # of a call, by the calls in flight
    level: float
    noise: float = 0.1
    proven: bool = False
    calls: int = 1000  # that the callers have in flight at most
    seed: int = 1
    now: float = 0.0
    results: list[ExperimentResult] = field(default_factory=list)
    experiment: SlowdownExperiment = field(default_factory=SlowdownExperiment)

    def run(self, seconds: int) -> None:
        draw, experiment = new_random(self.seed), self.experiment
        for _ in range(seconds):
            calls = min(self.calls, int(self.level))
            grants = [Grant(self.now, n, at_limit=calls == int(self.level)) for n in range(1, calls + 1)]
            for grant in grants:
                experiment.start(grant)
            self.now += 1.0
            level = self.level
            for left, grant in zip(range(len(grants), 0, -1), grants, strict=True):
                slow = self.slowdown(min(level, calls)) * draw.lognormvariate(-(self.noise**2) / 2, self.noise)
                result = experiment.observe(self.now, grant, level, left, slow, proven=self.proven)
                if result is not None:
                    self.results.append(result)
                    self.level = experiment.target_limit
                    experiment.clear()


def shared(slots: int) -> Callable[[float], float]:
    return lambda level: max(1.0, level / slots)


@pytest.mark.parametrize(("slots", "level"), [(20, 60.0), (3, 20.0), (50, 80.0)])
def test_where_calls_share_the_limit_goes_down_until_they_get_no_faster(slots: int, level: float) -> None:
    provider = Provider(shared(slots), level)
    provider.run(60)
    assert provider.results[-1] is ExperimentResult.KEEP
    assert slots * 0.8 <= provider.level <= slots * 1.6


def test_a_limit_that_is_not_quite_used_up_is_lowered_too() -> None:
    provider = Provider(shared(4), 37.0, calls=32)
    provider.run(60)
    assert provider.results[-1] is ExperimentResult.KEEP
    assert provider.level <= 8


def test_where_less_than_half_of_the_limit_is_used_it_is_not_the_cause() -> None:
    provider = Provider(lambda _: 3.0, 50.0, calls=24)
    provider.run(200)
    assert provider.results == []


def test_calls_that_are_slow_for_another_reason_restore_the_limit() -> None:
    provider = Provider(lambda _: 2.0, 50.0)
    provider.run(200)
    assert provider.results == [ExperimentResult.LOWER, ExperimentResult.RESTORE]  # and then twice is the norm
    assert provider.level == 50.0


def test_calls_that_a_provider_kept_waiting_during_an_experiment_are_not_the_norm() -> None:
    provider = Provider(shared(20), 60.0)
    while not provider.results:
        provider.run(1)
    provider.slowdown = lambda _: 10.0  # it stands still for a while
    provider.run(2)
    assert provider.results == [ExperimentResult.LOWER, ExperimentResult.RESTORE]
    provider.slowdown = shared(20)
    provider.run(60)
    assert provider.results[-1] is ExperimentResult.KEEP
    assert provider.level <= 32


def test_calls_that_get_a_little_faster_restore_the_limit() -> None:
    """Check it where 30 % fewer calls in flight get 10 % faster: so less work is done."""
    provider = Provider(lambda level: 2.0 * (level / 50) ** 0.3, 50.0)
    provider.run(20)
    assert provider.results[:2] == [ExperimentResult.LOWER, ExperimentResult.RESTORE]


@pytest.mark.parametrize("noise", [0.6, 0.8])
def test_chance_begins_no_experiment(noise: float) -> None:
    provider = Provider(lambda _: 1.0, 100.0, noise=noise)
    provider.run(1000)
    assert provider.results == []


def test_a_slowdown_has_a_minute_to_pass_where_the_limit_has_held_against_refusals() -> None:
    provider = Provider(lambda _: 2.0, 50.0, proven=True)
    provider.run(55)
    assert provider.results == []
    provider.run(10)
    assert provider.results[0] is ExperimentResult.LOWER


def test_a_norm_that_has_risen_is_the_norm() -> None:
    provider = Provider(lambda _: 2.0, 50.0)
    provider.run(100)
    found = len(provider.results)
    provider.slowdown = lambda _: 2.2
    provider.run(300)
    assert len(provider.results) == found


def test_ranks_of_equal_samples_differ_by_nothing_and_of_separate_ones_by_much() -> None:
    low, high = [1.0, 1.1, 1.2, 1.3], [2.0, 2.1, 2.2, 2.3]
    assert rank_z(low, low, 1.0) == 0.0
    assert rank_z(high, low, 1.0) == -rank_z(low, high, 1.0) > 2.0
    assert rank_z(high, low, 3.0) < -2.0
    assert rank_z([], low, 1.0, missing=4) == rank_z(high, low, 1.0)
    assert rank_z([], low, 1.0) == 0.0
