"""The ratio step: how many replicas bring a reading to its target."""

from __future__ import annotations

import math
from typing import Final

from forebay._validate import check_positive, is_number, reject

_OWNER: Final = "desired_replicas"
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
    replica there is no reading of one: the answer is `minimum`. A reading that is infinite asks for `maximum`.

    Source: Kubernetes, "Horizontal Pod Autoscaling", algorithm details.

    Args:
        current: replicas that there are now, or that have been asked for.
        reading: what was measured, as the mean of a replica.
        target: what it should be, above 0.
        tolerance: share of the target that is no reason to change anything.
        minimum: the least.
        maximum: the most; None for no bound.

    Raises:
        InvalidSetting: `target` is not above 0, `maximum` is below `minimum`, or the reading is not a number, or so
            large that only a `maximum` would answer it.
    """
    check_positive(_OWNER, "target", target, unit="whatever is measured")
    if maximum is not None and maximum < minimum:
        reject(_OWNER, "maximum", maximum, f"at least the minimum, {minimum}, or None for no bound")
    if not is_number(reading):
        reject(_OWNER, "reading", reading, "a number")
    if not current:
        return minimum
    ratio = reading / target
    if abs(ratio - 1.0) <= tolerance + _NOISE:
        return clamp(current, minimum, maximum)
    wanted = current * ratio if maximum is None else min(current * ratio, float(maximum))
    if wanted == math.inf:
        reject(_OWNER, "reading", reading, "finite, unless there is a maximum")
    return clamp(whole_replicas(wanted), minimum, maximum)


def whole_replicas(replicas: float) -> int:
    """Return a number of replicas rounded up; an excess that only the arithmetic made is none."""
    return math.ceil(replicas - _NOISE * max(1.0, replicas))


def clamp(replicas: int, minimum: int, maximum: int | None) -> int:
    """Return the number from `minimum` to `maximum` that is nearest to `replicas`."""
    return max(minimum, replicas if maximum is None else min(replicas, maximum))
