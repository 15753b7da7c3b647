"""Whatever happens to a breaker, in whatever order: its probes are bounded and conserved, and it can always recover."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.breaker import Breaker, BreakerRules, BreakerState, FaultCountTrigger, consecutive_faults
from forebay.interfaces import Outcome

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


class BreakerMachine(RuleBasedStateMachine):
    """Calls come and go beside a model that knows only which calls are out, and under which era."""

    @initialize(
        probes=st.integers(1, 3),
        successes=st.integers(1, 3),
        chance=st.floats(0, 1, exclude_max=True),
    )
    def build(self, probes: int, successes: int, chance: float) -> None:
        self.terms = BreakerRules(
            triggers=(consecutive_faults(3), FaultCountTrigger(faults=5, calls=20)),
            reset_timeout=8.0,
            max_reset_timeout=32.0,
            probes=probes,
            successes=successes,
            probe_timeout=16.0,
        )
        self.breaker = Breaker(self.terms, draw=lambda: chance)
        self.now = 0.0
        self.out: list[int] = []
        self.faults_since_closed = 0

    @property
    def probes_out(self) -> int:
        return Counter(self.out)[self.breaker._epoch]

    @rule()
    def call(self) -> None:
        expected = self.breaker.ready(self.now)
        era = self.breaker.allow(self.now)
        assert bool(era) == expected
        if era:
            self.out.append(era)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end(self, data: st.DataObject, outcome: Outcome) -> None:
        index = data.draw(st.integers(0, len(self.out) - 1))
        before = self.breaker.state(self.now)
        era = self.out.pop(index)
        current = era == self.breaker._epoch
        changed = self.breaker.record(self.now, outcome, era)
        assert changed is None or changed is self.breaker.state(self.now) is not before
        if not current and outcome is not Outcome.SUCCESS:
            assert changed is None, "a late outcome has no say, but for an overdue probe that succeeds"
        if before is CLOSED and not current:
            assert changed is None
        if outcome in (Outcome.IGNORED, Outcome.OVERLOAD):
            assert changed is None
            assert before is OPEN or self.breaker.ready(self.now) or self.probes_out == self.terms.probes
        if before is HALF_OPEN and current and outcome is Outcome.FAULT:
            assert changed is OPEN

    @rule(seconds=st.sampled_from([0.0, 0.25, 1.0, 4.0, 16.0, 64.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def wait_as_told(self) -> None:
        remaining = self.breaker.retry_after(self.now)
        assert remaining is not None
        state = self.breaker.state(self.now)
        self.now += remaining * (1 + 1e-9)
        if state is OPEN:
            assert self.breaker.ready(self.now)

    @rule()
    def trip(self) -> None:
        was_open = self.breaker.state(self.now) is OPEN
        assert self.breaker.trip(self.now) is (None if was_open else OPEN)

    @rule()
    def reset(self) -> None:
        self.breaker.reset()
        assert self.breaker.state(self.now) is CLOSED

    @invariant()
    def probes_are_bounded_and_conserved(self) -> None:
        state = self.breaker.state(self.now)
        if state is HALF_OPEN:
            assert self.probes_out == self.breaker._out <= self.terms.probes
            assert self.breaker.ready(self.now) == (self.probes_out < self.terms.probes)
        else:
            assert self.breaker._out == 0

    @invariant()
    def what_it_says_agrees(self) -> None:
        state = self.breaker.state(self.now)
        remaining = self.breaker.retry_after(self.now)
        assert remaining is not None
        assert (remaining == 0.0) == self.breaker.ready(self.now)
        assert self.breaker.ready(self.now) == (state is CLOSED or (state is HALF_OPEN and remaining == 0.0))
        assert remaining <= max(self.terms.max_reset_timeout, self.terms.probe_timeout)

    def teardown(self) -> None:
        """Though all that is out hangs for ever, it closes once calls succeed again."""
        if not hasattr(self, "breaker"):
            return
        for _ in range(2 + self.terms.successes):
            remaining = self.breaker.retry_after(self.now)
            assert remaining is not None
            self.now += remaining * (1 + 1e-9)
            era = self.breaker.allow(self.now)
            if era:
                self.breaker.record(self.now, Outcome.SUCCESS, era)
        assert self.breaker.state(self.now) is CLOSED


BreakerMachine.TestCase.settings = settings(stateful_step_count=60)
TestBreakerMachine = BreakerMachine.TestCase
