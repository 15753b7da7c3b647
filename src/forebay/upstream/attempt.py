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

from forebay.retry import Attempts, Leave, Retry, RetryBudgets
from forebay.typing import Outcome
from forebay.upstream.ask import Ask, Ended, Permit

_LOOK: Final = 0.5  # seconds after which a refused call asks again whether it may be tried again, on average


class Tried(msgspec.Struct, kw_only=True, eq=False):
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

    ended: Ended
    value: Any = None
    error: BaseException | None = None
    again: bool = False
    counts: bool = True
    retry_after: float | None = None
    open: bool = False
    elsewhere: bool = False


@dataclass(frozen=True, slots=True)
class Enter:
    """Get a permit, and send it back. If that raises, close the script."""

    ask: Ask


@dataclass(frozen=True, slots=True)
class Try:
    """Make the attempt, and send back what it came to."""

    permit: Permit


@dataclass(frozen=True, slots=True)
class Settle:
    """Close a permit."""

    permit: Permit
    ended: Ended


@dataclass(frozen=True, slots=True)
class Sleep:
    """Let so many seconds pass."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Moment:
    """Send back the time of `forebay.clock.now` and a draw from [0, 1)."""


Step: TypeAlias = Enter | Try | Settle | Sleep | Moment


def script(  # noqa: PLR0913 - an attempt, and what decides on the next
    ask: Ask,
    permit: Permit,
    tried: Tried,
    *,
    retry: Retry,
    budgets: RetryBudgets,
    hurries: Callable[[], bool] | None = None,
) -> Generator[Step, Any, Tried]:
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
    attempts = Attempts(retry)
    drawn: float | None = None  # when this retry was, from the budget of what is refused
    while True:
        not_now = tried.again and not tried.open and not tried.counts
        if tried.open or tried.ended.outcome is Outcome.SUCCESS:
            budgets.let_in(permit.at, drawn)
        delay = None
        if tried.again and not tried.open:
            now, chance = yield Moment()
            left = ask.deadline - now if ask.deadline < math.inf else math.inf
            delay = attempts.next(counts=tried.counts, chance=chance, retry_after=tried.retry_after, left=left)
            if delay is not None and tried.counts and not budgets.faults.withdraw(now):
                delay = None
        if delay is None:
            if not tried.open:
                yield Settle(permit, tried.ended)
            return tried
        yield Settle(permit, msgspec.structs.replace(tried.ended, final=False))
        if hurries is not None and not_now and hurries():
            return tried
        ask.retries += 1
        given, drawn = yield from _return(ask, attempts, budgets, delay=delay, at=now, not_now=not_now)
        if given is None:
            return tried
        permit = given
        tried = yield Try(permit)


def _return(  # noqa: PLR0913 - a call, and the retry that was drawn for it
    ask: Ask, attempts: Attempts, budgets: RetryBudgets, *, delay: float, at: float, not_now: bool
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
    leave, given = Leave.NO, at
    try:
        yield Sleep(delay)
        if not_now:
            leave, given = yield from _leave(ask, attempts, budgets, refused=at)
            if leave is Leave.NO:
                return None, None
        permit: Permit = yield Enter(ask)
    except GeneratorExit:  # it got no permit, or its caller has left: its provider sees nothing of this retry
        if not_now:
            budgets.unsent(leave, given)
        else:
            budgets.faults.give_back(at)
        raise
    return permit, given if leave is Leave.DRAWN else None


def _leave(
    ask: Ask, attempts: Attempts, budgets: RetryBudgets, *, refused: float
) -> Generator[Step, Any, tuple[Leave, float]]:
    """Wait until a refused call may be tried again: how, and when that was; `Leave.NO` where that would be too late."""
    while True:
        moment: tuple[float, float] = yield Moment()
        now, chance = moment
        leave = budgets.leave(now, refused=refused)
        if leave is not Leave.NO:
            return leave, now
        seconds = _LOOK * (0.5 + chance)
        if not attempts.linger(seconds, left=ask.deadline - now):
            return leave, now
        yield Sleep(seconds)
