"""The decisions of an account, one at a time: which call is sent, how long calls wait, and what each end returns."""

from __future__ import annotations

import math

import pytest

from forebay.breaker import Breaker, BreakerRules, BreakerState
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.limit import FixedLimit
from forebay.quota import Budget, BudgetReservation, BudgetTracker, Quota, RateLimiter
from forebay.task import Priority
from forebay.upstream.account import Account
from forebay.upstream.account_registry import AccountRegistry
from forebay.upstream.call_queue import DeadlineHeap, QueuedCall
from forebay.upstream.call_request import Admitted, CallOutcome, CallRequest, Permit, Queued, Rejected
from forebay.upstream.spend import UpstreamBudgets
from forebay.upstream.upstream_settings import UpstreamSettings

FAULT = CallOutcome(kind=Outcome.FAULT)
SUCCESS = CallOutcome(kind=Outcome.SUCCESS)
NORMAL = Priority.NORMAL


class RecordingWaiter:
    """Records the decision and the time to wake at."""

    def __init__(self) -> None:
        self.decision: Admitted | Rejected | None = None
        self.looks_at: float | None = None
        self.gone = False

    def resolve(self, decision: Admitted | Rejected) -> bool:
        self.decision = decision
        return not self.gone

    def wake_at(self, when: float) -> bool:
        self.looks_at = when
        return not self.gone


class NoonBudget:
    """A budget for which it is always noon of the first day."""

    name = "the budget"

    def __init__(self, usd: float) -> None:
        self.tracker = BudgetTracker(Budget(usd=usd))

    def can_afford(self, usd: float, priority: Priority) -> bool:
        return self.tracker.can_afford(43_200.0, usd, priority)

    def reserve(self, usd: float) -> NoonReservation:
        return NoonReservation(self.tracker, self.tracker.reserve(43_200.0, usd))

    def rejection(self, usd: float) -> Rejected:
        return Rejected(f"{usd} is too much", "budget", 1.0, None)


class NoonReservation:
    def __init__(self, tracker: BudgetTracker, reservation: BudgetReservation) -> None:
        self.tracker, self.reservation = tracker, reservation

    def settle(self, usd: float) -> None:
        self.tracker.settle(43_200.0, self.reservation, usd)


class AccountHarness:
    """An account, and what tests do with it."""

    def __init__(self, slots: int = 1, *quotas: Quota, usd: float | None = None, max_wait: float = 60.0) -> None:
        self.budget = NoonBudget(usd) if usd is not None else None
        self.account = Account(
            "upstream:test",
            limit=FixedLimit(slots),
            quotas=RateLimiter(quotas),
            breaker=Breaker(BreakerRules(reset_timeout=10.0), draw=lambda: 0.0),
            budgets=lambda _: () if self.budget is None else (self.budget,),
            max_wait=max_wait,
            draw=lambda: 0.0,
        )

    def admit(self, now: float = 0.0, **how: object) -> Permit:
        """Make a call that is admitted at once, and return its permit."""
        decision = self.account.try_acquire(now, CallRequest(**how))  # type: ignore[arg-type]
        assert isinstance(decision, Admitted), decision
        return decision.permit

    def reject(self, now: float = 0.0, **how: object) -> Rejected:
        """Make a call that is rejected at once, and return the rejection."""
        decision = self.account.try_acquire(now, CallRequest(**how))  # type: ignore[arg-type]
        assert isinstance(decision, Rejected), decision
        return decision

    def queue(self, now: float = 0.0, **how: object) -> tuple[QueuedCall, RecordingWaiter]:
        """Make a call that has to wait, and return its entry and its waiter."""
        request, caller = CallRequest(**how), RecordingWaiter()  # type: ignore[arg-type]
        assert isinstance(self.account.try_acquire(now, request), Queued)
        call = self.account.enqueue(now, request, caller)
        self.account.serve_queue(now)
        return call, caller

    def end(self, now: float, permit: Permit, outcome: CallOutcome = SUCCESS) -> None:
        """End a call."""
        self.account.settle(now, permit, outcome)
        self.account.serve_queue(now)

    def take(self, now: float, seconds: float = 1.0) -> None:
        """Make a call that takes `seconds`, from its start to its end."""
        self.end(now, self.admit(now), CallOutcome(kind=Outcome.SUCCESS, latency=seconds))

    def break_down(self, now: float = 0.0) -> None:
        """Let five calls fail, which opens the breaker."""
        for _ in range(5):
            self.end(now, self.admit(now), FAULT)
        assert self.account.breaker.state(now) is BreakerState.OPEN


