"""The adaptive limit, on a server whose calls all take a second."""

from __future__ import annotations

from collections import deque

import pytest
from tests.unit.limit.server import Server

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
    limit = AdaptiveLimit()
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
    run_shared(server, 10, 30)
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
