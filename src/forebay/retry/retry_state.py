"""The retry state of one call or task: the attempts it has made, and whether it may make another."""

from __future__ import annotations

import math

from forebay.retry.backoff import Retry


class RetryState:
    """The attempts of one call or task.

    Faults and throttled attempts (429, 503, 529) are counted apart: a provider that throttles is healthy, so its answer
    uses up none of the attempts that are kept for faults. Each kind backs off by its own count: the first throttled
    attempt after a fault waits like a first retry.

    Args:
        retry: the policy.
        failed: attempts that were used up before, in another process.
        total_delay: seconds of the delays before.

    Attributes:
        failed: attempts that were used up.
        throttled: attempts that the provider throttled.
        total_delay: seconds of all delays so far.
        out_of_time: it gave up because no time was left for another attempt.
    """

    __slots__ = ("_retry", "failed", "out_of_time", "throttled", "total_delay")

    def __init__(self, retry: Retry, *, failed: int = 0, total_delay: float = 0.0) -> None:
        self._retry = retry
        self.failed = failed
        self.throttled = 0
        self.total_delay = total_delay
        self.out_of_time = False

    def follow(self, retry: Retry) -> None:
        """Go on under another policy: another worker ran the task."""
        self._retry = retry

    def next_delay(
        self,
        *,
        uses_attempt: bool,
        draw: float,
        retry_after: float | None = None,
        believed: bool = True,
        time_left: float = math.inf,
    ) -> float | None:
        """Count a failed attempt; return the seconds to wait before the next one, or None to give up.

        Args:
            uses_attempt: whether it uses up an attempt; False for a throttled one.
            draw: a random number in [0, 1).
            retry_after: seconds that the provider asked for, or None.
            believed: False if earlier ones were too long: it is not waited for, but if there is no time for it the call
                gives up all the same.
            time_left: seconds until the result is worthless.
        """
        if uses_attempt:
            self.failed += 1
            if self.failed >= self._retry.max_attempts:
                return None
        else:
            self.throttled += 1
        number = self.failed if uses_attempt else self.throttled
        left = min(time_left, self._retry.max_total_delay - self.total_delay)
        delay = self._retry.delay(number, draw=draw, retry_after=retry_after, time_left=left)
        if delay is not None and not believed:
            delay = self._retry.delay(number, draw=draw, time_left=left)
        if delay is None:
            self.out_of_time = True
        else:
            self.total_delay += delay
        return delay

    def add_delay(self, seconds: float, *, time_left: float = math.inf) -> bool:
        """Return whether the call may wait `seconds` longer for its retry; if so, count them."""
        if seconds >= min(time_left, self._retry.max_total_delay - self.total_delay):
            self.out_of_time = True
            return False
        self.total_delay += seconds
        return True

    def budget_delay(self, *, draw: float, time_left: float = math.inf) -> float | None:
        """Return the seconds to wait because the retry budget is used up; None to give up. This uses no attempt.

        Args:
            draw: a random number in [0, 1).
            time_left: seconds until the result is worthless.
        """
        self.throttled += 1
        delay = self._retry.delay(self.throttled, draw=draw)
        return delay if delay is not None and self.add_delay(delay, time_left=time_left) else None
