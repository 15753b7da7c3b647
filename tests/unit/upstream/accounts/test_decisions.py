"""The decisions of an account, one at a time: which calls are admitted, which wait, and what each outcome changes."""

from __future__ import annotations

import math
from typing import Any

import pytest

from forebay import Overloaded, clock
from forebay.breaker import Breaker, BreakerRules, BreakerState
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.limit import FixedLimit, VegasLimit
from forebay.quota import Budget, BudgetReservation, BudgetTracker, Prices, Quota, RateLimiter
from forebay.retry import Retry
from forebay.task import Priority
from forebay.upstream.accounts import account as account_module
from forebay.upstream.accounts.account import Account
from forebay.upstream.accounts.account_registry import AccountRegistry
from forebay.upstream.accounts.call_queue import CallQueue, QueuedCall
from forebay.upstream.accounts.fair_order import FairOrder
from forebay.upstream.accounts.spend import UpstreamBudgets
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.accounts.usage_recorder import UsageRecorder
from forebay.upstream.call_request import Admitted, CallOutcome, CallRequest, Permit, Queued, Rejected
from forebay.upstream.upstream_settings import UpstreamSettings

FAULT = CallOutcome(kind=Outcome.FAULT)
SUCCESS = CallOutcome(kind=Outcome.SUCCESS)
NORMAL = Priority.NORMAL


class RecordingWaiter:
    """A waiter that records its decision and its wake-up time."""

    def __init__(self) -> None:
        self.decision: Admitted | Rejected | None = None
        self.wake_time: float | None = None
        self.gone = False

    def resolve(self, decision: Admitted | Rejected) -> bool:
        self.decision = decision
        return not self.gone

    def wake_at(self, when: float) -> bool:
        self.wake_time = when
        return not self.gone


class NoonReservation:
    """Dollars held of a `NoonBudget`."""

    def __init__(self, tracker: BudgetTracker, reservation: BudgetReservation) -> None:
        self.tracker = tracker
        self.reservation = reservation

    def settle(self, usd: float) -> None:
        self.tracker.settle(43_200.0, self.reservation, usd)

    def revise(self, usd: float) -> None:
        self.tracker.revise(43_200.0, self.reservation, usd)


class NoonBudget:
    """A budget whose clock stands at noon of the first day."""

    name = "the budget"

    def __init__(self, usd: float) -> None:
        self.tracker = BudgetTracker(Budget(usd=usd))

    def can_afford(self, usd: float, priority: Priority) -> bool:
        return self.tracker.can_afford(43_200.0, usd, priority)

    def try_reserve(self, usd: float, priority: Priority) -> NoonReservation | None:
        reservation = self.tracker.try_reserve(43_200.0, usd, priority)
        return None if reservation is None else NoonReservation(self.tracker, reservation)

    def rejection(self, usd: float, priority: Priority) -> Rejected:
        del priority
        return Rejected(f"{usd} is too much", "budget", 1.0, None)


class AccountHarness:
    """An account with short names for the operations of a test."""

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
        """Return the permit of a call that is admitted at once."""
        answer = self.account.try_acquire(now, CallRequest(**how))  # type: ignore[arg-type]
        assert isinstance(answer, Admitted), answer
        return answer.permit

    def reject(self, now: float = 0.0, **how: object) -> Rejected:
        """Return the rejection of a call that is rejected at once."""
        answer = self.account.try_acquire(now, CallRequest(**how))  # type: ignore[arg-type]
        assert isinstance(answer, Rejected), answer
        return answer

    def enqueue(self, now: float = 0.0, **how: object) -> tuple[QueuedCall, RecordingWaiter]:
        """Return the queue entry and the waiter of a call that has to wait."""
        request, caller = CallRequest(**how), RecordingWaiter()  # type: ignore[arg-type]
        assert isinstance(self.account.try_acquire(now, request), Queued)
        waiting = self.account.queue.enqueue(now, request, caller)
        self.account.serve_queue(now)
        return waiting, caller

    def settle(self, now: float, permit: Permit, outcome: CallOutcome = SUCCESS) -> None:
        """Settle a call, and serve the queue."""
        self.account.settle(now, permit, outcome)
        self.account.serve_queue(now)

    def complete_call(self, now: float, seconds: float = 1.0) -> None:
        """Admit a call and settle it as a success that took `seconds`."""
        self.settle(now, self.admit(now), CallOutcome(kind=Outcome.SUCCESS, latency=seconds))

    def open_breaker(self, now: float = 0.0) -> None:
        """Open the breaker by five failed calls."""
        for _ in range(5):
            self.settle(now, self.admit(now), FAULT)
        assert self.account.breaker.state(now) is BreakerState.OPEN


