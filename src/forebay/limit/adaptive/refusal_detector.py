"""Telling an overload from stray refusals: a few that our load did not cause must not lower the limit."""

from __future__ import annotations

import math
from typing import Final

_OVERLOAD_SHARE: Final = 0.1  # least share of calls that a provider at its capacity refuses
_OVERLOAD_CONTRAST: Final = 4.0  # ... and at least so many times the background
_MIN_BACKGROUND: Final = 0.003  # share of calls refused below the capacity: no provider is taken to refuse fewer
_MAX_BACKGROUND: Final = 0.2  # ... and no healthy provider refuses more
_FIRST_BACKGROUND: Final = 0.03  # ... before anything is known
_BACKGROUND_WEIGHT: Final = 0.005  # of one call in the background: a memory of two hundred calls
_EVIDENCE: Final = 8.0  # log-likelihood ratio, in nats, from which refusals are an overload: odds of e**8 to 1
_EVIDENCE_EXPECTED: Final = 3.0  # the same where a refusal was expected: above a limit that was refused before ...
_QUIET_BACKGROUND: Final = 0.004  # ... with a background of at most this


class RefusalDetector:
    """A test of two hypotheses about the latest answers: the usual background of refusals, or a full provider.

    The evidence is the log-likelihood ratio of the second over the first, counted from the moment since which it is
    largest (Page's cumulative sum). With a background of 0.3 %, three refusals among two dozen answers are an overload;
    with 3 % it takes six or seven in a row, or twice as many among a hundred.

    Source: E. S. Page, "Continuous Inspection Schemes", Biometrika 41, 1954.

    Attributes:
        background: share of calls that are refused though the provider is below its capacity.
    """

    def __init__(self) -> None:
        self.background = _FIRST_BACKGROUND
        self._evidence = 0.0
        self._answers = self._refusals = 0  # since the evidence was last reset
        self._weighed_background = -1.0
        self._weigh_answers()

    def record_accepted(self) -> None:
        """Count an accepted call."""
        self._answers += 1
        self._evidence += self._acceptance_weight
        if self._evidence <= 0:
            self._learn_background()

    def record_refusal(self) -> None:
        """Count a refused call."""
        self._answers += 1
        self._refusals += 1
        self._evidence += self._refusal_weight

    def is_overload(self, *, expected: bool) -> bool:
        """Return whether the refusals are an overload; `expected` lowers the bar where refusals are rare otherwise."""
        return self._evidence >= (_EVIDENCE_EXPECTED if expected and self.background < _QUIET_BACKGROUND else _EVIDENCE)

    def reset(self) -> None:
        """Drop the evidence, because the limit has changed; the background stays."""
        self._evidence = 0.0
        self._answers = self._refusals = 0

    def _learn_background(self) -> None:
        """Add the answers to the background: there is no evidence left for an overload."""
        weight = 1 - (1 - _BACKGROUND_WEIGHT) ** self._answers
        self.background += weight * (self._refusals / self._answers - self.background)
        self.reset()
        self._weigh_answers()

    def _weigh_answers(self) -> None:
        """Compute the log-likelihood ratio of one answer of each kind.

        The background is mostly at its lower bound and so unchanged: that saves two logarithms a call.
        """
        usual = min(_MAX_BACKGROUND, max(_MIN_BACKGROUND, self.background))
        if usual == self._weighed_background:
            return
        self._weighed_background = usual
        full = max(_OVERLOAD_SHARE, _OVERLOAD_CONTRAST * usual)
        self._acceptance_weight = math.log((1 - full) / (1 - usual))
        self._refusal_weight = math.log(full / usual)
