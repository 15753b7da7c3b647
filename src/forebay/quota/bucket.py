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

    __slots__ = ("amount", "at", "cushion", "late", "level", "opens", "per", "rate", "size", "turn", "window_ends")

    def __init__(self, amount: float, per: float, now: float) -> None:
        self.level = amount
        self.at = now
        self.window_ends: float | None = None  # None: it refills all the time
        self.turn = 0  # which window it is
        self.late = 0.0  # seconds of each window in which nothing is taken
        self.opens = -math.inf  # when the present window may be used
        self.cushion = 0.0  # share of the amount that stays where there is no window
        self.resize(amount, per)

    def resize(self, amount: float, per: float) -> None:
        """Grant `amount` in each `per` seconds from now on."""
        self.amount = amount
        self.per = per
        self.size = amount  # the most that it holds
        self.rate = amount / per
        self.level = max(-amount, min(self.level, amount))

    def refill(self, now: float) -> None:
        """Let time pass until `now`."""
        passed = now - self.at
        if not passed:  # one call looks ten times at the same moment
            return
        self.at = now
        if self.window_ends is None:
            if passed > 0:
                self.level = min(self.size, self.level + passed * self.rate)
        elif passed < 0:
            self.window_ends += passed  # as long from now as before the clock went back
            self.opens += passed
        elif now >= self.window_ends:
            self.window_ends += self.per * (math.floor((now - self.window_ends) / self.per) + 1)
            self.level = self.amount
            self.turn += 1
            self.opens = self.window_ends - self.per + self.late

    @property
    def kept(self) -> float:
        """What is never drained."""
        return self.cushion * self.amount if self.window_ends is None else 0.0

    def wait(self, now: float, amount: float, ahead: float = 0.0) -> float:
        """Seconds until `amount` can be taken once `ahead` is through: 0 is now, infinity never, for it is too much."""
        if amount > self.amount:
            return math.inf
        seconds = self.time_to(now, min(amount + self.kept, self.size)) if amount else 0.0
        return seconds if not ahead else max(seconds, self.time_to(now, ahead + amount + self.kept))

    def time_to(self, now: float, amount: float) -> float:
        """Seconds until `amount` in all, which may be more than it can hold at once, will have been there."""
        self.refill(now)
        missing = amount - self.level
        if missing <= EPSILON * self.amount:
            return 0.0 if self.window_ends is None else max(0.0, self.opens - now)
        if self.window_ends is None:
            return missing / self.rate
        return self.window_ends + self.late - now + self.per * (math.ceil(missing / self.amount) - 1)

    def left_in(self, now: float, seconds: float) -> float:
        """What is left in `seconds`, were it to grow without a bound; infinity if a window has turned by then."""
        self.refill(now)
        if self.window_ends is None:
            return self.level + seconds * self.rate
        return self.level if now + seconds < self.window_ends else math.inf

    def take(self, now: float, amount: float) -> None:
        """Take `amount`, into debt if it must be."""
        if now != self.at:
            self.refill(now)
        self.level = max(self.level - amount, -self.amount)

    def give_back(self, now: float, amount: float) -> None:
        """Return `amount`; what does not fit is lost."""
        if now != self.at:
            self.refill(now)
        self.level = min(self.size, self.level + amount)