# --- the queue ---


def test_a_call_that_waited_four_typical_waits_is_promoted_one_priority() -> None:
    harness = AccountHarness()
    harness.complete_call(0.0, seconds=1.0)
    permit = harness.admit(0.0)
    _, low = harness.enqueue(0.0, priority=Priority.LOW)
    flood: list[RecordingWaiter] = []
    for second in range(1, 15):  # one more HIGH call each; by the one in 21 alone it would take 21
        _, high = harness.enqueue(second, priority=Priority.HIGH)
        harness.settle(second, permit)
        if isinstance(low.decision, Admitted):
            return
        flood.append(high)
        permit = next(caller.decision.permit for caller in flood if isinstance(caller.decision, Admitted))
        flood = [caller for caller in flood if caller.decision is None]
    pytest.fail("under a flood of HIGH calls the LOW one waited for more than four typical waits")


def test_under_a_flood_of_higher_priority_every_twenty_first_call_is_of_the_lower_one() -> None:
    harness = AccountHarness()
    permit = harness.admit()
    _, low = harness.enqueue(priority=Priority.LOW)
    flood = [harness.enqueue(priority=Priority.HIGH)[1] for _ in range(30)]
    served: list[RecordingWaiter] = []
    for _ in range(31):
        harness.settle(0.0, permit)  # in no time, so none of them is promoted
        served += [caller for caller in (low, *flood) if isinstance(caller.decision, Admitted) and caller not in served]
        permit = served[-1].decision.permit  # type: ignore[union-attr]
    assert served.index(low) == 20


def test_a_deadline_that_passes_in_the_queue_rejects_its_call_at_any_position() -> None:
    harness = AccountHarness()
    harness.admit(0.0)
    _, head = harness.enqueue(0.0, priority=Priority.HIGH)
    _, behind = harness.enqueue(0.0, deadline=5.0)
    harness.account.serve_queue(2.0)
    assert head.wake_time == 5.0
    head.wake_time = None
    harness.account.serve_queue(5.0)
    assert isinstance(behind.decision, Rejected)
    assert "deadline" in behind.decision.reason
    assert head.decision is None
    assert head.wake_time == 90.0, "the head wakes again and again for a deadline that has passed"


def test_a_flood_of_one_tenant_and_of_new_runs_keeps_nobody_out_who_goes_before_it() -> None:
    harness = AccountHarness(100, Quota(requests=2, per="second"), max_wait=5.0)
    charge = Charge(requests=1)
    harness.settle(
        0.0, harness.admit(charge=charge, tenant="a", task_id="first"), CallOutcome(kind=Outcome.SUCCESS, latency=0.5)
    )
    held = harness.admit(charge=charge, tenant="a")
    flood = 0
    while isinstance(harness.account.try_acquire(0.0, CallRequest(charge=charge, tenant="a")), Queued):
        harness.enqueue(charge=charge, tenant="a")
        flood += 1
    assert 8 <= flood <= 12  # of these calls 5 s have room for 10
    for asking in ({"tenant": "b"}, {"tenant": "a", "task_id": "first"}, {"tenant": "a", "retries": 1}):
        answer = harness.account.try_acquire(0.0, CallRequest(charge=charge, **asking))
        assert isinstance(answer, Queued), answer
        assert answer.seconds <= 1.5
    assert "longer than max_wait" in harness.reject(charge=charge, tenant="a").reason
    assert not held.closed


