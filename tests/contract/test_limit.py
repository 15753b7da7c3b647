"""The contract of every limit. "Add a limit" in CONTRIBUTING.md lists the other files to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.limit.server import Server
from tests.unit.limit.test_base import HalvingLimit

from forebay.errors import InvalidSetting
from forebay.interfaces import Outcome
from forebay.limit import (
    AdaptiveLimit,
    AimdLimit,
    FixedLimit,
    GradientLimit,
    Grant,
    Limit,
    TimeoutAimdLimit,
    VegasLimit,
)

MAX_LIMIT = 40
CAPACITY = 8
LIMITS: dict[str, Callable[[], Limit]] = {
    "fixed": lambda: FixedLimit(MAX_LIMIT),
    "adaptive": lambda: AdaptiveLimit(max_limit=MAX_LIMIT),
    "timeout": lambda: TimeoutAimdLimit(max_limit=MAX_LIMIT),
    "epoch": lambda: AimdLimit(max_limit=MAX_LIMIT),
    "gradient": lambda: GradientLimit(max_limit=MAX_LIMIT),
    "vegas": lambda: VegasLimit(max_limit=MAX_LIMIT),
    "only observe": lambda: HalvingLimit(max_limit=MAX_LIMIT),
}
EVERY = pytest.mark.parametrize("make", LIMITS.values(), ids=LIMITS)

# Each event: seconds that pass, calls to send, the call in flight that something happens to, its outcome (None: it
# is accepted), and its slowdown.
EVENTS = st.lists(
    st.tuples(
        st.floats(0, 30),
        st.integers(0, 6),
        st.integers(0, 50),
        st.sampled_from([*Outcome, None]),
        st.none() | st.floats(0, 100),
    ),
    max_size=80,
)


@dataclass
class LimitUser:
    """A user of a limit, which keeps to the interface and checks the invariants at every step."""

    limit: Limit
    now: float = 0.0
    in_flight: list[tuple[Grant, bool]] = field(default_factory=list)  # grants, and whether they were accepted

    def play(self, events: list[tuple[float, int, int, Outcome | None, float | None]]) -> None:
        for seconds, calls, which, outcome, slowdown in events:
            self.now += seconds
            for _ in range(calls):
                if len(self.in_flight) < self.limit.limit(self.now):
                    self.in_flight.append((self.limit.grant(self.now, len(self.in_flight) + 1), False))
                    self.check()
            if self.in_flight:
                self.finish_or_accept(which % len(self.in_flight), outcome, slowdown)
                self.check()

    def finish_or_accept(self, which: int, outcome: Outcome | None, slowdown: float | None) -> None:
        grant, accepted = self.in_flight.pop(which)
        if outcome is not None:
            self.limit.observe(self.now, grant, outcome, slowdown=slowdown)
            return
        if not accepted:
            self.limit.accepted(self.now, grant)
        self.in_flight.append((grant, True))

    def finish(self, outcome: Outcome) -> None:
        while self.in_flight:
            self.finish_or_accept(0, outcome, None)
            self.check()

    def check(self) -> None:
        limit, change = self.limit.limit(self.now), self.limit.reopens_at(self.now)
        assert 0 <= limit <= MAX_LIMIT
        assert (limit == 0) == (change is not None)
        if change is not None:
            assert self.now < change <= self.now + 5
            assert self.limit.limit(change) >= 1


@EVERY
@given(EVENTS)
def test_a_limit_stays_within_its_bounds_and_says_when_it_reopens(
    make: Callable[[], Limit], events: list[tuple[float, int, int, Outcome | None, float | None]]
) -> None:
    user = LimitUser(make())
    user.check()
    user.play(events)
    user.finish(Outcome.OVERLOAD)


@EVERY
@given(EVENTS, st.integers(0, 60), st.floats(1.0, 1.45))
def test_a_limit_recovers_on_a_healthy_server_whatever_happened_before(
    make: Callable[[], Limit],
    events: list[tuple[float, int, int, Outcome | None, float | None]],
    refusals: int,
    slowdown: float,
) -> None:
    user = LimitUser(make())
    user.play(events)
    user.finish(Outcome.IGNORED)
    for _ in range(refusals):
        user.now = user.limit.reopens_at(user.now) or user.now
        user.limit.observe(user.now, user.limit.grant(user.now, 1), Outcome.OVERLOAD)
    server = Server(user.limit, CAPACITY, slowdown=slowdown, now=user.now)
    server.run(1500)
    assert max(server.seen[-300:]) >= CAPACITY


@EVERY
def test_faults_and_ignored_calls_do_not_change_a_limit(make: Callable[[], Limit]) -> None:
    limit = make()
    before = limit.limit(0.0)
    for _ in range(50):
        grant = limit.grant(0.0, before)
        limit.observe(1.0, grant, Outcome.IGNORED)
        grant = limit.grant(0.0, before)
        limit.observe(1.0, grant, Outcome.FAULT)
    assert limit.limit(1.0) == before


@pytest.mark.parametrize("kind", [AdaptiveLimit, AimdLimit])
def test_refusals_of_one_epoch_lower_a_limit_once(kind: type[AdaptiveLimit | AimdLimit]) -> None:
    limit = kind(initial_limit=20)
    together = [limit.grant(0.0, n) for n in range(1, 21)]
    for grant in together[10:]:
        limit.observe(0.1, grant, Outcome.OVERLOAD)
    once = limit.limit(0.1)
    assert once < 20
    for grant in together[:10]:
        limit.observe(0.2, grant, Outcome.OVERLOAD)
    assert limit.limit(0.2) == once


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FixedLimit, {"n": 0}),
        (FixedLimit, {"n": True}),
        (AdaptiveLimit, {"initial_limit": 0}),
        (AdaptiveLimit, {"initial_limit": 11, "max_limit": 10}),
        (AdaptiveLimit, {"max_limit": 1.5}),
        (TimeoutAimdLimit, {"timeout": 0}),
        (TimeoutAimdLimit, {"backoff_ratio": 1.0}),
        (AimdLimit, {"growth": 0.0}),
        (AimdLimit, {"backoff_ratio": 0.0}),
        (GradientLimit, {"tolerance": 0.0}),
        (GradientLimit, {"queue_size": -1.0}),
        (GradientLimit, {"smoothing": 1.1}),
        (VegasLimit, {"initial_limit": 5, "max_limit": 4}),
    ],
)
def test_an_invalid_setting_is_reported_by_name(kind: type, settings: dict[str, object]) -> None:
    with pytest.raises(InvalidSetting, match=rf"{kind.__name__}.*{next(iter(settings))}"):
        kind(**settings)
