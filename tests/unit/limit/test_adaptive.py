"""The adaptive limit, on a server whose calls all take a second."""

from __future__ import annotations

import heapq
import math
from collections import deque

import pytest
from tests.unit.limit.server import Server

from forebay.clock import new_random
from forebay.interfaces import Outcome
from forebay.limit import AdaptiveLimit, AdaptiveLimitState, Grant
from forebay.upstream.accounts.latency import LatencyModel


def settled_server(capacity: int = 50, stray: int = 0) -> Server:
    """Return a server whose limit has found its capacity."""
    server = Server(AdaptiveLimit(), capacity, stray=stray)
    server.run(120)
    return server


def adaptive(server: Server) -> AdaptiveLimit:
    assert isinstance(server.limit, AdaptiveLimit)
    return server.limit


def test_the_limit_doubles_up_to_the_capacity_and_stays_there() -> None:
    server = Server(AdaptiveLimit(initial_limit=1), 50)
    server.run(60)
    server.run(300)
    assert 49 <= min(server.seen[60:]) <= max(server.seen[60:]) <= 52


def test_a_settled_limit_is_refused_only_a_few_times_a_minute() -> None:
    server = settled_server()
    before = server.refused
    server.run(300)
    assert server.refused - before <= 20


@pytest.mark.parametrize("one_in", [100, 33])
def test_stray_refusals_do_not_lower_the_limit(one_in: int) -> None:
    server = settled_server(stray=one_in)
    server.run(300)
    assert min(server.seen[120:]) >= 45


def test_a_stray_refusal_of_a_lone_call_does_not_lower_the_limit() -> None:
    server = settled_server()
    limit = server.limit
    limit.observe(server.now, limit.grant(server.now, 1), Outcome.OVERLOAD)
    assert limit.limit(server.now) >= 49


def test_the_limit_follows_the_capacity_down_and_up() -> None:
    server = settled_server()
    server.capacity = 20
    server.run(60)
    assert 18 <= server.seen[-1] <= 23
    server.capacity = 50
    server.run(60)
    assert server.seen[-1] >= 48


def test_acceptances_are_enough_to_follow_a_capacity_that_is_far_above_all_that_was_refused() -> None:
    server = Server(AdaptiveLimit(), 50, seconds=20, prompt=True)
    server.run(600)
    assert 48 <= min(server.seen[400:]) <= max(server.seen[400:]) <= 52
    server.capacity = 200
    server.run(35)  # up to 30 until a probe is due; by rounds of ended calls it takes 100
    assert server.seen[-1] >= 190


def test_acceptances_alone_raise_a_limit_to_four_times_what_is_known_to_be_fast() -> None:
    server = Server(AdaptiveLimit(), 50, seconds=20, prompt=True)
    server.run(600)
    server.capacity = 10_000
    server.run(39)  # the calls that were sent in the latest 20 have not ended
    assert 200 <= server.seen[-1] <= 4 * 55


@pytest.mark.parametrize(("seconds", "limit"), [(44.0, 11), (46.0, 20)])
def test_a_first_call_that_took_long_doubles_the_limit(seconds: float, limit: int) -> None:
    adaptive = AdaptiveLimit()
    grants = [adaptive.grant(0.0, in_flight) for in_flight in range(1, 11)]
    for grant in grants:
        adaptive.accepted(1.0, grant)
    assert adaptive.limit(seconds) == 10
    adaptive.observe(seconds, grants[-1], Outcome.SUCCESS, slowdown=1.0)
    assert adaptive.limit(seconds) == limit


def test_calls_of_minutes_raise_a_limit_when_they_are_accepted() -> None:
    server = Server(AdaptiveLimit(), 1000, seconds=60, prompt=True)
    server.run(120)
    assert server.seen[-1] <= 2 * 15  # the calls that ended had 10 to 20 in flight
    server.run(240)
    assert server.seen[-1] >= 120  # by rounds of ended calls 78


def test_a_call_that_takes_long_raises_no_limit_that_was_not_used_up() -> None:
    adaptive = AdaptiveLimit()
    grant = adaptive.grant(0.0, 1)
    adaptive.observe(100.0, grant, Outcome.SUCCESS, slowdown=1.0)
    assert adaptive.limit(100.0) == 10


def test_in_an_outage_it_sends_trial_calls_and_then_returns_to_the_best_limit() -> None:
    server = settled_server()
    server.capacity = 0
    server.run(20)
    limit = adaptive(server)
    assert limit.state(server.now) is AdaptiveLimitState.BACKING_OFF
    before = server.sent
    server.run(60)
    assert 10 <= server.sent - before <= 20  # about one trial call in five seconds
    server.capacity = 50
    server.run(20)
    assert server.seen[-1] >= 45


def test_the_limit_is_back_seconds_after_a_short_drop_of_capacity() -> None:
    server = settled_server()
    server.capacity = 25
    server.run(2)
    server.capacity = 50
    server.run(12)
    assert server.seen[-1] >= 45


