"""Telling the cause of a refusal: a rate, or something else."""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

_RECENT: Final = 10.0  # seconds in which a call that was accepted contradicts a refusal; before it, up to twice as long
_NAMED: Final = 5.0  # weight of words or headers that name a rate
_TRIED: Final = 2.0  # weight of a trial that found a limit ...
_CHANCE: Final = 4.0  # ... and of one that found none
_PAUSED: Final = 0.5  # weight of a refused trial call of a pause
_ENOUGH: Final = 4.0  # score from which a rate is the likely cause ...
_ENOUGH_MEASURED: Final = 0.0  # ... where a rate has been measured, which explains the refusal
_MAX_SCORE: Final = 9.0
_MIN_SCORE: Final = -4.0
_ENOUGH_DISPROVED: Final = 8.0  # ... where a learned rate was disproved
_HALF_LIFE: Final = 10.0  # seconds of the evidence for a rate: one that is not kept to refuses again at once
_MAX_REFUSALS: Final = 64  # that are remembered
_KNOWN_AFTER: Final = 1.0  # seconds until most calls that were sent before and are refused have been refused
_MAX_EARLY: Final = 256  # calls accepted earlier than that which are remembered until then


class _Refusal(NamedTuple):
    at: float  # seconds
    sent_at: float
    in_flight: int


