"""The meaning of attempts that failed: their evidence about the account, and whether another may help."""

from __future__ import annotations

from typing import Final

from forebay import clock
from forebay.errors import InvalidAmount, InvalidSetting
from forebay.interfaces import Charge, Outcome
from forebay.upstream.accounts.thread_safe_account import ThreadSafeAccount
from forebay.upstream.call_request import AttemptResult, CallOutcome, Permit
from forebay.upstream.providers import (
    ErrorKind,
    classify,
    names_spend_cap,
    read_rate_limits,
    read_rate_scope,
    read_retry_after,
    read_should_retry,
)
from forebay.upstream.sdk_exceptions import ErrorAnswer, find_error_answer, is_judged, is_timeout

_ONE_REQUEST: Final = Charge()
_SUSPENSION: Final = 60.0  # seconds without calls after the provider reported that the account's money is spent
_MAX_SUSPENSION: Final = 3_600.0  # seconds, whatever its Retry-After: money can be paid in at any time


def judge_exception(account: ThreadSafeAccount, permit: Permit, error: Exception) -> AttemptResult:
    """Return the result of an attempt that raised an exception, for callers whose HTTP messages are not seen here.

    An exception that reports an answer, as those of SDKs do, counts as that answer (429, 400, 500 ...).
    """
    if isinstance(error, InvalidAmount | InvalidSetting) or is_judged(error):  # no evidence, and it was retried already
        outcome = CallOutcome(kind=Outcome.IGNORED, answered=False, latency=clock.now() - permit.granted_at)
        return AttemptResult(error=error, outcome=outcome)
    answer = find_error_answer(error)
    if answer is None:
        return judge_failure(account, permit, error)
    result = judge_error_answer(account, permit, classify(*answer), answer)
    result.error = error
    return result


def judge_failure(account: ThreadSafeAccount, permit: Permit, error: Exception) -> AttemptResult:
    """Return the result of an attempt that was sent, and failed without an answer.

    A caller's own timeout counts against the provider only if its silence is unusual. It is retried once at most, and
    not at all if calls usually take longer than this caller waits: each attempt may be billed in full.
    """
    kind, retryable = Outcome.FAULT, True
    if is_timeout(error):
        verdict = account.judge_timeout(permit)
        if not verdict.fault:
            kind, retryable = Outcome.IGNORED, verdict.retry_may_help and not permit.request.retries
    outcome = CallOutcome(kind=kind, answered=False, latency=clock.now() - permit.granted_at)
    return AttemptResult(error=error, outcome=outcome, retryable=retryable, can_fall_back=True)


def judge_unsent(error: Exception, *, local: bool = False) -> AttemptResult:
    """Return the result of an attempt that was not sent: it has used nothing.

    Args:
        error: raised for the caller if it is the last attempt.
        local: the cause is on this side (a pool timeout, for example), and another attempt would not help.
    """
    outcome = CallOutcome(kind=Outcome.IGNORED if local else Outcome.FAULT, released=True, usd=0.0)
    return AttemptResult(error=error, outcome=outcome, retryable=not local, can_fall_back=not local)


def judge_error_answer(
    account: ThreadSafeAccount, permit: Permit, kind: ErrorKind, answer: ErrorAnswer, *, can_resend: bool = True
) -> AttemptResult:
    """Return the result of an attempt that was answered with an error, by the kind's rule (`classify.py`).

    That the account's money is spent (402, or 429 with ``insufficient_quota``) is noted by the account here.

    Args:
        account: of the call.
        permit: of the attempt.
        kind: of the answer.
        answer: the answer.
        can_resend: the request can be sent again.
    """
    headers, body, wall, rule = answer.headers, answer.body, clock.wall_time(), kind.rule
    retry_after, rate_limits = read_retry_after(headers, body, wall=wall), read_rate_limits(headers, wall=wall)
    retryable = rule.retryable
    if kind is ErrorKind.SPEND_CAP:
        seconds = _SUSPENSION if retry_after is None else min(retry_after, _MAX_SUSPENSION)
        account.record_spend_cap(permit, seconds, certain=names_spend_cap(body))
    elif (asked := read_should_retry(headers)) is not None:
        retryable = asked
    if rule.throttled:  # no tokens were used; providers count the request all the same
        rate_limited = kind is ErrorKind.RATE_LIMIT  # then `RateLimiter.record_throttled` returns what it reserved
        outcome = CallOutcome(
            kind=rule.outcome,
            used=None if rate_limited else _ONE_REQUEST,
            rate_limited=rate_limited,
            spend_cap=kind is ErrorKind.SPEND_CAP,
            rate_scope=read_rate_scope(body),
            account_limited=kind is ErrorKind.CONCURRENCY_LIMIT,
            retry_after=retry_after,  # for the account, see `RefusalControl`
            rate_limit_headers=rate_limits,
            usd=0.0,
        )
    else:
        latency = clock.now() - permit.granted_at
        outcome = CallOutcome(
            kind=rule.outcome, used=_ONE_REQUEST, usd=0.0, latency=latency, rate_limit_headers=rate_limits
        )
    return AttemptResult(
        outcome=outcome,
        retryable=retryable and can_resend,
        uses_attempt=rule.uses_attempt,
        retry_after=retry_after,
        can_fall_back=rule.can_fall_back,
    )