def test_a_full_queue_is_open_for_calls_that_go_before_most_of_it_up_to_twice_its_bound(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(account_module, "_QUEUE_BOUND", 10)
    harness = AccountHarness()
    harness.admit()
    for _ in range(10):
        harness.enqueue(tenant="flood")
    assert "10 calls wait already" in harness.reject(tenant="flood").reason
    for number in range(4):
        harness.enqueue(tenant=f"{number}")  # it goes after one call of each tenant
    assert "10 calls wait already" in harness.reject(tenant="4").reason
    for _ in range(5):
        harness.enqueue(retries=1)
    assert "10 calls wait already" in harness.reject(retries=1).reason
    harness.enqueue(priority=Priority.CRITICAL)
    assert harness.account.queue.length == 20
    assert "10 calls wait already" in harness.reject(priority=Priority.CRITICAL).reason


def test_no_call_waits_for_more_than_one_and_a_half_times_the_longest_expected_wait() -> None:
    harness = AccountHarness(max_wait=10.0)
    harness.admit(0.0)
    _, head = harness.enqueue(0.0)
    _, behind = harness.enqueue(1.0, priority=Priority.LOW, deadline=500.0)
    assert head.wake_time == 15.0
    harness.account.serve_queue(15.0)
    assert isinstance(head.decision, Rejected)
    assert "waited for 15 s" in head.decision.reason
    assert behind.decision is None
    harness.account.serve_queue(16.0)
    assert isinstance(behind.decision, Rejected)
    assert harness.account.queue.length == 0


def test_a_queued_call_that_became_larger_than_its_bucket_takes_no_retry_slot() -> None:
    harness = AccountHarness(10)
    permit = harness.admit(charge=Charge(tokens=500))
    harness.account.answer_began(0.1, permit, [RateLimitHeaders(unit="tokens", limit=1_000, remaining=500, reset=30.0)])
    _, caller = harness.enqueue(0.2, charge=Charge(tokens=550), deadline=100.0)
    for _ in range(2):  # a changed limit counts once it is reported twice
        harness.account.answer_began(1.0, permit, [RateLimitHeaders(unit="tokens", limit=400, remaining=0, reset=60.0)])
    harness.account.serve_queue(100.0)
    assert isinstance(caller.decision, Rejected)
    assert caller.decision.retry_after is None
    harness.admit(100.0, charge=Charge(tokens=390))
    retry_after = harness.reject(100.0, charge=Charge(tokens=390), deadline=120.0).retry_after
    assert retry_after is not None
    assert math.isfinite(retry_after)


def test_a_call_past_its_deadline_is_rejected_though_there_is_capacity() -> None:
    assert "deadline" in AccountHarness().reject(9.0, deadline=9.0).reason


def test_a_call_that_would_wait_for_more_than_half_of_its_time_is_rejected_at_once() -> None:
    harness = AccountHarness()
    harness.complete_call(0.0, seconds=8.0)
    harness.admit(0.0)
    rejection = harness.reject(0.0, deadline=15.0)
    assert "wait about 8 s" in rejection.reason
    assert "too much of the 15 s to its deadline" in rejection.reason
    assert rejection.limited_by == "concurrency"  # the limit that would have to grow
    harness.enqueue(0.0, deadline=17.0)


def test_after_refusals_a_call_that_was_not_refused_goes_first() -> None:
    harness = AccountHarness(10)
    refused = CallOutcome(kind=Outcome.OVERLOAD, released=True, account_limited=True, usd=0.0)
    for second in range(9):
        harness.account.settle(second + 0.1, harness.admit(float(second)), refused)
    _, retried = harness.enqueue(8.2, retries=1)
    _, fresh = harness.enqueue(8.2)
    harness.account.serve_queue(9.0)
    assert isinstance(fresh.decision, Admitted)
    assert retried.decision is None


def test_a_call_may_wait_for_a_quota_for_most_of_its_time_since_that_wait_is_known_well() -> None:
    harness = AccountHarness(10, Quota(requests=1, per="minute"))
    harness.admit(0.0)
    assert "too much of the 74 s to its deadline" in harness.reject(0.0, deadline=74.0).reason
    harness.enqueue(0.0, deadline=76.0)


def test_a_call_with_too_near_a_deadline_may_retry_when_half_of_its_time_is_enough() -> None:
    harness = AccountHarness()
    harness.complete_call(0.0, seconds=8.0)
    harness.admit(0.0)
    harness.enqueue(0.0)
    harness.enqueue(0.0)  # so the next one would wait 24 s
    retry_after = harness.reject(0.0, deadline=20.0).retry_after
    assert retry_after is not None
    assert retry_after >= 24.0 - 10.0


def test_a_call_may_wait_while_the_time_left_is_enough_for_nearly_every_call() -> None:
    harness = AccountHarness()
    for seconds in (16.0, *(4.0 for _ in range(19))):
        harness.complete_call(0.0, seconds=seconds)
    harness.account.durations.held = 8.0
    harness.admit(0.0)
    assert harness.reject(0.0, deadline=27.0).limited_by == "concurrency"  # 19 s would be left; one took 16 s
    harness.enqueue(0.0, deadline=29.0)  # a quarter more than 16 s would be left


def test_however_long_calls_take_a_call_may_wait_for_an_eighth_of_its_time() -> None:
    harness = AccountHarness()
    for _ in range(20):
        harness.complete_call(0.0, seconds=60.0)
    harness.account.durations.held = 2.0
    harness.admit(0.0)
    harness.reject(0.0, deadline=15.0)
    harness.enqueue(0.0, deadline=17.0)


@pytest.mark.parametrize(("ended_at", "answer"), [(10.0, Rejected), (9.0, Queued)], ids=["at its deadline", "before"])
def test_calls_cut_off_at_their_deadline_count_as_longer_ones(ended_at: float, answer: type) -> None:
    harness = AccountHarness()
    for _ in range(20):
        permit = harness.admit(0.0, deadline=10.0)
        harness.settle(ended_at, permit, CallOutcome(kind=Outcome.IGNORED))
    harness.account.durations.held = 9.0
    harness.admit(0.0)
    # Half of its time would do if those calls had not been cut off.
    assert isinstance(harness.account.try_acquire(0.0, CallRequest(deadline=20.0)), answer)


def decide_late(harness: AccountHarness, now: float, *, seconds: float) -> Admitted | Rejected | None:
    """Return the decision on a call with two of its ten seconds left, after calls that took `seconds`."""
    for _ in range(20):
        harness.complete_call(now, seconds=seconds)
    holder = harness.admit(now)
    _, caller = harness.enqueue(now, deadline=now + 10.0)
    harness.settle(now + 8.0, holder)
    if isinstance(caller.decision, Admitted):
        harness.settle(now + 8.0, caller.decision.permit)
    return caller.decision


def test_in_the_last_quarter_of_its_time_a_call_is_sent_only_if_it_can_meet_its_deadline() -> None:
    harness = AccountHarness()
    assert isinstance(decide_late(harness, 0.0, seconds=2.1), Admitted)  # one call in ten seconds tests the estimate
    decision = decide_late(harness, 9.0, seconds=2.1)
    assert isinstance(decision, Rejected)
    assert decision.limited_by == "deadline"
    assert isinstance(decide_late(harness, 9.5, seconds=1.9), Admitted)
    assert isinstance(decide_late(harness, 18.0, seconds=2.1), Admitted)


def test_while_calls_with_more_time_wait_a_late_call_must_be_likely_to_meet_its_deadline() -> None:
    harness = AccountHarness()
    for number in range(20):
        harness.complete_call(0.0, seconds=1.0 if number % 2 else 3.0)
    # One call in ten seconds tests the estimate.
    for now, others, answer in ((0.0, 0, Admitted), (20.0, 1, Admitted), (29.0, 1, Rejected), (30.0, 0, Admitted)):
        harness.account.durations.held = 1.0
        holder = harness.admit(now)
        _, caller = harness.enqueue(now, deadline=now + 10.0)
        waiting = [harness.enqueue(now)[0] for _ in range(others)]
        harness.settle(now + 8.0, holder)
        assert isinstance(caller.decision, answer)
        if isinstance(caller.decision, Admitted):
            harness.settle(now + 8.0, caller.decision.permit)
        for other in waiting:
            if isinstance(decision := other.waiter.decision, Admitted):
                harness.settle(now + 8.0, decision.permit)


def test_too_few_known_durations_reject_no_late_call() -> None:
    harness = AccountHarness()
    for _ in range(7):
        harness.complete_call(0.0, seconds=5.0)
    harness.account.durations.held = 0.1
    for second in (0.0, 1.0):
        holder = harness.admit(second)
        _, caller = harness.enqueue(second, deadline=second + 10.0)
        harness.settle(second + 8.0, holder, CallOutcome(kind=Outcome.IGNORED))
        assert isinstance(caller.decision, Admitted)
        harness.settle(second + 8.0, caller.decision.permit, FAULT)


def test_a_call_with_little_time_from_the_start_is_admitted_at_once() -> None:
    harness = AccountHarness(9)
    for _ in range(20):
        harness.complete_call(0.0, seconds=5.0)
    for _ in range(3):
        harness.admit(0.0, deadline=1.0)


def test_a_late_retry_is_judged_by_the_time_that_its_call_had_at_first() -> None:
    harness = AccountHarness(9)
    for _ in range(20):
        harness.complete_call(0.0, seconds=5.0)
    request = CallRequest(deadline=10.0)
    # In the last quarter, one call in ten seconds tests the estimate.
    for now, answer in ((0.0, Admitted), (6.0, Admitted), (8.0, Admitted), (8.1, Rejected)):
        assert isinstance(harness.account.try_acquire(now, request), answer)


# --- latency ---


def test_durations_are_learned_from_successes_divided_by_their_slowdown() -> None:
    harness = AccountHarness()
    for tokens in range(100, 112):
        harness.account.latency_model.learn(tokens, 0.02 * tokens)
    harness.settle(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.SUCCESS, latency=6.0, output_tokens=100))
    harness.settle(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.FAULT, latency=60.0, output_tokens=100))
    assert harness.account.durations.typical == pytest.approx(2.0)


