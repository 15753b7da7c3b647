"""A limit that somebody knows."""

from __future__ import annotations

from typing import Final

from forebay.interfaces import Grant, Outcome
from forebay.limit.bounds import check_count
from forebay.limit.outage_backoff import OutageBackoff

_ROW: Final = 10  # refusals in a row, at least, that are taken for an outage: or `n`, for so many may be under way


class FixedLimit:
    """`n` calls in flight: for a contract that says so, or a server of one's own.

    Only while all that it sends is refused, it does not hammer: after ten refusals in a row (or `n`, if that is more)
    without a success there is a silence, then one call beside those that still run; refused, a silence of twice the
    length, of five seconds at most. Each that is let in is followed by another, and the first success brings `n` back.

    Raises:
        InvalidSetting: `n` is not a whole number of at least 1.
    """

    def __init__(self, n: int) -> None:
        check_count("FixedLimit", "n", n)
        self._n = n
        self._knock = OutageBackoff()
        self._row = 0  # refusals since the last success
        self._out = 0  # calls in flight
        self._knocking = False
        self._knocker: Grant | None = None  # it is not known yet whether this one is let in

    def limit(self, now: float) -> int:
        """`n`, unless everything is refused."""
        if not self._knocking:
            return self._n
        if now < self._knock.silent_until:
            return 0
        return min(self._n, self._out + (self._knocker is None))

    def reopens_at(self, now: float) -> float | None:
        """When the next knock is due; None if the limit is not 0."""
        return self._knock.silent_until if self._knocking and now < self._knock.silent_until else None

    def grant(self, now: float, in_flight: int) -> Grant:
        """Mark a slot that is taken now."""
        self._out += 1
        grant = Grant(now, in_flight, at_limit=in_flight >= self._n)
        if self._knocking:
            self._knocker = grant
        return grant

    def accepted(self, now: float, grant: Grant) -> None:  # noqa: ARG002 - the seam's
        """Its call was not refused so far."""
        if grant is self._knocker:
            self._knocker = None

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Its call has ended. A success ends an outage, a refusal may tell of one; all else says nothing."""
        self._out -= 1
        if grant is self._knocker:
            self._knocker = None
        if outcome is Outcome.SUCCESS:
            self._row = 0
            if self._knocking:
                self._knocking = False
                self._knock.reset()
        elif outcome is Outcome.OVERLOAD:
            self._row += 1
            if self._row >= max(_ROW, self._n) and now >= self._knock.silent_until:
                self._knocking = True
                self._knock.record_refusal(now)
