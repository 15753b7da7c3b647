"""What every limit promises."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.unit.limit.server import Server

from forebay.errors import InvalidSetting
from forebay.interfaces import Grant, Limit, Outcome
from forebay.limit import AdaptiveLimit, AimdLimit, FixedLimit, GradientLimit, TimeoutAimdLimit, VegasLimit

LARGEST = 40
CAPACITY = 8
LIMITS: dict[str, Callable[[], Limit]] = {
    "fixed": lambda: FixedLimit(LARGEST),
    "adaptive": lambda: AdaptiveLimit(max_limit=LARGEST),
    "timeout": lambda: TimeoutAimdLimit(max_limit=LARGEST),
    "epoch": lambda: AimdLimit(max_limit=LARGEST),
    "gradient": lambda: GradientLimit(max_limit=LARGEST),
    "vegas": lambda: VegasLimit(max_limit=LARGEST),
}
EVERY = pytest.mark.parametrize("make", LIMITS.values(), ids=LIMITS)

# what happens: seconds that pass, how many calls are sent, which of those in flight is heard of, and what
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
class World:
    """A user of a limit who keeps to the seam, and checks what it must hold at any moment."""

    limit: Limit
    now: float = 0.0
    out: list[tuple[Grant, bool]] = field(default_factory=list)  # grants, and whether they were accepted

    def play(self, events: list[tuple[float, int, int, Outcome | None, float | None]]) -> None:
        for seconds, calls, which, outcome, stretch in events:
            self.now += seconds
            for _ in range(calls):
                if len(self.out) < self.limit.limit(self.now):
                    self.out.append((self.limit.grant(self.now, len(self.out) + 1), False))
                    self.check()
            if self.out:
                self.hear(which % len(self.out), outcome, stretch)
                self.check()

    def hear(self, which: int, outcome: Outcome | None, stretch: float | None) -> None:
        grant, accepted = self.out.pop(which)
        if outcome is not None:
            self.limit.observe(self.now, grant, outcome, slowdown=stretch)
            return
        if not accepted:
            self.limit.accepted(self.now, grant)
        self.out.append((grant, True))

    def finish(self, outcome: Outcome) -> None:
        while self.out:
            self.hear(0, outcome, None)
            self.check()

    def check(self) -> None:
        limit, change = self.limit.limit(self.now), self.limit.reopens_at(self.now)
        assert 0 <= limit <= LARGEST
        assert (limit == 0) == (change is not None)
        if change is not None:
            assert self.now < change <= self.now + 5
            assert self.limit.limit(change) >= 1


@EVERY
@given(EVENTS)
def test_a_limit_stays_within_its_bounds_and_says_when_it_opens(
    make: Callable[[], Limit], events: list[tuple[float, int, int, Outcome | None, float | None]]
) -> None:
    world = World(make())
    world.check()
    world.play(events)
    world.finish(Outcome.OVERLOAD)


@EVERY
@given(EVENTS, st.integers(0, 60), st.floats(1.0, 1.45))
def test_whatever_has_happened_a_limit_finds_a_healthy_server_again(
    make: Callable[[], Limit],
    events: list[tuple[float, int, int, Outcome | None, float | None]],
    refusals: int,
    stretch: float,
) -> None:
    world = World(make())
    world.play(events)
    world.finish(Outcome.IGNORED)
    for _ in range(refusals):
        world.now = world.limit.reopens_at(world.now) or world.now
        world.limit.observe(world.now, world.limit.grant(world.now, 1), Outcome.OVERLOAD)
    server = Server(world.limit, CAPACITY, slowdown=stretch, now=world.now)
    server.run(1500)
    assert max(server.seen[-300:]) >= CAPACITY


@EVERY
def test_what_says_nothing_changes_nothing(make: Callable[[], Limit]) -> None:
    limit = make()
    before = limit.limit(0.0)
    for _ in range(50):
        grant = limit.grant(0.0, before)
        limit.observe(1.0, grant, Outcome.IGNORED)
        grant = limit.grant(0.0, before)
        limit.observe(1.0, grant, Outcome.FAULT)
    assert limit.limit(1.0) == before


@pytest.mark.parametrize("kind", [AdaptiveLimit, AimdLimit])
def test_refusals_of_one_epoch_are_answered_once(kind: type[AdaptiveLimit | AimdLimit]) -> None:
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
        (AdaptiveLimit, {"start": 0}),
        (AdaptiveLimit, {"start": 11, "largest": 10}),
        (AdaptiveLimit, {"largest": 1.5}),
        (TimeoutAimdLimit, {"timeout": 0}),
        (TimeoutAimdLimit, {"backoff": 1.0}),
        (AimdLimit, {"growth": 0.0}),
        (AimdLimit, {"backoff": 0.0}),
        (GradientLimit, {"tolerance": 0.0}),
        (GradientLimit, {"queue": -1.0}),
        (GradientLimit, {"smoothing": 1.1}),
        (VegasLimit, {"start": 5, "largest": 4}),
    ],
)
def test_a_number_that_makes_no_sense_is_refused_by_name(kind: type, settings: dict[str, object]) -> None:
    with pytest.raises(InvalidSetting, match=rf"{kind.__name__}.*{next(iter(settings))}"):
        kind(**settings)
