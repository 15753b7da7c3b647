"""A limit that follows the gradient of latency, for calls that all cost the same.

Source: `Gradient2Limit` and `WindowedLimit` of Netflix's concurrency-limits.
"""

from __future__ import annotations

import math
from typing import Final

from forebay.interfaces import Grant, Outcome
from forebay.limit.bounds import check_between, check_bounds

_WINDOW: Final = 1.0  # seconds of answers that make one sample, at least
_SAMPLES: Final = 10  # answers that make one sample, at least
_LONG: Final = 600  # samples over which the long average reaches
_WARM_UP: Final = 10  # samples of which the long average is the plain mean
_DRIFT: Final = 0.95  # what is left of a long average that is more than twice the short one


class GradientLimit:
    """Compares the latency of late with its long average, and lowers the limit as it rises.

    Not for language models: there, latency says how long answers are, and the limit wanders far below the capacity.

    Args:
        tolerance: how many times the long average the latency may be before the limit falls.
        queue: calls by which the limit grows for each sample while latency does not rise.
        smoothing: weight of one sample in the limit.
        start: calls in flight to begin with.
        largest: calls in flight at most.

    Raises:
        InvalidSetting: a number makes no sense; the message names it.
    """

    def __init__(
        self,
        *,
        tolerance: float = 1.5,
        queue_size: float = 4.0,
        smoothing: float = 0.2,
        initial_limit: int = 20,
        max_limit: int = 1000,
    ) -> None:
        check_bounds("GradientLimit", initial_limit, max_limit)
        check_between("GradientLimit", "tolerance", tolerance, 0.0, math.inf)
        check_between("GradientLimit", "queue_size", queue_size, 0.0, math.inf)
        check_between("GradientLimit", "smoothing", smoothing, 0.0, math.nextafter(1.0, 2.0))
        self._tolerance = tolerance
        self._queue = queue_size
        self._smoothing = smoothing
        self._largest = float(max_limit)
        self._level = float(initial_limit)
        self._long = 0.0  # seconds of a call, by its long average
        self._samples = 0
        self._opened = 0.0  # the window, in the clock's seconds
        self._time = 0.0  # seconds of its calls together
        self._calls = 0
        self._most = 0  # calls in flight in it

    def limit(self, now: float) -> int:  # noqa: ARG002 - the seam's
        """Calls that may be in flight."""
        return int(self._level)

    def reopens_at(self, now: float) -> float | None:  # noqa: ARG002 - the seam's
        """Never: the limit is never 0."""
        return None

    def grant(self, now: float, in_flight: int) -> Grant:
        """Mark a slot that is taken now."""
        return Grant(now, in_flight)

    def accepted(self, now: float, grant: Grant) -> None:
        """Nothing follows from it."""

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Its call has ended; only the time of a success counts."""
        if outcome is not Outcome.SUCCESS:
            return
        self._time += now - grant.granted_at
        self._calls += 1
        self._most = max(self._most, grant.in_flight)
        if self._calls >= _SAMPLES and now - self._opened >= _WINDOW:
            self._update(self._time / self._calls, self._most)
            self._open_window(now)

    def _update(self, short: float, in_flight: int) -> None:
        self._samples += 1
        weight = 1 / self._samples if self._samples <= _WARM_UP else 2 / (_LONG + 1)
        self._long += weight * (short - self._long)
        if short <= 0:
            return
        if self._long > 2 * short:
            self._long *= _DRIFT
        if 2 * in_flight < self._level:
            return
        gradient = max(0.5, min(1.0, self._tolerance * self._long / short))
        target = self._level * gradient + self._queue
        level = self._level + self._smoothing * (target - self._level)
        self._level = max(1.0, min(self._largest, level))

    def _open_window(self, now: float) -> None:
        self._opened = now
        self._time = 0.0
        self._calls = 0
        self._most = 0
