"""Estimates of the tokens that an account's calls use, learned from those that have ended."""

from __future__ import annotations

import math
from typing import Final

from forebay.interfaces import Charge

_GAIN: Final = 0.05  # weight of the newest call
_FADING: Final = 0.99
_HALF_LIFE: Final = 600.0  # seconds in which the largest output falls to half, if there is no larger one
_MIN_CALLS: Final = 5  # before the mean of their output tokens is used
_MIN_RATIO: Final = 0.7  # texts of spaces or of one letter have fewer tokens; those of others need not have
_MAX_RATIO: Final = 10.0


class TokenEstimates:
    """The output tokens of a typical call, and a correction of estimated input tokens.

    Attributes:
        input_ratio: charged input tokens over estimated ones, as a moving mean.
    """

    __slots__ = ("_calls", "_largest", "_largest_at", "_mean", "_ratios", "input_ratio")

    def __init__(self) -> None:
        self.input_ratio = 1.0
        self._largest = 0.0
        self._largest_at = 0.0
        self._ratios = 0
        self._mean = 0.0
        self._calls = 0

    @property
    def output_tokens(self) -> int | None:
        """Output tokens of a typical call; None while too few calls are known."""
        return round(self._mean) if self._calls >= _MIN_CALLS else None

    def largest_output(self, now: float) -> float:
        """Return the output tokens of the largest call lately.

        It falls by a hundredth with each smaller call, and by half in ten minutes: what it demands may let no call in.
        """
        return self._largest * math.exp2(-max(0.0, now - self._largest_at) / _HALF_LIFE)

    def observe(self, now: float, estimated: int, used: Charge) -> None:
        """Learn from a call that was estimated to send `estimated` input tokens, and used `used`."""
        if estimated > 0 and used.input_tokens > 0:
            self._ratios += 1
            newest = min(_MAX_RATIO, max(_MIN_RATIO, used.input_tokens / estimated))
            mean = self.input_ratio + (newest - self.input_ratio) * max(_GAIN, 1.0 / self._ratios)
            self.input_ratio = max(_MIN_RATIO, mean)  # not a rounding error below
        self._calls += 1
        self._largest = max(_FADING * self.largest_output(now), used.output_tokens)
        self._largest_at = now
        self._mean += (used.output_tokens - self._mean) * max(_GAIN, 1.0 / self._calls)
