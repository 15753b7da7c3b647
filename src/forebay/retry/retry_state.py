"""What one call has tried so far, and whether it may try again."""

from __future__ import annotations

import math

from forebay.retry.backoff import Retry


class RetryState:
    """Counts the attempts of one call.

    Faults and refusals are counted apart: a provider that answers *not now* is well, and its answer uses up none of
    the attempts that are kept for faults. Each kind backs off by its own number: a refusal after a fault is a first.

    Attributes:
        failed: attempts that were used up.
        refused: attempts that were answered *not now*.
        waited: seconds that were given out as waits.
    """

    __slots__ = ("_retry", "failed", "throttled", "total_delay")

    def __init__(self, retry: Retry) -> None:
        self._retry = retry
        self.failed = 0
        self.throttled = 0
        self.total_delay = 0.0

    def next_delay(
        self, *, uses_attempt: bool, draw: float, retry_after: float | None = None, time_left: float = math.inf
    ) -> float | None:
        """An attempt has failed: seconds to wait before the next one, or None to give up.

        Args:
            counts: whether it uses up an attempt. False for *not now* (429, 529).
            chance: a draw from [0, 1).
            retry_after: seconds that the provider asked for, or None.
            left: seconds until the result is worthless.
        """
        if uses_attempt:
            self.failed += 1
            if self.failed >= self._retry.max_attempts:
                return None
        else:
            self.throttled += 1
        number = self.failed if uses_attempt else self.throttled
        rest = min(time_left, self._retry.max_total_delay - self.total_delay)
        delay = self._retry.delay(number, draw=draw, retry_after=retry_after, time_left=rest)
        if delay is not None:
            self.total_delay += delay
        return delay

    def add_delay(self, seconds: float, *, time_left: float = math.inf) -> bool:
        """Whether it may wait `seconds` longer for its turn to be tried again; if so, they count as given out."""
        if seconds >= min(time_left, self._retry.max_total_delay - self.total_delay):
            return False
        self.total_delay += seconds
        return True
