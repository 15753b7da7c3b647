"""Money: a budget that runs out, by the calendar in UTC, and the purse that keeps it."""

from __future__ import annotations

import datetime as dt
import math
from typing import Final, Literal

import msgspec

from forebay.errors import InvalidAmount, InvalidBudget, ReservationClosed
from forebay.task import Priority

_HOUR: Final = 3600.0
_DAY: Final = 86400.0
_PERIODS: Final = ("hour", "day", "month", None)


class Budget(msgspec.Struct, frozen=True, kw_only=True):
    """An amount of US dollars that runs out.

    Attributes:
        usd: how much may be spent in each period.
        per: ``"hour"``, ``"day"`` or ``"month"`` of the calendar in UTC; None: once and for all.
        reserve: the share kept for HIGH and CRITICAL, from 0 up to but not including 1.

    Raises:
        InvalidBudget: an amount that is not positive, a share out of range, or an unknown period.
    """

    usd: float
    per: Literal["hour", "day", "month"] | None = None
    reserved_share: float = 0.0

    def __post_init__(self) -> None:
        if not _number(self.usd) or not 0 < self.usd < math.inf:
            self._refuse("usd", "a positive number of US dollars; where nothing may be spent, do not call")
        if self.per not in _PERIODS:
            self._refuse("per", "'hour', 'day', 'month', or None for a budget that never comes back")
        if not _number(self.reserved_share) or not 0 <= self.reserved_share < 1:
            self._refuse("reserved_share", "a share from 0 up to but not including 1, such as 0.1")

    def _refuse(self, name: str, expected: str) -> None:
        raise InvalidBudget(name=name, value=getattr(self, name), expected=expected)


class _Page:
    """What was spent and is reserved in one period."""

    __slots__ = ("into", "open", "reserved", "spent", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.spent = 0.0
        self.reserved = 0.0
        self.open = 0  # reservations
        self.into: _Page | None = None  # where it was carried over to


class BudgetReservation:
    """Dollars that a call holds of a purse until they are settled or released: one of them, once."""

    __slots__ = ("open", "period", "usd")

    def __init__(self, usd: float, page: _Page) -> None:
        self.usd = usd
        self.period = page
        self.open = True


class BudgetTracker:
    """Keeps a budget: of an account, a tenant or a task.

    Pure. Its holder brings the time, in epoch seconds, and where threads share it the lock. What is spent counts in the
    period in which it was reserved. A clock that goes back takes what was spent meanwhile with it, so it neither gives
    money for nothing nor keeps any locked beyond the end of the period that it goes back to.

    Args:
        budget: how much, how often.
    """

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._page = _Page(-math.inf)
        self._before: _Page | None = None  # the last period with a page of its own

    def can_afford(self, now: float, usd: float, priority: Priority = Priority.NORMAL) -> bool:
        """Whether so much may be reserved, what is reserved for others counted as spent; nothing may, once all is."""
        page = self._turn(now)
        share = 1.0 if priority <= Priority.HIGH else 1.0 - self.budget.reserved_share
        left = self.budget.usd * share - page.spent - page.reserved
        return left > 0 and check_dollars(usd) <= left + self.budget.usd * 1e-12

    def reserve(self, now: float, usd: float) -> BudgetReservation:
        """Set aside what a call will cost at most; its holder has asked `affords`.

        Raises:
            InvalidAmount: not a number of dollars of at least 0.
        """
        page = self._turn(now)
        page.reserved += check_dollars(usd)
        page.open += 1
        return BudgetReservation(usd, page)

    def settle(self, now: float, reservation: BudgetReservation, usd: float) -> None:
        """The call cost this, more than was reserved perhaps.

        Raises:
            InvalidAmount: not a number of dollars of at least 0; the sum stays reserved.
            ReservationClosed: it was settled or released before.
        """
        cost = check_dollars(usd)
        self._close(now, reservation).spent += cost

    def release(self, now: float, reservation: BudgetReservation) -> None:
        """The call never left: it cost nothing.

        Raises:
            ReservationClosed: it was settled or released before.
        """
        self._close(now, reservation)

    def spent(self, now: float) -> float:
        """US dollars spent in the present period."""
        return self._turn(now).spent

    def remaining(self, now: float) -> float:
        """US dollars that are neither spent nor reserved; less than 0 if calls cost more than was thought."""
        page = self._turn(now)
        return self.budget.usd - page.spent - page.reserved

    def reserved(self) -> tuple[int, float]:
        """How many sums are open, and how many US dollars they hold; of the present period and the one before."""
        pages = [self._page] if self._before is None else [self._page, self._before]
        return sum(page.open for page in pages), sum(page.reserved for page in pages)

    def resets_in(self, now: float) -> float | None:
        """Seconds until the whole budget is there again; None for never."""
        if self.budget.per is None:
            return None
        self._turn(now)
        return _end(self.budget.per, self._page.start) - now

    def _close(self, now: float, held: BudgetReservation) -> _Page:
        if not held.open:
            raise ReservationClosed
        self._turn(now)
        held.open = False
        page = held.period
        while page.into is not None:
            page = page.into
        page.open -= 1
        page.reserved = page.reserved - held.usd if page.open else 0.0  # no dust of roundings
        return page

    def _turn(self, now: float) -> _Page:
        """The page of the present period."""
        start = _start(self.budget.per, now)
        page = self._page
        if start == page.start:
            return page
        if start > page.start:
            self._page, self._before = _Page(start), page
        else:
            self._go_back(start)
        return self._page

    def _go_back(self, start: float) -> None:
        """The clock was wrong before, or is now: what was spent on the later page was spent on this one."""
        later, before = self._page, self._before
        page = before if before is not None and before.start == start else _Page(start)
        page.spent += later.spent
        page.reserved += later.reserved
        page.open += later.open
        later.into = page
        self._page, self._before = page, None


def _start(per: str | None, now: float) -> float:
    """When the period of `now` began, in epoch seconds."""
    if per is None:
        return 0.0
    if per == "month":
        moment = dt.datetime.fromtimestamp(now, dt.UTC)
        return dt.datetime(moment.year, moment.month, 1, tzinfo=dt.UTC).timestamp()
    length = _HOUR if per == "hour" else _DAY
    return math.floor(now / length) * length


def _end(per: str, start: float) -> float:
    """When the period that began at `start` ends."""
    if per == "month":
        return _start(per, start + 32 * _DAY)
    return start + (_HOUR if per == "hour" else _DAY)


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_dollars(usd: float) -> float:
    """The sum, if it can be one of money.

    Raises:
        InvalidAmount: not a number of dollars of at least 0.
    """
    if not _number(usd) or not 0 <= usd < math.inf:
        raise InvalidAmount(value=usd)
    return usd