# --- the queue ---


def test_a_call_that_has_waited_four_typical_waits_is_promoted_by_one_priority() -> None:
    harness = AccountHarness()
    harness.take(0.0, seconds=1.0)
    permit = harness.admit(0.0)
    _, low = harness.queue(0.0, priority=Priority.LOW)
    flood: list[RecordingWaiter] = []
    for second in range(1, 15):  # one more HIGH call each; by the starvation bound alone it would take 21
        _, high = harness.queue(second, priority=Priority.HIGH)
        harness.end(second, permit)
        if isinstance(low.decision, Admitted):
            return
        flood.append(high)
        permit = next(caller.decision.permit for caller in flood if isinstance(caller.decision, Admitted))
        flood = [caller for caller in flood if caller.decision is None]
    pytest.fail("under a flood of HIGH calls the LOW one waited for more than four typical times")


def test_under_a_flood_of_better_calls_every_twenty_first_has_the_starved_priority() -> None:
    harness = AccountHarness()
    permit = harness.admit()
    _, low = harness.queue(priority=Priority.LOW)
    flood = [harness.queue(priority=Priority.HIGH)[1] for _ in range(30)]
    served: list[RecordingWaiter] = []
    for _ in range(31):
        harness.end(0.0, permit)  # no time passes, so none of them is promoted
        served += [caller for caller in (low, *flood) if isinstance(caller.decision, Admitted) and caller not in served]
        permit = served[-1].decision.permit  # type: ignore[union-attr]
    assert served.index(low) == 20


def test_a_queued_call_is_rejected_when_its_deadline_passes_wherever_it_stands() -> None:
    harness = AccountHarness()
    harness.admit(0.0)
    _, head = harness.queue(0.0, priority=Priority.HIGH)
    _, behind = harness.queue(0.0, deadline=5.0)
    harness.account.serve_queue(2.0)
    assert head.looks_at == 5.0
    head.looks_at = None
    harness.account.serve_queue(5.0)
    assert isinstance(behind.decision, Rejected)
    assert "deadline" in behind.decision.reason
    assert head.decision is None
    assert head.looks_at is None, "a deadline that has passed wakes the head again and again"


def test_a_queued_call_that_no_longer_fits_its_quota_takes_no_retry_slot() -> None:
    harness = AccountHarness(10)
    permit = harness.admit(charge=Charge(tokens=500))
    harness.account.answer_began(0.1, permit, [RateLimitHeaders(unit="tokens", limit=1_000, remaining=500, reset=30.0)])
    _, caller = harness.queue(0.2, charge=Charge(tokens=550), deadline=100.0)
    for _ in range(2):  # headers with another limit must come twice
        harness.account.answer_began(1.0, permit, [RateLimitHeaders(unit="tokens", limit=400, remaining=0, reset=60.0)])
    harness.account.serve_queue(100.0)
    assert isinstance(caller.decision, Rejected)
    assert caller.decision.retry_after is None
    harness.admit(100.0, charge=Charge(tokens=390))
    again = harness.reject(100.0, charge=Charge(tokens=390), deadline=120.0).retry_after
    assert again is not None
    assert math.isfinite(again)


def test_a_call_whose_deadline_has_passed_is_not_sent_even_if_there_is_a_free_slot() -> None:
    assert "deadline" in AccountHarness().reject(9.0, deadline=9.0).reason