def test_the_time_a_slot_is_held_includes_cancelled_calls_and_not_throttled_ones() -> None:
    harness = AccountHarness()
    harness.settle(30.0, harness.admit(0.0), CallOutcome(kind=Outcome.IGNORED))
    for _ in range(9):  # ten in a row would be an outage
        harness.settle(31.0, harness.admit(31.0), CallOutcome(kind=Outcome.OVERLOAD, released=True))
    assert harness.account.durations.held == pytest.approx(30.0)
    harness.admit(31.0)
    assert harness.account.expected_wait(31.0, CallRequest())[0] == pytest.approx(30.0)


def test_latency_is_taken_for_normal_only_below_half_of_the_limit_in_flight() -> None:
    harness = AccountHarness(8)
    alone = harness.admit(0.0)
    for tokens in range(100, 112):
        harness.account.observe_latency(0.0, alone, tokens, 0.01 * tokens)
    for _ in range(4):
        fifth = harness.admit(0.0)
    for _ in range(100):
        assert harness.account.observe_latency(0.0, fifth, 100, 3.0) == pytest.approx(3.0)


def test_a_rejected_call_may_retry_when_the_queue_is_short_enough_for_it() -> None:
    harness = AccountHarness(1000, Quota(requests=6, per="minute"), max_wait=60.0)
    for _ in range(6):
        harness.complete_call(0.0, seconds=0.1)
    for _ in range(6):
        harness.enqueue(0.0)
    first, second = harness.reject(0.0).retry_after, harness.reject(0.0).retry_after
    assert first is not None
    assert second is not None
    assert first == pytest.approx(10.0 + 10.0, abs=2.0)  # one call is served each ten seconds
    assert second == pytest.approx(first + 10.0, abs=2.0)


