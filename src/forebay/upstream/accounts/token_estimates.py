"""Estimates of the tokens that an account's calls use, learned from those that have ended."""

from __future__ import annotations

from typing import Final

from forebay.interfaces import Charge
from forebay.upstream.providers import InputTokenRatio

_GAIN: Final = 0.05  # weight of the newest call
_MIN_CALLS: Final = 5  # before their mean is used


class TokenEstimates:
    """The output tokens of a typical call, and a correction of estimated input tokens.

    Attributes:
        input_ratio: counted input tokens over estimated ones.
    """

    __slots__ = ("_calls", "_mean", "input_ratio")

    def __init__(self) -> None:
        self.input_ratio = InputTokenRatio()
        self._mean = 0.0
        self._calls = 0

    @property
    def output_tokens(self) -> int | None:
        """Output tokens of a typical call; None while too few calls are known."""
        return round(self._mean) if self._calls >= _MIN_CALLS else None

    def observe(self, estimated: int, used: Charge) -> None:
        """Learn from a call that was estimated to send `estimated` input tokens, and used `used`."""
        self.input_ratio.observe(estimated, used.input_tokens)
        self._calls += 1
        self._mean += (used.output_tokens - self._mean) * max(_GAIN, 1.0 / self._calls)
