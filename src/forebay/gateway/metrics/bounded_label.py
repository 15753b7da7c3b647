"""A label whose values callers choose, with a bound on how many of them have time series of their own."""

from __future__ import annotations

from typing import Final

OTHER: Final = "other"
_MAX_LENGTH: Final = 200  # characters


class BoundedLabel:
    """The values of one label (a model, a tenant, a key). All that are not admitted count together, as ``other``.

    Callers choose them, so a value is admitted only once a provider has served a call with it: calls with junk names
    fail, and take no place of a real one. An empty value, for one that is not known, is always itself.

    Args:
        max_values: how many values are admitted; 0 for none.
    """

    __slots__ = ("_admitted", "_max_values")

    def __init__(self, max_values: int) -> None:
        self._max_values = max_values
        self._admitted = {""}

    def admit(self, value: str) -> None:
        """Admit a value if there is room: at most 200 characters, all printable."""
        if value in self._admitted or value == OTHER or not self.has_room():
            return
        if len(value) <= _MAX_LENGTH and value.isprintable():
            self._admitted.add(value)

    def has_room(self) -> bool:
        """Return whether another value may be admitted."""
        return len(self._admitted) <= self._max_values

    def label(self, value: str) -> str:
        """Return the value if it is admitted, else ``other``."""
        return value if value in self._admitted else OTHER
