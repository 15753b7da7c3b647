"""The difference between the wall clock of this process and that of a Redis server."""

from __future__ import annotations

from collections.abc import Callable
from math import inf

from forebay.clock import monotonic, wall_time

_INTERVAL = 10.0  # seconds between two measurements: the server's clock may be set too
_STEP = 1.0  # seconds; clocks that differ by less agree
_MAX_DURATION = 1.0  # seconds that a measurement may take: half of that is its error


class RedisClock:
    """The difference between the wall clock of this process and that of the server, in whole seconds.

    Processes on machines whose clocks differ store times by the server's clock, so that they agree on when a lease
    expires. For clocks that agree the difference is exactly 0. It follows at once when the clock of this machine is
    set, because it is kept as the difference between the server's clock and the monotonic one.

    Any thread may ask it.
    """

    def __init__(self) -> None:
        self._server: float | None = None  # its epoch seconds at monotonic 0; None: not measured
        self._ahead = 0.0
        self._next = -inf  # monotonic

    def is_due(self) -> bool:
        """Return whether it is to be measured again."""
        self.ahead()
        return monotonic() >= self._next

    def measure(self, ask: Callable[[], float | None]) -> None:
        """Measure it by asking the server for its epoch seconds; a slow answer does not count.

        A server that does not tell is taken to agree.
        """
        before = monotonic()
        seconds = ask()
        after = monotonic()
        if after - before <= _MAX_DURATION:
            self._server = None if seconds is None else seconds - (before + after) / 2
            self._next = after + _INTERVAL

    def ahead(self) -> float:
        """Return how many seconds to subtract from a time of this process to have the server's."""
        if self._server is None:
            return 0.0
        ahead = wall_time() - monotonic() - self._server
        if abs(ahead - self._ahead) > _STEP:
            self._ahead = float(round(ahead))
            self._next = -inf  # this machine may have been suspended, with its monotonic clock
        return self._ahead
