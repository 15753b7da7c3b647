"""Exponential backoff: what is retried and how often, and how long each retry waits."""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from forebay._hooks import is_async
from forebay._renamed import renamed_arguments
from forebay._validate import check_not_negative, check_positive, check_whole, is_number, reject
from forebay.errors import RemoteError

ErrorFilter: TypeAlias = type[BaseException] | tuple[type[BaseException], ...] | Callable[[BaseException], bool]

_SPREAD = 0.2  # of a Retry-After, over which the callers that got the same one are spread


@renamed_arguments(base="base_delay", ceiling="max_delay", longest_wait="max_total_delay")
@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """A retry policy for calls or tasks: exponential backoff with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", 2015.

    Attributes:
        max_attempts: attempts at one call or task, the first included; 1 is no retry. An attempt at a call that the
            provider throttles (429, 503, 529) uses up none; those are bounded by the deadline and `max_total_delay`.
        base_delay: longest backoff before the first retry, in seconds.
        max_delay: longest backoff before any retry, in seconds. A longer Retry-After still counts.
        max_total_delay: longest wait of one call or task between its attempts, all together, in seconds. Waits in a
            queue do not count. There is no retry if a Retry-After is as long or longer.
        on: which errors of a task's handler are worth a retry: an exception type, a tuple of them, or a plain function
            of the exception that returns True or False. An attempt that ran out of time has ended with TaskTimedOut,
            which is a TimeoutError. An exception of another process (RemoteError) is compared by its name. An
            `Upstream` judges the errors of its calls by itself, and takes no `on`.

    Raises:
        InvalidSetting: a setting is invalid; the message names it.
    """

    max_attempts: int = 6
    base_delay: float = 0.5
    max_delay: float = 60.0
    max_total_delay: float = 60.0
    on: ErrorFilter = Exception

    def __post_init__(self) -> None:
        check_whole("Retry", "max_attempts", self.max_attempts)
        check_positive("Retry", "base_delay", self.base_delay, unit="seconds")
        if not is_number(self.max_delay) or not self.base_delay <= self.max_delay < math.inf:
            reject("Retry", "max_delay", self.max_delay, "a finite number of seconds, not below base_delay")
        check_not_negative("Retry", "max_total_delay", self.max_total_delay, unit="seconds", infinite=True)
        if not _is_error_filter(self.on):
            expected = "an exception type, a tuple of them, or a plain function that takes the exception"
            reject("Retry", "on", self.on, expected)

    def covers(self, error: BaseException) -> bool:
        """Return whether an attempt that ended with `error` is worth a retry. It raises what a function `on` raises."""
        if isinstance(self.on, type | tuple):
            remote = isinstance(error, RemoteError) and _names_any(error.type, self.on)
            return remote or isinstance(error, self.on)
        return bool(self.on(error))

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


def _is_error_filter(on: object) -> bool:
    if isinstance(on, type | tuple):
        kinds = on if isinstance(on, tuple) else (on,)
        return bool(kinds) and all(isinstance(kind, type) and issubclass(kind, BaseException) for kind in kinds)
    return callable(on) and not is_async(on)


def _names_any(name: str, kinds: type[BaseException] | tuple[type[BaseException], ...]) -> bool:
    """Return whether `name` is that of one of `kinds`, or of a subclass that Python itself defines."""
    named = getattr(builtins, name, None)
    if isinstance(named, type) and issubclass(named, kinds):
        return True
    return any(name == kind.__name__ for kind in (kinds if isinstance(kinds, tuple) else (kinds,)))