def test_a_call_that_would_wait_for_more_than_half_of_its_time_is_rejected_at_once() -> None:
    harness = AccountHarness()
    harness.take(0.0, seconds=8.0)
    harness.admit(0.0)
    refused = harness.reject(0.0, deadline=15.0)
    assert "wait about 8 s" in refused.reason
    assert "too much of the 15 s to its deadline" in refused.reason
    assert refused.limited_by == "concurrency"  # what a longer wait is for
    harness.queue(0.0, deadline=17.0)


def test_a_call_with_a_near_deadline_retries_when_half_of_its_time_is_enough() -> None:
    harness = AccountHarness()
    harness.take(0.0, seconds=8.0)
    harness.admit(0.0)
    harness.queue(0.0)
    harness.queue(0.0)  # so the next call would wait for 24 s
    again = harness.reject(0.0, deadline=20.0).retry_after
    assert again is not None
    assert again >= 24.0 - 10.0


def test_a_call_may_wait_only_while_nearly_every_call_would_fit_into_the_rest_of_its_time() -> None:
    harness = AccountHarness()
    for seconds in (16.0, *(4.0 for _ in range(19))):
        harness.take(0.0, seconds=seconds)
    harness.account.durations.held = 8.0
    harness.admit(0.0)
    assert harness.reject(0.0, deadline=27.0).limited_by == "concurrency"  # 19 s would be left, and one call took 16
    harness.queue(0.0, deadline=29.0)  # 20 s would be left, a quarter more than 16


def test_a_call_may_always_wait_for_an_eighth_of_its_time() -> None:
    harness = AccountHarness()
    for _ in range(20):
        harness.take(0.0, seconds=60.0)
    harness.account.durations.held = 2.0
    harness.admit(0.0)
    harness.reject(0.0, deadline=15.0)
    harness.queue(0.0, deadline=17.0)


@pytest.mark.parametrize(("left_at", "decision"), [(10.0, Rejected), (9.0, Queued)], ids=["at its deadline", "before"])
def test_calls_that_are_cut_off_at_their_deadline_are_known_to_take_longer(left_at: float, decision: type) -> None:
    harness = AccountHarness()
    for _ in range(20):
        permit = harness.admit(0.0, deadline=10.0)
        harness.end(left_at, permit, CallOutcome(kind=Outcome.IGNORED))
    harness.account.durations.held = 9.0
    harness.admit(0.0)
    assert isinstance(
        harness.account.try_acquire(0.0, CallRequest(deadline=20.0)), decision
    )  # half of its time would be enough if the cancelled calls did not count


def late_decision(harness: AccountHarness, now: float, *, seconds: float) -> Admitted | Rejected | None:
    """Return the decision on a call with two of its ten seconds left, after calls that took `seconds`."""
    for _ in range(20):
        harness.take(now, seconds=seconds)
    holder = harness.admit(now)
    _, caller = harness.queue(now, deadline=now + 10.0)
    harness.end(now + 8.0, holder)
    if isinstance(caller.decision, Admitted):
        harness.end(now + 8.0, caller.decision.permit)
    return caller.decision


def test_in_the_last_quarter_of_its_time_a_call_is_sent_only_if_it_can_end_in_time() -> None:
    harness = AccountHarness()
    assert isinstance(late_decision(harness, 0.0, seconds=2.1), Admitted)  # one call in ten seconds tests the estimate
    given = late_decision(harness, 9.0, seconds=2.1)
    assert isinstance(given, Rejected)
    assert given.limited_by == "deadline"
    assert isinstance(late_decision(harness, 9.5, seconds=1.9), Admitted)
    assert isinstance(late_decision(harness, 18.0, seconds=2.1), Admitted)


