"""One HTTP request to a provider: its account, its needs, and the results of its attempts. Nothing here waits.

It is independent of the HTTP library: a subclass reads the library's messages, sends the request, and adds the response
for the caller.
"""

from __future__ import annotations

import functools
from typing import Final

from forebay import clock
from forebay.errors import InvalidAmount, InvalidSetting, Overloaded
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.quota import BilledUsage, RateScope
from forebay.upstream.accounts.shared_account import SharedAccount
from forebay.upstream.background_responses import BackgroundResponse
from forebay.upstream.call_request import AttemptResult, Caller, CallOutcome, CallPrice, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.fallbacks.reroute import ReroutedRequest, can_reroute, reroute_request
from forebay.upstream.metered_stream import MeteredStream, StreamEnd
from forebay.upstream.providers import (
    BodyMeter,
    Endpoint,
    ErrorKind,
    Headers,
    Usage,
    UsageFilter,
    UsageMeter,
    classify,
    find_unpriced,
    find_unreadable,
    names_concurrency,
    names_spend_cap,
    read_rate_limits,
    read_rate_scope,
    read_response,
    read_retry_after,
    read_should_retry,
)
from forebay.upstream.providers.classify import NO_RESPONSE
from forebay.upstream.sdk_exceptions import ErrorAnswer, find_error_answer, is_timeout

