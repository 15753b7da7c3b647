"""The level of one quota: a token bucket that refills all the time, or a fixed window that resets.

Pure. If the clock goes back, the bucket follows it and refills nothing.
"""

from __future__ import annotations

import math
from typing import Final

_UNKNOWN_END: Final = 1.0  # seconds: what calls under way hold comes back when they end, which is not known
EPSILON: Final = 1e-9  # relative: a call that waits exactly as long as it was told must pass


class Bucket:
    """The level of one quota.

    A level below zero is a debt: calls used more than was left. It is paid back in full before the next call goes.

    Args:
        amount: granted in each period.
        period: seconds.
        now: the present, in the clock's seconds; the bucket starts full.
        max_debt_share: of the amount that a debt can be at most. What exceeds it is forgiven: only where something else
            corrects the level.
        strict: what calls under way hold, and may not use, does not refill meanwhile. So the level and what they hold
            are one amount at most, and no span of time gets more than was granted, whenever they end.
    """

    __slots__ = (
        "amount",
        "capacity",
        "held",
        "level",
        "margin_share",
        "max_debt_share",
        "period",
        "rate",
        "strict",
        "updated_at",
        "usable_from",
        "window_delay",
        "window_end",
        "window_number",
    )

    def __init__(
        self, amount: float, period: float, now: float, *, max_debt_share: float = math.inf, strict: bool = False
    ) -> None:
        self.level = amount
        self.strict = strict
        self.held = 0.0  # by calls under way, if it is strict
        self.max_debt_share = max_debt_share
        self.updated_at = now
        self.window_end: float | None = None  # None: it refills all the time
        self.window_number = 0  # counts the windows
        self.window_delay = 0.0  # seconds at the start of each window in which nothing is taken
        self.usable_from = -math.inf  # when the present window may be used
        self.margin_share = 0.0  # share of the amount that is never taken, where there is no window
        self.resize(amount, period)

    def resize(self, amount: float, period: float) -> None:
        """Grant `amount` in each `period` seconds from now on."""
        self.amount = amount
        self.period = period
        self.capacity = amount  # most that it holds
        self.rate = amount / period
        self.level = max(self.lowest, min(self.level, amount))

    def refill(self, now: float) -> None:
        """Refill for the time until `now`."""
        passed = now - self.updated_at
        if not passed:  # one call asks about ten times at the same moment
            return
        self.updated_at = now
        if self.window_end is None:
            if passed > 0:
                self.level = min(self.capacity - self.held, self.level + passed * self.rate)
        elif passed < 0:
            self.window_end += passed  # as long from now as before the clock went back
            self.usable_from += passed
        elif now >= self.window_end:
            self.window_end += self.period * (math.floor((now - self.window_end) / self.period) + 1)
            self.level = self.amount
            self.window_number += 1
            self.usable_from = self.window_end - self.period + self.window_delay

    def is_full(self, now: float) -> bool:
        """Return whether nothing is missing, so that a new bucket would be the same. It changes nothing."""
        if self.window_end is not None or self.held:
            return False
        return self.level + (now - self.updated_at) * self.rate >= self.capacity

    def remaining(self, now: float) -> float:
        """Return what is left; below 0 is a debt."""
        self.refill(now)
        return self.level

    def lacks(self, now: float, amount: float) -> bool:
        """Return whether `amount` has to wait because so much is not left, and can ever be."""
        return 0.0 < self.wait(now, amount) < math.inf

    @property
    def is_sole(self) -> bool:
        """True if no other process takes from the same quota."""
        return True

    @property
    def counted(self) -> float:
        """The use of all processes, as far as it is known here; 0 if there are no others."""
        return 0.0

    @property
    def lowest(self) -> float:
        """The lowest level that it can have."""
        return -self.max_debt_share * self.amount

    @property
    def margin(self) -> float:
        """The part of the level that is never taken."""
        return self.margin_share * self.amount if self.window_end is None else 0.0

    def wait(self, now: float, amount: float, ahead: float = 0.0, held: float = 0.0) -> float:
        """Return the seconds until `amount` can be taken after `ahead` has been; infinity if it is too large.

        `held` has to be left for others. When the bucket is full, `amount` can be taken nevertheless: nothing is lost.
        """
        if amount > self.amount:
            return math.inf
        kept = self.margin if self.margin_share else 0.0  # the property costs as much as the rest, and few have one
        seconds = self.time_until(now, min(amount + kept + held, self.capacity)) if amount else 0.0
        return seconds if not ahead else max(seconds, self.time_until(now, ahead + amount + kept))

    def time_until(self, now: float, amount: float) -> float:
        """Return the seconds until `amount` has become available, even if that is more than the bucket holds."""
        self.refill(now)
        missing = amount - self.level
        if missing <= EPSILON * self.amount:
            return 0.0 if self.window_end is None else max(0.0, self.usable_from - now)
        if self.window_end is None:
            seconds = missing / self.rate
            return max(seconds, _UNKNOWN_END) if self.held and amount > self.capacity - self.held else seconds
        return self.window_end + self.window_delay - now + self.period * (math.ceil(missing / self.amount) - 1)

    def must_hold(self, now: float, amount: float, at: float) -> bool:
        """Return whether `amount` has to be left now for somebody who takes it at `at`.

        Not if it comes back until then: by the refill, or because another window has begun.
        """
        return at < self.window_end if self.window_end is not None else (at - now) * self.rate < amount

    def level_in(self, now: float, seconds: float) -> float:
        """Return the level in `seconds` without the bound of its capacity; infinity if the window resets before."""
        self.refill(now)
        if self.window_end is None:
            return self.level + seconds * self.rate
        return self.level if now + seconds < self.window_end else math.inf

    def take(self, now: float, amount: float) -> None:
        """Take `amount`, into debt if necessary."""
        if now != self.updated_at:
            self.refill(now)
        self.level = max(self.level - amount, self.lowest)

    def reserve(self, now: float, amount: float) -> None:
        """Take `amount` for a call that is sent. It ends by `end`, once."""
        self.take(now, amount)
        if self.strict:
            self.held += amount

    def end(self, now: float, reserved: float, used: float) -> None:
        """Replace what a call had reserved by what it used: a surplus is refunded, a deficit becomes a debt."""
        if self.strict:
            if now != self.updated_at:
                self.refill(now)
            self.held = max(0.0, self.held - reserved)
        if reserved >= used:
            self.refund(now, reserved - used)
        else:
            self.take(now, used - reserved)

    def drop_reservations(self) -> None:
        """Forget which calls are under way: they are another process's. What they took stays taken."""
        self.held = 0.0

    def lower_to(self, level: float) -> None:
        """Take what is above `level`."""
        self.level = min(self.level, level)

    def refund(self, now: float, amount: float) -> None:
        """Return `amount` to the bucket; what exceeds its capacity is lost."""
        if now != self.updated_at:
            self.refill(now)
        self.level = min(self.capacity - self.held, self.level + amount)