def test_while_calls_with_more_time_wait_a_late_call_must_be_likely_to_end_in_time() -> None:
    harness = AccountHarness()
    for number in range(20):
        harness.take(0.0, seconds=1.0 if number % 2 else 3.0)
    for now, others, decision in (
        (0.0, 0, Admitted),
        (20.0, 1, Admitted),
        (29.0, 1, Rejected),
        (30.0, 0, Admitted),
    ):  # one in ten seconds
        harness.account.durations.held = 1.0
        holder = harness.admit(now)
        _, caller = harness.queue(now, deadline=now + 10.0)
        waiting = [harness.queue(now)[0] for _ in range(others)]
        harness.end(now + 8.0, holder)
        assert isinstance(caller.decision, decision)
        if isinstance(caller.decision, Admitted):
            harness.end(now + 8.0, caller.decision.permit)
        for other in waiting:
            if isinstance(given := other.waiter.decision, Admitted):
                harness.end(now + 8.0, given.permit)


def test_no_call_is_judged_by_too_few_durations() -> None:
    harness = AccountHarness()
    for _ in range(7):
        harness.take(0.0, seconds=5.0)
    harness.account.durations.held = 0.1
    for second in (0.0, 1.0):
        holder = harness.admit(second)
        _, caller = harness.queue(second, deadline=second + 10.0)
        harness.end(second + 8.0, holder, CallOutcome(kind=Outcome.IGNORED))
        assert isinstance(caller.decision, Admitted)
        harness.end(second + 8.0, caller.decision.permit, FAULT)


def test_a_call_that_has_little_time_from_the_start_is_sent_at_once() -> None:
    harness = AccountHarness(9)
    for _ in range(20):
        harness.take(0.0, seconds=5.0)
    for _ in range(3):
        harness.admit(0.0, deadline=1.0)


def test_a_late_retry_is_judged_by_the_time_that_the_call_had_at_first() -> None:
    harness = AccountHarness(9)
    for _ in range(20):
        harness.take(0.0, seconds=5.0)
    request = CallRequest(deadline=10.0)
    for now, decision in (
        (0.0, Admitted),
        (6.0, Admitted),
        (8.0, Admitted),
        (8.1, Rejected),
    ):  # in the last quarter of its time, one in ten seconds
        assert isinstance(harness.account.try_acquire(now, request), decision)


# --- durations ---


def test_the_typical_latency_is_learned_from_successes_over_their_slowdown() -> None:
    harness = AccountHarness()
    for tokens in range(100, 112):
        harness.account.latency_model.learn(tokens, 0.02 * tokens)
    harness.end(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.SUCCESS, latency=6.0, output_tokens=100))
    harness.end(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.FAULT, latency=60.0, output_tokens=100))
    assert harness.account.durations.typical == pytest.approx(2.0)


def test_cancelled_calls_count_in_the_time_that_slots_are_held_and_throttled_ones_do_not() -> None:
    harness = AccountHarness()
    harness.end(30.0, harness.admit(0.0), CallOutcome(kind=Outcome.IGNORED))
    for _ in range(9):  # ten in a row are an outage
        harness.end(31.0, harness.admit(31.0), CallOutcome(kind=Outcome.OVERLOAD, released=True))
    assert harness.account.durations.held == pytest.approx(30.0)
    harness.admit(31.0)
    assert harness.account.expected_wait(31.0, CallRequest())[0] == pytest.approx(30.0)


def test_a_slowdown_counts_as_normal_only_with_half_of_the_limit_in_flight() -> None:
    harness = AccountHarness(8)
    alone = harness.admit(0.0)
    for tokens in range(100, 112):
        harness.account.observe_latency(0.0, alone, tokens, 0.01 * tokens)
    for _ in range(4):
        fifth = harness.admit(0.0)
    for _ in range(100):
        assert harness.account.observe_latency(0.0, fifth, 100, 3.0) == pytest.approx(3.0)


def test_a_rejected_call_retries_when_the_queue_is_short_enough() -> None:
    harness = AccountHarness(1000, Quota(requests=6, per="minute"), max_wait=60.0)
    for _ in range(6):
        harness.take(0.0, seconds=0.1)
    for _ in range(6):
        harness.queue(0.0)
    first, second = harness.reject(0.0).retry_after, harness.reject(0.0).retry_after
    assert first is not None
    assert second is not None
    assert first == pytest.approx(10.0 + 10.0, abs=2.0)  # one call is sent every ten seconds
    assert second == pytest.approx(first + 10.0, abs=2.0)