ERRORS: Final = 400
REDIRECTS: Final = 300
_UNREAD: Final = (Endpoint.OTHER, Endpoint.SPEECH)  # their answers pass as they arrive
_TOKENS_PER_SECOND: Final = 200  # of output: few models are faster
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
        "_answered_by",
        "_original_body",
        "_path",
        "_retry_after",
        "_sent_tokens",
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
        self.api_key = (
            profile.read_credential(parsed, headers) if caller is None or caller.api_key is None else caller.api_key
        )
        self.account = core.accounts.account(model, self.api_key)
        if parsed.websocket:
            core.warn_unmetered()
        estimates = self.account.token_estimates
        charge = profile.estimate_charge(
            parsed, output_tokens=estimates.output_tokens, input_ratio=estimates.input_ratio
        )
        self._sent_tokens = charge.input_tokens
        price = self._price(body) if core.is_metered else CallPrice()
        if caller is None:
            self.call_request = core.request(model, charge, free=parsed.free, price=price)
        else:
            self.call_request = core.request_for(caller, model, charge, free=parsed.free, price=price)
        self.changed_body = profile.with_include_usage(parsed, body)
        self.error_kind = ErrorKind.SUCCESS
        self._answered_by = ""
        self._retry_after: float | None = None
        self._status: int | None = None

    def _price(self, body: bytes) -> CallPrice:
        """Return the price of the request, or why it cannot be metered."""
        core, parsed, estimates = self.core, self.parsed, self.account.token_estimates
        model = parsed.model or ""
        unreadable = find_unreadable(parsed, body)
        if unreadable and (price := core.unreadable_call(unreadable)) is not None:
            return price
        if parsed.free or not core.budgets.has_budgets:
            return CallPrice()
        if unpriced := unreadable or find_unpriced(parsed):
            return core.unpriced_call(unpriced, model)
        usage = core.profile.estimate_usage(
            parsed,
            largest_output=estimates.largest_output,
            input_ratio=estimates.input_ratio,
            continued_tokens=core.stored_tokens.get(parsed.previous_response_id),
        )
        self._sent_tokens = max(self._sent_tokens, usage.input_tokens)
        unbounded = parsed.generates_tokens and parsed.max_output_tokens is None
        tokens = _TOKENS_PER_SECOND * parsed.choices
        return core.price(
            model,
            usage,
            alternatives=parsed.alternatives,
            per_second=BilledUsage(output_tokens=tokens, tier=parsed.tier) if unbounded else None,
        )

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
        """Return whether the answer is always passed on as it arrives: an event stream, or from an unknown endpoint."""
        if status >= REDIRECTS:
            return False
        return self._is_unread() or _is_event_stream(content_type)

    def _is_unread(self) -> bool:
        return self.parsed.endpoint in _UNREAD and self.parsed.response_id is None

    def metered_stream(self, permit: Permit, headers: Headers, *, encoding: str = "") -> MeteredStream:
        """Return the stream that meters a streaming answer and releases its permit; `encoding`: of the bytes fed."""
        self.account.answer_began(permit, self._rate_limits(headers))
        meter: UsageMeter | BodyMeter | None = None
        events = _is_event_stream(headers.get("content-type", ""))
        # A free request fetches an answer that was metered when it was generated, unless that was in the background.
        if self.parsed.free and self.parsed.response_id is None:
            pass
        elif events:
            meter = UsageMeter(input_tokens=self._sent_tokens)
        elif not self._is_unread():
            meter = BodyMeter()
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

    def _settle_stream(self, permit: Permit, meter: UsageMeter | BodyMeter | None, end: StreamEnd) -> None:
        """Release the permit of a streaming answer; `meter` has read it, if it can be read."""
        usage = None if meter is None else self._stream_usage(permit, meter, end)
        if meter is not None:
            self._answered_by = meter.model or ""
            self._remember(permit, meter.response_id, usage)
        self.account.settle(permit, self.call_outcome(permit, end.kind, usage))

    def _stream_usage(self, permit: Permit, meter: UsageMeter | BodyMeter, end: StreamEnd) -> Usage | None:
        """Return the usage of a streaming answer; None for as much as was reserved.

        A complete answer that reports none counts as it was reserved: the text does not show hidden reasoning, which
        may have been billed. Of one that broke off, or that was left, the output that arrived is counted, and what may
        have been made before any arrived: a model can think for long before its first word. In the background it goes
        on.
        """
        usage = meter.usage
        if usage is not None and not usage.estimated:
            return usage
        parsed = self.parsed
        if parsed.background or not parsed.generates_tokens or not end.readable or isinstance(meter, BodyMeter):
            return None
        if meter.complete and self.core.is_metered:
            return None
        if end.ended:
            return usage
        output_at = clock.now() if end.output_at is None else end.output_at
        seconds = max(0.0, output_at - permit.granted_at)
        hidden = int(_TOKENS_PER_SECOND * parsed.choices * seconds)
        bound = None if parsed.max_output_tokens is None else parsed.max_output_tokens * parsed.choices
        return meter.unfinished_usage(hidden, bound)

    def _remember(self, permit: Permit, response_id: str | None, usage: Usage | None) -> None:
        """Remember a stored response: its length, for calls that continue it, or that its usage comes later."""
        if self.parsed.endpoint is not Endpoint.RESPONSES or response_id is None or not permit.spend:
            return
        if usage is not None and not usage.estimated:
            self.core.stored_tokens.add(response_id, usage.input_tokens + usage.output_tokens)
        elif self.parsed.background:
            response = BackgroundResponse(self.call_request.model, self.parsed.tier, permit.spend)
            self.core.background.add(response_id, response)

    def _correct_background(self, response_id: str, usage: Usage) -> None:
        """Replace the dollars counted for a response in the background by those of its usage."""
        response = self.core.background.pop(response_id)
        if response is None:
            return
        usd = self.core.cost(response.model, usage.billed(tier=response.tier), answered_by=self._answered_by)
        if usd is not None:
            for counted in response.spend:
                counted.revise(usd)
        self.core.stored_tokens.add(response_id, usage.input_tokens + usage.output_tokens)

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
            outcome = CallOutcome(kind=Outcome.IGNORED, used=_ONE_REQUEST, usd=0.0, rate_limit_headers=rate_limits)
            return AttemptResult(outcome=outcome)
        response = read_response(body)
        self._answered_by = response.model or ""
        self._remember(permit, response.response_id, response.usage)
        kind_of_outcome = Outcome.SUCCESS if response.error_kind is None else response.error_kind.rule.outcome
        return AttemptResult(outcome=self.call_outcome(permit, kind_of_outcome, response.usage, rate_limits))

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
        if sent and not local:
            result = judge_failure(self.account, permit, error)
        else:
            kind = Outcome.IGNORED if local else Outcome.FAULT
            outcome = CallOutcome(kind=kind, released=True, usd=0.0)
            result = AttemptResult(error=error, outcome=outcome, retryable=not local, can_fall_back=not local)
        result.retryable = result.retryable and self._original_body is not None
        return result

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
        if self.parsed.free:  # it fetches an answer, which took its tokens when it was made
            if self.parsed.response_id is not None:
                self._correct_background(self.parsed.response_id, usage)
            return CallOutcome(kind=kind, latency=latency, rate_limit_headers=rate_limit_headers)
        used = self.core.profile.final_charge(self.call_request.charge, usage)
        usd: float | None = 0.0
        if self.core.budgets.has_budgets:
            billed = usage.billed(tier=self.parsed.tier, web_searches=self.parsed.searches)
            usd = self.core.cost(
                self.call_request.model,
                billed,
                answered_by=self._answered_by,
                alternatives=self.parsed.alternatives,
            )
            if usd is None and self.call_request.usd:
                self.core.count_unpriced()
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


