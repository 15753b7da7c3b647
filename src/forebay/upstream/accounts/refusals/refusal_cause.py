"""Telling the cause of a refusal: a rate, or a limit on the calls in flight."""

from __future__ import annotations

import math
from collections import deque
from typing import Final, NamedTuple

_RECENT: Final = 10.0  # seconds in which a call that was accepted contradicts a refusal; before it, up to twice as long
_NAMED: Final = 5.0  # weight of words or headers that name a rate, in refusals
_SAYS_CONCURRENCY: Final = 3.0  # weight of words that name the calls in flight: each fall of such a limit looks alike
_ENOUGH: Final = 4.0  # score from which a rate is the likely cause ...
_ENOUGH_MEASURED: Final = 0.0  # ... where a rate has been measured, which explains the refusal
_MAX_SCORE: Final = 9.0
_MIN_SCORE: Final = -3.0
_DISPROVED: Final = -50.0  # score after a learned rate was disproved; each further time it is twice as low ...
_MIN_DISPROVED: Final = -200.0  # ... down to this
_DECAY: Final = 0.15  # of the score for each accepted call: refusals at random, up to one in eight, do not add up
_ROW: Final = 3  # refusals in a row that count for a rate: a limit that falls refuses many, all below what was accepted
_DRAINED: Final = 0.5  # of the calls in flight that were accepted: refused with fewer, the others in a row count, too
_MAX_REFUSALS: Final = 64  # that are remembered


class _Refusal(NamedTuple):
    at: float  # seconds
    sent_at: float
    in_flight: int


class RefusalCause:
    """A score of the evidence for a rate, and against a limit on the calls in flight.

    A limit on the calls in flight refuses only calls beyond it. So it is not the cause of a refusal if a call with as
    many calls in flight was accepted a few seconds before or after. A refusal of which that is true counts for a rate,
    if it is not one of many in a row, as after a fall of the limit, and each other one against it. What the provider
    says about the cause decides only until such evidence outweighs it.
    """

    __slots__ = (
        "_disproved", "_earlier_peak", "_judged_at", "_open", "_peak", "_refusals", "_row", "_row_start", "_score",
        "_window_start",
    )  # fmt: skip

    def __init__(self) -> None:
        self._peak = self._earlier_peak = 0  # most calls in flight with an accepted one
        self._window_start = -math.inf
        self._score = 0.0
        self._row, self._row_start = 0, -math.inf  # refusals in a row that counted, and the arrival of the first
        self._disproved = 0.0  # the score that was set when a learned rate was disproved latest; 0 for never
        self._judged_at = -math.inf  # when the latest refusal arrived that was counted against a rate
        self._refusals: deque[_Refusal] = deque(maxlen=_MAX_REFUSALS)
        self._open: deque[_Refusal] = deque(maxlen=_MAX_REFUSALS)  # those that nothing contradicts yet

    @property
    def peak(self) -> int:
        """The most calls in flight with which a call was accepted recently."""
        return max(self._peak, self._earlier_peak)

    def is_rate(self, *, measured: bool, named: bool = False, says_concurrency: bool = False) -> bool:
        """Return whether a rate is the likely cause of refusals now.

        Args:
            measured: a rate has been measured.
            named: they name a rate, or a time after which to come back.
            says_concurrency: they name the calls in flight.
        """
        said = _NAMED * named - _SAYS_CONCURRENCY * says_concurrency
        return self._score + said >= (_ENOUGH_MEASURED if measured else _ENOUGH)

    def record_accepted(self, now: float, sent_at: float, in_flight: int, *, decays: bool) -> None:
        """Note that a call was accepted.

        Args:
            now: the time.
            sent_at: when it was sent.
            in_flight: calls in flight at that time, itself included.
            decays: stray refusals are forgotten with it.
        """
        self._move_window(now)
        if sent_at >= self._row_start:
            self._row = 0
        if decays and self._score > 0.0:
            self._score = max(0.0, self._score - _DECAY)
        if in_flight > self._peak or self._open:
            # Calls that were refused in the meantime never were in flight at the provider.
            in_flight -= sum(refusal.sent_at < sent_at < refusal.at for refusal in self._refusals)
            self._peak = max(self._peak, in_flight)
            self._contradict(sent_at, in_flight)

    def record_refused(
        self, now: float, sent_at: float, in_flight: int, *, rising: bool = False, penalty: bool = False
    ) -> None:
        """Note that a call was refused.

        Args:
            now: the time.
            sent_at: when it was sent.
            in_flight: calls in flight at that time, itself included.
            rising: a learned rate is being raised, and so are the calls in flight: more of them say nothing.
            penalty: the row of refusals began with more calls in flight than were accepted: fewer say nothing then.
        """
        self._move_window(now)
        refusal = _Refusal(now, sent_at, in_flight)
        self._refusals.append(refusal)
        if in_flight <= self.peak:
            if not penalty and (self._row < _ROW or in_flight < _DRAINED * self.peak):
                self._row_start = self._row_start if self._row else now
                self._row += 1
                self._count(1.0)
        elif self.peak and not rising and sent_at >= self._judged_at:  # those sent at once are one piece of evidence
            self._judged_at = now
            self._open.append(refusal)
            self._count(-1.0)

    def disprove_rate(self) -> None:
        """Note that refusals went on at any rate: much more evidence is needed to take a rate for their cause again."""
        self._disproved = max(_MIN_DISPROVED, 2 * self._disproved) if self._disproved else _DISPROVED
        self._score = self._disproved

    def _contradict(self, sent_at: float, in_flight: int) -> None:
        """Count the refusals that a call accepted with `in_flight` calls in flight contradicts, as one."""
        while self._open and self._open[0].at < sent_at - _RECENT:
            self._open.popleft()
        contradicted = [refusal for refusal in self._open if refusal.at < sent_at and refusal.in_flight <= in_flight]
        if contradicted:
            self._count(2.0)  # they were counted against a rate
        for refusal in contradicted:
            self._open.remove(refusal)

    def _count(self, evidence: float) -> None:
        self._score = max(min(_MIN_SCORE, self._score), min(_MAX_SCORE, self._score + evidence))

    def _move_window(self, now: float) -> None:
        if now >= self._window_start + _RECENT:
            recent = now < self._window_start + 2 * _RECENT
            self._earlier_peak = self._peak if recent else 0
            self._peak, self._window_start = 0, now
