"""Draws that are spread evenly, by which calls are shared as exactly as their shares say."""

from __future__ import annotations

from typing import Final

from forebay import clock

_STEP: Final = 0.6180339887498949  # the golden ratio's fraction: its multiples are spread most evenly, however many


class EvenDraws:
    """A sequence of numbers in [0, 1) of which any run is spread evenly; its beginning is random.

    Of n draws a share p is below p but for a few, where of independent ones it is off by the square root of n: calls
    that are shared by them wander less from the shares, so that no account is full, and loses what refills, while
    another one is behind. It is a Kronecker sequence. Two threads may get the same number.

    Source: L. Kuipers and H. Niederreiter, "Uniform Distribution of Sequences", 1974.
    """

    __slots__ = ("_latest",)

    def __init__(self) -> None:
        self._latest: float | None = None

    def __call__(self) -> float:
        """Return the next number."""
        self._latest = clock.draw() if self._latest is None else (self._latest + _STEP) % 1.0
        return self._latest
