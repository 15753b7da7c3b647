"""The retries of one account: the policy for each call, and the budgets for all calls together."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Final

from forebay import clock
from forebay.retry import Retry, RetryBudgets, RetryPermission, RetryState
from forebay.upstream.call_request import AttemptResult

_KEPT: Final = 0.25  # share of the budget of faults that is kept for first retries


class AccountRetries:
    """The retry policy of an account and its retry budgets, safe to use from any thread.

    Each account has budgets of its own, so that a model that is down takes no retries from the others.

    Args:
        retry: the policy for each call.
        draw: returns random numbers from [0, 1).
    """

    __slots__ = ("_budgets", "_lock", "draw", "retry")

    def __init__(self, retry: Retry, *, draw: Callable[[], float]) -> None:
        self.retry = retry
        self.draw = draw
        self._budgets = RetryBudgets()
        self._lock = threading.Lock()  # calls come from many threads

    def reset_after_fork(self) -> None:
        """See `ForkAware`."""
        self._lock = threading.Lock()

    def record_first_attempt(self) -> None:
        """Count the first attempt of a call, which is sent: retries are a share of these."""
        with self._lock:
            self._budgets.deposit(clock.now())

    def record_accepted(
        self, sent_at: float, *, throttled_at: float | None = None, failed_at: float | None = None
    ) -> None:
        """Note that an attempt was served. If it was a retry it has helped, and goes back to its budget.

        Args:
            sent_at: when it got its permit.
            throttled_at: when it was taken from the budget of throttled calls, if it was.
            failed_at: when it was taken from the budget of faults, if it was.
        """
        with self._lock:
            self._budgets.record_accepted(sent_at, throttled_at)
            if failed_at is not None:
                self._budgets.faults.refund(failed_at)

    def next_delay(
        self, state: RetryState, result: AttemptResult, *, now: float, deadline: float, believed: bool = True
    ) -> float | None:
        """Return the seconds to wait before the next attempt; None to give up. `believed`: its Retry-After is.

        A call that failed takes its retry from the budget of faults here: its first one from all of it, and any other
        from three quarters. So calls that fail however often they are sent leave retries for those that a retry helps.
        A throttled call asks `request_retry` later.
        """
        time_left = deadline - now if deadline < math.inf else math.inf
        delay = state.next_delay(
            uses_attempt=result.uses_attempt,
            draw=self.draw(),
            retry_after=result.retry_after,
            believed=believed,
            time_left=time_left,
        )
        if delay is None or not result.uses_attempt:
            return delay
        with self._lock:
            return delay if self._budgets.faults.withdraw(now, keep=_KEPT if state.failed > 1 else 0.0) else None

    def request_retry(self, now: float, throttled_at: float) -> RetryPermission:
        """Return whether a call that was throttled at `throttled_at` may be retried now, and at what price."""
        with self._lock:
            return self._budgets.request_retry(now, throttled_at=throttled_at)

    def refund_fault(self, withdrawn_at: float) -> None:
        """Return a retry of a failed call that was not sent."""
        with self._lock:
            self._budgets.faults.refund(withdrawn_at)

    def return_unused(self, permission: RetryPermission, at: float) -> None:
        """Return a retry of a throttled call that was permitted at `at` and not sent."""
        with self._lock:
            self._budgets.return_unused(permission, at)
