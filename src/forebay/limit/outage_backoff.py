"""When even a single call is refused: knock now and then, do not hammer."""

from __future__ import annotations

from typing import Final

_FIRST: Final = 1.0  # seconds without a call after the first refusal of a lone call
_LONGEST: Final = 5.0  # seconds; each further refusal doubles the silence up to this


class OutageBackoff:
    """Silences between lone calls, until one is let in.

    Attributes:
        until: no call before then, in the clock's seconds.
    """

    def __init__(self) -> None:
        self.silent_until = 0.0
        self._silence = 0.0

    def record_refusal(self, now: float) -> None:
        """A lone call was refused."""
        self._silence = min(_LONGEST, 2 * self._silence) if self._silence else _FIRST
        self.silent_until = now + self._silence

    def reset(self) -> None:
        """A call was let in."""
        self.silent_until = self._silence = 0.0