def test_a_call_of_an_earlier_epoch_changes_nothing() -> None:
    limit = AdaptiveLimit(initial_limit=20)
    old = [limit.grant(0.0, 20) for _ in range(40)]
    for grant in old[:10]:
        limit.observe(0.1, grant, Outcome.OVERLOAD)
    assert limit.epoch == 2
    level = limit.limit(0.1)
    for grant in old[10:25]:
        limit.observe(0.2, grant, Outcome.OVERLOAD)
        limit.observe(0.3, grant, Outcome.SUCCESS)
    assert (limit.limit(0.3), limit.epoch) == (level, 2)


def test_the_limit_does_not_grow_while_it_is_not_used_up() -> None:
    limit = AdaptiveLimit(initial_limit=10)
    for second in range(100):
        limit.observe(second + 1.0, limit.grant(float(second), 3), Outcome.SUCCESS)
    assert limit.limit(100.0) == 10


def test_the_limit_grows_no_further_than_it_is_used() -> None:
    """Check it with twenty-four callers that always have one call in flight each."""
    limit, in_flight = AdaptiveLimit(), deque[Grant]()
    for second in range(200):
        while len(in_flight) < min(24, limit.limit(float(second))):
            in_flight.append(limit.grant(float(second), len(in_flight) + 1))
        limit.observe(second + 1.0, in_flight.popleft(), Outcome.SUCCESS)
    assert limit.limit(200.0) <= 28


def test_the_limit_never_exceeds_max_limit() -> None:
    server = Server(AdaptiveLimit(max_limit=30), 1000)
    server.run(60)
    assert max(server.seen) == 30


def run_shared(server: Server, slots: int, seconds: int) -> None:
    """Run a server that shares `slots`: it refuses nothing, and slows down with the calls in flight."""
    server.capacity = 10_000
    for _ in range(seconds):
        server.slowdown = max(1.0, len(server.in_flight) / slots)
        server.second()


def test_a_slowdown_caused_by_our_load_lowers_the_limit() -> None:
    server = settled_server()
    run_shared(server, 25, 200)
    assert 20 <= server.seen[-1] <= 40


def test_a_second_slowdown_of_a_sharing_server_is_acted_on_at_once() -> None:
    server = settled_server()
    run_shared(server, 25, 200)
    assert server.seen[-1] >= 20
    run_shared(server, 10, 5)
    assert server.seen[-1] <= 20
    run_shared(server, 10, 60)
    assert server.seen[-1] <= 15


def test_an_expectation_learned_under_a_flood_does_not_hide_our_load() -> None:
    """Check it with three slots and ten calls in flight from the start."""
    server, pace = Server(AdaptiveLimit(), 10_000, slowdown=None), LatencyModel()
    for _ in range(300):
        seconds = max(1.0, len(server.in_flight) / 3)
        for _ in server.in_flight:
            server.slowdown = pace.observe(100, seconds, light=False)
        server.second()
    assert max(server.seen[100:]) <= 15
    assert sorted(server.seen[100:])[100] <= 5


def test_a_slowdown_that_passes_does_not_lower_the_limit() -> None:
    server = settled_server()
    server.slowdown = 2.5
    server.run(55)
    server.slowdown = 1.0
    server.run(20)
    assert min(server.seen[120:]) >= 48


def test_a_slowdown_not_caused_by_our_load_restores_the_limit() -> None:
    server = settled_server()
    server.slowdown = 2.5
    server.run(100)
    low = min(server.seen[120:])
    assert low < 40  # the experiment
    server.run(60)
    assert sorted(server.seen[220:])[10] >= 48  # and the limit after it


def test_a_slowdown_that_passes_during_an_experiment_restores_the_limit() -> None:
    server = settled_server()
    server.slowdown = 2.5
    while server.limit.limit(server.now) >= 40:
        server.second()
    server.slowdown = 1.0
    server.run(3)
    assert server.seen[-1] >= 48


def test_nothing_raises_the_limit_during_an_experiment() -> None:
    server = settled_server()
    server.slowdown = 2.5
    while server.limit.limit(server.now) >= 40:
        server.second()
    lowered = server.limit.limit(server.now)
    for _ in range(10):
        server.limit.accepted(server.now, server.limit.grant(server.now, lowered))
    assert server.limit.limit(server.now) == lowered


def test_an_experiment_without_samples_times_out() -> None:
    server = settled_server()
    server.slowdown = 2.5
    while adaptive(server).state(server.now) is not AdaptiveLimitState.EXPERIMENT:
        server.second()
    server.slowdown = None
    server.run(130)
    assert adaptive(server).state(server.now) is not AdaptiveLimitState.EXPERIMENT
    server.run(60)
    assert server.seen[-1] >= 48


def test_too_short_an_expectation_does_not_keep_the_limit_down() -> None:
    server = Server(AdaptiveLimit(), 5, slowdown=1.3)
    server.run(60)
    server.capacity = 50
    server.run(400)
    assert server.seen[-1] >= 45


