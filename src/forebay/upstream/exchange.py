"""One HTTP request to a provider: its account, its needs, and the results of its attempts. Nothing here waits.

It is independent of the HTTP library: a subclass reads the library's messages, sends the request, and adds the response
for the caller.
"""

from __future__ import annotations

import functools
from typing import Final

from forebay import clock
from forebay.errors import Overloaded
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.quota import RateScope
from forebay.upstream.call_request import AttemptResult, Caller, CallOutcome, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.fallbacks.reroute import ReroutedRequest, can_reroute, reroute_request
from forebay.upstream.metered_stream import MeteredStream
from forebay.upstream.providers import (
    Endpoint,
    ErrorKind,
    Headers,
    Usage,
    UsageFilter,
    UsageMeter,
    classify,
    read_rate_limits,
    read_rate_scope,
    read_response,
    read_retry_after,
    read_should_retry,
)
from forebay.upstream.providers.classify import NO_RESPONSE

ERRORS: Final = 400
REDIRECTS: Final = 300
_ONE_REQUEST: Final = Charge()
_SUSPENSION: Final = 60.0  # seconds without calls after the provider reported that the account's money is spent
_MAX_SUSPENSION: Final = 3_600.0  # seconds, whatever its Retry-After: money can be paid in at any time


class Exchange:
    """One request, from the account that it uses to the answer that its caller gets. It is a `CallRoute`.

    Args:
        core: of the upstream that it is sent through.
        method: such as ``"POST"``.
        path: of its URL, with the query.
        headers: of the request.
        body: as it is sent; None for a stream, which cannot be sent again.
        caller: a caller in another process; None for the task that runs here, if there is one.

    Attributes:
        core: of the upstream.
        api_key: the API key that the account belongs to, as the request's header has it.
        parsed: the request's endpoint, model and tokens.
        account: the account that it uses.
        call_request: its needs.
        changed_body: the body to send instead of its own, or None.
        error_kind: the kind of its latest answer.
    """

    __slots__ = (
        "_original_body",
        "_path",
        "_retry_after",
        "_status",
        "account",
        "api_key",
        "call_request",
        "changed_body",
        "core",
        "error_kind",
        "parsed",
    )

    def __init__(  # noqa: PLR0913 - the parts of a request
        self,
        core: UpstreamCore,
        *,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | None,
        caller: Caller | None = None,
    ) -> None:
        profile = core.profile
        self.core = core
        self._path = path
        self._original_body = body
        body = body or b""
        self.parsed = parsed = profile.read_request(method, path, headers, body)
        model = parsed.model or ""
        self.api_key = _read_api_key(headers) if caller is None or caller.api_key is None else caller.api_key
        self.account = core.accounts.account(model, self.api_key)
        if parsed.websocket:
            core.warn_unmetered()
        estimates = self.account.token_estimates
        charge = profile.estimate_charge(
            parsed, output_tokens=estimates.output_tokens, input_ratio=estimates.input_ratio
        )
        if caller is None:
            self.call_request = core.request(model, charge, free=parsed.free)
        else:
            self.call_request = core.request_for(caller, model, charge, free=parsed.free)
        self.changed_body = profile.with_include_usage(parsed, body)
        self.error_kind = ErrorKind.SUCCESS
        self._retry_after: float | None = None
        self._status: int | None = None

    # --- fallback ---

    def can_reroute(self, route: FallbackRoute) -> bool:
        """Return whether another account could serve it, by a cheap check."""
        return self._original_body is not None and can_reroute(route, self.parsed, self.call_request.model)

    def rerouted_request(self, route: FallbackRoute) -> ReroutedRequest | None:
        """Return the request as it is sent to another account; None if it cannot be answered there."""
        assert self._original_body is not None  # noqa: S101 - or it cannot be rerouted
        return reroute_request(route, self._path, self.parsed, self._original_body, self.api_key)

    def throttled_error(self) -> Overloaded | None:
        """Return the provider's latest answer as an error if it throttled the call, else None."""
        if not self.error_kind.rule.throttled:
            return None
        return Overloaded(self.describe_failure(), limited_by=self.account.name, retry_after=self._retry_after)

    def describe_failure(self) -> str:
        """Return a description of the latest attempt's failure, for a person."""
        if self._status is None:
            return f"{self.core.name}: its provider could not be reached"
        return f"{self.core.name}: its provider answered {self._status} ({self.error_kind.value})"

    # --- an answer that streams ---

    def is_streamed(self, status: int, content_type: str) -> bool:
        """Return whether the answer is passed on as it arrives: an event stream, or from an unknown endpoint."""
        return status < REDIRECTS and (self.parsed.endpoint is Endpoint.OTHER or _is_event_stream(content_type))

    def metered_stream(self, permit: Permit, headers: Headers, *, encoding: str = "") -> MeteredStream:
        """Return the stream that meters a streaming answer and releases its permit; `encoding`: of the bytes fed."""
        self.account.answer_began(permit, self._rate_limits(headers))
        meter = None
        generated = not self.parsed.free  # a free request fetches an answer that was metered when it was generated
        if generated and _is_event_stream(headers.get("content-type", "")):
            meter = UsageMeter(input_tokens=self.call_request.charge.input_tokens, encoding=encoding)
        usage_filter = None if self.changed_body is None else UsageFilter()
        settle = functools.partial(self._settle_stream, permit)
        return MeteredStream(settle, meter, usage_filter, detects_truncation=self.parsed.generates_tokens)

    def _settle_stream(self, permit: Permit, kind: Outcome, usage: Usage | None) -> None:
        self.account.settle(permit, self.call_outcome(permit, kind, usage))

    def stream_result(self) -> AttemptResult:
        """Return the result of an attempt whose answer has begun; the reader of the answer releases the permit."""
        self.error_kind = ErrorKind.SUCCESS
        return AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS), streaming=True)

    # --- the result of an attempt ---

    def judge_answer(self, permit: Permit, status: int, headers: Headers, body: bytes) -> AttemptResult:
        """Return the result of an attempt whose answer is complete.

        An error (429, 503, 500 ...) is classified, and its Retry-After and rate limit headers are read. That the
        account's money is spent (402, or 429 with ``insufficient_quota``) suspends the account here.

        Args:
            permit: of the attempt.
            status: of the answer.
            headers: of the answer.
            body: without its Content-Encoding.
        """
        rate_limits = self._rate_limits(headers, always=status >= ERRORS)
        self.error_kind = ErrorKind.SUCCESS
        self._status = status
        if status >= ERRORS:
            kind = self.error_kind = classify(status, headers, body)
            self._retry_after = read_retry_after(headers, body, wall=clock.wall_time())
            retry = None if kind is ErrorKind.SPEND_CAP else read_should_retry(headers)
            if kind is ErrorKind.SPEND_CAP:
                after = self._retry_after
                self.account.suspend(_SUSPENSION if after is None else min(after, _MAX_SUSPENSION))
            return judge_error(
                permit,
                kind,
                retry_after=self._retry_after,
                rate_limits=rate_limits,
                rate_scope=read_rate_scope(body),
                retry=False if self._original_body is None else retry,
            )
        if status >= REDIRECTS:
            outcome = CallOutcome(kind=Outcome.IGNORED, used=_ONE_REQUEST, usd=0.0, rate_limit_headers=rate_limits)
            return AttemptResult(outcome=outcome)
        response = read_response(body)
        kind_of_outcome = Outcome.SUCCESS if response.error_kind is None else response.error_kind.rule.outcome
        return AttemptResult(outcome=self.call_outcome(permit, kind_of_outcome, response.usage, rate_limits))

    def _rate_limits(self, headers: Headers, *, always: bool = False) -> tuple[RateLimitHeaders, ...]:
        """Return the rate-limit headers of an answer, if they can matter; those of an error `always` do."""
        if always or self.account.needs_headers():
            return read_rate_limits(headers, wall=clock.wall_time())
        return ()

    def connection_failed(
        self, permit: Permit, error: Exception, *, sent: bool = True, local: bool = False
    ) -> AttemptResult:
        """Return the result of an attempt whose connection failed, before the answer or within it.

        Args:
            permit: of the attempt.
            error: raised for the caller if it is the last attempt.
            sent: bytes may have reached the provider, as before a read timeout. Then the attempt takes all that was
                reserved, tokens and dollars, and so does each retry that ends so.
            local: the cause is on this side (a pool timeout, for example), and another attempt would not help.
        """
        self.error_kind = NO_RESPONSE
        self._status = None
        kind = Outcome.IGNORED if local else Outcome.FAULT
        if sent and not local:
            outcome = CallOutcome(kind=kind, latency=clock.now() - permit.granted_at)
        else:
            outcome = CallOutcome(kind=kind, released=True, usd=0.0)
        retryable = self._original_body is not None and not local
        return AttemptResult(error=error, outcome=outcome, retryable=retryable, can_fall_back=not local)

    def call_outcome(
        self,
        permit: Permit,
        kind: Outcome,
        usage: Usage | None,
        rate_limit_headers: tuple[RateLimitHeaders, ...] = (),
    ) -> CallOutcome:
        """Return the outcome of an answered attempt, with its usage and cost."""
        latency = clock.now() - permit.granted_at
        if usage is None:
            return CallOutcome(kind=kind, latency=latency, rate_limit_headers=rate_limit_headers)
        used = self.core.profile.final_charge(self.call_request.charge, usage)
        usd = 0.0
        if self.core.budgets.has_budgets:
            tokens = Charge(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
            usd = self.core.cost(self.call_request.model, tokens, cached_tokens=usage.cache_read_tokens)
        reported = kind is Outcome.SUCCESS and not usage.estimated
        return CallOutcome(
            kind=kind,
            used=used,
            usd=usd,
            latency=latency,
            output_tokens=usage.output_tokens,
            estimated_input_tokens=self.parsed.input_tokens if reported else None,
            rate_limit_headers=rate_limit_headers,
        )


def judge_error(  # noqa: PLR0913 - what an error says
    permit: Permit,
    kind: ErrorKind,
    *,
    retry_after: float | None = None,
    rate_limits: tuple[RateLimitHeaders, ...] = (),
    rate_scope: RateScope | None = None,
    retry: bool | None = None,
) -> AttemptResult:
    """Return the result of an attempt that the provider answered with an error, by the kind's rule (`classify.py`).

    Args:
        permit: of the attempt.
        kind: of the error.
        retry_after: seconds that the provider asked to wait, or None. This call waits for them; for a limit of the
            account (429) they also count for the others, see `RefusalControl`.
        rate_limits: the rate-limit headers of the answer.
        rate_scope: the rate that the answer names, or None.
        retry: whether the call may be retried; None if that follows from the kind.
    """
    rule = kind.rule
    if rule.throttled:  # nothing was used: `RateLimiter.record_throttled` returns what a rate-limited call reserved
        rate_limited = kind is ErrorKind.RATE_LIMIT
        outcome = CallOutcome(
            kind=rule.outcome,
            released=not rate_limited,
            rate_limited=rate_limited,
            rate_scope=rate_scope,
            account_limited=kind is ErrorKind.CONCURRENCY_LIMIT,
            retry_after=retry_after,
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
        retryable=rule.retryable if retry is None else retry,
        uses_attempt=rule.uses_attempt,
        retry_after=retry_after,
        can_fall_back=rule.can_fall_back,
    )


def _read_api_key(headers: Headers) -> str:
    """Return the API key of a request; empty if there is none."""
    for name in ("authorization", "x-api-key", "api-key"):
        if key := headers.get(name):
            return key
    return ""


def _is_event_stream(content_type: str) -> bool:
    return content_type.lower().startswith("text/event-stream")
