"""Whether refusals are ours: a stray one says nothing about the limit, and a few of them must not lower it."""

from __future__ import annotations

import math
from typing import Final

_CONGESTED: Final = 0.1  # share of calls that is refused, at the least, by one who is full
_CONTRAST: Final = 4.0  # ... and at the least so many times the background
_LEAST_BACKGROUND: Final = 0.003  # share of calls refused by one who is not full: nobody refuses fewer
_MOST_BACKGROUND: Final = 0.2  # ... and nobody who is well refuses more
_FIRST_BACKGROUND: Final = 0.03  # ... before anything is known
_FORGETS: Final = 0.005  # weight of one call in what is known of the background: a memory of two hundred calls
_CONVINCED: Final = 8.0  # evidence that refusals are ours, in nats: 1 : e**8
_SUSPECTED: Final = 3.0  # the same where a refusal was to be expected: above a level that was refused before, and
_QUIET: Final = 0.004  # ... with no more than this for a background


class RefusalDetector:
    """Weighs two stories of the latest answers: a background of refusals as always, or a provider that is full.

    The evidence is the logarithm of how much likelier the second story makes the answers, counted from the moment
    since when it is largest: Page's cumulative sum. At a background of 0.3 % three refusals among two dozen answers
    convince, at 3 % it takes six or seven in a row, or twice as many among a hundred.

    Source: E. S. Page, "Continuous Inspection Schemes", Biometrika 41, 1954.

    Attributes:
        background: share of calls that is refused though the provider is not full.
    """

    def __init__(self) -> None:
        self.background = _FIRST_BACKGROUND
        self._evidence = 0.0
        self._answers = self._refusals = 0  # of which it is not known yet what they say
        self._usual = -1.0
        self._weigh()

    def record_accepted(self) -> None:
        """A call was let in."""
        self._answers += 1
        self._evidence += self._acceptance
        if self._evidence <= 0:
            self._learn()

    def record_refusal(self) -> None:
        """A call was refused."""
        self._answers += 1
        self._refusals += 1
        self._evidence += self._refusal

    def is_overload(self, *, expected: bool) -> bool:
        """Whether the refusals are ours; `suspect` where one was to be expected."""
        return self._evidence >= (_SUSPECTED if expected and self.background < _QUIET else _CONVINCED)

    def reset(self) -> None:
        """Another level, other evidence; the background stays."""
        self._evidence = 0.0
        self._answers = self._refusals = 0

    def _learn(self) -> None:
        """The evidence has come to nothing, so what was seen was background."""
        weight = 1 - (1 - _FORGETS) ** self._answers
        self.background += weight * (self._refusals / self._answers - self.background)
        self.reset()
        self._weigh()

    def _weigh(self) -> None:
        """What one answer says, of each kind, by the shares that are refused in the one story and in the other.

        Mostly the background is so low that it stays what it was: two logarithms saved for each call.
        """
        usual = min(_MOST_BACKGROUND, max(_LEAST_BACKGROUND, self.background))
        if usual == self._usual:
            return
        self._usual = usual
        full = max(_CONGESTED, _CONTRAST * usual)
        self._acceptance = math.log((1 - full) / (1 - usual))
        self._refusal = math.log(full / usual)
