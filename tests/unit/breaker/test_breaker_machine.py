"""The breaker as a state machine: its probes are bounded and conserved, and it can always recover."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.breaker import Breaker, BreakerRules, BreakerState, FaultCountTrigger, consecutive_faults
from forebay.interfaces import Outcome

CLOSED, OPEN, HALF_OPEN = BreakerState.CLOSED, BreakerState.OPEN, BreakerState.HALF_OPEN


class BreakerMachine(RuleBasedStateMachine):
    """Calls on a breaker, compared with a model that knows only which calls are in flight, and under which epoch."""

    @initialize(
        probes=st.integers(1, 3),
        successes=st.integers(1, 3),
        draw=st.floats(0, 1, exclude_max=True),
    )
    def build(self, probes: int, successes: int, draw: float) -> None:
        self.breaker_rules = BreakerRules(
            triggers=(consecutive_faults(3), FaultCountTrigger(faults=5, calls=20)),
            reset_timeout=8.0,
            max_reset_timeout=32.0,
            probes=probes,
            successes=successes,
            probe_timeout=16.0,
        )
        self.breaker = Breaker(self.breaker_rules, draw=lambda: draw)
        self.now = 0.0
        self.out: list[int] = []
        self.faults_since_closed = 0

    @property
    def probes_out(self) -> int:
        return Counter(self.out)[self.breaker._epoch]

    @rule()
    def call(self) -> None:
        expected = self.breaker.ready(self.now)
        epoch = self.breaker.allow(self.now)
        assert bool(epoch) == expected
        if epoch:
            self.out.append(epoch)

    @precondition(lambda self: self.out)
    @rule(data=st.data(), outcome=st.sampled_from(Outcome))
    def end(self, data: st.DataObject, outcome: Outcome) -> None:
        index = data.draw(st.integers(0, len(self.out) - 1))
        before = self.breaker.state(self.now)
        epoch = self.out.pop(index)
        current = epoch == self.breaker._epoch
        changed = self.breaker.record(self.now, outcome, epoch)
        assert changed is None or changed is self.breaker.state(self.now) is not before
        if not current and outcome is not Outcome.SUCCESS:
            assert changed is None, "a late outcome changes nothing, except an overdue probe that succeeds"
        if before is CLOSED and not current:
            assert changed is None
        if outcome in (Outcome.IGNORED, Outcome.OVERLOAD):
            assert changed is None
            assert before is OPEN or self.breaker.ready(self.now) or self.probes_out == self.breaker_rules.probes
        if before is HALF_OPEN and current and outcome is Outcome.FAULT:
            assert changed is OPEN

    @rule(seconds=st.sampled_from([0.0, 0.25, 1.0, 4.0, 16.0, 64.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def wait_until_retry(self) -> None:
        retry_after = self.breaker.retry_after(self.now)
        assert retry_after is not None
        state = self.breaker.state(self.now)
        self.now += retry_after * (1 + 1e-9)
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
            assert self.probes_out == self.breaker._out <= self.breaker_rules.probes
            assert self.breaker.ready(self.now) == (self.probes_out < self.breaker_rules.probes)
        else:
            assert self.breaker._out == 0

    @invariant()
    def its_answers_agree(self) -> None:
        state = self.breaker.state(self.now)
        retry_after = self.breaker.retry_after(self.now)
        assert retry_after is not None
        assert (retry_after == 0.0) == self.breaker.ready(self.now)
        assert self.breaker.ready(self.now) == (state is CLOSED or (state is HALF_OPEN and retry_after == 0.0))
        assert retry_after <= max(self.breaker_rules.max_reset_timeout, self.breaker_rules.probe_timeout)

    def teardown(self) -> None:
        """Check that it closes once calls succeed again, even if all calls in flight hang forever."""
        if not hasattr(self, "breaker"):
            return
        for _ in range(2 + self.breaker_rules.successes):
            retry_after = self.breaker.retry_after(self.now)
            assert retry_after is not None
            self.now += retry_after * (1 + 1e-9)
            epoch = self.breaker.allow(self.now)
            if epoch:
                self.breaker.record(self.now, Outcome.SUCCESS, epoch)
        assert self.breaker.state(self.now) is CLOSED


BreakerMachine.TestCase.settings = settings(stateful_step_count=60)
TestBreakerMachine = BreakerMachine.TestCase
