"""The limits that are compared, and the oracle that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Final

from forebay.interfaces import Outcome
from forebay.limit import (
    AdaptiveLimit,
    AimdLimit,
    FixedLimit,
    GradientLimit,
    Grant,
    Limit,
    TimeoutAimdLimit,
    VegasLimit,
)


class Oracle(Limit):
    """Knows at every moment how many calls the provider bears."""

    def __init__(self, capacity: Callable[[float], int]) -> None:
        super().__init__()
        self._capacity = capacity

    def limit(self, now: float) -> int:
        """What it knows."""
        return self._capacity(now)

    def reopens_at(self, now: float) -> float | None:
        """Asked again at the next tenth of a second."""
        return (math.floor(10 * now + 1e-6) + 1) / 10

    def grant(self, now: float, in_flight: int) -> Grant:
        """A mark that says nothing."""
        return Grant(now, in_flight)

    def accepted(self, now: float, grant: Grant) -> None:
        """Known before."""

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:
        """Known before."""


OURS: Final = "adaptive"
UPSTREAM: Final = "upstream"  # the whole of one, its adaptive limit included
SEMAPHORE: Final = "semaphore"
LIMITS: Final[Mapping[str, Callable[[int], Limit]]] = {
    OURS: lambda _: AdaptiveLimit(),
    "epoch AIMD": lambda _: AimdLimit(),
    "gradient2": lambda _: GradientLimit(),
    "vegas": lambda _: VegasLimit(),
    "AIMD by timeout": lambda _: TimeoutAimdLimit(timeout=10.0),
    SEMAPHORE: lambda slots: FixedLimit(2 * slots),  # somebody's guess, with the retries of an SDK inside
}
