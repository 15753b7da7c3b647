"""What calls of an account use, as it has been so far: the next one reserves by it."""

from __future__ import annotations

from forebay.interfaces import Charge
from forebay.upstream.providers import InputTokenRatio

_GAIN = 0.05  # weight of the newest call
_LEAST = 5  # calls before their mean is believed


class TokenEstimates:
    """Learned from what was settled.

    Attributes:
        ratio: input tokens that are counted for each that was estimated.
    """

    __slots__ = ("_mean", "_seen", "input_ratio")

    def __init__(self) -> None:
        self.input_ratio = InputTokenRatio()
        self._mean = 0.0
        self._seen = 0

    @property
    def output_tokens(self) -> int | None:
        """What a call typically makes, or None while too few were seen."""
        return round(self._mean) if self._seen >= _LEAST else None

    def observe(self, foreseen: int, used: Charge) -> None:
        """A call was estimated to send so many input tokens, and used this."""
        self.input_ratio.observe(foreseen, used.input_tokens)
        self._seen += 1
        self._mean += (used.output_tokens - self._mean) * max(_GAIN, 1.0 / self._seen)
