"""The periods of a budget by the calendar in UTC, in plain arithmetic, so that a script in a store can do the same.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

from math import floor
from typing import Final

_HOUR: Final = 3600.0
_DAY: Final = 86400.0


def period_start(per: str | None, now: float) -> float:
    """Return when the period of `now` began, in epoch seconds; 0 if it never ends."""
    if per is None:
        return 0.0
    if per == "hour":
        return floor(now / _HOUR) * _HOUR
    day = floor(now / _DAY)
    return day * _DAY if per == "day" else (day - _day_of_month(day) + 1) * _DAY


def period_end(per: str | None, start: float) -> float | None:
    """Return when the period that began at `start` ends; None for never."""
    if per is None:
        return None
    if per == "month":
        return period_start(per, start + 32 * _DAY)
    return start + (_HOUR if per == "hour" else _DAY)


def _day_of_month(day: int) -> int:
    """Return the day of the month, from 1, of a day counted from 1970-01-01.

    Source: H. Hinnant, "chrono-Compatible Low-Level Date Algorithms", `civil_from_days`.
    """
    shifted = day + 719468
    of_era = shifted - floor(shifted / 146097) * 146097
    year = floor((of_era - floor(of_era / 1460) + floor(of_era / 36524) - floor(of_era / 146096)) / 365)
    of_year = of_era - (365 * year + floor(year / 4) - floor(year / 100))
    month = floor((5 * of_year + 2) / 153)
    return of_year - floor((153 * month + 2) / 5) + 1
