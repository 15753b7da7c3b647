"""The limits that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final

from bench.baselines.semaphore import SEMAPHORE, semaphore
from forebay.limit import AdaptiveLimit, AimdLimit, GradientLimit, Limit, TimeoutAimdLimit, VegasLimit

OURS: Final = "adaptive"
UPSTREAM: Final = "upstream"  # a whole Upstream with its adaptive limit, queue, retries and deadlines
LIMITS: Final[Mapping[str, Callable[[int], Limit]]] = {
    OURS: lambda _: AdaptiveLimit(),
    "epoch AIMD": lambda _: AimdLimit(),
    "gradient2": lambda _: GradientLimit(),
    "vegas": lambda _: VegasLimit(),
    "AIMD by timeout": lambda _: TimeoutAimdLimit(timeout=10.0),
    SEMAPHORE: semaphore,
}
"""Makes each limit, by name, for a provider's slots."""
