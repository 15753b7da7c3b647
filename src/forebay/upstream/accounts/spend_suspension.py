"""The suspension of an account whose money at the provider is spent (402, ``insufficient_quota``)."""

from __future__ import annotations

import math
from typing import Final

from forebay.interfaces import Outcome
from forebay.upstream.call_request import Permit

_DOUBT: Final = 2.0  # seconds in which every call must be refused, if only the words or the status speak of money
_LONGEST_PROBE: Final = 60.0  # seconds without an answer to a probe, after which another one is sent


class SpendSuspension:
    """The suspension of one account. When its time is over one call goes as a probe, and the others when that succeeds.

    An error code such as ``insufficient_quota`` means the account. A bare 402, or the wording of a message, may mean
    one request only ("you requested up to 65536 tokens, but can only afford 41234"). So these suspend the account only
    once they have come for two seconds, and no call that was sent in that time was accepted.

    Pure: the caller passes the time. Calls that cost nothing pass all the time, and prove nothing.
    """

    __slots__ = ("_accepted_sent_at", "_doubted_at", "_probe", "_slow_refusals", "_until")

    def __init__(self) -> None:
        self._until: float | None = None  # None: calls are sent
        self._probe: Permit | None = None
        self._doubted_at = -math.inf  # when the first refusal of the latest row came
        self._accepted_sent_at = -math.inf  # when the latest of the accepted calls was sent
        self._slow_refusals = False  # so slow that a call without an answer is not yet an accepted one

    def confirm(self, now: float, permit: Permit, *, certain: bool) -> float | None:
        """Return the time since when no call was accepted, if a refusal means that the money of the key is spent.

        A probe that is refused says that of its own account; the others may have calls of another kind.

        Args:
            now: the time.
            permit: of the call that was refused.
            certain: the refusal cannot mean this call alone.
        """
        if certain:
            return math.inf
        if self._until is not None:
            return self._doubted_at
        self._slow_refusals |= permit.accepted
        if self._accepted_sent_at >= self._doubted_at:
            self._doubted_at = now
            return None
        spent = permit.granted_at >= self._doubted_at and now - self._doubted_at >= _DOUBT
        return self._doubted_at if spent else None

    def accepted_since(self, when: float) -> bool:
        """Return whether a call that was sent after `when` was accepted."""
        return self._accepted_sent_at >= when

    def begin(self, now: float, seconds: float) -> None:
        """Send no calls for `seconds`."""
        self._until = now + seconds
        self._probe = None

    def time_left(self, now: float, *, probe_duration: float) -> float | None:
        """Return the seconds until a call may be sent; None if one may be sent now.

        Args:
            now: the time.
            probe_duration: seconds that a probe is expected to take.
        """
        if self._until is None:
            return None
        if now < self._until:
            return self._until - now
        if self._probe is None or now - self._probe.granted_at > _LONGEST_PROBE:
            return None
        return probe_duration

    def record_sent(self, permit: Permit) -> None:
        """Note that a call is sent: it is the probe if the account is still suspended."""
        if self._until is not None and not permit.request.free:
            self._probe = permit

    def record_unrefused(self, permit: Permit) -> None:
        """Note that a call has no answer yet, after a second: it is accepted, unless refusals take longer."""
        if not (self._slow_refusals or permit.request.free):
            self._accepted_sent_at = max(self._accepted_sent_at, permit.granted_at)

    def record_accepted(self, permit: Permit) -> None:
        """Note that the answer of a call has begun: if it is the probe, there is money again."""
        if not permit.request.free:
            self._accepted_sent_at = max(self._accepted_sent_at, permit.granted_at)
        if permit is self._probe:
            self._until = self._probe = None

    def record_end(self, permit: Permit, kind: Outcome) -> None:
        """Note that a call has ended. A probe that has shown nothing makes room for another."""
        if kind is Outcome.SUCCESS:
            self.record_accepted(permit)
        elif permit is self._probe:
            self._probe = None
