"""A provider that refuses everything for want of capacity, for longer than anybody should wait for it."""

from __future__ import annotations

import math
from typing import Final

from forebay.limit import Limit

_SPREAD: Final = 10.0  # seconds over which those come again who were sent away
_FORGET: Final = 60.0  # seconds without a refusal, for nobody asked: how it was meanwhile is not known


class OutageDetector:
    """Knows since when nobody was let in. The limit knocks meanwhile: a refusal is no fault, so no breaker opens.

    Args:
        limit: of the account; 0 between two knocks.
        patience: seconds after which nobody need wait any longer.
    """

    __slots__ = ("_latest", "_limit", "_patience", "_since")

    def __init__(self, limit: Limit, patience: float) -> None:
        self._limit = limit
        self._patience = patience
        self._since = math.inf
        self._latest = -math.inf  # when the latest call was refused

    def record_throttled(self, now: float) -> None:
        """A call was, for want of capacity."""
        self._since = now if now - self._latest > _FORGET else min(self._since, now)
        self._latest = now

    def record_accepted(self) -> None:
        """A call was let in: its answer has begun."""
        self._since = math.inf

    def duration(self, now: float) -> float | None:
        """For how many seconds it has, if that is too long, and the next to knock is not due; else None."""
        seconds = now - self._since
        return seconds if seconds >= self._patience and self._limit.limit(now) == 0 else None

    def retry_after(self, now: float, draw: float) -> float:
        """Seconds after which one who was sent away may come again; `chance` is a draw from [0, 1)."""
        return (self._limit.reopens_at(now) or now) - now + draw * _SPREAD
