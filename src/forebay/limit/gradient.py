"""A limit that follows the gradient of latency, for calls that all cost the same.

Source: `Gradient2Limit` and `WindowedLimit` of Netflix's concurrency-limits.
"""

from __future__ import annotations

import math
from typing import Final

from forebay._validate import check_between
from forebay.interfaces import Outcome
from forebay.limit.base import Grant, Limit

_WINDOW: Final = 1.0  # seconds of answers that make one sample, at least
_MIN_ANSWERS: Final = 10  # answers that make one sample, at least
_LONG_SAMPLES: Final = 600  # samples in the long average
_WARM_UP_SAMPLES: Final = 10  # first samples, of which the long average is the plain mean
_DRIFT: Final = 0.95  # what is left of a long average that is more than twice the short one


class GradientLimit(Limit):
    """A limit that compares recent latency with its long average, and falls as latency rises.

    It does not suit language models: their latency says how long the answers are, and the limit would end far below the
    capacity.

    Args:
        tolerance: how many times the long average the latency may reach before the limit falls.
        queue_size: calls by which the limit grows at each sample while latency does not rise.
        smoothing: weight of one sample in the limit, above 0 and at most 1.
        initial_limit: calls in flight to begin with.
        max_limit: most calls that may ever be in flight.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
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
        super().__init__(initial_limit=initial_limit, max_limit=max_limit)
        check_between("GradientLimit", "tolerance", tolerance, 0.0, math.inf)
        check_between("GradientLimit", "queue_size", queue_size, 0.0, math.inf)
        check_between("GradientLimit", "smoothing", smoothing, 0.0, math.nextafter(1.0, 2.0))
        self._tolerance = tolerance
        self._queue_size = queue_size
        self._smoothing = smoothing
        self._long_average = 0.0  # seconds of a call
        self._samples = 0
        self._window_start = 0.0  # in the clock's seconds
        self._window_seconds = 0.0  # durations of its calls, added up
        self._window_answers = 0
        self._window_in_flight = 0  # most calls in flight with one of them

    def observe(self, now: float, grant: Grant, outcome: Outcome, *, slowdown: float | None = None) -> None:  # noqa: ARG002
        """Add the duration of a success to the present sample; other outcomes are ignored."""
        if outcome is not Outcome.SUCCESS:
            return
        self._window_seconds += now - grant.granted_at
        self._window_answers += 1
        self._window_in_flight = max(self._window_in_flight, grant.in_flight)
        if self._window_answers >= _MIN_ANSWERS and now - self._window_start >= _WINDOW:
            self._update(self._window_seconds / self._window_answers, self._window_in_flight)
            self._begin_window(now)

    def _update(self, latency: float, in_flight: int) -> None:
        self._samples += 1
        weight = 1 / self._samples if self._samples <= _WARM_UP_SAMPLES else 2 / (_LONG_SAMPLES + 1)
        self._long_average += weight * (latency - self._long_average)
        if latency <= 0:
            return
        if self._long_average > 2 * latency:
            self._long_average *= _DRIFT
        if 2 * in_flight < self._level:
            return
        gradient = max(0.5, min(1.0, self._tolerance * self._long_average / latency))
        target = self._level * gradient + self._queue_size
        self._set_level(self._level + self._smoothing * (target - self._level))

    def _begin_window(self, now: float) -> None:
        self._window_start = now
        self._window_seconds = 0.0
        self._window_answers = 0
        self._window_in_flight = 0
