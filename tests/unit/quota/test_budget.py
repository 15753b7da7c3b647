"""Budgets, and the tracker of their spend."""

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


def new_tracker(usd: float = 10.0, per: Any = "day", reserve: float = 0.0) -> BudgetTracker:
    return BudgetTracker(Budget(usd=usd, per=per, reserved_share=reserve))


def spend(tracker: BudgetTracker, usd: float, now: float = NOON) -> None:
    tracker.settle(now, tracker.reserve(now, usd), usd)


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
        ({"usd": 1, "reserved_share": 1}, "from 0 up to but not including 1"),
        ({"usd": 1, "reserved_share": -0.1}, "reserved_share is -0.1"),
        ({"usd": 1, "reserved_share": math.nan}, "reserved_share is nan"),
    ],
)
def test_an_invalid_budget_says_what_to_do(given: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidBudget) as caught:
        Budget(**given)
    assert says in str(caught.value)


def test_an_old_name_gives_the_new_one() -> None:
    with pytest.raises(TypeError, match="Budget: reserve is now reserved_share"):
        Budget(usd=1, reserve=0.1)  # type: ignore[call-arg]


def test_reserved_dollars_count_as_spent_until_they_are_settled() -> None:
    tracker = new_tracker()
    held = tracker.reserve(NOON, 8.0)
    assert not tracker.can_afford(NOON, 3.0)
    tracker.settle(NOON, held, 5.0)
    assert tracker.can_afford(NOON, 5.0)
    assert tracker.remaining(NOON) == 5.0


def test_after_the_last_dollar_not_even_a_free_call_is_affordable() -> None:
    tracker = new_tracker(0.3)
    for _ in range(3):
        assert tracker.can_afford(NOON, 0.1)
        spend(tracker, 0.1)
    assert not tracker.can_afford(NOON, 0.01)
    spend(tracker, 0.1)
    assert not tracker.can_afford(NOON, 0.0)
    assert not tracker.can_afford_unreserved(NOON, 0.0)


def test_the_reserved_share_is_kept_for_high_and_critical() -> None:
    tracker = new_tracker(10.0, reserve=0.2)
    spend(tracker, 8.0)
    assert not tracker.can_afford(NOON, 0.5, Priority.NORMAL)
    assert not tracker.can_afford(NOON, 0.5, Priority.LOW)
    assert tracker.can_afford(NOON, 0.5, Priority.HIGH)
    assert tracker.can_afford(NOON, 2.0, Priority.CRITICAL)


def test_spend_exceeds_a_budget_by_no_more_than_the_calls_in_flight() -> None:
    tracker, held = new_tracker(1.0), []
    while tracker.can_afford(NOON, 0.1):
        held.append(tracker.reserve(NOON, 0.1))
    for one in held:
        tracker.settle(NOON, one, 0.15)
    assert len(held) == 10
    assert tracker.spent(NOON) == pytest.approx(1.5)
    assert not tracker.can_afford(NOON, 0.0)


def test_a_call_that_was_never_sent_costs_nothing() -> None:
    tracker = new_tracker()
    tracker.release(NOON, tracker.reserve(NOON, 9.0))
    assert tracker.remaining(NOON) == 10.0


@pytest.mark.parametrize("first", ["settle", "release"])
@pytest.mark.parametrize("second", ["settle", "release"])
def test_a_reservation_is_closed_once(first: str, second: str) -> None:
    tracker = new_tracker()
    held = tracker.reserve(NOON, 1.0)
    getattr(tracker, first)(NOON, held, *([1.0] if first == "settle" else []))
    before = tracker.remaining(NOON)
    with pytest.raises(ReservationClosed):
        getattr(tracker, second)(NOON, held, *([1.0] if second == "settle" else []))
    assert tracker.remaining(NOON) == before


@pytest.mark.parametrize("usd", [-1.0, math.nan, math.inf, "3", None])
def test_an_invalid_amount_is_rejected_and_changes_nothing(usd: Any) -> None:
    tracker = new_tracker()
    held = tracker.reserve(NOON, 1.0)
    for attempt in (lambda: tracker.reserve(NOON, usd), lambda: tracker.settle(NOON, held, usd)):
        with pytest.raises(InvalidAmount):
            attempt()
    tracker.settle(NOON, held, 1.0)
    assert tracker.remaining(NOON) == 9.0


# --- the calendar ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("per", "seconds"), [("hour", 3600.0), ("day", DAY / 2), ("month", 6.5 * DAY), (None, None)])
def test_a_budget_renews_at_the_end_of_its_period(per: str | None, seconds: float | None) -> None:
    tracker = new_tracker(per=per)
    spend(tracker, 10.0)
    assert tracker.resets_in(NOON) == seconds
    if seconds is not None:
        assert not tracker.can_afford(NOON + seconds - 0.001, 1.0)
        assert tracker.can_afford(NOON + seconds, 10.0)
    else:
        assert not tracker.can_afford(NOON + 10_000 * DAY, 1.0)


