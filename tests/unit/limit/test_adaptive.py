"""The adaptive limit, on a server that is easy to follow."""

from __future__ import annotations

from collections import deque

import pytest
from tests.unit.limit.server import Server

from forebay.interfaces import Grant, Outcome
from forebay.limit import AdaptiveLimit, AdaptiveLimitState
from forebay.upstream.latency import LatencyModel


def settled(capacity: int = 50, stray: int = 0) -> Server:
    """A server whose limit has found it."""
    server = Server(AdaptiveLimit(), capacity, stray=stray)
    server.run(120)
    return server


def adaptive(server: Server) -> AdaptiveLimit:
    assert isinstance(server.limit, AdaptiveLimit)
    return server.limit


def test_it_finds_the_capacity_by_doubling_and_stays_there() -> None:
    server = Server(AdaptiveLimit(initial_limit=1), 50)
    server.run(60)
    server.run(300)
    assert 49 <= min(server.seen[60:]) <= max(server.seen[60:]) <= 52


def test_it_is_refused_no_more_than_a_few_times_a_minute_when_settled() -> None:
    server = settled()
    before = server.refused
    server.run(300)
    assert server.refused - before <= 20


@pytest.mark.parametrize("one_in", [100, 33])
def test_stray_refusals_do_not_lower_it(one_in: int) -> None:
    server = settled(stray=one_in)
    server.run(300)
    assert min(server.seen[120:]) >= 45


def test_a_stray_refusal_of_a_lone_call_does_not_lower_it() -> None:
    server = settled()
    limit = server.limit
    limit.observe(server.now, limit.grant(server.now, 1), Outcome.OVERLOAD)
    assert limit.limit(server.now) >= 49


def test_it_falls_with_the_capacity_and_comes_back_with_it() -> None:
    server = settled()
    server.capacity = 20
    server.run(60)
    assert 18 <= server.seen[-1] <= 23
    server.capacity = 50
    server.run(60)
    assert server.seen[-1] >= 48


def test_when_all_is_refused_it_knocks_and_then_returns_to_what_held() -> None:
    server = settled()
    server.capacity = 0
    server.run(20)
    limit = adaptive(server)
    assert limit.state(server.now) is AdaptiveLimitState.BACKING_OFF
    knocked = server.sent
    server.run(60)
    assert 10 <= server.sent - knocked <= 20  # a lone call in five seconds, about
    server.capacity = 50
    server.run(20)
    assert server.seen[-1] >= 45


def test_a_passing_spell_is_forgotten_in_a_few_seconds() -> None:
    server = settled()
    server.capacity = 25
    server.run(2)
    server.capacity = 50
    server.run(12)
    assert server.seen[-1] >= 45


def test_a_call_of_an_earlier_epoch_says_nothing() -> None:
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


def test_it_does_not_grow_while_it_is_not_used() -> None:
    limit = AdaptiveLimit()
    for second in range(100):
        limit.observe(second + 1.0, limit.grant(float(second), 3), Outcome.SUCCESS)
    assert limit.limit(100.0) == 10


def test_it_grows_no_further_than_it_is_used() -> None:
    """Twenty-four callers: each call began when all of them had one under way."""
    limit, flying = AdaptiveLimit(), deque[Grant]()
    for second in range(200):
        while len(flying) < min(24, limit.limit(float(second))):
            flying.append(limit.grant(float(second), len(flying) + 1))
        limit.observe(second + 1.0, flying.popleft(), Outcome.SUCCESS)
    assert limit.limit(200.0) <= 28


def test_it_never_passes_its_largest() -> None:
    server = Server(AdaptiveLimit(max_limit=30), 1000)
    server.run(60)
    assert max(server.seen) == 30


def shared(server: Server, slots: int, seconds: int) -> None:
    """Let the server share so many slots: more calls in flight are slower ones, none is refused."""
    server.capacity = 10_000
    for _ in range(seconds):
        server.slowdown = max(1.0, len(server.flying) / slots)
        server.second()


def test_a_slow_down_by_our_load_lowers_it() -> None:
    server = settled()
    shared(server, 25, 200)
    assert 20 <= server.seen[-1] <= 40


def test_one_that_shares_is_not_waited_for() -> None:
    server = settled()
    shared(server, 25, 200)
    assert server.seen[-1] >= 20
    shared(server, 10, 30)
    assert server.seen[-1] <= 15


def test_what_was_learned_under_a_flood_is_not_believed() -> None:
    """There are three slots, and from the first call on there are ten in flight."""
    server, pace = Server(AdaptiveLimit(), 10_000, slowdown=None), LatencyModel()
    for _ in range(300):
        took = max(1.0, len(server.flying) / 3)
        for _ in server.flying:
            server.slowdown = pace.observe(100, took, light=False)
        server.second()
    assert max(server.seen[100:]) <= 15
    assert sorted(server.seen[100:])[100] <= 5


def test_a_slow_down_that_passes_is_waited_for() -> None:
    server = settled()
    server.slowdown = 2.5
    server.run(55)
    server.slowdown = 1.0
    server.run(20)
    assert min(server.seen[120:]) >= 48


def test_a_slow_down_that_is_not_ours_is_left_alone() -> None:
    server = settled()
    server.slowdown = 2.5
    server.run(100)
    low = min(server.seen[120:])
    assert low < 40  # it tried
    server.run(60)
    assert sorted(server.seen[220:])[10] >= 48  # and went back


def test_a_slow_down_that_passes_in_a_trial_leaves_nothing_behind() -> None:
    server = settled()
    server.slowdown = 2.5
    while server.limit.limit(server.now) >= 40:
        server.second()
    server.slowdown = 1.0
    server.run(3)
    assert server.seen[-1] >= 48


def test_nothing_raises_it_in_a_trial() -> None:
    server = settled()
    server.slowdown = 2.5
    while server.limit.limit(server.now) >= 40:
        server.second()
    lowered = server.limit.limit(server.now)
    for _ in range(10):
        server.limit.accepted(server.now, server.limit.grant(server.now, lowered))
    assert server.limit.limit(server.now) == lowered


def test_a_trial_without_answers_is_given_up() -> None:
    server = settled()
    server.slowdown = 2.5
    while adaptive(server).state(server.now) is not AdaptiveLimitState.EXPERIMENT:
        server.second()
    server.slowdown = None
    server.run(130)
    assert adaptive(server).state(server.now) is not AdaptiveLimitState.EXPERIMENT
    server.run(60)
    assert server.seen[-1] >= 48


def test_an_expectation_that_is_too_short_does_not_keep_it_down() -> None:
    server = Server(AdaptiveLimit(), 5, slowdown=1.3)
    server.run(60)
    server.capacity = 50
    server.run(400)
    assert server.seen[-1] >= 45


def test_it_names_what_it_does() -> None:
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
