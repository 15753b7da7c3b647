"""Exponential backoff while a provider refuses even a single call."""

from __future__ import annotations

from typing import Final

_FIRST_SILENCE: Final = 1.0  # seconds without a call after the first refusal of a lone call
_MAX_SILENCE: Final = 5.0  # seconds; each further refusal doubles the silence up to this


class OutageBackoff:
    """The silences between trial calls during an outage.

    Attributes:
        silent_until: no call may be sent before this time, in the clock's seconds.
    """

    def __init__(self) -> None:
        self.silent_until = 0.0
        self._silence = 0.0

    def record_refusal(self, now: float) -> None:
        """Begin the next silence: a lone call was refused."""
        self._silence = min(_MAX_SILENCE, 2 * self._silence) if self._silence else _FIRST_SILENCE
        self.silent_until = now + self._silence

    def reset(self) -> None:
        """End the outage: a call was accepted."""
        self.silent_until = self._silence = 0.0
