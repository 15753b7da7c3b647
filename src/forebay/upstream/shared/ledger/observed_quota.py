"""A quota of a ledger that was observed from a provider's headers. Pure.

The same rules are in `redis_exchange.lua`: change both; `tests/integration/test_redis_ledger.py` compares them.
"""

from __future__ import annotations

import math
from typing import Final

import msgspec

_MARGIN: Final = 0.01  # of a quota that refills all the time, which is never granted: see `ObservedLimit`
_WINDOW_DELAY: Final = 0.2  # seconds at the start of a window in which nothing is granted, because clocks differ


class ObservedQuota(msgspec.Struct):
    """A limit that the members of a ledger have observed. Its level is the ledger's, beside those of given quotas.

    Attributes:
        unit: what it counts.
        amount: granted in a period.
        seconds: of the period.
        epoch: how often a member has learned something else of it.
        window_end: when its window ends, by the ledger's clock; None if it refills all the time.
        counted: the use that members have reported.
        doubted_until: until then no member waits for it.
    """

    unit: str
    amount: float
    seconds: float
    epoch: int = 0
    window_end: float | None = None
    counted: float = 0.0
    doubted_until: float = 0.0

    def refilled(self, level: float, held: float, time: float, elapsed: float) -> float:
        """Return its level after `elapsed` seconds, of which members hold `held` besides."""
        if self.window_end is None:
            return level + elapsed * self.amount / self.seconds
        if time < self.window_end:
            return level
        self.window_end += self.seconds * (math.floor((time - self.window_end) / self.seconds) + 1.0)
        return self.amount - held

    def margin(self, needed: float, held: float) -> float:
        """Return what is to be left when `needed` is taken; less if the quota never has so much."""
        if self.window_end is not None:
            return 0.0
        return max(0.0, min(_MARGIN * self.amount, self.amount - held - needed))

    def wait(self, missing: float, time: float) -> float:
        """Return the seconds until `missing` more than its level has come; if it is 0 or less, until it may be used."""
        if self.window_end is None:
            return max(0.0, missing * self.seconds / self.amount)
        if missing <= 0.0:
            return max(0.0, self.window_end - self.seconds + _WINDOW_DELAY - time)
        windows = math.ceil(missing / self.amount) - 1.0
        return self.window_end + _WINDOW_DELAY - time + self.seconds * windows
