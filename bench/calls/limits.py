"""The limits that are compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Final

from bench.baselines.semaphore import SEMAPHORE, semaphore
from forebay.limit import AdaptiveLimit, AimdLimit, GradientLimit, Limit, TimeoutAimdLimit, VegasLimit

OURS: Final = "adaptive"
UPSTREAM: Final = "upstream"  # a whole Upstream with its adaptive limit, queue, retries and deadlines
LIMITS: Final[Mapping[str, Callable[[int], Limit]]] = {
    OURS: lambda _: AdaptiveLimit(),
    "AIMD": lambda _: AimdLimit(),
    "gradient": lambda _: GradientLimit(),
    "Vegas": lambda _: VegasLimit(),
    "timeout AIMD": lambda _: TimeoutAimdLimit(timeout=10.0),
    SEMAPHORE: semaphore,
}
"""Makes each limit, by name, for a provider's slots. The tables of docs/limits.md have the same names."""


def select(names: Sequence[str], only: str | None) -> tuple[str, ...]:
    """Return all names, or `only` that one; exit with a message for a name that is not among them."""
    if only is None:
        return tuple(names)
    if only not in names:
        raise SystemExit(f"There is no {only!r} in this benchmark: choose one of {', '.join(names)}.")
    return (only,)