def test_a_small_call_does_not_overtake_calls_that_wait_for_tokens() -> None:
    harness = AccountHarness(9, Quota(tokens=100, per="minute"))
    harness.admit(0.0, charge=Charge(tokens=90))
    harness.queue(0.0, charge=Charge(tokens=90))
    harness.queue(0.0, charge=Charge(tokens=1))


def test_queued_calls_are_rejected_as_soon_as_the_breaker_opens() -> None:
    harness = AccountHarness(5)
    permits = [harness.admit() for _ in range(5)]
    _, caller = harness.queue()
    for permit in permits:  # the queue is served only later
        harness.account.settle(0.0, permit, FAULT)
    assert isinstance(caller.decision, Rejected)
    assert caller.decision.limited_by == "breaker"


def test_the_permit_of_a_caller_whose_event_loop_has_closed_is_returned() -> None:
    harness = AccountHarness(1, Quota(requests=10, per="minute"), usd=9.0)
    holder = harness.admit(0.0)
    _, caller = harness.queue(0.0, usd=1.0)
    caller.gone = True
    harness.end(0.0, holder)
    assert harness.account.in_flight == 0
    assert harness.budget is not None
    assert harness.budget.tracker.remaining(43_200.0) == 9.0
    assert harness.account.quotas.levels(0.0)[0].remaining == 9.0


# --- ends ---


def test_a_rate_limited_call_takes_nothing_and_delays_all_calls() -> None:
    harness = AccountHarness(9, Quota(requests=10, per="minute"))
    harness.end(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.IGNORED, rate_limited=True, retry_after=7.0, usd=0.0))
    decision = harness.account.try_acquire(0.0, CallRequest())
    assert isinstance(decision, Queued)
    assert decision.seconds == pytest.approx(7.0)


def test_a_call_that_cost_more_than_expected_is_settled_at_its_cost() -> None:
    harness = AccountHarness(9, usd=9.0)
    harness.end(0.0, harness.admit(0.0, usd=1.0), CallOutcome(kind=Outcome.SUCCESS, usd=3.0))
    assert harness.budget is not None
    assert harness.budget.tracker.spent(43_200.0) == 3.0


def test_a_call_that_failed_midway_costs_what_was_reserved() -> None:
    harness = AccountHarness(9, usd=9.0)
    harness.end(0.0, harness.admit(0.0, usd=2.0), FAULT)
    assert harness.budget is not None
    assert harness.budget.tracker.spent(43_200.0) == 2.0
    assert harness.budget.tracker.remaining(43_200.0) == 7.0


def test_reserved_money_is_not_available_to_others() -> None:
    harness = AccountHarness(9, usd=3.0)
    harness.admit(0.0, usd=2.0)
    assert harness.reject(0.0, usd=2.0).limited_by == "budget"


def test_neither_throttled_nor_retried_attempts_open_the_breaker() -> None:
    harness = AccountHarness(100)
    for _ in range(50):
        harness.end(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.OVERLOAD, released=True))
        harness.end(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.FAULT, final=False))
    assert harness.account.breaker.state(0.0) is BreakerState.CLOSED


def test_a_cancelled_probe_is_returned() -> None:
    harness = AccountHarness(9)
    harness.break_down()
    probe = harness.admit(11.0)
    assert harness.reject(11.0).limited_by == "breaker"
    harness.account.release_unsent(11.0, probe)
    harness.admit(11.0)


def test_the_probe_of_a_caller_that_is_gone_is_returned() -> None:
    harness = AccountHarness(1)
    holder = harness.admit(0.0)
    _, caller = harness.queue(0.0)
    caller.gone = True
    harness.account.breaker.trip(0.0)
    harness.end(11.0, holder)  # half-open by now, so the queued call is the probe
    assert isinstance(caller.decision, Admitted)
    harness.admit(11.0)


