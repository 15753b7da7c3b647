"""Faults one after the other, and whether the calls of others contradict them. Pure."""

from __future__ import annotations

import math
from typing import Final

_FRESH: Final = 5.0  # seconds for which a success says that a dependency works
_LATE: Final = 0.5  # seconds after which others know of a success, at most


class FaultRow:
    """The faults, one after the other, with which the calls of one side end: of this process, or of all others."""

    __slots__ = ("_began", "_fault_at", "_success_at")

    def __init__(self) -> None:
        self._began = math.inf  # when the first fault of the row came; infinity: there is none
        self._fault_at = self._success_at = -math.inf

    def record_fault(self, now: float) -> None:
        """Note a fault: it begins a row if there is none."""
        self._began = min(self._began, now)
        self._fault_at = now

    def record_success(self, now: float) -> None:
        """Note a success. It ends a row whose latest fault is some time ago: it may be another process's."""
        self._success_at = now
        if now > self._fault_at + _FRESH:
            self._began = math.inf

    def end(self, now: float) -> None:
        """Note a success of the same process as the faults: it ends the row."""
        self._success_at, self._began = now, math.inf

    @property
    def is_empty(self) -> bool:
        """True if the latest call did not fail."""
        return self._began == math.inf

    def is_contradicted_by(self, other: FaultRow) -> bool:
        """Return whether the other side has succeeded since this row began, without a fault, and up to its last fault.

        Then the dependency works, and what fails is something between it and this side.
        """
        since = max(self._began + _LATE, self._fault_at - _FRESH)
        return other.is_empty and other._success_at > since
