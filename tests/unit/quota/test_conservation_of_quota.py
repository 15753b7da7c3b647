"""Conservation: no reservation is lost or refunded twice, and no span of time gets more than its quota."""

from __future__ import annotations

import math

import hypothesis.strategies as st
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from forebay.interfaces import Charge, RateLimitHeaders
from forebay.quota import Budget, BudgetReservation, BudgetTracker, Quota, QuotaReservation, RateLimiter
from forebay.task import Priority

AMOUNTS = st.integers(1, 200)
STEPS = st.floats(0, 100, allow_nan=False)


@given(
    amount=AMOUNTS,
    per=st.sampled_from(["second", "minute", "hour"]),
    calls=st.lists(st.tuples(STEPS, st.integers(1, 200), st.floats(0, 1)), min_size=1, max_size=60),
)
def test_no_span_gets_more_than_amount_and_amount_times_t_over_period(
    amount: int, per: str, calls: list[tuple[float, int, float]]
) -> None:
    quota = Quota(input_tokens=amount, per=per)  # type: ignore[arg-type]
    limiter, now = RateLimiter([quota]), 0.0
    granted: list[tuple[float, int]] = []
    for step, tokens, share in calls:
        now += step * quota.seconds / 60
        charge = Charge(input_tokens=tokens)
        delay = limiter.wait(now, charge)
        if math.isinf(delay.seconds):
            assert tokens > amount
            continue
        if share < 0.5:
            now += delay.seconds  # it waits as long as it was told, and must pass then
            assert limiter.wait(now, charge).seconds == 0
        elif delay.seconds:
            continue
        used = int(tokens * min(1.0, 0.3 + share))
        limiter.settle(now, limiter.reserve(now, charge), Charge(input_tokens=used))
        granted.append((now, used))
    for begin in range(len(granted)):
        total = 0
        for at, used in granted[begin:]:
            total += used
            assert total <= (amount + amount * (at - granted[begin][0]) / quota.seconds) * (1 + 1e-6)


class RateLimiterMachine(RuleBasedStateMachine):
    """Calls that reserve and end in every way, compared with a model that counts exactly."""

    @initialize(requests=st.integers(1, 50), tokens=st.integers(1, 500))
    def build(self, requests: int, tokens: int) -> None:
        self.size = {"requests": requests, "input_tokens": tokens}
        self.limiter = RateLimiter([Quota(requests=requests, per="minute"), Quota(input_tokens=tokens, per="minute")])
        self.now = 0.0
        self.held: list[QuotaReservation] = []
        self.level = {unit: float(size) for unit, size in self.size.items()}

    def move(self, unit: str, by: float) -> None:
        self.level[unit] = min(self.size[unit], self.level[unit] + by)

    @rule(step=st.floats(0, 90))
    def time_passes(self, step: float) -> None:
        self.now += step
        for unit, size in self.size.items():
            self.move(unit, step * size / 60)

    @rule(back=st.floats(0, 1e6))
    def the_clock_goes_back(self, back: float) -> None:
        self.limiter.wait(self.now, Charge())  # it has seen the present time
        self.now -= back
        assert self.limiter.wait(self.now, Charge()).seconds <= 60 * (2 + 1 / self.size["requests"])

    @rule(tokens=st.integers(0, 500))
    def reserve(self, tokens: int) -> None:
        charge = Charge(input_tokens=tokens)
        if self.limiter.wait(self.now, charge).seconds == 0:
            self.held.append(self.limiter.reserve(self.now, charge))
            self.move("requests", -1)
            self.move("input_tokens", -tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=st.integers(-5, 700))
    def settle(self, data: st.DataObject, used: int) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.limiter.settle(self.now, held, Charge(input_tokens=used))
        self.move("input_tokens", held.charge.input_tokens - max(0, used))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.limiter.release(self.now, held)
        self.move("requests", 1)
        self.move("input_tokens", held.charge.input_tokens)

    @invariant()
    def the_levels_agree(self) -> None:
        if not hasattr(self, "limiter"):
            return
        for level, (unit, expected) in zip(self.limiter.levels(self.now), self.level.items(), strict=True):
            assert math.isclose(level.remaining, expected, abs_tol=1e-6 * self.size[unit]), unit
        assert len(self.limiter._open) == len(self.held)
        assert self.limiter._under_way["input_tokens"] == sum(held.charge.input_tokens for held in self.held)


