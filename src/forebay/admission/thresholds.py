"""The threshold ladder: from which load each priority is refused."""

from __future__ import annotations

from forebay.errors import InvalidThreshold
from forebay.task import Priority


def _exact(load: float) -> float:
    """0.75 * 0.8 is a little more than 0.6, the load of a house with 60 of 100 taken."""
    return round(load, 12)


class PriorityThresholds:
    """Thresholds by priority, so that the last of the room belongs to the most important work.

    For a threshold ``t``: LOW ``0.75 t``, NORMAL ``t``, HIGH ``(1 + t) / 2``, CRITICAL 1.

    Raises:
        InvalidThreshold: `threshold` is outside (0, 1].
    """

    __slots__ = ("_rungs", "threshold")

    def __init__(self, threshold: float) -> None:
        if not isinstance(threshold, int | float) or isinstance(threshold, bool) or not 0 < threshold <= 1:
            raise InvalidThreshold(value=threshold)
        self.threshold = float(threshold)
        # by rung: a priority is its own index, and an enum is slow to hash
        self._rungs = (1.0, _exact((1 + self.threshold) / 2), self.threshold, _exact(0.75 * self.threshold))

    def threshold_for(self, priority: Priority) -> float:
        """The load from which `priority` is refused."""
        return self._rungs[priority]

    def rejects(self, priority: Priority, load: float) -> bool:
        """Whether a resource at `load` takes no more of `priority`."""
        return load >= self._rungs[priority]
