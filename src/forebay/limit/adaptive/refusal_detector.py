"""Telling an overload from stray refusals: those that our load did not cause must not lower the limit."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass
from typing import Final

from forebay.limit.base import AnswerCounts, Grant

_OVERLOAD_SHARE: Final = 0.1  # least share of calls that a provider at its capacity refuses
_OVERLOAD_CONTRAST: Final = 4.0  # ... and at least so many times the background ...
_OVERLOAD_EXCESS: Final = 0.15  # ... though at most so much above it
_MIN_BACKGROUND: Final = 0.003  # share of calls refused below the capacity: no provider is taken to refuse fewer
_MAX_BACKGROUND: Final = 0.25  # ... and more are not tolerated
_SATURATED: Final = 0.3  # ... share from which the limit does not rise: a higher one would cost more than it gains
_MARGIN: Final = 0.1  # ... or so much above what fewer calls in flight are known not to avoid
_AS_OFTEN: Final = 0.8  # times as often as with twice as many calls in flight: our load is not the cause
_ENOUGH: Final = 100  # refusals after which the background is that of the present calls in flight
_FIRST_BACKGROUND: Final = 0.03  # ... before anything is known
_BACKGROUND_WEIGHT: Final = 0.005  # of one call in the background: a memory of two hundred calls
_EVIDENCE: Final = 8.0  # log-likelihood ratio, in nats, from which refusals are an overload: odds of e**8 to 1
_EVIDENCE_EXPECTED: Final = 1.0  # the same where a refusal was expected ...
_RARELY: Final = 0.2  # ... with less than so many of the background among the calls of a round
_CONTRADICTED_WITHIN: Final = 1.0  # seconds: later the capacity may have changed
_PEAK_LASTS: Final = 3.0  # seconds
_MAX_RECENT: Final = 64  # refusals that are remembered so long


@dataclass(slots=True)
class _Refusal:
    """A refused call: when it was sent and refused, and with how many calls in flight."""

    sent: float
    refused: float
    in_flight: int
    contradicted: bool  # or cannot be: so many in flight have not been accepted before


class RefusalDetector:
    """A test of two hypotheses about the latest answers: the usual background of refusals, or a full provider.

    The evidence is the log-likelihood ratio of the second over the first, counted from the moment since which it is
    largest (Page's cumulative sum). With a background of 0.3 %, three refusals among two dozen answers are an overload;
    with 3 % it takes six or seven in a row, or twice as many among a hundred.

    A refusal belongs to the background if it is contradicted: a call with as many calls in flight was accepted that was
    sent after the refused one, and at most a second after its refusal. Stray refusals are contradicted, and those of
    many small servers behind a load balancer, but not those of a provider that is full. More than a quarter are not
    taken for background, unless as many are refused with half the calls in flight.

    Source: E. S. Page, "Continuous Inspection Schemes", Biometrika 41, 1954.

    Attributes:
        background: share of calls that are refused though as many in flight are accepted.
    """

    def __init__(self) -> None:
        self.background = _FIRST_BACKGROUND
        self._accepted = self._refused = self._contradicted = 0  # of `answers`
        self._evidence = 0.0
        self._refusals = 0  # since there was no evidence
        self._latest_overload = 0  # refusals that were taken for it
        self._recent: deque[_Refusal] = deque(maxlen=_MAX_RECENT)
        self._peak = 0  # the most calls that were in flight with one that was accepted of late
        self._peak_sent = -math.inf  # when that one was sent
        self._causeless = 0.0  # share of calls that are refused with half as many in flight, too
        self._high, self._share = 0, 0.0  # the most calls in flight with a saturated background, and the background
        self._below = 0  # refusals since with less than half as many in flight
        self._weighed_background = -1.0
        self._weigh_answers()

    @property
    def answers(self) -> AnswerCounts:
        """The answers that it has counted, but for those of other processes."""
        return AnswerCounts(self._accepted, self._refused, self._contradicted)

    def record_accepted(self, grant: Grant, *, current: bool) -> None:
        """Count an accepted call; `current`: it was sent under the present limit."""
        served = self._contradict(grant) if self._recent else grant.in_flight
        if served >= self._peak or grant.granted_at - self._peak_sent > _PEAK_LASTS:
            self._peak, self._peak_sent = served, grant.granted_at
        self.background -= _BACKGROUND_WEIGHT * self.background
        if self.background > _MIN_BACKGROUND or self._weighed_background != _MIN_BACKGROUND:
            self._weigh_answers()
        if current:
            self._accepted += 1
            self._evidence += self._acceptance_weight
            if self._evidence <= 0.0:
                self._evidence, self._refusals = 0.0, 0

    def record_refusal(self, now: float, grant: Grant) -> None:
        """Count a refused call that was sent under the present limit."""
        self._discount(grant)
        new = grant.in_flight > self._peak or grant.granted_at - self._peak_sent > _PEAK_LASTS
        late = now - grant.granted_at > _CONTRADICTED_WITHIN
        self._recent.append(_Refusal(grant.granted_at, now, grant.in_flight, new or late))
        self._refused += 1
        self._evidence += self._refusal_weight
        self._refusals += 1
        self._compare(grant.in_flight)

    def add_answers(self, answers: AnswerCounts) -> None:
        """Count the answers of other processes, whose order is not known."""
        calls = answers.accepted + answers.contradicted
        if calls:
            learned = 1.0 - (1.0 - _BACKGROUND_WEIGHT) ** calls
            self.background += learned * (answers.contradicted / calls - self.background)
            self._weigh_answers()
        self._evidence += answers.accepted * self._acceptance_weight + answers.refused * self._refusal_weight
        self._refusals += answers.refused
        if self._evidence <= 0.0:
            self._evidence, self._refusals = 0.0, 0

    def _discount(self, grant: Grant) -> None:
        """Take a refused call out of those in flight with an accepted one: the provider did not have it."""
        if grant.granted_at < self._peak_sent:
            self._peak -= 1

    def _compare(self, in_flight: int) -> None:
        """Compare a background that is too high with that of half as many calls in flight.

        If they are refused nearly as often, it is not too high: a lower limit avoids no refusals.
        """
        if 2 * in_flight > self._high:
            self._below = 0
            if self.background >= _SATURATED and in_flight > self._high:
                self._high, self._share = in_flight, self.background
            return
        self._below += 1
        if self._below == _ENOUGH:
            self._causeless = self.background if self.background >= _AS_OFTEN * self._share else 0.0
            self._high = self._below = 0

    def _contradict(self, grant: Grant) -> int:
        """Add the refusals to the background that an accepted call contradicts; return how many were in flight with it.

        The calls that were refused later do not count: the provider did not have them.
        """
        sent, recent = grant.granted_at, self._recent
        while recent and sent - recent[0].refused > _CONTRADICTED_WITHIN:
            recent.popleft()
        served = grant.in_flight - sum(refusal.sent <= sent < refusal.refused for refusal in recent)
        for refusal in recent:
            if refusal.sent < sent and refusal.in_flight <= served and not refusal.contradicted:
                refusal.contradicted = True
                self._contradicted += 1
                self.background += _BACKGROUND_WEIGHT * (1.0 - self.background)
        return served

    def is_overload(self, *, expected_among: float = math.inf) -> bool:
        """Return whether the refusals are an overload.

        Args:
            expected_among: where a refusal was expected, above a limit that was refused before: among how many calls.
                If the background hardly ever refuses one of so many, a single refusal is enough.
        """
        expected = self.background * expected_among < _RARELY
        return self._evidence >= (_EVIDENCE_EXPECTED if expected else _EVIDENCE)

    @property
    def saturated(self) -> bool:
        """True if the background is the highest that is tolerated: a higher limit would cost more."""
        return self.background >= max(_SATURATED, self._causeless + _MARGIN)

    def reset(self) -> None:
        """Drop the evidence, because the limit has changed; the background stays."""
        self._evidence = 0.0
        self._latest_overload, self._refusals = int(self._refusals == 1), 0

    def contradict_overload(self) -> None:
        """Add the refusals of the latest overload to the background: more calls in flight are accepted after all."""
        for _ in range(self._latest_overload):
            self.background += _BACKGROUND_WEIGHT * (1.0 - self.background)
        self._latest_overload = 0

    def _weigh_answers(self) -> None:
        """Compute the log-likelihood ratio of one answer of each kind.

        The background is mostly at its lower bound and so unchanged: that saves two logarithms a call.
        """
        usual = min(max(_MAX_BACKGROUND, self._causeless + _MARGIN / 2), max(_MIN_BACKGROUND, self.background))
        if usual == self._weighed_background:
            return
        self._weighed_background = usual
        full = max(_OVERLOAD_SHARE, min(_OVERLOAD_CONTRAST * usual, _OVERLOAD_EXCESS + usual))
        self._acceptance_weight = math.log((1 - full) / (1 - usual))
        self._refusal_weight = math.log(full / usual)
