"""The retry budget that all callers share."""

from __future__ import annotations

import math

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.errors import InvalidSetting
from forebay.retry import RetryBudget


def withdraw_all(budget: RetryBudget, now: float) -> int:
    """Withdraw all retries at once, up to ten thousand; return how many there were."""
    count = 0
    while count < 10_000 and budget.withdraw(now):
        count += 1
    return count


def test_without_a_first_attempt_there_are_the_extra_retries() -> None:
    assert withdraw_all(RetryBudget(), 0.0) == 10


@pytest.mark.parametrize("first", [1, 5, 49, 50, 1000])
def test_a_fifth_of_the_first_attempts_may_be_retried_and_ten_more(first: int) -> None:
    budget = RetryBudget()
    for _ in range(first):
        budget.deposit(0.0)
    assert budget.balance(0.0) == pytest.approx(10 + 0.2 * first, abs=1e-3)
    assert withdraw_all(budget, 0.0) == 10 + first // 5


def test_an_old_surplus_does_not_count() -> None:
    budget = RetryBudget()
    for _ in range(10_000):
        budget.deposit(0.0)
    assert withdraw_all(budget, 67.0) == 10


def test_a_retry_counts_for_one_window() -> None:
    budget = RetryBudget()
    assert withdraw_all(budget, 0.0) == 10
    assert withdraw_all(budget, 60.0) == 0
    assert withdraw_all(budget, 66.0) == 10


def test_without_extra_there_is_no_retry_before_five_first_attempts() -> None:
    budget = RetryBudget(extra=0)
    for _ in range(4):
        budget.deposit(0.0)
    assert not budget.withdraw(0.0)
    budget.deposit(0.0)
    assert budget.withdraw(0.0)
    assert not budget.withdraw(0.0)


STEPS = st.lists(st.tuples(st.sampled_from([0.0, 0.01, 0.5, 0.99, 1.0, 3.0, 11.0]), st.booleans()), max_size=400)


@given(steps=STEPS, share=st.sampled_from([0.0, 0.2, 1.0]), extra=st.integers(0, 5))
def test_retries_never_exceed_the_budget_in_any_window(
    steps: list[tuple[float, bool]], share: float, extra: int
) -> None:
    budget = RetryBudget(share=share, extra=extra, window=10.0)
    now, first, retries = 0.0, [], []
    for pause, is_first in steps:
        now += pause
        if is_first:
            budget.deposit(now)
            first.append(now)
        elif budget.withdraw(now):
            retries.append(now)
    for end in retries:
        in_window = sum(end - 10.0 < at <= end for at in retries)
        paid_by = sum(end - 11.0 <= at <= end for at in first)
        assert in_window <= share * paid_by + extra + 1e-3


@given(steps=STEPS)
def test_no_more_slots_are_kept_than_the_window_has(steps: list[tuple[float, bool]]) -> None:
    budget = RetryBudget(window=10.0)
    now = 0.0
    for pause, is_first in steps:
        now += pause
        if is_first:
            budget.deposit(now)
        else:
            budget.withdraw(now)
        assert len(budget._slots) <= 11


@pytest.mark.parametrize(
    "numbers", [{"share": -0.1}, {"share": math.nan}, {"extra": -1}, {"extra": math.inf}, {"window": 0.0}]
)
def test_an_invalid_setting_is_reported_by_name(numbers: dict[str, float]) -> None:
    with pytest.raises(InvalidSetting, match=rf"RetryBudget was given {next(iter(numbers))}="):
        RetryBudget(**numbers)  # type: ignore[arg-type]


def test_a_refunded_retry_can_be_withdrawn_again() -> None:
    budget = RetryBudget()
    withdraw_all(budget, 0.0)
    budget.refund(0.0)
    assert withdraw_all(budget, 1.0) == 1


def test_a_refund_after_its_window_changes_nothing() -> None:
    budget = RetryBudget(window=10.0)
    withdraw_all(budget, 0.0)
    assert withdraw_all(budget, 20.0) == 10
    budget.refund(0.0)
    assert withdraw_all(budget, 20.0) == 0


def test_no_more_is_refunded_than_was_withdrawn() -> None:
    budget = RetryBudget()
    budget.withdraw(0.0)
    for _ in range(5):
        budget.refund(0.0)
    assert withdraw_all(budget, 0.0) == 10
