"""One HTTP request on its way through an upstream: what it asks, and what its answers come to. Nothing here waits.

It knows no HTTP library: whoever sends it says what came, and adds the answer that its caller gets to what comes back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import msgspec

from forebay import clock, context
from forebay.errors import Overloaded
from forebay.interfaces import Charge, Outcome, RateLimitHeaders
from forebay.task import Priority
from forebay.upstream.call_flow import AttemptResult
from forebay.upstream.call_request import CallOutcome, Permit
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
    read_response,
    read_retry_after,
    read_should_retry,
)
from forebay.upstream.reroute import ReroutedRequest, can_reroute, reroute_request

if TYPE_CHECKING:
    from forebay.upstream.fallback_routes import FallbackRoute
    from forebay.upstream.upstream import Upstream

ERRORS: Final = 400
REDIRECTS: Final = 300
_NOT_NOW: Final = frozenset(
    {
        ErrorKind.RATE_LIMIT,
        ErrorKind.CONCURRENCY_LIMIT,
        ErrorKind.ACCELERATION_LIMIT,
        ErrorKind.OVERLOADED,
        ErrorKind.SPEND_CAP,
    }
)
_COUNTED: Final = Charge()
_STOP: Final = 60.0  # seconds that an account rests when its provider says that its money is spent
_LONGEST_STOP: Final = 3_600.0  # ... however long it says that this lasts: money may be paid in at any time


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """On whose behalf a request is sent, where it does not come from a task that runs here.

    Attributes:
        priority: its rung.
        deadline: the time of `forebay.clock.now` when its answer becomes worthless.
        tenant: who pays for it.
        run: the id of the run that it belongs to, or None.
        key: the API key whose account it is of; None where that is to be read from the request.
    """

    priority: Priority = Priority.NORMAL
    deadline: float = float("inf")
    tenant: str = "default"
    task_id: str | None = None
    api_key: str | None = None


class Exchange:
    """One request, from the account that it belongs to up to the answer that its caller gets.

    Args:
        upstream: through which it goes.
        method: such as ``"POST"``.
        path: of its URL, with the query.
        headers: of the request.
        body: as it is sent; None for one that is read as it is sent, so it cannot be sent again.
        sender: on whose behalf; None for the task that runs here, if one does.

    Attributes:
        upstream: through which it goes.
        key: the API key whose account it is of, as its header has it.
        read: what is asked for.
        desk: of the account that it belongs to.
        ask: what it asks of that account.
        changed: the body to send in place of its own, or None.
        meaning: what its latest answer meant.
    """

    __slots__ = (
        "_after",
        "_content",
        "_path",
        "_status",
        "account",
        "api_key",
        "call_request",
        "changed_body",
        "error_kind",
        "parsed",
        "upstream",
    )  # fmt: skip

    def __init__(  # noqa: PLR0913 - the parts of a request
        self,
        upstream: Upstream,
        *,
        method: str,
        path: str,
        headers: Headers,
        body: bytes | None,
        caller: Caller | None = None,
    ) -> None:
        rules = upstream.profile
        self.upstream = upstream
        self._path = path
        self._content = body
        body = body or b""
        self.parsed = rules.read_request(method, path, headers, body)
        model = self.parsed.model or ""
        self.api_key = _key(headers) if caller is None or caller.api_key is None else caller.api_key
        self.account = upstream.accounts.account(model, self.api_key)
        if self.parsed.websocket:
            upstream.warn_unmetered()
        known = self.account.token_estimates
        charge = rules.estimate_charge(
            self.parsed, output_tokens=known.output_tokens, input_ratio=known.input_ratio.value
        )
        free = self.parsed.free
        if caller is None:
            self.call_request = upstream.request(model, charge, free=free)
        else:
            self.call_request = upstream.request_for(caller, model, charge, free=free)
        self.changed_body = rules.with_include_usage(self.parsed, body)
        self.error_kind = ErrorKind.SUCCESS
        self._after: float | None = None
        self._status: int | None = None

    def report_throttling(self) -> None:
        """The last answer goes to the caller; if it is *not now*, the run that is under way hears of it."""
        if self.error_kind is ErrorKind.SUCCESS:
            return
        refusal = self.throttled_error()
        if refusal is not None and (running := context.call_observer()) is not None:
            running.record_rejection(self.account, refusal)

    # --- where else it may go ---

    def can_reroute(self, stop: FallbackRoute) -> bool:
        """Whether another account could serve it, as far as that is cheap to tell."""
        return self._content is not None and can_reroute(stop, self.parsed, self.call_request.model)

    def reroute(self, stop: FallbackRoute) -> ReroutedRequest | None:
        """The request as it is sent there; None if it cannot be answered there."""
        assert self._content is not None  # noqa: S101 - else it may not leave
        return reroute_request(stop, self._path, self.parsed, self._content, self.api_key)

    def throttled_error(self) -> Overloaded | None:
        """What its provider's latest answer comes to, if that was *not now*."""
        if self.error_kind not in _NOT_NOW:
            return None
        return Overloaded(self.describe_failure(), limited_by=self.account.name, retry_after=self._after)

    def describe_failure(self) -> str:
        """What its latest attempt came to, for a person."""
        if self._status is None:
            return f"{self.upstream.name}: its provider could not be reached"
        return f"{self.upstream.name}: its provider answered {self._status} ({self.error_kind.value})"

    # --- an answer that is still coming ---

    def is_streamed(self, status: int, kind: str) -> bool:
        """Whether the answer is passed on while it comes: events, or what nothing is known of.

        Args:
            status: of the answer.
            kind: its Content-Type.
        """
        return status < REDIRECTS and (self.parsed.endpoint is Endpoint.OTHER or _is_events(kind))

    def metered_stream(self, permit: Permit, headers: Headers) -> MeteredStream:
        """What meters an open answer, and closes its permit."""
        self.account.answer_began(permit, self._notices(headers))
        meter = None
        made = not self.parsed.free  # else it is fetched, and was metered when it was made
        if made and _is_events(headers.get("content-type", "")):
            meter = UsageMeter(stream=True, input_tokens=self.call_request.charge.input_tokens)
        keep = None if self.changed_body is None else UsageFilter()
        return MeteredStream(self, permit, meter, keep, detects_truncation=self.parsed.generates_tokens)

    def stream_result(self) -> AttemptResult:
        """The answer has begun; whoever reads it closes the permit."""
        self.error_kind = ErrorKind.SUCCESS
        return AttemptResult(outcome=CallOutcome(kind=Outcome.SUCCESS), streaming=True)

    # --- what an attempt comes to ---

    def judge_answer(self, permit: Permit, status: int, headers: Headers, body: bytes) -> AttemptResult:
        """The answer is all there; its body without the Content-Encoding."""
        heard = self._notices(headers, always=status >= ERRORS)
        self.error_kind = ErrorKind.SUCCESS
        self._status = status
        if status >= ERRORS:
            meaning = self.error_kind = classify(status, headers, body)
            self._after = read_retry_after(headers, body, wall=clock.wall_time())
            if meaning in _NOT_NOW:
                return self._not_now(headers, heard)
            seconds = clock.now() - permit.granted_at
            ended = CallOutcome(kind=meaning.outcome, used=_COUNTED, usd=0.0, latency=seconds, rate_limit_headers=heard)
            return self._tried(headers, ended)
        if status >= REDIRECTS:
            return AttemptResult(
                outcome=CallOutcome(kind=Outcome.IGNORED, used=_COUNTED, usd=0.0, rate_limit_headers=heard)
            )
        read = read_response(body)
        outcome = Outcome.SUCCESS if read.error_kind is None else read.error_kind.outcome
        return AttemptResult(outcome=self.call_outcome(permit, outcome, read.usage, heard))

    def _notices(self, headers: Headers, *, always: bool = False) -> tuple[RateLimitHeaders, ...]:
        """What the headers of an answer say of the quotas, if that may matter, as it `always` does for a refusal."""
        return read_rate_limits(headers, wall=clock.wall_time()) if always or self.account.needs_headers() else ()

    def _not_now(self, headers: Headers, heard: tuple[RateLimitHeaders, ...]) -> AttemptResult:
        """It was refused at the provider's door: nothing was used."""
        meaning, after = self.error_kind, self._after
        if meaning is ErrorKind.SPEND_CAP:
            self.account.suspend(_STOP if after is None else min(after, _LONGEST_STOP))
        rate = meaning is ErrorKind.RATE_LIMIT
        ended = CallOutcome(
            kind=meaning.outcome,
            released=not rate,
            rate_limited=rate,
            retry_after=after,
            rate_limit_headers=heard,
            usd=0.0,
        )
        return self._tried(headers, ended)

    def _tried(self, headers: Headers, ended: CallOutcome) -> AttemptResult:
        """An attempt that did not succeed; whether there may be another, the provider may say itself."""
        meaning = self.error_kind
        told = None if meaning is ErrorKind.SPEND_CAP else read_should_retry(headers)
        again = self._content is not None and (meaning.retryable if told is None else told)
        elsewhere = meaning in _NOT_NOW or meaning is ErrorKind.FAULT
        return AttemptResult(
            outcome=ended,
            retryable=again,
            uses_attempt=meaning.uses_attempt,
            retry_after=self._after,
            can_fall_back=elsewhere,
        )

    def connection_failed(
        self, permit: Permit, error: Exception, *, sent: bool = True, local: bool = False
    ) -> AttemptResult:
        """The connection failed, before the answer or within it.

        Args:
            permit: of the attempt.
            error: what its caller gets, if it is the last.
            sent: whether a byte may have left.
            ours: the provider had no part in it, and another attempt would not help.
        """
        self.error_kind = ErrorKind.FAULT
        self._status = None
        outcome = Outcome.IGNORED if local else Outcome.FAULT
        if sent and not local:
            ended = CallOutcome(kind=outcome, latency=clock.now() - permit.granted_at)
        else:
            ended = CallOutcome(kind=outcome, released=True, usd=0.0)
        return AttemptResult(
            error=error, outcome=ended, retryable=self._content is not None and not local, can_fall_back=not local
        )

    # --- what the account hears ---

    def call_outcome(
        self,
        permit: Permit,
        outcome: Outcome,
        usage: Usage | None,
        rate_limit_headers: tuple[RateLimitHeaders, ...] = (),
    ) -> CallOutcome:
        """How a call ended that was answered, with what it used."""
        seconds = clock.now() - permit.granted_at
        if usage is None:
            return CallOutcome(kind=outcome, latency=seconds, rate_limit_headers=rate_limit_headers)
        used = self.upstream.profile.final_charge(self.call_request.charge, usage)
        usd = 0.0
        if self.upstream.has_budgets:
            made = Charge(input_tokens=usage.input_tokens, output_tokens=usage.output_tokens)
            usd = self.upstream.cost(self.call_request.model, made, cached_tokens=usage.cache_read_tokens)
        told = outcome is Outcome.SUCCESS and not usage.estimated
        return CallOutcome(
            kind=outcome,
            used=used,
            usd=usd,
            latency=seconds,
            output_tokens=usage.output_tokens,
            estimated_input_tokens=self.parsed.input_tokens if told else None,
            rate_limit_headers=rate_limit_headers,
        )


def _key(headers: Headers) -> str:
    """The API key of a request, or nothing."""
    for name in ("authorization", "x-api-key", "api-key"):
        if key := headers.get(name):
            return key
    return ""


def _is_events(kind: str) -> bool:
    return kind.lower().startswith("text/event-stream")