def test_a_small_call_does_not_overtake_calls_that_wait_for_tokens() -> None:
    harness = AccountHarness(9, Quota(tokens=100, per="minute"))
    harness.admit(0.0, charge=Charge(tokens=90))
    harness.enqueue(0.0, charge=Charge(tokens=90))
    harness.enqueue(0.0, charge=Charge(tokens=1))


def test_queued_calls_are_rejected_as_soon_as_the_breaker_opens() -> None:
    harness = AccountHarness(5)
    permits = [harness.admit() for _ in range(5)]
    _, caller = harness.enqueue()
    for permit in permits:  # without serving the queue in between
        harness.account.settle(0.0, permit, FAULT)
    assert isinstance(caller.decision, Rejected)
    assert caller.decision.limited_by == "breaker"


def test_a_caller_whose_loop_has_closed_keeps_no_permit() -> None:
    harness = AccountHarness(1, Quota(requests=10, per="minute"), usd=9.0)
    holder = harness.admit(0.0)
    _, caller = harness.enqueue(0.0, usd=1.0)
    caller.gone = True
    harness.settle(0.0, holder)
    assert harness.account.in_flight == 0
    assert harness.budget is not None
    assert harness.budget.tracker.remaining(43_200.0) == 9.0
    assert harness.account.quotas.levels(0.0)[0].remaining == 9.0