class RefusalCause:
    """A score of the evidence for a rate.

    A trial whose calls were refused, too, speaks for a rate, and one whose calls were accepted against it. A limit on
    the calls in flight refuses only calls beyond it: so does a refusal with more of them than were accepted a few
    seconds before or after. What the provider says about the cause decides only until such evidence outweighs it.
    """

    __slots__ = (
        "_earlier_peak",
        "_early",
        "_enough",
        "_judged_at",
        "_limit_at",
        "_open",
        "_peak",
        "_peak_sent_at",
        "_refusals",
        "_score",
        "_window_start",
    )

    def __init__(self) -> None:
        self._peak = self._earlier_peak = 0  # most calls in flight with an accepted one
        self._peak_sent_at = -math.inf
        self._early: deque[tuple[float, int]] = deque(maxlen=_MAX_EARLY)  # accepted calls, as in `_count_accepted`
        self._window_start = -math.inf
        self._score = 0.0
        self._enough = _ENOUGH
        self._judged_at = -math.inf  # when the latest refusal arrived that was counted against a rate
        self._limit_at = -math.inf  # when a trial spoke for a rate latest
        self._refusals: deque[_Refusal] = deque(maxlen=_MAX_REFUSALS)
        self._open: deque[_Refusal] = deque(maxlen=_MAX_REFUSALS)  # those that nothing contradicts yet

    @property
    def peak(self) -> int:
        """The most calls in flight with which a call was accepted recently."""
        return max(self._peak, self._earlier_peak)

    def is_rate(self, *, measured: bool, named: bool = False) -> bool:
        """Return whether a rate is the likely cause of refusals now.

        Args:
            measured: a rate has been measured.
            named: they name a rate, or a time after which to come back.
        """
        return self._score + _NAMED * named >= (_ENOUGH_MEASURED if measured else self._enough)

    def record_accepted(self, now: float, sent_at: float, in_flight: int, *, paused: bool = False) -> None:
        """Note that a call was accepted.

        Args:
            now: the time.
            sent_at: when it was sent.
            in_flight: calls in flight at that time, itself included.
            paused: calls paused until now.
        """
        if not paused:
            self._move_window(now)
        if self._early:
            self._count_early(now)
        if in_flight > self._peak or self._open:
            if now < sent_at + _KNOWN_AFTER:
                self._early.append((sent_at, in_flight))
            else:
                self._count_accepted(sent_at, in_flight)

    def record_refused(
        self, now: float, sent_at: float, in_flight: int, *, rising: bool = False, paused: bool = False
    ) -> bool:
        """Note that a call was refused, and return whether fewer calls in flight would have helped.

        Args:
            now: the time.
            sent_at: when it was sent.
            in_flight: calls in flight at that time, itself included.
            rising: a learned rate is being raised, and so are the calls in flight: more of them say nothing.
            paused: calls pause.
        """
        if not paused:
            self._move_window(now)
        refusal = self.record_unserved(now, sent_at, in_flight)
        if in_flight <= self.peak or rising or not self.peak:
            return False
        if sent_at >= self._judged_at:  # those sent at once are one piece of evidence
            self._judged_at = now
            self._open.append(refusal)
            self._count(-1.0)
        return True

    def record_unserved(self, now: float, sent_at: float, in_flight: int) -> _Refusal:
        """Note that a call was refused, whatever the cause: it never was in flight at the provider."""
        self._count_early(now)
        refusal = _Refusal(now, sent_at, in_flight)
        self._refusals.append(refusal)
        self._discount(sent_at)
        return refusal

    def leave_out(self, seconds: float) -> None:
        """Leave out a pause: what was known before it has not become older."""
        self._window_start += seconds
        self._limit_at += seconds

    def record_limit(self, now: float) -> None:
        """Count a trial whose calls were refused, though no more were in flight than were accepted before."""
        if self._score > 0.0:
            self._score *= 0.5 ** ((now - self._limit_at) / _HALF_LIFE)
        self._limit_at = now
        self._count(_TRIED)

    def record_chance(self) -> None:
        """Count a trial whose calls were accepted."""
        self._count(-_CHANCE)

    def record_silent_refusal(self, in_flight: int) -> None:
        """Count a trial call of a pause that was refused with no more calls in flight than were accepted before."""
        if in_flight <= self.peak:
            self._count(_PAUSED)

    @property
    def score(self) -> float:
        """The evidence for a rate."""
        return self._score

    @property
    def is_disproved(self) -> bool:
        """True once a learned rate was disproved."""
        return self._enough == _ENOUGH_DISPROVED

    def adopt(self, now: float, score: float, *, is_disproved: bool, chance: bool) -> None:
        """Take over the evidence for a rate that another process has found; against one only if its trial says so."""
        if chance or score > self._score:
            self._score, self._limit_at = score, now
        self._enough = _ENOUGH_DISPROVED if is_disproved else _ENOUGH

    def disprove_rate(self) -> None:
        """Note that a learned rate did not keep calls from being refused: it takes longer to learn one again."""
        self._score, self._enough = 0.0, _ENOUGH_DISPROVED

    def _count_early(self, now: float) -> None:
        """Count the calls whose acceptance was known before the refusals of others in flight with them."""
        while self._early and now >= self._early[0][0] + _KNOWN_AFTER:
            self._count_accepted(*self._early.popleft())

    def _count_accepted(self, sent_at: float, in_flight: int) -> None:
        """Count a call that was accepted; `in_flight`: calls in flight when it was sent, itself included."""
        # Calls that were refused in the meantime never were in flight at the provider. Of those sent in the same
        # moment the one that came first had fewer in flight.
        order = (sent_at, in_flight)
        in_flight -= sum((other.sent_at, other.in_flight) < order and sent_at < other.at for other in self._refusals)
        if in_flight > self._peak:
            self._peak, self._peak_sent_at = in_flight, sent_at
        self._contradict(sent_at, in_flight)

    def _discount(self, sent_at: float) -> None:
        """Take a refused call out of those in flight with an accepted one: the provider did not have it."""
        if sent_at < self._peak_sent_at:
            self._peak -= 1

    def _contradict(self, sent_at: float, in_flight: int) -> None:
        """Take back what the refusals counted that a call accepted with `in_flight` calls in flight contradicts."""
        while self._open and self._open[0].at < sent_at - _RECENT:
            self._open.popleft()
        contradicted = [refusal for refusal in self._open if refusal.at < sent_at and refusal.in_flight <= in_flight]
        if contradicted:
            self._count(1.0)
        for refusal in contradicted:
            self._open.remove(refusal)

    def _count(self, evidence: float) -> None:
        self._score = max(min(_MIN_SCORE, self._score), min(_MAX_SCORE, self._score + evidence))

    def _move_window(self, now: float) -> None:
        if now >= self._window_start + _RECENT:
            recent = now < self._window_start + 2 * _RECENT
            self._earlier_peak = self._peak if recent else 0
            self._peak, self._peak_sent_at, self._window_start = 0, -math.inf, now
