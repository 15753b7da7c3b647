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
from forebay.upstream.call_meter import CallMeter, ReadAnswer, StreamMeter
from forebay.upstream.call_request import AttemptResult, Caller, CallOutcome, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.failed_attempts import judge_error_answer, judge_failure, judge_unsent
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.fallbacks.reroute import ReroutedRequest, can_reroute, reroute_request
from forebay.upstream.metered_stream import MeteredStream, StreamEnd
from forebay.upstream.providers import (
    Endpoint,
    ErrorKind,
    Headers,
    Usage,
    UsageFilter,
    classify,
    is_event_stream,
    read_rate_limits,
    read_response,
)
from forebay.upstream.providers.classify import NO_RESPONSE
from forebay.upstream.sdk_exceptions import ErrorAnswer

REDIRECTS: Final = 300
ERRORS: Final = 400
OUT_OF_TIME: Final = ("x-forebay-retries", "out-of-time")
"""The header of a provider's answer after which no time was left for another attempt."""
_UNAUTHORIZED: Final = 401
_KEY_REFUSED: Final = (_UNAUTHORIZED, 403)
_UNREAD: Final = (Endpoint.OTHER, Endpoint.SPEECH)  # their answers pass as they arrive


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
        "_credential",
        "_meter",
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
        credential = profile.read_credential(parsed, headers)
        # None: it is ours, as the key of a fallback is.
        self._credential = None if caller is None or caller.key_is_held else credential
        self.api_key = credential if caller is None or caller.api_key is None else caller.api_key
        self.account = core.accounts.account(model, self.api_key)
        if parsed.websocket:
            core.warn_unmetered()
        self._meter = meter = CallMeter(core, self.account, parsed, body, caller)
        if caller is None:
            self.call_request = core.request(model, meter.charge, free=parsed.free, price=meter.price)
        else:
            self.call_request = core.request_for(caller, model, meter.charge, free=parsed.free, price=meter.price)
        self.call_request.size = len(body)
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

    def may_use_key(self, route: FallbackRoute) -> bool:
        """See `CallRoute`."""
        return route.api_key is None or self._credential is None or self._credential in self.core.accepted_keys

    def record_key(self, *, tried: bool) -> None:
        """See `CallRoute`. What it has answered to a wrong request (400) says nothing about the key."""
        if self._credential is not None and (tried or self._status in _KEY_REFUSED):
            self.core.accepted_keys.record(self._credential, accepted=tried)

    def key_refused(self) -> bool:
        """See `CallRoute`."""
        return self._status in _KEY_REFUSED

    def held_key_invalid(self) -> bool:
        """See `CallRoute`."""
        return self._credential is None and self._status == _UNAUTHORIZED

    def throttled_error(self) -> Overloaded | None:
        """Return the provider's latest answer as an error if it throttled the call, else None."""
        if not self.error_kind.rule.throttled:
            return None
        return Overloaded(self.describe_failure(), limited_by=self.account.name, retry_after=self._retry_after)

    def mark_out_of_time(self, result: AttemptResult) -> None:
        """See `CallRoute`. A subclass that makes answers marks them."""

    def describe_failure(self) -> str:
        """Return a description of the latest attempt's failure, for a person."""
        if self._status is None:
            return f"{self.core.name}: its provider could not be reached"
        return f"{self.core.name}: its provider answered {self._status} ({self.error_kind.value})"

    # --- an answer that streams ---

    def is_streamed(self, status: int, content_type: str) -> bool:
        """Return whether the answer is always passed on as it arrives: an event stream, or from an unknown endpoint."""
        if status >= REDIRECTS:
            return False
        return self._is_unread() or is_event_stream(content_type)

    def _is_unread(self) -> bool:
        return self.parsed.endpoint in _UNREAD and self.parsed.response_id is None

    def metered_stream(self, permit: Permit, headers: Headers, *, encoding: str = "") -> MeteredStream:
        """Return the stream that meters a streaming answer and releases its permit; `encoding`: of the bytes fed."""
        self.account.answer_began(permit, self._rate_limits(headers))
        meter: StreamMeter | None = None
        events = is_event_stream(headers.get("content-type", ""))
        # A free request fetches an answer that was metered when it was generated, unless that was in the background.
        is_metered = not self.parsed.free or self.parsed.response_id is not None
        if is_metered and (events or not self._is_unread()):
            meter = self._meter.stream_meter(events=events)
        usage_filter = UsageFilter() if events and self.changed_body is not None else None
        return MeteredStream(
            functools.partial(self._settle_stream, permit, meter),
            functools.partial(self._judge_break, permit),
            meter,
            usage_filter,
            detects_truncation=self.parsed.generates_tokens,
            encoding=encoding,
        )

    def _judge_break(self, permit: Permit, error: Exception) -> Outcome:
        """Return what an exception that ends a streaming answer says about the provider."""
        return judge_failure(self.account, permit, error).outcome.kind

    def _settle_stream(self, permit: Permit, meter: StreamMeter | None, end: StreamEnd) -> None:
        """Release the permit of a streaming answer; `meter` has read it, if it can be read."""
        usage = None if meter is None else self._meter.stream_usage(permit, meter, end)
        self.account.settle(permit, self.call_outcome(permit, end.kind, usage, meter))

    def stream_result(self) -> AttemptResult:
        """Return the result of an attempt whose answer has begun; the reader of the answer releases the permit."""
        self.error_kind = ErrorKind.SUCCESS
        return AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS), streaming=True)

    # --- the result of an attempt ---

    def judge_answer(self, permit: Permit, status: int, headers: Headers, body: bytes) -> AttemptResult:
        """Return the result of an attempt whose answer is complete.

        An error (429, 503, 500 ...) is classified, and its Retry-After and rate limit headers are read. That the
        account's money is spent (402, or 429 with ``insufficient_quota``) is noted by the account here.

        Args:
            permit: of the attempt.
            status: of the answer.
            headers: of the answer.
            body: without its Content-Encoding.
        """
        self.error_kind = ErrorKind.SUCCESS
        self._status = status
        if status >= ERRORS:
            self.error_kind = classify(status, headers, body)
            answer = ErrorAnswer(status, headers, body)
            result = judge_error_answer(
                self.account, permit, self.error_kind, answer, can_resend=self._original_body is not None
            )
            self._retry_after = result.retry_after
            return result
        rate_limits = self._rate_limits(headers)
        if status >= REDIRECTS:
            outcome = CallOutcome(kind=Outcome.IGNORED, used=Charge(), usd=0.0, rate_limit_headers=rate_limits)
            return AttemptResult(outcome=outcome)
        response = read_response(body)
        kind = Outcome.SUCCESS if response.error_kind is None else response.error_kind.rule.outcome
        return AttemptResult(outcome=self.call_outcome(permit, kind, response.usage, response, rate_limits))

    def _rate_limits(self, headers: Headers) -> tuple[RateLimitHeaders, ...]:
        """Return the rate-limit headers of an answer, if they can matter."""
        if self.account.needs_headers():
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
        failed = sent and not local
        result = judge_failure(self.account, permit, error) if failed else judge_unsent(error, local=local)
        result.retryable = result.retryable and self._original_body is not None
        return result

    def call_outcome(
        self,
        permit: Permit,
        kind: Outcome,
        usage: Usage | None,
        answer: ReadAnswer | None = None,
        rate_limit_headers: tuple[RateLimitHeaders, ...] = (),
    ) -> CallOutcome:
        """Return the outcome of an answered attempt, see `CallMeter.outcome`."""
        return self._meter.outcome(permit, kind, usage, answer, rate_limit_headers)