@pytest.mark.parametrize("arrives", [True, False])
def test_a_permit_that_its_caller_can_never_take_goes_to_the_next(*, arrives: bool) -> None:
    harness = AccountHarness(1, Quota(requests=10, per="minute"), usd=9.0)
    holder = harness.admit(0.0)
    lost, caller = harness.enqueue(0.0, usd=1.0)
    _, waiting = harness.enqueue(0.0, usd=1.0)
    harness.settle(0.0, holder)
    assert isinstance(caller.decision, Admitted)
    assert waiting.wake_time == pytest.approx(1.0)
    caller.gone = True  # its loop closes before it wakes
    if arrives:
        harness.enqueue(0.5)
    else:
        harness.account.serve_queue(1.0)
    assert isinstance(waiting.decision, Admitted)
    harness.account.withdraw(1.0, lost)  # the task of the closed loop is collected
    assert harness.account.in_flight == 1
    assert harness.budget is not None
    assert harness.budget.tracker.remaining(43_200.0) == 8.0


# --- outcomes ---


def test_a_rate_limited_call_uses_no_quota_and_blocks_all_calls() -> None:
    harness = AccountHarness(9, Quota(requests=10, per="minute"))
    harness.settle(
        0.0, harness.admit(0.0), CallOutcome(kind=Outcome.IGNORED, rate_limited=True, retry_after=7.0, usd=0.0)
    )
    answer = harness.account.try_acquire(0.0, CallRequest())
    assert isinstance(answer, Queued)
    assert answer.seconds == pytest.approx(7.0)


def test_a_call_that_cost_more_than_was_reserved_costs_that() -> None:
    harness = AccountHarness(9, usd=9.0)
    harness.settle(0.0, harness.admit(0.0, usd=1.0), CallOutcome(kind=Outcome.SUCCESS, usd=3.0))
    assert harness.budget is not None
    assert harness.budget.tracker.spent(43_200.0) == 3.0


def test_a_failed_call_costs_the_reserved_amount() -> None:
    harness = AccountHarness(9, usd=9.0)
    harness.settle(0.0, harness.admit(0.0, usd=2.0), FAULT)
    assert harness.budget is not None
    assert harness.budget.tracker.spent(43_200.0) == 2.0
    assert harness.budget.tracker.remaining(43_200.0) == 7.0


def test_reserved_dollars_are_not_available_to_others() -> None:
    harness = AccountHarness(9, usd=3.0)
    harness.admit(0.0, usd=2.0)
    assert harness.reject(0.0, usd=2.0).limited_by == "budget"


def test_throttled_calls_and_retried_attempts_never_open_the_breaker() -> None:
    harness = AccountHarness(100)
    for _ in range(50):
        harness.settle(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.OVERLOAD, released=True))
        harness.settle(0.0, harness.admit(0.0), CallOutcome(kind=Outcome.FAULT, final=False))
    assert harness.account.breaker.state(0.0) is BreakerState.CLOSED


def test_a_probe_that_is_cancelled_is_given_back() -> None:
    harness = AccountHarness(9)
    harness.open_breaker()
    probe = harness.admit(11.0)
    assert harness.reject(11.0).limited_by == "breaker"
    harness.account.release_unsent(11.0, probe)
    harness.admit(11.0)


def test_a_probe_whose_caller_is_gone_is_given_back() -> None:
    harness = AccountHarness(1)
    holder = harness.admit(0.0)
    _, caller = harness.enqueue(0.0)
    caller.gone = True
    harness.account.breaker.trip(0.0)
    harness.settle(11.0, holder)  # half-open by now, so the queued call is the probe
    assert isinstance(caller.decision, Admitted)
    harness.admit(11.0)


# --- load ---


