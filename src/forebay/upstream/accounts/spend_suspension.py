"""The suspension of an account whose money at the provider is spent (402, ``insufficient_quota``)."""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from forebay.interfaces import Outcome
from forebay.upstream.call_request import CallRequest, Permit

_DOUBT: Final = 2.0  # seconds in which every call must be refused, if only the words or the status speak of money ...
_GAPS: Final = 2.0  # ... and times the longest time between two accepted calls, of the last minutes ...
_WINDOW: Final = 300.0  # ... which are this many seconds, up to twice
_MAX_GAP: Final = 60.0  # seconds that such a time counts at most
_FIRST: Final = 2.0  # seconds of a suspension that is in doubt, at least ...
_SHARE: Final = 0.25  # ... and share of the time since the first refusal
LONGEST_PROBE: Final = 60.0  # seconds without an answer to a probe, after which another one is sent


class Suspended(NamedTuple):
    """A refusal that means that the money of the key is spent.

    Attributes:
        seconds: until the next call is tried.
        since: when no call was accepted any more. Accounts that have accepted one since go on.
    """

    seconds: float
    since: float


class SpendSuspension:
    """The suspension of one account. When its time is over one call goes as a probe, and the others when that succeeds.

    An error code such as ``insufficient_quota`` means the account. A bare 402, or the wording of a message, may mean
    one request only ("you requested up to 65536 tokens, but can only afford 41234"). So these suspend the account only
    once they have come for two seconds, and for twice as long as none was accepted at any time of the last minutes,
    and if no call that was sent in that time was accepted. Even then they may mean the only caller that was busy:
    probes go soon at first, and a request as long as the one that was refused, which may be the same, goes last.

    Pure: the caller passes the time. Calls that cost nothing pass all the time, and prove nothing.
    """

    __slots__ = (
        "_accepted_sent_at",
        "_doubted_at",
        "_earlier_gap",
        "_gap",
        "_probe",
        "_refused_size",
        "_slow_refusals",
        "_until",
        "_until_same",
        "_window_start",
    )

    def __init__(self) -> None:
        self._until: float | None = None  # None: calls are sent
        self._until_same = -math.inf  # for a call of the size of the one that was refused last, if that is in doubt
        self._refused_size = 0
        self._probe: Permit | None = None
        self._doubted_at = -math.inf  # when the first refusal of the latest row came
        self._accepted_sent_at = -math.inf  # when the latest of the accepted calls was sent
        self._gap = self._earlier_gap = 0.0  # seconds between two accepted calls, at most, in this window and before
        self._window_start = -math.inf
        self._slow_refusals = False  # so slow that a call without an answer is not yet an accepted one

    @property
    def is_suspended(self) -> bool:
        """True from a refusal for money until a probe is accepted."""
        return self._until is not None

    def confirm(self, now: float, permit: Permit, seconds: float, *, certain: bool) -> Suspended | None:
        """Return for how long no call is to be sent if a refusal means that the money of the key is spent, else None.

        A probe that is refused says that of its own account; the others may have calls of another kind.

        Args:
            now: the time.
            permit: of the call that was refused.
            seconds: for which calls are suspended if there is no doubt.
            certain: the refusal cannot mean this call alone.
        """
        if certain:
            self._refused_size = 0
            return Suspended(seconds, math.inf)
        self._refused_size = permit.request.size
        if self._until is None:
            self._slow_refusals |= permit.accepted
            if self._accepted_sent_at >= self._doubted_at:
                self._doubted_at = now
                return None
            doubt = max(_DOUBT, _GAPS * max(self._gap, self._earlier_gap))
            if permit.granted_at < self._doubted_at or now - self._doubted_at < doubt:
                return None
        return Suspended(min(seconds, max(_FIRST, _SHARE * (now - self._doubted_at))), self._doubted_at)

    def accepted_since(self, when: float) -> bool:
        """Return whether a call that was sent after `when` was accepted."""
        return self._accepted_sent_at >= when

    def begin(self, now: float, seconds: float) -> None:
        """Send no calls for `seconds`."""
        self._until = now + seconds
        self._until_same = now + 2 * seconds
        self._probe = None

    def time_left(self, now: float, request: CallRequest | None = None, *, probe_duration: float) -> float | None:
        """Return the seconds until a call may be sent; None if one may be sent now.

        Args:
            now: the time.
            request: of the call; None for any.
            probe_duration: seconds that a probe is expected to take.
        """
        if self._until is None:
            return None
        same = request is not None and request.size > 0 and request.size == self._refused_size
        until = self._until_same if same else self._until
        if now < until:
            return until - now
        if self._probe is None or now - self._probe.granted_at > LONGEST_PROBE:
            return None
        return probe_duration

    def record_sent(self, permit: Permit) -> None:
        """Note that a call is sent: it is the probe if the account is still suspended."""
        if self._until is not None and not permit.request.free:
            self._probe = permit

    def record_unrefused(self, permit: Permit) -> None:
        """Note that a call has no answer yet, after a second: it is accepted, unless refusals take longer."""
        if not self._slow_refusals:
            self._note_accepted(permit)

    def record_accepted(self, permit: Permit) -> None:
        """Note that the answer of a call has begun: if it is the probe, there is money again."""
        self._note_accepted(permit)
        if permit is self._probe:
            self._until = self._probe = None

    def _note_accepted(self, permit: Permit) -> None:
        if permit.request.free or permit.granted_at <= self._accepted_sent_at:
            return
        if permit.granted_at >= self._window_start + _WINDOW:
            self._gap, self._earlier_gap, self._window_start = 0.0, self._gap, permit.granted_at
        if self._accepted_sent_at > -math.inf:
            self._gap = max(self._gap, min(_MAX_GAP, permit.granted_at - self._accepted_sent_at))
        self._accepted_sent_at = permit.granted_at

    def record_end(self, permit: Permit, kind: Outcome) -> None:
        """Note that a call has ended. A probe that has shown nothing makes room for another."""
        if kind is Outcome.SUCCESS:
            self.record_accepted(permit)
        elif permit is self._probe:
            self._probe = None
