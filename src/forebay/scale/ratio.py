"""The ratio step: how many replicas bring a reading to its target."""

from __future__ import annotations

import math
from typing import Final

_NOISE: Final = 1e-9  # of a number of replicas: 4.2 / 0.7 is 6.000000000000001, and needs no seventh


def desired_replicas(  # noqa: PLR0913 - each has a name
    *,
    current: int,
    reading: float,
    target: float,
    tolerance: float = 0.1,
    minimum: int = 0,
    maximum: int | None = None,
) -> int:
    """Return how many replicas there should be, from `minimum` to `maximum`.

    ``ceil(current * reading / target)``, or `current` while the reading is within `tolerance` of the target. Without a
    replica there is no reading of one: the answer is `minimum`.

    Source: Kubernetes, "Horizontal Pod Autoscaling", algorithm details.

    Args:
        current: replicas that there are now, or that have been asked for.
        reading: what was measured, as the mean of a replica.
        target: what it should be, above 0.
        tolerance: share of the target that is no reason to change anything.
        minimum: the least.
        maximum: the most; None for no bound.
    """
    ratio = reading / target
    wanted = current if abs(ratio - 1.0) <= tolerance + _NOISE else whole_replicas(current * ratio)
    return clamp(wanted, minimum, maximum)


def whole_replicas(replicas: float) -> int:
    """Return a number of replicas rounded up; an excess that only the arithmetic made is none."""
    return math.ceil(replicas - _NOISE * max(1.0, replicas))


def clamp(replicas: int, minimum: int, maximum: int | None) -> int:
    """Return the number from `minimum` to `maximum` that is nearest to `replicas`."""
    return max(minimum, replicas if maximum is None else min(replicas, maximum))
