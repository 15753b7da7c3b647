"""Money that runs out, one promise a test."""

from __future__ import annotations

import datetime as dt
import math
from typing import Any

import pytest

from forebay.errors import InvalidAmount, InvalidBudget, ReservationClosed
from forebay.quota import Budget, BudgetTracker
from forebay.task import Priority

DAY = 86_400.0
NOON = dt.datetime(2026, 11, 24, 12, tzinfo=dt.UTC).timestamp()


def purse(usd: float = 10.0, per: Any = "day", reserve: float = 0.0) -> BudgetTracker:
    return BudgetTracker(Budget(usd=usd, per=per, reserved_share=reserve))


def spend(of: BudgetTracker, usd: float, now: float = NOON) -> None:
    of.settle(now, of.reserve(now, usd), usd)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"usd": 0}, "positive number of US dollars"),
        ({"usd": -1}, "usd is -1"),
        ({"usd": math.nan}, "usd is nan"),
        ({"usd": math.inf}, "usd is inf"),
        ({"usd": "25"}, "positive number"),
        ({"usd": True}, "positive number"),
        ({"usd": 1, "per": "minute"}, "'hour', 'day', 'month', or None"),
        ({"usd": 1, "reserve": 1}, "from 0 up to but not including 1"),
        ({"usd": 1, "reserve": -0.1}, "reserve is -0.1"),
        ({"usd": 1, "reserve": math.nan}, "reserve is nan"),
    ],
)
def test_a_budget_that_cannot_be_meant_says_what_to_do(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidBudget) as caught:
        Budget(**given)
    assert says in str(caught.value)


def test_what_is_reserved_counts_as_spent_until_it_is_settled() -> None:
    money = purse()
    held = money.reserve(NOON, 8.0)
    assert not money.can_afford(NOON, 3.0)
    money.settle(NOON, held, 5.0)
    assert money.can_afford(NOON, 5.0)
    assert money.remaining(NOON) == 5.0


def test_the_last_dollar_may_be_spent_and_then_nothing_not_even_what_is_free() -> None:
    money = purse(0.3)
    for _ in range(3):
        assert money.can_afford(NOON, 0.1)
        spend(money, 0.1)
    assert not money.can_afford(NOON, 0.01)
    spend(money, 0.1)
    assert not money.can_afford(NOON, 0.0)


def test_a_share_is_kept_for_those_that_matter() -> None:
    money = purse(10.0, reserve=0.2)
    spend(money, 8.0)
    assert not money.can_afford(NOON, 0.5, Priority.NORMAL)
    assert not money.can_afford(NOON, 0.5, Priority.LOW)
    assert money.can_afford(NOON, 0.5, Priority.HIGH)
    assert money.can_afford(NOON, 2.0, Priority.CRITICAL)


def test_spending_passes_a_budget_by_no_more_than_what_was_in_flight() -> None:
    money, held = purse(1.0), []
    while money.can_afford(NOON, 0.1):
        held.append(money.reserve(NOON, 0.1))
    for one in held:
        money.settle(NOON, one, 0.15)
    assert len(held) == 10
    assert money.spent(NOON) == pytest.approx(1.5)
    assert not money.can_afford(NOON, 0.0)


def test_what_never_left_costs_nothing() -> None:
    money = purse()
    money.release(NOON, money.reserve(NOON, 9.0))
    assert money.remaining(NOON) == 10.0


@pytest.mark.parametrize("first", ["settle", "release"])
@pytest.mark.parametrize("second", ["settle", "release"])
def test_a_sum_is_closed_once(first: str, second: str) -> None:
    money = purse()
    held = money.reserve(NOON, 1.0)
    getattr(money, first)(NOON, held, *([1.0] if first == "settle" else []))
    before = money.remaining(NOON)
    with pytest.raises(ReservationClosed):
        getattr(money, second)(NOON, held, *([1.0] if second == "settle" else []))
    assert money.remaining(NOON) == before


@pytest.mark.parametrize("usd", [-1.0, math.nan, math.inf, "3", None])
def test_what_is_no_sum_is_refused_and_changes_nothing(usd: Any) -> None:
    money = purse()
    held = money.reserve(NOON, 1.0)
    for attempt in (lambda: money.reserve(NOON, usd), lambda: money.settle(NOON, held, usd)):
        with pytest.raises(InvalidAmount):
            attempt()
    money.settle(NOON, held, 1.0)
    assert money.remaining(NOON) == 9.0


# --- the calendar --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per", "seconds"), [("hour", 3600.0), ("day", DAY / 2), ("month", 6.5 * DAY), (None, None)])
def test_it_says_when_it_is_whole_again(per: str | None, seconds: float | None) -> None:
    money = purse(per=per)
    spend(money, 10.0)
    assert money.resets_in(NOON) == seconds
    if seconds is not None:
        assert not money.can_afford(NOON + seconds - 0.001, 1.0)
        assert money.can_afford(NOON + seconds, 10.0)
    else:
        assert not money.can_afford(NOON + 10_000 * DAY, 1.0)


def test_a_month_ends_also_in_december_and_in_a_leap_february() -> None:
    money = purse(per="month")
    for moment, days in ((dt.datetime(2027, 12, 31, tzinfo=dt.UTC), 1), (dt.datetime(2028, 2, 1, tzinfo=dt.UTC), 29)):
        assert money.resets_in(moment.timestamp()) == days * DAY


def test_a_call_that_ends_tomorrow_is_paid_from_today() -> None:
    money = purse()
    held = money.reserve(NOON, 4.0)
    assert money.remaining(NOON + DAY) == 10.0
    money.settle(NOON + DAY, held, 4.0)
    assert money.remaining(NOON + DAY) == 10.0


def test_a_clock_that_goes_back_gives_no_money_for_nothing() -> None:
    money = purse()
    spend(money, 6.0)
    spend(money, 3.0, NOON + DAY)  # it was not tomorrow
    assert money.remaining(NOON) == 1.0
    assert money.remaining(NOON + DAY) == 10.0, "tomorrow is whole"


def test_a_clock_that_was_a_year_ahead_locks_nothing_beyond_the_day() -> None:
    money = purse()
    spend(money, 10.0, NOON + 365 * DAY)
    assert not money.can_afford(NOON, 1.0), "it was spent today"
    assert money.can_afford(NOON + DAY, 10.0)


def test_a_sum_that_was_reserved_before_the_clock_went_back_is_settled_where_it_went() -> None:
    money = purse()
    held = money.reserve(NOON + DAY, 4.0)
    assert money.remaining(NOON) == 6.0
    money.settle(NOON, held, 2.0)
    assert money.remaining(NOON) == 8.0
