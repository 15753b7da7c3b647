"""Whatever comes: nothing that is reserved is lost or given twice, and no span of time gets more than was granted."""

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
    quotas, now = RateLimiter([quota]), 0.0
    granted: list[tuple[float, int]] = []
    for step, tokens, share in calls:
        now += step * quota.seconds / 60
        charge = Charge(input_tokens=tokens)
        delay = quotas.wait(now, charge)
        if math.isinf(delay.seconds):
            assert tokens > amount
            continue
        if share < 0.5:
            now += delay.seconds  # as patient as it was told to be: it must get in then
            assert quotas.wait(now, charge).seconds == 0
        elif delay.seconds:
            continue
        used = int(tokens * min(1.0, 0.3 + share))
        quotas.settle(now, quotas.reserve(now, charge), Charge(input_tokens=used))
        granted.append((now, used))
    for begin in range(len(granted)):
        total = 0
        for at, used in granted[begin:]:
            total += used
            assert total <= (amount + amount * (at - granted[begin][0]) / quota.seconds) * (1 + 1e-6)


class QuotasMachine(RuleBasedStateMachine):
    """Calls reserve, and end in every way at any point, beside a model that keeps exact accounts."""

    @initialize(requests=st.integers(1, 50), tokens=st.integers(1, 500))
    def build(self, requests: int, tokens: int) -> None:
        self.size = {"requests": requests, "input_tokens": tokens}
        self.quotas = RateLimiter([Quota(requests=requests, per="minute"), Quota(input_tokens=tokens, per="minute")])
        self.now = 0.0
        self.held: list[QuotaReservation] = []
        self.level = {unit: float(size) for unit, size in self.size.items()}

    def move(self, unit: str, by: float) -> None:
        self.level[unit] = max(-self.size[unit], min(self.size[unit], self.level[unit] + by))

    @rule(step=st.floats(0, 90))
    def time_passes(self, step: float) -> None:
        self.now += step
        for unit, size in self.size.items():
            self.move(unit, step * size / 60)

    @rule(back=st.floats(0, 1e6))
    def the_clock_goes_back(self, back: float) -> None:
        self.quotas.wait(self.now, Charge())  # it has seen the time
        self.now -= back
        assert self.quotas.wait(self.now, Charge()).seconds <= 60 * (2 + 1 / self.size["requests"])

    @rule(tokens=st.integers(0, 500))
    def reserve(self, tokens: int) -> None:
        charge = Charge(input_tokens=tokens)
        if self.quotas.wait(self.now, charge).seconds == 0:
            self.held.append(self.quotas.reserve(self.now, charge))
            self.move("requests", -1)
            self.move("input_tokens", -tokens)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=st.integers(-5, 700))
    def settle(self, data: st.DataObject, used: int) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.quotas.settle(self.now, held, Charge(input_tokens=used))
        self.move("input_tokens", held.charge.input_tokens - max(0, used))

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.quotas.release(self.now, held)
        self.move("requests", 1)
        self.move("input_tokens", held.charge.input_tokens)

    @invariant()
    def the_accounts_agree(self) -> None:
        if not hasattr(self, "quotas"):
            return
        for level, (unit, expected) in zip(self.quotas.levels(self.now), self.level.items(), strict=True):
            assert math.isclose(level.remaining, expected, abs_tol=1e-6 * self.size[unit]), unit
        assert len(self.quotas._open) == len(self.held)
        assert self.quotas._under_way["input_tokens"] == sum(held.charge.input_tokens for held in self.held)


