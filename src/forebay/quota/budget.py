"""Budgets in US dollars that run out and renew by the calendar in UTC, and the tracker of what is spent."""

from __future__ import annotations

import datetime as dt
import math
from dataclasses import dataclass
from typing import Final, Literal

from forebay._renamed import renamed_arguments
from forebay._validate import is_number, is_positive
from forebay.errors import InvalidAmount, InvalidBudget, ReservationClosed
from forebay.task import Priority

_HOUR: Final = 3600.0
_DAY: Final = 86400.0
_MAX_DOLLARS: Final = 1e12  # an int of any size passes for a number, and cannot be added to a float
_PERIODS: Final = ("hour", "day", "month", None)

SMALL_CALLS: Final = 10
"""Calls of which a budget has room for so many are small: if one is rejected, the budget counts as spent."""


@renamed_arguments(reserve="reserved_share")
@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """An amount of US dollars that runs out.

    Attributes:
        usd: how much may be spent in each period.
        per: ``"hour"``, ``"day"`` or ``"month"`` of the calendar in UTC; None for a budget that never renews.
        reserved_share: the share kept for HIGH and CRITICAL, from 0 up to but not including 1.
        alert: the share, above 0 and below 1, from which an event says how much is spent, once in a period; None for no
            such event. That the budget is spent is an event in any case. See `forebay.events.BudgetAlert`.

    Raises:
        InvalidBudget: an amount that is not positive, a share out of range, or an unknown period.
    """

    usd: float
    per: Literal["hour", "day", "month"] | None = None
    reserved_share: float = 0.0
    alert: float | None = None

    def __post_init__(self) -> None:
        if not is_positive(self.usd):
            self._reject("usd", "a positive number of US dollars; to spend nothing, do not call")
        if self.per not in _PERIODS:
            self._reject("per", "'hour', 'day', 'month', or None for a budget that never renews")
        if not is_number(self.reserved_share) or not 0 <= self.reserved_share < 1:
            self._reject("reserved_share", "a share from 0 up to but not including 1, such as 0.1")
        if self.alert is not None and not (is_number(self.alert) and 0 < self.alert < 1):
            self._reject("alert", "a share above 0 and below 1, such as 0.8, or None for no alert")

    def _reject(self, name: str, expected: str) -> None:
        raise InvalidBudget(name=name, value=getattr(self, name), expected=expected)


class _BudgetPeriod:
    """The dollars spent and reserved in one period."""

    __slots__ = ("alerted", "merged_into", "open", "reserved", "spent", "start")

    def __init__(self, start: float) -> None:
        self.start = start
        self.spent = 0.0
        self.alerted = 0.0  # the highest share that an alert was taken for
        self.reserved = 0.0
        self.open = 0  # reservations
        self.merged_into: _BudgetPeriod | None = None  # the period that took it over when the clock went back


class BudgetReservation:
    """A reservation of dollars for one call. It is settled or released exactly once; a cost may be revised later."""

    __slots__ = ("cost", "open", "period", "usd")

    def __init__(self, usd: float, period: _BudgetPeriod) -> None:
        self.usd = usd
        self.period = period
        self.open = True
        self.cost = 0.0  # what it was settled for


