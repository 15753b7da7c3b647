"""When even a single call is refused: knock now and then, do not hammer."""

from __future__ import annotations

from typing import Final

_FIRST: Final = 1.0  # seconds without a call after the first refusal of a lone call
_LONGEST: Final = 5.0  # seconds; each further refusal doubles the silence up to this


class Knock:
    """Silences between lone calls, until one is let in.

    Attributes:
        until: no call before then, in the clock's seconds.
    """

    def __init__(self) -> None:
        self.until = 0.0
        self._silence = 0.0

    def refused(self, now: float) -> None:
        """A lone call was refused."""
        self._silence = min(_LONGEST, 2 * self._silence) if self._silence else _FIRST
        self.until = now + self._silence

    def answered(self) -> None:
        """A call was let in."""
        self.until = self._silence = 0.0