def test_a_fall_of_capacity_leaves_the_limit_at_the_calls_in_flight() -> None:
    limit = AdaptiveLimit(initial_limit=50)
    grants = [limit.grant(0.0, n) for n in range(1, 51)]
    for grant in grants[30:]:
        limit.observe(0.1, grant, Outcome.OVERLOAD)
    assert 30 <= limit.limit(0.1) <= 36


def test_a_dip_of_seconds_costs_a_limit_seconds() -> None:
    server = settled_server()
    for _ in range(6):
        server.capacity = 1
        server.run(3)
        server.capacity = 50
        server.run(17)
    seen = server.seen[-17:]
    assert seen[8] >= 45  # nine seconds later
    assert min(seen[12:]) >= 49


def test_a_limit_of_few_slots_is_probed_rarely() -> None:
    """Check that of two hundred calls of a key of two slots hardly any are refused."""
    server = settled_server(2)
    before = server.refused
    server.run(300)
    assert server.refused - before <= 6
    server.capacity = 4
    server.run(120)
    assert server.seen[-1] == 4


def test_refusals_that_come_late_are_learned_to_be_late() -> None:
    """Check that a call counts as accepted only once the refusals of late would have come."""
    limit = AdaptiveLimit(initial_limit=20)
    for n in range(1, 21):
        limit.observe(30.0, limit.grant(0.0, n), Outcome.OVERLOAD if n > 10 else Outcome.SUCCESS)
    fallen = limit.limit(30.0)
    for second in range(31, 60):
        grant = limit.grant(float(second), fallen)
        limit.accepted(second + 1.0, grant)
        assert not grant.accepted
        limit.observe(second + 1.0, grant, Outcome.IGNORED)
    assert limit.limit(60.0) == fallen


def test_the_limit_of_many_small_servers_behind_a_load_balancer_is_not_that_of_the_first_refusal() -> None:
    """Check it with ten servers of five slots, each call at one of them at random."""
    draw, limit, now = new_random(1), AdaptiveLimit(), 0.0
    calls: deque[tuple[float, int, Grant]] = deque()
    busy, accepted, sent, at_work = [0] * 10, 0, 0, 0
    for step in range(6000):
        now = step / 10
        while calls and calls[0][0] <= now:
            _, server, grant = calls.popleft()
            busy[server] -= 1
            limit.observe(now, grant, Outcome.SUCCESS)
        for _ in range(max(0, min(3, limit.limit(now) - len(calls)))):
            grant, server = limit.grant(now, len(calls) + 1), draw.randrange(10)
            sent += step > 1000
            if busy[server] < 5:
                busy[server] += 1
                accepted += step > 1000
                limit.accepted(now, grant)
                calls.append((now + 7.0, server, grant))
            else:
                limit.observe(now, grant, Outcome.OVERLOAD)
        at_work += len(calls) if step > 1000 else 0
    assert at_work / 5000 >= 33
    assert 1 - accepted / sent <= 0.4


@pytest.mark.parametrize("seed", range(3))
def test_latency_that_varies_by_chance_never_lowers_a_limit_that_nothing_limits(seed: int) -> None:
    draw, limit, now = new_random(seed), AdaptiveLimit(), 0.0
    calls: list[tuple[float, int, float, Grant]] = []
    lowest = math.inf
    for n in range(20_000):
        while len(calls) < min(100, limit.limit(now)):
            slowdown = draw.lognormvariate(-0.32, 0.8)
            grant = limit.grant(now, len(calls) + 1)
            heapq.heappush(calls, (now + 7.0 * slowdown, n + len(calls), slowdown, grant))
        now, _, slowdown, grant = heapq.heappop(calls)
        limit.observe(now, grant, Outcome.SUCCESS, slowdown=slowdown)
        lowest = min(lowest, limit.limit(now)) if n > 1000 else lowest
    assert lowest >= 100


def test_every_state_is_reached() -> None:
    server = Server(AdaptiveLimit(), 50)
    seen = set()
    for capacity in (50, 0, 50, 20, 50):
        server.capacity = capacity
        for _ in range(60):
            server.second()
            seen.add(adaptive(server).state(server.now))
    server.slowdown = 3.0
    for _ in range(30):
        server.second()
        seen.add(adaptive(server).state(server.now))
    assert seen == set(AdaptiveLimitState)


@pytest.mark.parametrize("seed", range(20))
def test_no_order_of_grants_and_ends_breaks_a_small_limit(seed: int) -> None:
    rng, limit, now = new_random(seed), AdaptiveLimit(initial_limit=2), 0.0
    in_flight: list[Grant] = []
    for _ in range(400):
        now += rng.choice([0.1, 0.5, 1.0, 3.0])
        if rng.random() < 0.5 and len(in_flight) < limit.limit(now):
            in_flight.append(limit.grant(now, len(in_flight) + 1))
        elif in_flight:
            grant = in_flight.pop(rng.randrange(len(in_flight)))
            limit.observe(now, grant, rng.choice([Outcome.SUCCESS, Outcome.OVERLOAD]))
    assert limit.limit(now + 10.0) >= 1
