"""A fixed limit, with a backoff for outages."""

from __future__ import annotations

from typing import Final

from forebay._validate import check_whole
from forebay.interfaces import Outcome
from forebay.limit.base import Grant, Limit
from forebay.limit.outage_backoff import OutageBackoff

_OUTAGE_REFUSALS: Final = 10  # least refusals in a row that count as an outage; `n` if more calls may be under way


class FixedLimit(Limit):
    """A limit of `n` calls in flight: for a limit fixed by contract, or for your own server.

    It backs off only while the provider refuses everything. After ten refusals in a row (or `n`, if that is more)
    without a success, the limit is 0 for a second; then one trial call goes, in addition to those that still run. Each
    refusal of a trial call doubles the silence, up to five seconds. Each trial call that is accepted is followed by
    another, and the first success restores `n`.

    Args:
        n: calls in flight.

    Raises:
        InvalidSetting: `n` is not a whole number of at least 1.
    """

    def __init__(self, n: int) -> None:
        check_whole("FixedLimit", "n", n)
        super().__init__(initial_limit=n, max_limit=n)
        self._n = n
        self._backoff = OutageBackoff()
        self._refusals_in_a_row = 0
        self._in_flight = 0
        self._in_outage = False
        self._trial: Grant | None = None  # the trial call of which it is not known yet whether it is accepted

    def limit(self, now: float) -> int:
        """Return `n`, or less while the provider refuses everything."""
        if not self._in_outage:
            return self._n
        if now < self._backoff.silent_until:
            return 0
        return min(self._n, self._in_flight + (self._trial is None))

    def reopens_at(self, now: float) -> float | None:
        """Return when the next trial call is due, in the clock's seconds; None while the limit is above 0."""
        return self._backoff.silent_until if self._in_outage and now < self._backoff.silent_until else None

    def grant(self, now: float, in_flight: int) -> Grant:
        """Return the grant of a slot that is taken now; `in_flight` includes it."""
        self._in_flight += 1
        grant = Grant(now, in_flight, at_limit=in_flight >= self._n)
        if self._in_outage:
            self._trial = grant
        return grant

    def accepted(self, now: float, grant: Grant) -> None:  # noqa: ARG002 - the interface's
        """Allow another trial call once this one is accepted."""
        if grant is self._trial:
            self._trial = None

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """End an outage at a success, and begin or prolong one at a refusal."""
        self._in_flight -= 1
        if grant is self._trial:
            self._trial = None
        if outcome is Outcome.SUCCESS:
            self._refusals_in_a_row = 0
            if self._in_outage:
                self._in_outage = False
                self._backoff.reset()
        elif outcome is Outcome.OVERLOAD:
            self._refusals_in_a_row += 1
            if self._refusals_in_a_row >= max(_OUTAGE_REFUSALS, self._n) and now >= self._backoff.silent_until:
                self._in_outage = True
                self._backoff.record_refusal(now)
