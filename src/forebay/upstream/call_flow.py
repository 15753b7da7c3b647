"""What an attempt of a call comes to, and what follows when it is to be tried again: without doing it.

The script is a generator that says what is to be done and is told how it went, so that an event loop and a plain thread
drive the same one.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import msgspec

from forebay.interfaces import Outcome
from forebay.retry import Retry, RetryBudgets, RetryPermission, RetryState
from forebay.upstream.call_request import CallOutcome, CallRequest, Permit

_LOOK: Final = 0.5  # seconds after which a refused call asks again whether it may be tried again, on average


class AttemptResult(msgspec.Struct, kw_only=True, eq=False):
    """What one attempt came to. Its permit is still open.

    Attributes:
        value: what its maker gets if it is the last.
        error: what is raised instead, if it is the last.
        ended: how it ended, for the account.
        again: whether another attempt could help.
        counts: whether that would use one up; *not now* does not.
        retry_after: seconds that the upstream asked for, or None.
        open: an answer that is still coming, so its permit is closed by whoever reads it.
        elsewhere: whether another account could do better, if it is the last.
    """

    outcome: CallOutcome
    value: Any = None
    error: BaseException | None = None
    retryable: bool = False
    uses_attempt: bool = True
    retry_after: float | None = None
    streaming: bool = False
    can_fall_back: bool = False


@dataclass(frozen=True, slots=True)
class Acquire:
    """Get a permit, and send it back. If that raises, close the script."""

    request: CallRequest


@dataclass(frozen=True, slots=True)
class Send:
    """Make the attempt, and send back what it came to."""

    permit: Permit


@dataclass(frozen=True, slots=True)
class Release:
    """Close a permit."""

    permit: Permit
    outcome: CallOutcome


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let so many seconds pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class ReadClock:
    """Send back the time of `forebay.clock.now` and a draw from [0, 1)."""


Step: TypeAlias = Acquire | Send | Release | Sleep | ReadClock


def call_flow(  # noqa: PLR0913 - an attempt, and what decides on the next
    ask: CallRequest,
    permit: Permit,
    tried: AttemptResult,
    *,
    retry: Retry,
    budgets: RetryBudgets,
    hurries: Callable[[], bool] | None = None,
) -> Generator[Step, Any, AttemptResult]:
    """Try a call again. Every permit is closed, but that of an answer that is still coming.

    Whoever does not drive it to its end closes it: a retry that was drawn and has not been sent goes back then.

    Args:
        ask: what it asks.
        permit: of its first attempt.
        tried: what that came to.
        retry: how it is tried again.
        budgets: whether it may be.
        hurries: asked after a *not now* whether the call goes elsewhere, rather than wait for its next attempt.

    Returns:
        The last attempt.
    """
    attempts = RetryState(retry)
    drawn: float | None = None  # when this retry was, from the budget of what is refused
    while True:
        not_now = tried.retryable and not tried.streaming and not tried.uses_attempt
        if tried.streaming or tried.outcome.kind is Outcome.SUCCESS:
            budgets.record_accepted(permit.granted_at, drawn)
        delay = None
        if tried.retryable and not tried.streaming:
            now, chance = yield ReadClock()
            left = ask.deadline - now if ask.deadline < math.inf else math.inf
            delay = attempts.next_delay(
                uses_attempt=tried.uses_attempt, draw=chance, retry_after=tried.retry_after, time_left=left
            )
            if delay is not None and tried.uses_attempt and not budgets.faults.withdraw(now):
                delay = None
        if delay is None:
            if not tried.streaming:
                yield Release(permit, tried.outcome)
            return tried
        yield Release(permit, msgspec.structs.replace(tried.outcome, final=False))
        if hurries is not None and not_now and hurries():
            return tried
        ask.retries += 1
        given, drawn = yield from _return(ask, attempts, budgets, delay=delay, at=now, not_now=not_now)
        if given is None:
            return tried
        permit = given
        tried = yield Send(permit)


def _return(  # noqa: PLR0913 - a call, and the retry that was drawn for it
    ask: CallRequest, attempts: RetryState, budgets: RetryBudgets, *, delay: float, at: float, not_now: bool
) -> Generator[Step, Any, tuple[Permit | None, float | None]]:
    """Wait, and get another permit; None where that would be too late.

    Args:
        ask: what the call asks.
        attempts: those that it has made.
        budgets: whether it may make another.
        delay: seconds to wait first.
        at: when its latest attempt had failed, and a retry was drawn for it.
        not_now: it was refused, so none was drawn yet.

    Returns:
        Also when a retry was drawn, if it comes back should this one be let in.
    """
    leave, given = RetryPermission.DENIED, at
    try:
        yield Sleep(delay)
        if not_now:
            leave, given = yield from _leave(ask, attempts, budgets, refused=at)
            if leave is RetryPermission.DENIED:
                return None, None
        permit: Permit = yield Acquire(ask)
    except GeneratorExit:  # it got no permit, or its caller has left: its provider sees nothing of this retry
        if not_now:
            budgets.return_unused(leave, given)
        else:
            budgets.faults.refund(at)
        raise
    return permit, given if leave is RetryPermission.FROM_BUDGET else None


def _leave(
    ask: CallRequest, attempts: RetryState, budgets: RetryBudgets, *, refused: float
) -> Generator[Step, Any, tuple[RetryPermission, float]]:
    """Wait until a refused call may be tried again: how, and when that was; `RetryPermission.DENIED` where that would be too late."""
    while True:
        moment: tuple[float, float] = yield ReadClock()
        now, chance = moment
        leave = budgets.request_retry(now, throttled_at=refused)
        if leave is not RetryPermission.DENIED:
            return leave, now
        seconds = _LOOK * (0.5 + chance)
        if not attempts.add_delay(seconds, time_left=ask.deadline - now):
            return leave, now
        yield Sleep(seconds)