def test_the_load_is_full_while_the_spend_cap_of_the_provider_is_reached() -> None:
    harness = AccountHarness()
    harness.account.suspend(0.0, 3_600.0)
    assert harness.account.load(3_599.0, CallRequest(), NORMAL) == (1.0, "budget")
    assert harness.account.load(3_600.0, CallRequest(), NORMAL) == (0.0, "nothing")


def test_the_load_counts_expected_calls() -> None:
    harness = AccountHarness(1)
    harness.complete_call(0.0, seconds=6.0)
    harness.account.expected_calls = 5
    assert harness.account.load(0.0, CallRequest(), NORMAL)[0] == pytest.approx(5 * 6.0 / 60.0)


# --- learned quotas ---


@pytest.mark.parametrize("kind", [Outcome.FAULT, Outcome.OVERLOAD])
def test_a_call_that_the_provider_has_not_served_uses_no_request_of_a_learned_quota(kind: Outcome) -> None:
    harness = AccountHarness(10)
    quotas = harness.account.quotas
    headers = (RateLimitHeaders(unit="requests", limit=20, remaining=10, reset=50.0),)
    first = harness.admit(0.0)
    harness.settle(0.5, first, CallOutcome(kind=Outcome.SUCCESS, used=Charge(), rate_limit_headers=headers))
    before = quotas.levels(1.0)[0].remaining
    harness.settle(1.0, harness.admit(1.0), CallOutcome(kind=kind, used=Charge()))
    assert quotas.levels(1.0)[0].remaining == before
    harness.settle(1.0, harness.admit(1.0), CallOutcome(kind=Outcome.SUCCESS, used=Charge()))
    assert quotas.levels(1.0)[0].remaining == before - 1


# --- the breaker ---


def test_a_call_that_has_failed_does_not_probe() -> None:
    harness = AccountHarness(10)
    harness.open_breaker(0.0)
    rejected = harness.reject(20.0, failed=True)
    assert (rejected.limited_by, rejected.retry_after) == ("breaker", 1.0)
    probe = harness.admit(20.0)
    harness.settle(20.0, probe)
    harness.complete_call(20.0)
    harness.admit(20.0, failed=True)


def test_a_probe_counts_by_its_first_attempt() -> None:
    harness = AccountHarness(10)
    harness.open_breaker(0.0)
    harness.settle(20.0, harness.admit(20.0), CallOutcome(kind=Outcome.FAULT, final=False))
    assert harness.account.breaker.state(20.0) is BreakerState.OPEN


# --- accounts ---


def make_registry(**settings: Any) -> AccountRegistry:
    budgets = UpstreamBudgets("llm", None, None, None)
    recorder = UsageRecorder("llm", Prices())
    return AccountRegistry(UpstreamSettings("llm", **settings), budgets, Retry(), recorder=recorder, draw=lambda: 0.0)


def test_each_key_has_an_account_of_its_own_and_one_key_has_one() -> None:
    registry = make_registry()
    assert registry.account("gpt", "sk-one") is registry.account("gpt", "sk-one")
    assert len({registry.account("gpt", key) for key in ("", "sk-one", "sk-two")}) == 3


def test_each_model_has_an_account_of_its_own_and_a_dated_name_that_of_its_model() -> None:
    registry = make_registry()
    assert registry.account("gpt-4o") is not registry.account("gpt-4o-mini")
    assert registry.account("") is not registry.account("gpt-4o")
    for dated in ("gpt-4o-2024-08-06", "gpt-4o-latest", "gpt-4o-20240806"):
        assert registry.account(dated) is registry.account("gpt-4o")


@pytest.mark.parametrize(
    "settings", [{"max_concurrent": 3}, {"quotas": [Quota(requests=5, per="day")]}, {"limit": VegasLimit()}]
)
def test_limits_that_are_given_hold_for_all_models_together(settings: dict[str, Any]) -> None:
    registry = make_registry(**settings)
    assert registry.account("gpt-4o") is registry.account("gpt-4o-mini") is registry.account("")


def take_one(account: ThreadSafeAccount) -> Permit:
    return account.acquire_blocking(CallRequest(charge=Charge()))


NOT_FOUND = CallOutcome(kind=Outcome.IGNORED, used=Charge(), usd=0.0)


