"""The decision of an autoscaler: windows, panic, stabilization, and the freeze while something else is short."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from tests.unit.scale.fluid_fleet import FluidFleet, reversals

from forebay.errors import InvalidSetting
from forebay.interfaces import Demand
from forebay.scale import ScaleDecider, ScalePolicy, slots_asked

QUOTA = "openai:requests"


def decide(decider: ScaleDecider, *asked: float, start: float = 0.0, current: int = 1, **options: Any) -> list[int]:
    """Return the replicas after each reading, two seconds apart; each is ready at once."""
    replicas = []
    for number, slots in enumerate(asked):
        current = decider.decide(
            start + 2.0 * number, asked=slots, current=current, ready=options.pop("ready", current), **options
        ).replicas
        replicas.append(current)
    return replicas


# --- what is asked for ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("demand", "refused", "service", "outside", "asked"),
    [
        # Here: what runs, and of what waits as many as let all begin within the drain target of 30 seconds.
        (Demand(running=5), 0.0, 10.0, False, 5.0),
        (Demand(running=5, queued=30), 0.0, 10.0, False, 15.0),
        (Demand(running=5, queued=10, spilled=20), 0.0, 10.0, False, 15.0),
        (Demand(running=5, queued=10), 0.0, 90.0, False, 15.0),  # never more than one slot each
        (Demand(running=5, queued=30), 0.0, 0.1, False, 5.1),
        # Refused work would hold its rate times its service time, however short that is.
        (Demand(running=5), 100.0, 0.1, False, 15.0),
        # Elsewhere: what other processes run, and the overflow; not what waits in the queue of this one.
        (Demand(running=5, queued=30, spilled=30, elsewhere=7), 0.0, 10.0, True, 17.0),
        # While the service time is unknown, at most twice what runs, and one.
        (Demand(spilled=1000, elsewhere=0), 0.0, None, True, 1.0),
        (Demand(spilled=1000, elsewhere=6), 0.0, None, True, 12.0),
        (Demand(spilled=2, elsewhere=6), 0.0, None, True, 8.0),
        (Demand(), 0.0, None, False, 0.0),
        (Demand(spilled=3, elsewhere=0), 0.0, 0.0, True, 1e-7),  # tasks that take no time ask for something
    ],
)
def test_tasks_ask_for_slots(
    demand: Demand,
    refused: float,
    service: float | None,
    outside: bool,  # noqa: FBT001 - a row
    asked: float,
) -> None:
    found = slots_asked(demand, refused_per_second=refused, service=service, drain=30.0, outside=outside)
    assert found == pytest.approx(asked)


# --- windows ----------------------------------------------------------------------------------------------------------


def test_the_mean_of_a_minute_counts() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100))
    assert decide(decider, *[5.0] * 30, current=10) == [10] * 30
    replicas = decide(decider, *[8.0] * 30, start=60.0, current=10)
    assert replicas[:5] == [10] * 5  # the mean is still within a tenth
    assert replicas[-1] == 16
    assert replicas == sorted(replicas)


def test_a_surge_is_met_by_the_panic_window() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100))
    decide(decider, *[5.0] * 30, current=10)
    assert decide(decider, 20.0, 20.0, 20.0, start=60.0, current=10) == [20, 30, 40]


def test_the_panic_window_counts_until_it_was_not_needed_for_a_window() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100))
    decide(decider, *[5.0] * 30, current=10)
    decide(decider, *[20.0] * 3, start=60.0, current=10)
    for number in range(3, 60):
        now = 60.0 + 2.0 * number
        decision = decider.decide(now, asked=20.0, current=40, ready=40)
        assert decision.panic == (now <= 60.0 + 60.0)  # at 62 s, more than half of what was wanted was ready
        assert decision.replicas == 40


def test_nothing_is_given_back_in_panic() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100, stabilization=0.0))
    decide(decider, 20.0, current=10, ready=1)
    assert decider.decide(10.0, asked=0.0, current=40, ready=40).replicas == 40
    assert decider.decide(61.0, asked=0.0, current=40, ready=40).replicas == 1


def test_replicas_that_start_are_not_asked_for_twice() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=1000))
    current = 10
    for number in range(40):
        current = decider.decide(2.0 * number, asked=50.0, current=current, ready=10).replicas
    assert current == 100


def test_from_zero_by_demand_and_back_when_a_window_was_empty() -> None:
    decider = ScaleDecider(ScalePolicy(seats=8, minimum=0, maximum=10, stabilization=100.0))
    assert decide(decider, 0.0, 0.0, current=0) == [0, 0]
    assert decide(decider, 0.01, start=4.0, current=0, ready=0) == [1]
    replicas = decide(decider, *[0.0] * 100, start=6.0)
    assert replicas.index(0) == 80  # at 166 s: 60 s until the window is empty, and the stabilization


@pytest.mark.parametrize("asked", [1e-15, 1e-9, 0.01])
def test_however_little_is_asked_for_one_replica_starts_and_stays(asked: float) -> None:
    policy = ScalePolicy(seats=100, minimum=0, maximum=10, stabilization=0.0, window=2.0, panic_window=2.0)
    assert decide(ScaleDecider(policy), asked, asked, asked, current=0, ready=0) == [1, 1, 1]
    assert decide(ScaleDecider(policy), *[asked] * 100) == [1] * 100
    assert decide(ScaleDecider(policy), 0.0, 0.0, current=1)[-1] == 0


def test_a_load_that_no_float_divides_by_asks_for_the_maximum() -> None:
    policy = ScalePolicy(load=1e-320, maximum=10)
    assert (policy.replicas_for(10.0, 2), policy.replicas_for(10.0, 0)) == (10, 10)


@pytest.mark.parametrize("load", [0.2, 0.7])
def test_without_a_service_time_the_fleet_doubles_at_most_until_the_next_ones_are_ready(load: float) -> None:
    policy = ScalePolicy(seats=2, load=load, minimum=0, maximum=1000)
    decider, current, ready = ScaleDecider(policy), 0, 0
    steps = []
    for number in range(100):
        if number % 20 == 0:
            ready = current
        demand = Demand(spilled=10_000, elsewhere=2 * ready)
        asked = slots_asked(demand, refused_per_second=0.0, service=None, drain=30.0, outside=True)
        decision = decider.decide(2.0 * number, asked=asked, current=current, ready=ready, double=True)
        assert decision.replicas <= max(1, 2 * ready)
        current = decision.replicas
        steps.append(current)
    assert steps[::20] == [1, 2, 4, 8, 16]


def test_the_bounds_hold_whatever_there_is() -> None:
    policy = ScalePolicy(minimum=3, maximum=5)
    assert decide(ScaleDecider(policy), 0.0, current=1) == [3]
    assert decide(ScaleDecider(policy), 100.0, current=1) == [5]
    assert decide(ScaleDecider(policy), 100.0, current=9) == [5]


# --- stabilization ----------------------------------------------------------------------------------------------------


def test_down_only_to_the_most_of_the_stabilization_window() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100, stabilization=300.0, window=2.0, panic_window=2.0))
    decide(decider, *[10.0] * 10, current=20)
    replicas = decide(decider, *[5.0] * 100, *[1.0] * 200, start=20.0, current=20)
    assert replicas[:149] == [20] * 149  # until 318 s, 300 after the last reading that asked for 20
    assert replicas[150] == 10
    assert replicas[260] == 2


def test_a_fleet_that_is_found_is_given_the_stabilization_window() -> None:
    decider = ScaleDecider(ScalePolicy(maximum=100))
    assert decide(decider, *[0.0] * 150, current=30) == [30] * 150
    assert decide(decider, 0.0, 0.0, start=300.0, current=30)[-1] == 1


def test_the_fleet_turns_down_once_in_two_stabilization_windows() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100, stabilization=100.0, window=2.0, panic_window=2.0))
    decide(decider, *[10.0] * 5, current=20)
    replicas = decide(decider, *[5.0] * 55, *[10.0] * 5, *[5.0] * 100, start=10.0, current=20)
    turns = [10.0 + 2.0 * number for number in range(1, len(replicas)) if replicas[number] < replicas[number - 1]]
    assert len(turns) == 2
    assert turns[1] - turns[0] == pytest.approx(200.0, abs=2.0)  # 100 s after the second rise it would have been 170


# --- the freeze -------------------------------------------------------------------------------------------------------


def test_no_replica_is_added_while_something_else_is_short() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100))
    assert decide(decider, *[50.0] * 60, current=10, limited_by=QUOTA) == [10] * 60
    decision = decider.decide(120.0, asked=50.0, current=10, ready=10, limited_by=QUOTA)
    assert (decision.wanted, decision.limited_by) == (100, QUOTA)


def test_a_shortage_that_comes_and_goes_counts() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100))
    for number in range(60):
        short = None if number % 3 == 2 else QUOTA
        assert decider.decide(2.0 * number, asked=50.0, current=10, ready=10, limited_by=short).replicas == 10


def test_replicas_are_added_once_nothing_else_has_been_short_for_a_panic_window() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, maximum=100))
    decide(decider, *[50.0] * 30, current=10, limited_by=QUOTA)
    assert decide(decider, 50.0, 50.0, 50.0, start=60.0, current=10) == [10, 100, 100]


def test_from_zero_one_starts_though_something_else_is_short_and_no_second_one() -> None:
    decider = ScaleDecider(ScalePolicy(load=0.5, minimum=0, maximum=100))
    assert decide(decider, *[50.0] * 5, current=0, ready=0, limited_by=QUOTA) == [1] * 5


def test_a_frozen_fleet_shrinks_and_has_its_minimum() -> None:
    decider = ScaleDecider(ScalePolicy(minimum=2, maximum=100, stabilization=10.0))
    assert decide(decider, 50.0, current=0, limited_by=QUOTA) == [2]
    assert decide(decider, *[0.5] * 60, start=2.0, current=20, limited_by=QUOTA)[-1] == 2


# --- properties -------------------------------------------------------------------------------------------------------

readings = st.lists(
    st.tuples(st.floats(0.1, 30.0), st.floats(0.0, 200.0), st.sampled_from([None, None, QUOTA]), st.booleans()),
    min_size=1,
    max_size=120,
)
policies = st.builds(
    lambda seats, load, minimum, more, stabilization: ScalePolicy(
        seats=seats, load=load, minimum=minimum, maximum=max(1, minimum + more), stabilization=stabilization
    ),
    seats=st.integers(1, 8),
    load=st.floats(0.1, 1.0),
    minimum=st.integers(0, 5),
    more=st.integers(0, 50),
    stabilization=st.floats(0.0, 300.0),
)


@given(policy=policies, readings=readings, current=st.integers(0, 60))
def test_bounds_hold_and_nothing_is_added_while_frozen(
    policy: ScalePolicy, readings: list[tuple[float, float, str | None, bool]], current: int
) -> None:
    decider, now, turned = ScaleDecider(policy), 0.0, -math.inf
    rose = True
    for seconds, asked, short, obeyed in readings:
        now += seconds
        decision = decider.decide(now, asked=asked, current=current, ready=current, limited_by=short)
        assert policy.minimum <= decision.replicas <= policy.maximum
        if short is not None:
            assert decision.limited_by == short
            assert decision.replicas <= max(current, policy.minimum, 1)
        if decision.panic and current <= policy.maximum:
            assert decision.replicas >= current
        if decision.replicas < current <= policy.maximum and rose:
            assert now >= turned + 2 * policy.stabilization
            turned, rose = now, False
        rose = rose or decision.replicas > current
        current = decision.replicas if obeyed or not policy.minimum <= current <= policy.maximum else current


@given(
    period=st.floats(60.0, 3600.0),
    mean=st.floats(5.0, 100.0),
    amplitude=st.floats(0.1, 1.0),
    seats=st.integers(1, 8),
    service=st.floats(1.0, 60.0),
    start_up=st.sampled_from([0.0, 60.0]),
)
@example(period=450.0, mean=50.0, amplitude=1.0, seats=1, service=10.0, start_up=60.0)
@example(period=301.0, mean=50.0, amplitude=1.0, seats=1, service=10.0, start_up=60.0)
def test_a_sine_load_is_followed_with_one_reversal_for_each_stabilization_window(  # noqa: PLR0913, PLR0917 - a drawn scene
    period: float, mean: float, amplitude: float, seats: int, service: float, start_up: float
) -> None:
    fleet = FluidFleet(ScalePolicy(seats=seats, maximum=1000), service=service, start_up=start_up)
    seconds = 7200.0
    steps = fleet.run(
        lambda now: mean * (1 + amplitude * math.sin(2 * math.pi * now / period)),
        seconds,
        first=math.ceil(mean / seats),
    )
    down, up = reversals(steps)
    assert all(later - earlier >= 2 * 300.0 for earlier, later in itertools.pairwise(down))
    assert len(down) + len(up) <= seconds / 300.0


def test_without_stabilization_a_sine_load_turns_the_fleet_around_all_the_time() -> None:
    """The negative control of the test above: the load is the same, and the windows alone do not hold it."""
    fleet = FluidFleet(ScalePolicy(maximum=1000, stabilization=0.0), start_up=60.0)
    down, up = reversals(fleet.run(lambda now: 50 * (1 + math.sin(2 * math.pi * now / 200.0)), 7200.0, first=50))
    assert len(down) + len(up) > 2 * 7200.0 / 300.0


@pytest.mark.parametrize("factor", [1.5, 2.0, 3.0, 5.0, 10.0])
@pytest.mark.parametrize("service", [2.0, 10.0, 30.0])
@pytest.mark.parametrize("seats", [1, 8])
def test_a_surge_is_met_within_two_windows_though_replicas_start_for_a_minute(
    factor: float, service: float, seats: int
) -> None:
    fleet = FluidFleet(ScalePolicy(seats=seats, maximum=10_000), service=service, start_up=60.0)
    before = 40.0
    steps = fleet.run(
        lambda now: before if now < 600.0 else factor * before, 900.0, first=math.ceil(before / 0.7 / seats)
    )
    met = next(step.at for step in steps if step.at >= 600.0 and step.ready * seats >= factor * before)
    assert met <= 600.0 + 2 * 60.0


def test_by_what_runs_alone_a_surge_is_met_later() -> None:
    """The negative control: by the utilization of the slots, as by that of CPUs, each step is a few replicas."""
    fleet = FluidFleet(ScalePolicy(maximum=10_000), start_up=60.0, counts_waiting=False)
    steps = fleet.run(lambda now: 40.0 if now < 600.0 else 400.0, 900.0, first=58)
    met = next((step.at for step in steps if step.at >= 600.0 and step.ready >= 400.0), math.inf)
    assert met > 600.0 + 2 * 60.0


@given(supply=st.floats(1.0, 30.0), load=st.floats(31.0, 500.0), begins=st.floats(0.0, 600.0))
def test_what_a_quota_cannot_feed_is_not_bought(supply: float, load: float, begins: float) -> None:
    fleet = FluidFleet(
        ScalePolicy(maximum=1000), limited_by=lambda now: QUOTA if now >= begins else None, supply=supply
    )
    steps = fleet.run(lambda now: load if now >= begins else supply * 0.6, 1800.0, first=30)
    bought = [step for step in steps if step.at >= begins and step.replicas > step.before]
    assert not bought
    assume(begins > 0.0)
    blind = FluidFleet(ScalePolicy(maximum=1000), supply=supply)  # the control: it knows nothing of the quota
    assert blind.run(lambda now: load if now >= begins else supply * 0.6, 1800.0, first=30)[-1].replicas > 30


# --- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"seats": 0}, "seats"),
        ({"load": 0.0}, "a share of the slots above 0 and up to 1"),
        ({"load": 1.5}, "load"),
        ({"minimum": -1}, "minimum"),
        ({"maximum": 0}, "maximum"),
        ({"minimum": 3, "maximum": 2}, "at least the minimum, 3"),
        ({"window": 0.0}, "window"),
        ({"panic_window": 90.0}, "at most the window, 60 seconds"),
        ({"stabilization": -1.0}, "stabilization"),
        ({"drain": 0.0}, "or None for half of the window"),
        ({"tolerance": 1.0}, "tolerance"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        ScalePolicy(**settings)
