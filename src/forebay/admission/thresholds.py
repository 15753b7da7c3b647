"""Priority thresholds: the load from which each priority is rejected."""

from __future__ import annotations

from forebay._validate import is_number
from forebay.errors import InvalidThreshold
from forebay.task import Priority


def _exact(load: float) -> float:
    """Round off the last bits: 0.75 * 0.8 is a little more than 0.6, the load of a queue with 60 of 100 taken."""
    return round(load, 12)


class PriorityThresholds:
    """The load thresholds by priority, which keep the last of the capacity for the most important work.

    For a threshold ``t``: LOW ``0.75 t``, NORMAL ``t``, HIGH ``(1 + t) / 2``, CRITICAL 1.

    Args:
        threshold: the load from which NORMAL is rejected, above 0 and at most 1.

    Raises:
        InvalidThreshold: `threshold` is outside (0, 1].
    """

    __slots__ = ("_loads", "threshold")

    def __init__(self, threshold: float) -> None:
        if not is_number(threshold) or not 0 < threshold <= 1:
            raise InvalidThreshold(value=threshold)
        self.threshold = float(threshold)
        # A tuple: a priority is its own index, and an enum is slow to hash.
        self._loads = (1.0, _exact((1 + self.threshold) / 2), self.threshold, _exact(0.75 * self.threshold))

    def threshold_for(self, priority: Priority) -> float:
        """Return the load from which `priority` is rejected."""
        return self._loads[priority]

    def rejects(self, priority: Priority, load: float) -> bool:
        """Return whether a resource at `load` rejects work of `priority`."""
        return load >= self._loads[priority._value_]  # a plain number is faster than an enum as an index