# --- load ---


def test_the_load_is_full_while_the_account_is_suspended() -> None:
    harness = AccountHarness()
    harness.account.suspend(0.0, 3_600.0)
    assert harness.account.load(3_599.0, CallRequest(), NORMAL) == (1.0, "budget")
    assert harness.account.load(3_600.0, CallRequest(), NORMAL) == (0.0, "nothing")


def test_the_load_counts_expected_calls() -> None:
    harness = AccountHarness(1)
    harness.take(0.0, seconds=6.0)
    harness.account.expected_calls = 5
    assert harness.account.load(0.0, CallRequest(), NORMAL)[0] == pytest.approx(5 * 6.0 / 60.0)


# --- the account of a call ---


def test_each_api_key_has_one_account() -> None:
    registry = AccountRegistry(UpstreamSettings("llm"), UpstreamBudgets("llm", None, None, None), draw=lambda: 0.0)
    assert registry.account("gpt", "sk-one") is registry.account("gpt", "sk-one")
    assert len({registry.account("gpt", key) for key in ("", "sk-one", "sk-two")}) == 3


# --- deadlines ---


class FakeEntry:
    is_queued = True


def test_the_deadline_heap_drops_entries_that_have_left() -> None:
    deadlines = DeadlineHeap[FakeEntry]()
    staying = FakeEntry()
    deadlines.add(1e9, staying, length=1)
    for moment in range(1000):
        left = FakeEntry()
        deadlines.add(moment, left, length=1)
        left.is_queued = False
    assert len(deadlines) < 100
    assert deadlines.next_deadline() == 1e9
    assert deadlines.pop_overdue(1e9 - 1) is None
    assert deadlines.pop_overdue(1e9) is staying
    assert deadlines.next_deadline() is None


def test_an_entry_without_a_deadline_is_not_kept() -> None:
    deadlines = DeadlineHeap[FakeEntry]()
    deadlines.add(math.inf, FakeEntry(), length=1)
    assert deadlines.next_deadline() is None


def test_a_call_that_is_rejected_during_a_probe_need_not_wait_for_the_longest_probe() -> None:
    harness = AccountHarness(5)
    for permit in [harness.admit(1.0) for _ in range(5)]:
        harness.end(1.0, permit, FAULT)
    assert harness.reject(1.0).limited_by == "breaker"
    probe = harness.admit(20.0)
    assert harness.reject(20.0).retry_after == 1.0  # not after the minute in which the probe must be answered
    harness.end(21.0, probe)


REFUSED = CallOutcome(kind=Outcome.OVERLOAD, released=True, usd=0.0)


def test_no_call_waits_in_an_outage_longer_than_the_longest_wait() -> None:
    harness = AccountHarness(2, max_wait=30.0)
    for _ in range(10):
        harness.end(0.0, harness.admit(0.0), REFUSED)
    _, caller = harness.queue(0.5)
    now = 0.0
    while caller.decision is None or isinstance(caller.decision, Admitted):
        now = harness.account.limit.reopens_at(now) or now + 0.1
        harness.account.serve_queue(now)
        if isinstance(caller.decision, Admitted):  # it is throttled again
            permit = caller.decision.permit
            caller.decision = None
            harness.end(now, permit, REFUSED)
            if now < 30.0:
                _, caller = harness.queue(now)
            else:
                break
    assert 30.0 <= now <= 35.0
    refusal = harness.reject(now)
    assert refusal.limited_by == "outage"
    assert harness.account.load(now, CallRequest(), NORMAL) == (1.0, "outage")
    when = harness.account.limit.reopens_at(now)
    assert when is not None
    assert refusal.retry_after == pytest.approx(when - now)
    assert harness.account.load(when, CallRequest(), NORMAL)[0] < 1.0  # the next call may be sent
    harness.end(when, harness.admit(when))
    harness.admit(when)
