"""The trial of a refusal: a few calls are sent right after it, and what becomes of them tells why it was refused."""

from __future__ import annotations

import enum
import math
from collections import deque
from typing import Final

_REFUSED: Final = 6  # calls refused right after the first that show that a limit is the cause, if not more are accepted
_MARGIN: Final = 1.25  # by which the rate may be underestimated
RIGHT_AFTER: Final = 1.0  # seconds after the refused call was sent
_OVER: Final = 2.1  # seconds after it: the calls right after it have been answered, or count as accepted
_TRAFFIC: Final = 2.0  # seconds in which as many calls were sent as a trial needs
_MAX_CALLS: Final = 64  # whose times are remembered


class TrialVerdict(enum.Enum):
    """The answer that the calls right after a refusal give."""

    LIMIT = enum.auto()  # they were refused, too: by a rate, or by a limit on the calls in flight
    CHANCE = enum.auto()  # more were accepted than any limit lets through in that time: no load of ours is the cause


class RefusalTrial:
    """The calls sent right after one that was refused.

    After a refusal a rate lets through only what it gains from then on, and so does a full provider: its throughput.
    If more calls are accepted than that, the refusal had another cause: a server of many, chance, or what it asked for.

    Attributes:
        over_at: when the latest trial is over. It says nothing about calls that are sent later.
    """

    __slots__ = ("_accepted", "_rate", "_refused", "_sent", "_since", "_times", "_until", "over_at")

    def __init__(self) -> None:
        self._times: deque[float] = deque(maxlen=_MAX_CALLS)  # when the latest calls were sent
        self._since = self._until = -math.inf  # when the refused call was sent, and the latest accepted one after it
        self.over_at = -math.inf
        self._rate = 0.0
        self._sent = self._accepted = self._refused = 0

    def begin(self, now: float, sent_at: float, rate: float) -> None:
        """Begin a trial unless one is under way.

        Args:
            now: when the refusal arrived.
            sent_at: when the refused call was sent.
            rate: calls a second that are accepted at most, as far as known.
        """
        if not self.is_open(now):
            self._since = self._until = sent_at
            self.over_at = sent_at + _OVER
            self._rate = rate
            self._sent = sum(at > sent_at for at in self._times)
            self._accepted = self._refused = 0

    def can_decide(self, now: float) -> bool:
        """Return whether a trial may decide: one is under way, or calls come fast enough for a second of them to."""
        return self.is_open(now) or sum(at > now - _TRAFFIC for at in self._times) >= _REFUSED

    def is_open(self, now: float) -> bool:
        """Return whether a trial is under way."""
        return now < self.over_at

    def wants_call(self, now: float) -> bool:
        """Return whether a call is to be sent now for the trial."""
        return now < self._since + RIGHT_AFTER and self._sent < self._bound(now) + _REFUSED

    def record_sent(self, now: float) -> None:
        """Note that a call is sent."""
        self._times.append(now)
        self._sent += 1

    def record_accepted(self, sent_at: float) -> TrialVerdict | None:
        """Note that a call was accepted; return the verdict if that decides."""
        if not self._includes(sent_at):
            return None
        self._accepted += 1
        self._until = max(self._until, sent_at)
        return self._end(TrialVerdict.CHANCE) if self._accepted > self._bound(self._until) else None

    def record_refused(self, sent_at: float) -> TrialVerdict | None:
        """Note that a call was refused; return the verdict if that decides."""
        if not self._includes(sent_at):
            return None
        self._refused += 1
        return self._end(TrialVerdict.LIMIT) if self._refused >= max(_REFUSED, self._sent / 2) else None

    def _includes(self, sent_at: float) -> bool:
        return self._since < sent_at < self._since + RIGHT_AFTER

    def _bound(self, now: float) -> int:
        """Return how many calls a limit lets through from the refused one until `now`, at most."""
        return max(1, math.ceil(_MARGIN * self._rate * (now - self._since)))

    def _end(self, verdict: TrialVerdict) -> TrialVerdict:
        self._since = self.over_at = -math.inf
        return verdict
