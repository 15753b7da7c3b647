"""Exponential backoff: how often a failed call is retried, and how long each retry waits."""

from __future__ import annotations

import math
from dataclasses import dataclass

from forebay._renamed import renamed_arguments
from forebay._validate import check_not_negative, check_positive, check_whole, is_number, reject

_SPREAD = 0.2  # of a Retry-After, over which the callers that got the same one are spread


@renamed_arguments(base="base_delay", ceiling="max_delay", longest_wait="max_total_delay")
@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """A retry policy: exponential backoff with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", 2015.

    Attributes:
        max_attempts: attempts at one call, the first included; 1 is no retry. An attempt that the provider throttles
            (429, 503, 529) uses up none; those are bounded by the deadline and by `max_total_delay`.
        base_delay: longest backoff before the first retry, in seconds.
        max_delay: longest backoff before any retry, in seconds. A longer Retry-After of the provider still counts.
        max_total_delay: longest wait of one call between its attempts, all together, in seconds. Waits in the call
            queue do not count. The call is not retried if the provider asks for as much or more.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    max_attempts: int = 6
    base_delay: float = 0.5
    max_delay: float = 60.0
    max_total_delay: float = 60.0

    def __post_init__(self) -> None:
        check_whole("Retry", "max_attempts", self.max_attempts)
        check_positive("Retry", "base_delay", self.base_delay, unit="seconds")
        if not is_number(self.max_delay) or not self.base_delay <= self.max_delay < math.inf:
            reject("Retry", "max_delay", self.max_delay, "a finite number of seconds, not below base_delay")
        check_not_negative("Retry", "max_total_delay", self.max_total_delay, unit="seconds", infinite=True)

    def delay(
        self, retry: int, *, draw: float, retry_after: float | None = None, time_left: float = math.inf
    ) -> float | None:
        """Return the seconds to wait before a retry; None to give up, because it would be too late.

        The delay is uniform in ``[0, min(max_delay, base_delay * 2**(retry - 1))]``. A Retry-After is added to it, and
        the delay is then drawn from at least a fifth of that: all callers got the same one and must not return
        together.

        Args:
            retry: its number; 1 is the first.
            draw: a random number in [0, 1).
            retry_after: seconds that the provider asked for, or None.
            time_left: seconds until the result is worthless. The delay is drawn from what is left, so that the retry is
                in time.
        """
        asked = max(0.0, retry_after or 0.0)
        bound = min(time_left, self.max_total_delay)
        if not asked < bound:
            return None
        spread = max(min(self.max_delay, self.base_delay * 2.0 ** min(retry - 1, 64)), _SPREAD * asked)
        return asked + draw * min(spread, bound - asked)