def test_a_used_quota_is_not_forgotten_for_models_that_do_not_exist() -> None:
    registry = make_registry(models={"gpt-4o": [Quota(requests=5, per="day")]})
    for _ in range(5):
        account = registry.account("gpt-4o")
        account.settle(take_one(account), CallOutcome(kind=Outcome.SUCCESS))
    del account
    for number in range(3000):
        other = registry.account(f"gpt-{number}")
        other.settle(take_one(other), NOT_FOUND)
    assert len(list(registry)) <= 1001
    with pytest.raises(Overloaded):
        registry.account("gpt-4o").acquire_blocking(CallRequest(charge=Charge()))


def test_spent_money_stops_all_models_of_the_key_and_no_other() -> None:
    registry = make_registry()
    accounts = [registry.account(*place) for place in (("a", "key"), ("b", "key"), ("a", "other"))]
    accounts[0].suspend(60.0)
    assert [account.blocks(NORMAL) for account in accounts] == [True, True, False]


def test_spent_money_stops_models_of_the_key_that_were_not_called_before(monkeypatch: pytest.MonkeyPatch) -> None:
    registry = make_registry()
    registry.account("a", "key").suspend(60.0)
    assert registry.account("b", "key").blocks(NORMAL)
    assert not registry.account("b", "other").blocks(NORMAL)
    over = clock.now() + 61.0
    monkeypatch.setattr(clock, "now", lambda: over)
    assert not registry.account("c", "key").blocks(NORMAL)


# --- deadlines ---


def test_a_queue_drops_the_deadlines_of_withdrawn_calls_but_for_a_few() -> None:
    queue = CallQueue(FairOrder())
    staying = queue.enqueue(0.0, CallRequest(deadline=1e9), RecordingWaiter())
    for moment in range(1000):
        queue.withdraw(queue.enqueue(0.0, CallRequest(deadline=moment), RecordingWaiter()))
    assert len(queue._deadlines) < 100
    assert queue.next_deadline() == 1e9
    assert queue.pop_overdue(1e9 - 1) is None
    assert queue.pop_overdue(1e9) is staying
    assert queue.next_deadline() is None


def test_a_call_without_a_deadline_is_never_overdue() -> None:
    queue = CallQueue(FairOrder())
    queue.enqueue(0.0, CallRequest(deadline=math.inf), RecordingWaiter())
    assert queue.next_deadline() is None
    assert queue.pop_overdue(1e9) is None


def test_while_probes_are_in_flight_retry_after_is_shorter_than_their_timeout() -> None:
    harness = AccountHarness(5)
    for permit in [harness.admit(1.0) for _ in range(5)]:
        harness.settle(1.0, permit, FAULT)
    assert harness.reject(1.0).limited_by == "breaker"
    probe = harness.admit(20.0)
    assert harness.reject(20.0).retry_after == 1.0  # not a minute, the time that the probe has
    harness.settle(21.0, probe)


THROTTLED = CallOutcome(kind=Outcome.OVERLOAD, released=True, usd=0.0)


def test_in_an_outage_longer_than_max_wait_no_call_waits() -> None:
    harness = AccountHarness(2, max_wait=30.0)
    for _ in range(10):
        harness.settle(0.0, harness.admit(0.0), THROTTLED)
    _, caller = harness.enqueue(0.5)
    now = 0.0
    while caller.decision is None or isinstance(caller.decision, Admitted):
        now = harness.account.limit.reopens_at(now) or now + 0.1
        harness.account.serve_queue(now)
        if isinstance(caller.decision, Admitted):  # a trial call: it is throttled and retried
            permit = caller.decision.permit
            caller.decision = None
            harness.settle(now, permit, THROTTLED)
            if now < 30.0:
                _, caller = harness.enqueue(now)
            else:
                break
    assert 30.0 <= now <= 35.0
    rejection = harness.reject(now)
    assert rejection.limited_by == "outage"
    assert harness.account.load(now, CallRequest(), NORMAL) == (1.0, "outage")
    when = harness.account.limit.reopens_at(now)
    assert when is not None
    assert rejection.retry_after == pytest.approx(when - now)
    assert harness.account.load(when, CallRequest(), NORMAL)[0] < 1.0  # the next may be a trial call
    harness.settle(when, harness.admit(when))
    harness.admit(when)