def judge_exception(account: SharedAccount, permit: Permit, error: Exception) -> AttemptResult:
    """Return the result of an attempt that raised an exception, for callers whose HTTP messages are not seen here.

    An exception that reports an answer, as those of SDKs do, counts as that answer (429, 400, 500 ...).
    """
    if isinstance(
        error, (Overloaded, InvalidAmount, InvalidSetting)
    ):  # ours: no evidence, and the call was retried already
        outcome = CallOutcome(kind=Outcome.IGNORED, latency=clock.now() - permit.granted_at)
        return AttemptResult(error=error, outcome=outcome)
    answer = find_error_answer(error)
    if answer is None:
        return judge_failure(account, permit, error)
    result = judge_error_answer(account, permit, classify(*answer), answer)
    result.error = error
    return result


def judge_failure(account: SharedAccount, permit: Permit, error: Exception) -> AttemptResult:
    """Return the result of an attempt that was sent, and failed without an answer.

    A caller's own timeout counts against the provider only if its silence is unusual. It is retried once at most, and
    not at all if calls usually take longer than this caller waits: each attempt may be billed in full.
    """
    kind, retryable = Outcome.FAULT, True
    if is_timeout(error):
        verdict = account.judge_timeout(permit)
        if not verdict.fault:
            kind, retryable = Outcome.IGNORED, verdict.retry_may_help and not permit.request.retries
    outcome = CallOutcome(kind=kind, latency=clock.now() - permit.granted_at)
    return AttemptResult(error=error, outcome=outcome, retryable=retryable, can_fall_back=True)


def judge_error_answer(
    account: SharedAccount, permit: Permit, kind: ErrorKind, answer: ErrorAnswer, *, can_resend: bool = True
) -> AttemptResult:
    """Return the result of an attempt that was answered with an error, with its Retry-After and rate limit headers.

    That the account's money is spent (402, or 429 with ``insufficient_quota``) is noted by the account here.

    Args:
        account: of the call.
        permit: of the attempt.
        kind: of the answer.
        answer: the answer.
        can_resend: the request can be sent again.
    """
    headers, wall = answer.headers, clock.wall_time()
    retry_after = read_retry_after(headers, answer.body, wall=wall)
    retry = None if kind is ErrorKind.SPEND_CAP else read_should_retry(headers)
    if kind is ErrorKind.SPEND_CAP:
        seconds = _SUSPENSION if retry_after is None else min(retry_after, _MAX_SUSPENSION)
        account.record_spend_cap(permit, seconds, certain=names_spend_cap(answer.body))
    return judge_error(
        permit,
        kind,
        retry_after=retry_after,
        rate_limits=read_rate_limits(headers, wall=wall),
        rate_scope=read_rate_scope(answer.body),
        says_concurrency=kind is ErrorKind.CONCURRENCY_LIMIT and names_concurrency(answer.body),
        retry=retry if can_resend else False,
    )


def judge_error(  # noqa: PLR0913 - what an error says
    permit: Permit,
    kind: ErrorKind,
    *,
    retry_after: float | None = None,
    rate_limits: tuple[RateLimitHeaders, ...] = (),
    rate_scope: RateScope | None = None,
    says_concurrency: bool = False,
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
        says_concurrency: the answer says that too many calls are in flight.
        retry: whether the call may be retried; None if that follows from the kind.
    """
    rule = kind.rule
    if rule.throttled:  # nothing was used: `RateLimiter.record_throttled` returns what a rate-limited call reserved
        rate_limited = kind is ErrorKind.RATE_LIMIT
        outcome = CallOutcome(
            kind=rule.outcome,
            released=not rate_limited,
            rate_limited=rate_limited,
            spend_cap=kind is ErrorKind.SPEND_CAP,
            rate_scope=rate_scope,
            account_limited=kind is ErrorKind.CONCURRENCY_LIMIT,
            says_concurrency=says_concurrency,
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


def _is_event_stream(content_type: str) -> bool:
    return content_type.lower().startswith("text/event-stream")
