"""Retry budgets: how many retries all callers of one dependency may make together."""

from __future__ import annotations

import math
from collections import deque
from enum import Enum

from forebay._validate import check_not_negative, check_positive

_SLOTS = 10  # parts of the window; the oldest leaves as a whole
_PERIOD = 5.0  # seconds without a retry of a throttled call after which one may go, whatever the budget


class RetryBudget:
    """A budget of retries: a share of the recent first attempts, and a few extra.

    If each call had retries of its own, a failing dependency would get six times its load just when it can serve the
    least. Here the first attempts before an outage bound the retries during it, and they count for `window` seconds
    only. The extra retries are for callers that call rarely.

    In any `window` seconds there are at most ``share * first + extra`` retries, where `first` are the first attempts of
    those seconds and of the tenth of a window before. A retry budget alone does not end an overload that feeds itself;
    a concurrency limit does.

    Source: Finagle's ``RetryBudget`` (``percentCanRetry`` 0.2, a leaky bucket with a time to live) and, after it,
    ``tower::retry::budget::TpsBudget`` of Rust's tower.

    Args:
        share: retries for each first attempt.
        extra: retries in a window that need no first attempt.
        window: seconds for which a first attempt, or a retry, counts.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    __slots__ = ("_extra", "_first", "_retries", "_share", "_slot_seconds", "_slots")

    def __init__(self, *, share: float = 0.2, extra: int = 10, window: float = 60.0) -> None:
        check_not_negative("RetryBudget", "share", share, unit="retries for each first attempt")
        check_not_negative("RetryBudget", "extra", extra, unit="retries")
        check_positive("RetryBudget", "window", window, unit="seconds")
        self._share = share
        self._extra = extra
        self._slot_seconds = window / _SLOTS
        self._slots: deque[list[float]] = deque()  # each: when it began, first attempts, retries
        self._first = 0
        self._retries = 0

    def deposit(self, now: float) -> None:
        """Count a first attempt at `now`, in seconds of a clock that does not go back."""
        slots = self._slots
        slot = slots[-1] if slots and now < slots[-1][0] + self._slot_seconds else self._slot_at(now)
        slot[1] += 1
        self._first += 1

    def withdraw(self, now: float, *, keep: float = 0.0) -> bool:
        """Take one retry, and return True; return False if less than one would be left besides what is kept.

        Args:
            now: the time.
            keep: share of all retries of the window that must be left after this one.
        """
        slot = self._slot_at(now)
        if self._balance() < 1 + keep * (self._extra + self._share * self._first):
            return False
        slot[2] += 1
        self._retries += 1
        return True

    def refund(self, withdrawn_at: float) -> None:
        """Return the retry that was withdrawn at `withdrawn_at`."""
        slot = next((slot for slot in reversed(self._slots) if slot[0] <= withdrawn_at), None)
        if slot is not None and slot[2]:  # else it has left the window, and its count with it
            slot[2] -= 1
            self._retries -= 1

    def balance(self, now: float) -> float:
        """Return how many retries are left now."""
        self._slot_at(now)
        return max(0.0, self._balance())

    def _balance(self) -> float:
        # Plus a millionth: 0.2 * 5 must be a whole retry on every machine.
        return self._extra + self._share * self._first - self._retries + 1e-6

    def _slot_at(self, now: float) -> list[float]:
        """Drop the slots older than the window, and return the slot of `now`."""
        slots = self._slots
        while slots and slots[0][0] + (_SLOTS + 1) * self._slot_seconds <= now:
            _, first, retries = slots.popleft()
            self._first -= int(first)
            self._retries -= int(retries)
        if not slots or slots[-1][0] + self._slot_seconds <= now:
            slots.append([now, 0, 0])
        return slots[-1]


class RetryPermission(Enum):
    """The answer to a throttled call that asks to be retried now."""

    DENIED = "denied"  # not yet
    FREE = "free"  # the provider accepts other calls
    FROM_BUDGET = "from_budget"  # it uses up a retry of the budget, which is refunded if the call is accepted
    PERIODIC = "periodic"  # the provider accepts no call, and none was retried for a while


class RetryBudgets:
    """The retry budgets of one dependency: one for failed calls, one for throttled calls (429, 503, 529).

    Refusing a call costs the provider next to nothing, and says nothing against the call. So a throttled call uses up
    no retry of the failed ones, and one that may not be retried yet can wait instead of giving up. While every call is
    throttled, retries are few: those of its `RetryBudget`, and one every five seconds. The retry of a call that is then
    accepted is refunded, and once a call is accepted, those that were throttled before it may return.

    Attributes:
        faults: the budget of failed calls.
        throttles: the budget of throttled calls while no call is accepted.
    """

    __slots__ = ("_accepted_at", "_retried_at", "faults", "throttles")

    def __init__(self) -> None:
        self.faults = RetryBudget()
        self.throttles = RetryBudget()
        self._accepted_at = -math.inf  # when the latest accepted call was sent
        self._retried_at = -math.inf  # when a throttled call was last retried

    def deposit(self, now: float) -> None:
        """Count a first attempt at `now`, in seconds of a clock that does not go back."""
        self.faults.deposit(now)
        self.throttles.deposit(now)

    def record_accepted(self, sent: float, withdrawn_at: float | None = None) -> None:
        """Record that the call sent at `sent` was accepted; refund its retry if it was withdrawn from the budget."""
        self._accepted_at = max(self._accepted_at, sent)
        if withdrawn_at is not None:
            self.throttles.refund(withdrawn_at)

    def request_retry(self, now: float, *, throttled_at: float) -> RetryPermission:
        """Return whether a call that was throttled at `throttled_at` may be retried, and count the retry."""
        if self._accepted_at > throttled_at:
            return RetryPermission.FREE
        permission = RetryPermission.DENIED
        if self.throttles.withdraw(now):
            permission = RetryPermission.FROM_BUDGET
        elif now - self._retried_at >= _PERIOD:
            permission = RetryPermission.PERIODIC
        if permission is not RetryPermission.DENIED:
            self._retried_at = now
        return permission

    def return_unused(self, permission: RetryPermission, at: float) -> None:
        """Return the permission given at `at`: its retry was not sent."""
        if permission is RetryPermission.FROM_BUDGET:
            self.throttles.refund(at)
        elif permission is RetryPermission.PERIODIC and self._retried_at == at:
            self._retried_at = -math.inf