class BudgetTracker:
    """The spend of one budget: of an account, a tenant or a task.

    Pure. The caller passes the time in epoch seconds and, where threads share it, holds the lock. A cost counts in the
    period in which it was reserved. If the clock goes back, what was spent meanwhile goes back with it: that neither
    gives money away nor keeps any locked beyond the end of the period that the clock went back to.

    Args:
        budget: the amount and its period.
    """

    __slots__ = ("_period", "_previous", "budget")

    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self._period = _BudgetPeriod(-math.inf)
        self._previous: _BudgetPeriod | None = None

    def change(self, now: float, budget: Budget) -> None:
        """Set another amount or period. What was spent in the present period counts in the one that is present then."""
        period = self._present(now)
        self.budget = budget
        period.start = period_start(budget.per, now)

    def can_afford(self, now: float, usd: float, priority: Priority = Priority.NORMAL) -> bool:
        """Return whether `usd` may be reserved. Reserved dollars count as spent; once all is spent nothing may be."""
        period = self._present(now)
        return self._covers(usd, priority, taken=period.spent + period.reserved)

    def can_afford_unreserved(self, now: float, usd: float, priority: Priority = Priority.NORMAL) -> bool:
        """Return whether `usd` could be reserved if nothing were reserved now."""
        return self._covers(usd, priority, taken=self._present(now).spent)

    def _covers(self, usd: float, priority: Priority, *, taken: float) -> bool:
        share = 1.0 if priority <= Priority.HIGH else 1.0 - self.budget.reserved_share
        left = self.budget.usd * share - taken
        return left > 0 and check_dollars(usd) <= left + self.budget.usd * 1e-12

    def try_reserve(self, now: float, usd: float, priority: Priority = Priority.NORMAL) -> BudgetReservation | None:
        """Reserve the most that a call can cost, or return None if the budget cannot afford it: check and take in one.

        Raises:
            InvalidAmount: not a number of dollars of at least 0.
        """
        return self.reserve(now, usd) if self.can_afford(now, usd, priority) else None

    def reserve(self, now: float, usd: float) -> BudgetReservation:
        """Reserve dollars unconditionally, for a caller who has checked `can_afford` in the same step.

        Raises:
            InvalidAmount: not a number of dollars of at least 0.
        """
        period = self._present(now)
        period.reserved += check_dollars(usd)
        period.open += 1
        return BudgetReservation(usd, period)

    def settle(self, now: float, reservation: BudgetReservation, usd: float) -> None:
        """Replace a reservation by the cost of the call, which may be higher.

        Raises:
            InvalidAmount: not a number of dollars of at least 0; the dollars stay reserved.
            ReservationClosed: it was settled or released before.
        """
        cost = check_dollars(usd)
        self._close(now, reservation).spent += cost
        reservation.cost = cost

    def revise(self, now: float, reservation: BudgetReservation, usd: float) -> None:
        """Correct the cost of a call that was settled before its usage was known. It counts in the period of the call.

        Raises:
            InvalidAmount: not a number of dollars of at least 0; the cost stays.
        """
        cost = check_dollars(usd)
        self._present(now)
        period = _current(reservation.period)
        period.spent = max(0.0, period.spent + cost - reservation.cost)
        reservation.cost = cost

    def release(self, now: float, reservation: BudgetReservation) -> None:
        """Return the dollars of a call that was never sent.

        Raises:
            ReservationClosed: it was settled or released before.
        """
        self._close(now, reservation)

    def restore(self, at: float, usd: float, *, alerted: float = 0.0) -> None:
        """Add dollars that were spent before this tracker was made, in the period of `at`.

        Args:
            at: epoch seconds within the period that they were spent in.
            usd: the dollars.
            alerted: the highest share that an alert was given for in that period.

        Raises:
            InvalidAmount: not a number of dollars of at least 0.
        """
        period = self._present(at)
        period.spent += check_dollars(usd)
        period.alerted = max(period.alerted, alerted)

    def take_alert(self, now: float, *, rejected: float | None = None) -> float | None:
        """Return the share that an alert is due for, and note that it is given; None if none is due.

        An alert is due once a period for `Budget.alert`, and for 1.0 once the budget is spent: what is spent reaches
        it, or a call for a tenth of it or less is rejected though no other call holds dollars. If both are due at a
        time, only that for 1.0 is given.

        Args:
            now: the time.
            rejected: dollars of a call that was rejected now; None if none was.
        """
        period, total = self._present(now), self.budget.usd
        least = total * (1 - 1e-12)  # sums of dollars have rounding errors
        short = rejected is not None and period.spent + rejected > total >= rejected * SMALL_CALLS
        if period.spent >= least or short:
            due = 1.0
        elif self.budget.alert is not None and period.spent >= self.budget.alert * least:
            due = self.budget.alert
        else:
            return None
        if due <= period.alerted:
            return None
        period.alerted = due
        return due

    def period(self, now: float) -> float:
        """Return when the present period began, in epoch seconds; 0.0 if the budget never renews."""
        return self._present(now).start

    def drop_reservations(self) -> None:
        """Return all dollars that are reserved. None of the open reservations may be settled after that."""
        for period in (self._period, self._previous):
            if period is not None:
                period.open, period.reserved = 0, 0.0

    def spent(self, now: float) -> float:
        """Return the US dollars spent in the present period."""
        return self._present(now).spent

    def remaining(self, now: float) -> float:
        """Return the US dollars that are neither spent nor reserved; below 0 if calls cost more than was reserved."""
        period = self._present(now)
        return self.budget.usd - period.spent - period.reserved

    def reserved(self) -> tuple[int, float]:
        """Return the number of open reservations and their US dollars, of the present and the previous period."""
        periods = [self._period] if self._previous is None else [self._period, self._previous]
        return sum(period.open for period in periods), sum(period.reserved for period in periods)

    def resets_in(self, now: float) -> float | None:
        """Return the seconds until the budget renews; None for never."""
        if self.budget.per is None:
            return None
        self._present(now)
        return _period_end(self.budget.per, self._period.start) - now

    def _close(self, now: float, reservation: BudgetReservation) -> _BudgetPeriod:
        if not reservation.open:
            raise ReservationClosed
        self._present(now)
        reservation.open = False
        period = _current(reservation.period)
        period.open -= 1
        period.reserved = period.reserved - reservation.usd if period.open else 0.0  # drop rounding errors
        return period

    def _present(self, now: float) -> _BudgetPeriod:
        """Return the present period, and begin it if it is new."""
        start = period_start(self.budget.per, now)
        period = self._period
        if start == period.start:
            return period
        if start > period.start:
            self._period, self._previous = _BudgetPeriod(start), period
        else:
            self._go_back(start)
        return self._period

    def _go_back(self, start: float) -> None:
        """Merge the later period into the one that begins at `start`: the clock was wrong before, or is now."""
        later, previous = self._period, self._previous
        period = previous if previous is not None and previous.start == start else _BudgetPeriod(start)
        period.spent += later.spent
        period.reserved += later.reserved
        period.open += later.open
        period.alerted = max(period.alerted, later.alerted)
        later.merged_into = period
        self._period, self._previous = period, None


