"""Ask jitter: how long a process waits before it asks a store that others use too. Pure."""

from __future__ import annotations


class AskJitter:
    """A random wait within a window that doubles each time a process has asked in vain.

    When many processes hear of one record, the first one asks soon and takes it, and most of the others ask when it has
    gone. The more of them there are, the more often each asks in vain, and the further apart they ask.

    Args:
        min_window: seconds, when the last question was not in vain.
        max_window: seconds, at most.
    """

    __slots__ = ("_max_window", "_min_window", "_window")

    def __init__(self, *, min_window: float, max_window: float) -> None:
        self._min_window = self._window = min_window
        self._max_window = max_window

    def delay(self, draw: float) -> float:
        """Return the seconds to wait; `draw` is uniform in [0, 1)."""
        return draw * self._window

    def record(self, *, found: bool) -> None:
        """Record whether the store had something for this process."""
        self._window = self._min_window if found else min(2 * self._window, self._max_window)
