"""One quota as a level that falls and refills: a bucket that refills all the time, or a window that turns.

Pure; a clock that goes back is followed, and refills nothing by that.
"""

from __future__ import annotations

import math
from typing import Final

EPSILON: Final = 1e-9  # relative: who waits exactly as long as it was told must get in


class Bucket:
    """How much of a quota is left.

    Below zero is a debt, of one whole amount at most: what used more than two is an exception, or a lie.

    Args:
        amount: granted in each period.
        per: seconds of a period.
        now: the present; the bucket is full.
    """

    __slots__ = (
        "amount",
        "capacity",
        "level",
        "margin_share",
        "period",
        "rate",
        "updated_at",
        "usable_from",
        "window_delay",
        "window_end",
        "window_number",
    )

    def __init__(self, amount: float, per: float, now: float) -> None:
        self.level = amount
        self.updated_at = now
        self.window_end: float | None = None  # None: it refills all the time
        self.window_number = 0  # which window it is
        self.window_delay = 0.0  # seconds of each window in which nothing is taken
        self.usable_from = -math.inf  # when the present window may be used
        self.margin_share = 0.0  # share of the amount that stays where there is no window
        self.resize(amount, per)

    def resize(self, amount: float, per: float) -> None:
        """Grant `amount` in each `per` seconds from now on."""
        self.amount = amount
        self.period = per
        self.capacity = amount  # the most that it holds
        self.rate = amount / per
        self.level = max(-amount, min(self.level, amount))

    def refill(self, now: float) -> None:
        """Let time pass until `now`."""
        passed = now - self.updated_at
        if not passed:  # one call looks ten times at the same moment
            return
        self.updated_at = now
        if self.window_end is None:
            if passed > 0:
                self.level = min(self.capacity, self.level + passed * self.rate)
        elif passed < 0:
            self.window_end += passed  # as long from now as before the clock went back
            self.usable_from += passed
        elif now >= self.window_end:
            self.window_end += self.period * (math.floor((now - self.window_end) / self.period) + 1)
            self.level = self.amount
            self.window_number += 1
            self.usable_from = self.window_end - self.period + self.window_delay

    @property
    def margin(self) -> float:
        """What is never drained."""
        return self.margin_share * self.amount if self.window_end is None else 0.0

    def wait(self, now: float, amount: float, ahead: float = 0.0) -> float:
        """Seconds until `amount` can be taken once `ahead` is through: 0 is now, infinity never, for it is too much."""
        if amount > self.amount:
            return math.inf
        seconds = self.time_until(now, min(amount + self.margin, self.capacity)) if amount else 0.0
        return seconds if not ahead else max(seconds, self.time_until(now, ahead + amount + self.margin))

    def time_until(self, now: float, amount: float) -> float:
        """Seconds until `amount` in all, which may be more than it can hold at once, will have been there."""
        self.refill(now)
        missing = amount - self.level
        if missing <= EPSILON * self.amount:
            return 0.0 if self.window_end is None else max(0.0, self.usable_from - now)
        if self.window_end is None:
            return missing / self.rate
        return self.window_end + self.window_delay - now + self.period * (math.ceil(missing / self.amount) - 1)

    def level_in(self, now: float, seconds: float) -> float:
        """What is left in `seconds`, were it to grow without a bound; infinity if a window has turned by then."""
        self.refill(now)
        if self.window_end is None:
            return self.level + seconds * self.rate
        return self.level if now + seconds < self.window_end else math.inf

    def take(self, now: float, amount: float) -> None:
        """Take `amount`, into debt if it must be."""
        if now != self.updated_at:
            self.refill(now)
        self.level = max(self.level - amount, -self.amount)

    def refund(self, now: float, amount: float) -> None:
        """Return `amount`; what does not fit is lost."""
        if now != self.updated_at:
            self.refill(now)
        self.level = min(self.capacity, self.level + amount)