def _current(period: _BudgetPeriod) -> _BudgetPeriod:
    """Return the period that has taken over `period`, or itself."""
    while period.merged_into is not None:
        period = period.merged_into
    return period


def period_start(per: str | None, now: float) -> float:
    """Return when the period of `now` began, in epoch seconds.

    Args:
        per: ``"hour"``, ``"day"``, ``"month"``, or None for the one that never ends, which began at 0.0.
        now: epoch seconds.
    """
    if per is None:
        return 0.0
    if per == "month":
        moment = dt.datetime.fromtimestamp(now, dt.UTC)
        return dt.datetime(moment.year, moment.month, 1, tzinfo=dt.UTC).timestamp()
    length = _HOUR if per == "hour" else _DAY
    return math.floor(now / length) * length


def _period_end(per: str, start: float) -> float:
    """Return when the period that began at `start` ends, in epoch seconds."""
    if per == "month":
        return period_start(per, start + 32 * _DAY)
    return start + (_HOUR if per == "hour" else _DAY)


def check_dollars(usd: float) -> float:
    """Return `usd` if it can be an amount of money.

    Raises:
        InvalidAmount: not a number of dollars of at least 0.
    """
    if not is_number(usd) or not 0 <= usd <= _MAX_DOLLARS:
        raise InvalidAmount(value=usd)
    return usd