class LiarMachine(RuleBasedStateMachine):
    """Headers say anything, calls end anyhow, the clock leaps: it always ends well within two days, and by itself."""

    @initialize()
    def build(self) -> None:
        self.quotas = RateLimiter()
        self.now = 0.0
        self.held: list[QuotaReservation] = []
        self.ended: list[QuotaReservation] = []

    @rule(step=st.floats(-1e5, 1e5))
    def time_passes(self, step: float) -> None:
        self.now += step

    @rule(tokens=st.integers(0, 10_000))
    def reserve(self, tokens: int) -> None:
        self.held.append(self.quotas.reserve(self.now, Charge(input_tokens=tokens)))

    @precondition(lambda self: self.held or self.ended)
    @rule(
        data=st.data(),
        unit=st.sampled_from(["requests", "input_tokens", "output_tokens"]),
        limit=st.none() | st.integers(-5, 10**15),
        remaining=st.none() | st.integers(-5, 10**15),
        reset=st.none() | st.floats(),
        how=st.sampled_from(["hear", "refused"]),
        retry_after=st.none() | st.floats(),
    )
    def answer(  # noqa: PLR0913, PLR0917 - all that an answer can say
        self,
        data: st.DataObject,
        unit: str,
        limit: int | None,
        remaining: int | None,
        reset: float | None,
        how: str,
        retry_after: float | None,
    ) -> None:
        notice = RateLimitHeaders(unit=unit, limit=limit, remaining=remaining, reset=reset)
        if how == "refused" and self.held:
            held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
            self.quotas.record_throttled(self.now, held, retry_after, [notice])
        else:
            held = data.draw(st.sampled_from(self.held + self.ended))
            self.quotas.update_from_headers(self.now, [notice], held)

    @precondition(lambda self: self.held)
    @rule(data=st.data(), used=st.integers(0, 10**15))
    def settle(self, data: st.DataObject, used: int) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.quotas.settle(self.now, held, Charge(input_tokens=used, output_tokens=used))
        self.ended.append(held)

    @invariant()
    def it_is_never_locked_and_never_beyond_what_it_holds(self) -> None:
        if not hasattr(self, "quotas"):
            return
        seconds = self.quotas.wait(self.now, Charge()).seconds
        assert 0 <= seconds < 3 * 86_400
        assert self.quotas.wait(self.now, Charge()).seconds == seconds, "asking changes nothing"
        for level in self.quotas.levels(self.now):
            assert -level.amount <= level.remaining <= level.amount
        assert sum(held.charge.input_tokens for held in self.held) == self.quotas._under_way["input_tokens"]


class PurseMachine(RuleBasedStateMachine):
    """Money is reserved, settled and released in any order, while days pass and the clock is put back."""

    @initialize(reserve=st.floats(0, 0.9))
    def build(self, reserve: float) -> None:
        self.purse = BudgetTracker(Budget(usd=10, per="day", reserved_share=reserve))
        self.now = 1_000_000 * 86_400.0
        self.held: list[BudgetReservation] = []
        self.settled = 0.0
        self.turned = 0.0  # what was settled on days that are over

    @rule(usd=st.floats(0, 4), priority=st.sampled_from(Priority))
    def take(self, usd: float, priority: Priority) -> None:
        before = self.purse.remaining(self.now)
        if self.purse.can_afford(self.now, usd, priority):
            self.held.append(self.purse.reserve(self.now, usd))
            assert self.purse.remaining(self.now) >= -1e-9
            if priority > Priority.HIGH:
                assert self.purse.remaining(self.now) >= 10 * self.purse.budget.reserved_share - 1e-9
        else:
            assert usd > before - 10 * self.purse.budget.reserved_share - 1e-6 or before <= 1e-9

    @precondition(lambda self: self.held)
    @rule(data=st.data(), share=st.floats(0, 1))
    def settle(self, data: st.DataObject, share: float) -> None:
        held = self.held.pop(data.draw(st.integers(0, len(self.held) - 1)))
        self.purse.settle(self.now, held, held.usd * share)
        self.settled += held.usd * share

    @precondition(lambda self: self.held)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        self.purse.release(self.now, self.held.pop(data.draw(st.integers(0, len(self.held) - 1))))

    @rule(hours=st.floats(0, 30))
    def time_passes(self, hours: float) -> None:
        self.now += hours * 3600

    @rule(hours=st.floats(0, 30))
    def the_clock_is_put_back(self, hours: float) -> None:
        before = self.purse.remaining(self.now)
        self.now -= hours * 3600
        assert self.purse.remaining(self.now) <= before + 1e-9, "no money for nothing"

    @invariant()
    def it_does_not_stay_locked(self) -> None:
        if hasattr(self, "purse"):
            resets_in = self.purse.resets_in(self.now)
            assert resets_in is not None
            assert 0 < resets_in <= 86_400
            assert self.purse.spent(self.now) <= self.settled + 1e-6

    def teardown(self) -> None:
        if hasattr(self, "purse"):
            tomorrow = self.now + 86_400
            assert self.purse.remaining(tomorrow) == 10
            for held in self.held:
                self.purse.release(tomorrow, held)
            assert self.purse._page.reserved == 0


TestQuotasMachine = QuotasMachine.TestCase
TestLiarMachine = LiarMachine.TestCase
TestPurseMachine = PurseMachine.TestCase