class LyingHeadersMachine(RuleBasedStateMachine):
    """Impossible headers and a leaping clock: every wait ends within three days by itself."""

    @initialize()
    def build(self) -> None:
        self.limiter = RateLimiter()
        self.now = 0.0
        self.held: list[QuotaReservation] = []
        self.ended: list[QuotaReservation] = []

    @rule(step=st.floats(-1e5, 1e5))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule(tokens=st.integers(0, 10_000))
    def reserve(self, tokens: int) -> None:
        self.held.append(self.limiter.reserve(self.now, Charge(input_tokens=tokens)))

    @precondition(lambda self: self.held or self.ended)
    @rule(
        data=st.data(),
        unit=st.sampled_from(["requests", "input_tokens", "output_tokens"]),
        limit=st.none() | st.integers(-5, 10**15),
        remaining=st.none() | st.integers(-5, 10**15),
        reset=st.none() | st.floats(),
        how=st.sampled_from(["update_from_headers", "record_throttled"]),
        retry_after=st.none() | st.floats(),
    )
    def answer(  # noqa: PLR0913, PLR0917 - all that an answer can contain
        self,
        data: st.DataObject,
        unit: str,
        limit: int | None,
        remaining: int | None,
        reset: float | None,
        how: str,
        retry_after: float | None,
    ) -> None:
        headers = RateLimitHeaders(unit=unit, limit=limit, remaining=remaining, reset=reset)
        if how == "record_throttled" and self.held:
            held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.limiter.record_throttled(self.now, held, retry_after, [headers])
        else:
            held = data.draw(st.sampled_from(self.held + self.ended))
            self.limiter.update_from_headers(self.now, [headers], held)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=st.integers(0, 10**15))
    def settle(self, data: st.DataObject, used: int) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.limiter.settle(self.now, held, Charge(input_tokens=used, output_tokens=used))
        self.ended.append(held)

    @invariant()
    def waits_are_bounded_and_levels_within_their_capacity(self) -> None:
        if not hasattr(self, "limiter"):
            return
        seconds = self.limiter.wait(self.now, Charge()).seconds
        assert 0 <= seconds < 3 * 86_400
        assert self.limiter.wait(self.now, Charge()).seconds == seconds, "asking changes nothing"
        for level in self.limiter.levels(self.now):
            assert -level.amount <= level.remaining <= level.amount
        for unit, under_way in self.limiter._under_way.items():
            assert under_way == sum(getattr(held.charge, unit) for held in self.held), unit


class BudgetTrackerMachine(RuleBasedStateMachine):
    """Dollars are reserved, settled and released in any order, while days pass and the clock goes back."""

    @initialize(reserve=st.floats(0, 0.9))
    def build(self, reserve: float) -> None:
        self.tracker = BudgetTracker(Budget(usd=10, per="day", reserved_share=reserve))
        self.now = 1_000_000 * 86_400.0
        self.held: list[BudgetReservation] = []
        self.settled = 0.0

    @rule(usd=st.floats(0, 4), priority=st.sampled_from(Priority))
    def take(self, usd: float, priority: Priority) -> None:
        before = self.tracker.remaining(self.now)
        if self.tracker.can_afford(self.now, usd, priority):
            self.held.append(self.tracker.reserve(self.now, usd))
            assert self.tracker.remaining(self.now) >= -1e-9
            if priority > Priority.HIGH:
                assert self.tracker.remaining(self.now) >= 10 * self.tracker.budget.reserved_share - 1e-9
        else:
            assert usd > before - 10 * self.tracker.budget.reserved_share - 1e-6 or before <= 1e-9

    @precondition(lambda self: self.held)
    @rule(data=st.data(), share=st.floats(0, 1))
    def settle(self, data: st.DataObject, share: float) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.tracker.settle(self.now, held, held.usd * share)
        self.settled += held.usd * share

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.tracker.release(self.now, self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(hours=st.floats(0, 30))
    def time_passes(self, hours: float) -> None:
        self.now += hours * 3600

    @rule(hours=st.floats(0, 30))
    def the_clock_goes_back(self, hours: float) -> None:
        before = self.tracker.remaining(self.now)
        self.now -= hours * 3600
        assert self.tracker.remaining(self.now) <= before + 1e-9, "no money is given away"

    @invariant()
    def it_renews_within_a_day(self) -> None:
        if hasattr(self, "tracker"):
            resets_in = self.tracker.resets_in(self.now)
            assert resets_in is not None
            assert 0 < resets_in <= 86_400
            assert self.tracker.spent(self.now) <= self.settled + 1e-6

    def teardown(self) -> None:
        if hasattr(self, "tracker"):
            tomorrow = self.now + 86_400
            assert self.tracker.remaining(tomorrow) == 10
            for held in self.held:
                self.tracker.release(tomorrow, held)
            assert self.tracker._period.reserved == 0


TestRateLimiterMachine = RateLimiterMachine.TestCase
TestLyingHeadersMachine = LyingHeadersMachine.TestCase
TestBudgetTrackerMachine = BudgetTrackerMachine.TestCase
