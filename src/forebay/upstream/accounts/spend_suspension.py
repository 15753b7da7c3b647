"""The suspension of an account whose money at the provider is spent (402, ``insufficient_quota``)."""

from __future__ import annotations

from forebay.interfaces import Outcome
from forebay.upstream.call_request import Permit


class SpendSuspension:
    """The suspension of one account. When its time is over one call goes as a probe, and the others when that succeeds.

    Pure: the caller passes the time. Calls that cost nothing pass all the time, and prove nothing.
    """

    __slots__ = ("_probe", "_until")

    def __init__(self) -> None:
        self._until: float | None = None  # None: calls are sent
        self._probe: Permit | None = None

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
        return None if self._probe is None else probe_duration

    def record_sent(self, permit: Permit) -> None:
        """Note that a call is sent: it is the probe if the account is still suspended."""
        if self._until is not None and not permit.request.free:
            self._probe = permit

    def record_accepted(self, permit: Permit) -> None:
        """Note that a call was accepted: if it is the probe, there is money again."""
        if permit is self._probe:
            self._until = self._probe = None

    def record_end(self, permit: Permit, kind: Outcome) -> None:
        """Note that a call has ended. A probe that has shown nothing makes room for another."""
        if kind is Outcome.SUCCESS:
            self.record_accepted(permit)
        elif permit is self._probe:
            self._probe = None