def test_a_month_ends_in_december_and_in_a_leap_february() -> None:
    tracker = new_tracker(per="month")
    for moment, days in ((dt.datetime(2027, 12, 31, tzinfo=dt.UTC), 1), (dt.datetime(2028, 2, 1, tzinfo=dt.UTC), 29)):
        assert tracker.resets_in(moment.timestamp()) == days * DAY


def test_a_call_that_ends_tomorrow_counts_today() -> None:
    tracker = new_tracker()
    held = tracker.reserve(NOON, 4.0)
    assert tracker.remaining(NOON + DAY) == 10.0
    tracker.settle(NOON + DAY, held, 4.0)
    assert tracker.remaining(NOON + DAY) == 10.0


def test_a_clock_that_goes_back_gives_no_money_away() -> None:
    tracker = new_tracker()
    spend(tracker, 6.0)
    spend(tracker, 3.0, NOON + DAY)  # by a clock that was a day ahead
    assert tracker.remaining(NOON) == 1.0
    assert tracker.remaining(NOON + DAY) == 10.0, "tomorrow has its whole budget"


def test_a_clock_that_was_a_year_ahead_blocks_nothing_beyond_the_day() -> None:
    tracker = new_tracker()
    spend(tracker, 10.0, NOON + 365 * DAY)
    assert not tracker.can_afford(NOON, 1.0), "it counts as spent today"
    assert tracker.can_afford(NOON + DAY, 10.0)


def test_a_reservation_from_before_the_clock_went_back_is_settled_in_the_earlier_period() -> None:
    tracker = new_tracker()
    held = tracker.reserve(NOON + DAY, 4.0)
    assert tracker.remaining(NOON) == 6.0
    tracker.settle(NOON, held, 2.0)
    assert tracker.remaining(NOON) == 8.0


# --- alerts, and what was spent before ---


def test_an_alert_is_due_once_for_each_share_and_period() -> None:
    tracker = BudgetTracker(Budget(usd=10, per="day", alert=0.8))
    spend(tracker, 7.9)
    assert tracker.take_alert(NOON) is None
    spend(tracker, 0.1)
    assert [tracker.take_alert(NOON) for _ in range(2)] == [0.8, None]
    spend(tracker, 5.0)
    assert [tracker.take_alert(NOON) for _ in range(2)] == [1.0, None]
    assert tracker.take_alert(NOON + DAY) is None
    spend(tracker, 9.0, NOON + DAY)
    assert [tracker.take_alert(NOON + DAY) for _ in range(2)] == [0.8, None]


def test_a_call_that_passes_both_shares_gives_one_alert() -> None:
    tracker = BudgetTracker(Budget(usd=10, alert=0.8))
    spend(tracker, 12.0)
    assert [tracker.take_alert(NOON) for _ in range(2)] == [1.0, None]


def test_a_budget_counts_as_spent_once_small_calls_are_rejected() -> None:
    tracker = new_tracker(10.0)
    spend(tracker, 9.5)
    assert tracker.take_alert(NOON) is None
    assert tracker.take_alert(NOON, rejected=0.4) is None, "rejected for what others hold: they return it"
    assert tracker.take_alert(NOON, rejected=6.0) is None, "it is large: others fit"
    assert tracker.take_alert(NOON, rejected=0.6) == 1.0


def test_reserved_dollars_alert_nobody() -> None:
    tracker = BudgetTracker(Budget(usd=10, alert=0.5))
    tracker.reserve(NOON, 10.0)
    assert tracker.take_alert(NOON, rejected=1.0) is None


def test_what_was_spent_before_counts_in_its_period_alone() -> None:
    tracker = new_tracker(10.0)
    tracker.restore(NOON, 8.0)
    assert not tracker.can_afford(NOON, 3.0)
    assert tracker.remaining(NOON) == 2.0
    assert tracker.can_afford(NOON + DAY, 10.0)


def test_an_alert_that_was_given_before_is_not_due_again() -> None:
    tracker = BudgetTracker(Budget(usd=10, per="day", alert=0.8))
    tracker.restore(NOON, 9.0, alerted=0.8)
    assert tracker.take_alert(NOON) is None
    spend(tracker, 1.0)
    assert tracker.take_alert(NOON) == 1.0
    tracker.restore(NOON + DAY, 9.0)
    assert tracker.take_alert(NOON + DAY) == 0.8


@pytest.mark.parametrize("alert", [0, 1, 1.5, -0.1, math.nan, "0.8", True])
def test_an_invalid_alert_says_what_to_do(alert: Any) -> None:
    with pytest.raises(InvalidBudget, match=r"a share above 0 and below 1, such as 0\.8"):
        Budget(usd=1, alert=alert)
