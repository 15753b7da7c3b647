"""The limit of an oracle that knows the provider's capacity at every moment."""

from __future__ import annotations

import math
from collections.abc import Callable

from forebay.interfaces import Outcome
from forebay.limit import Grant, Limit


class OracleLimit(Limit):
    """A limit that is always the capacity.

    Args:
        capacity: returns the calls that the provider can serve, by the time in seconds.
    """

    def __init__(self, capacity: Callable[[float], int]) -> None:
        super().__init__()
        self._capacity = capacity

    def limit(self, now: float) -> int:
        """Return the capacity at `now`."""
        return self._capacity(now)

    def reopens_at(self, now: float) -> float | None:
        """Return the next tenth of a second, when the capacity is looked at again."""
        return (math.floor(10 * now + 1e-6) + 1) / 10

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Learn nothing: the capacity is known."""
