"""A limit that somebody knows."""

from __future__ import annotations

from forebay.limit.bounds import check_count
from forebay.typing import Grant, Outcome


class FixedLimit:
    """Always `n` calls in flight, whatever happens: for a contract that says so, or a server of one's own.

    Raises:
        InvalidSetting: `n` is not a whole number of at least 1.
    """

    def __init__(self, n: int) -> None:
        check_count("FixedLimit", "n", n)
        self._n = n

    def limit(self, now: float) -> int:  # noqa: ARG002 - the seam's
        """`n`."""
        return self._n

    def next_change(self, now: float) -> float | None:  # noqa: ARG002 - the seam's
        """Never."""
        return None

    def grant(self, now: float, in_flight: int) -> Grant:
        """Mark a slot that is taken now."""
        return Grant(now, in_flight, full=in_flight >= self._n)

    def accepted(self, now: float, grant: Grant) -> None:
        """Nothing follows from it."""

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, stretch: float | None = None) -> None:
        """Nothing follows from it."""
