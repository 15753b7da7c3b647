"""How many retries all callers of one dependency may make together."""

from __future__ import annotations

import math
from collections import deque
from enum import Enum

from forebay.errors import InvalidSetting

_SLOTS = 10  # parts of the window in which is counted; what is older than the window leaves it a part at a time

_KNOCK = 5.0  # seconds without a retry after which one goes, whatever the budget


class RetryBudget:
    """An amount that runs out: retries are at most a share of recent first attempts, and a few more.

    If each call had retries of its own, a dependency that fails would get six times its load, just when it bears least.
    Here the retries of a storm are bounded by what went before it, and what was saved up in an hour of peace is
    forgotten after `window` seconds, so it funds no storm. The few more are for those who call rarely.

    In any `window` seconds there are at most ``share * first + extra`` retries, where `first` are the first attempts of
    those seconds and the tenth of a window before. A retry budget alone does not end an overload that feeds itself; a
    concurrency limit does.

    Source: Finagle's ``RetryBudget`` (``percentCanRetry`` 0.2, a leaky bucket with a time to live) and, after it,
    ``tower::retry::budget::TpsBudget`` of Rust's tower.

    Args:
        share: retries for each first attempt.
        extra: retries in a window that need no first attempt.
        window: seconds for which a first attempt, or a retry, counts.

    Raises:
        InvalidSetting: a number makes no sense.
    """

    __slots__ = ("_extra", "_first", "_retries", "_share", "_slot", "_slots")

    def __init__(self, *, share: float = 0.2, extra: int = 10, window: float = 60.0) -> None:
        if not 0 <= share < math.inf:
            self._refuse("share", share, "a number of at least 0: 0.2 is a retry for every five first attempts")
        if not 0 <= extra < math.inf:
            self._refuse("extra", extra, "a number of at least 0")
        if not 0 < window < math.inf:
            self._refuse("window", window, "a positive number of seconds")
        self._share = share
        self._extra = extra
        self._slot = window / _SLOTS
        self._slots: deque[list[float]] = deque()  # each: when it began, first attempts, retries
        self._first = 0
        self._retries = 0

    def _refuse(self, name: str, value: float, expected: str) -> None:
        raise InvalidSetting(owner="RetryBudget", name=name, value=value, expected=expected)

    def deposit(self, now: float) -> None:
        """A call makes its first attempt at `now`, in seconds of a clock that does not go back."""
        slots = self._slots
        slot = slots[-1] if slots and now < slots[-1][0] + self._slot else self._slot_of(now)
        slot[1] += 1
        self._first += 1

    def withdraw(self, now: float) -> bool:
        """Take one retry, if there is one left; False: there may be none now."""
        slot = self._slot_of(now)
        if self._balance() < 1:
            return False
        slot[2] += 1
        self._retries += 1
        return True

    def refund(self, taken: float) -> None:
        """The retry that was withdrawn at `taken` was no load too many after all."""
        slot = next((slot for slot in reversed(self._slots) if slot[0] <= taken), None)
        if slot is not None and slot[2]:  # else it has left the window, and the count with it
            slot[2] -= 1
            self._retries -= 1

    def balance(self, now: float) -> float:
        """How many retries could be taken now."""
        self._slot_of(now)
        return max(0.0, self._balance())

    def _balance(self) -> float:
        # A thousandth of a thousandth: 0.2 * 5 must be a whole retry on every machine.
        return self._extra + self._share * self._first - self._retries + 1e-6

    def _slot_of(self, now: float) -> list[float]:
        """The part of the window that `now` is in, after what is older than the window has left."""
        slots = self._slots
        while slots and slots[0][0] + (_SLOTS + 1) * self._slot <= now:
            _, first, retries = slots.popleft()
            self._first -= int(first)
            self._retries -= int(retries)
        if not slots or slots[-1][0] + self._slot <= now:
            slots.append([now, 0, 0])
        return slots[-1]


class RetryPermission(Enum):
    """Whether a call that was refused may be tried again."""

    DENIED = "no"  # not yet
    FREE = "free"  # others are let in
    FROM_BUDGET = "drawn"  # at the price of a retry, which comes back if this one is let in
    PERIODIC = "knock"  # none is let in, and nobody has found out for long


class RetryBudgets:
    """What the retries of one dependency are drawn from: of calls that failed, and of calls that were refused.

    A refusal (429, 529) costs the side that refuses next to nothing, and says nothing against the call. So what is
    refused uses up no retry of what fails; and where it may not be tried again yet it can wait for that, rather than
    give up. While all are refused, retries are few: those of a `RetryBudget`, and one every five seconds to find out.
    A retry that is let in was none too many, and once a call is let in, those that were refused before it may return.

    Attributes:
        faults: of calls that failed.
        refusals: of calls that were refused, and would be again for all that is known.
    """

    __slots__ = ("_knocked", "_let_in", "faults", "throttles")

    def __init__(self) -> None:
        self.faults = RetryBudget()
        self.throttles = RetryBudget()
        self._let_in = -math.inf  # when the latest call was sent that was not refused
        self._knocked = -math.inf  # when a refused call was last tried again

    def deposit(self, now: float) -> None:
        """A call makes its first attempt at `now`, in seconds of a clock that does not go back."""
        self.faults.deposit(now)
        self.throttles.deposit(now)

    def record_accepted(self, sent: float, withdrawn_at: float | None = None) -> None:
        """A call sent at `sent` was not refused; `drawn`: when it was drawn from the budget, if it was a retry."""
        self._let_in = max(self._let_in, sent)
        if withdrawn_at is not None:
            self.throttles.refund(withdrawn_at)

    def request_retry(self, now: float, *, throttled_at: float) -> RetryPermission:
        """Whether a call that was refused at `refused` may be tried again."""
        if self._let_in > throttled_at:
            return RetryPermission.FREE
        leave = RetryPermission.DENIED
        if self.throttles.withdraw(now):
            leave = RetryPermission.FROM_BUDGET
        elif now - self._knocked >= _KNOCK:
            leave = RetryPermission.PERIODIC
        if leave is not RetryPermission.DENIED:
            self._knocked = now
        return leave

    def return_unused(self, permission: RetryPermission, at: float) -> None:
        """A retry that was given leave at `at` has not been sent: it comes back, and another may knock."""
        if permission is RetryPermission.FROM_BUDGET:
            self.throttles.refund(at)
        elif permission is RetryPermission.PERIODIC and self._knocked == at:
            self._knocked = -math.inf
