"""The table of provider errors: what a status (429, 402, 408, 503, 529...) or error code means, and what follows.

`classify` reads a response in this order: the error code in its body, then the wording of its message, then its headers
(Retry-After, a rate limit with nothing left), then its status. It returns an `ErrorKind`; the kind's `ErrorRule` says
whether the call is retried, what counts it (limit, quota or circuit breaker), whether it may fall back, and what the
caller gets. `docs/providers.md` shows the same tables, printed from here.

Sources: the error pages of OpenAI ("Error codes"), Anthropic ("Errors") and Azure OpenAI; the sources of Ollama,
llama.cpp's server and vLLM; the retry code of the SDKs of OpenAI and Anthropic (408, 409, 429, 5xx).
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from types import MappingProxyType
from typing import Any, Final

import msgspec

from forebay.interfaces import Outcome
from forebay.upstream.providers.http_headers import RATE_LIMIT_MARK, RETRY_AFTER_HEADERS, normalize_headers

_MAX_BODY: Final = 65_536  # bytes; a longer error body is not decoded
_MAX_TEXT: Final = 4096  # characters of a message that are searched
_FIRST_ERROR_STATUS: Final = 400
_FIRST_SERVER_ERROR: Final = 500


class ErrorKind(Enum):
    """The meaning of a response, for its call and for the calls after it.

    The value appears in messages of `forebay.Overloaded`, so it contains no word that agent frameworks retry on.
    """

    __hash__ = object.__hash__  # Enum hashes its name in Python, and each call looks kinds up

    SUCCESS = "success"
    RATE_LIMIT = "rate"
    CONCURRENCY_LIMIT = "concurrency"
    ACCELERATION_LIMIT = "acceleration"
    OVERLOADED = "overloaded"
    SPEND_CAP = "spend_cap"
    FAULT = "fault"
    TRANSIENT = "transient"
    CLIENT_ERROR = "client_error"

    @property
    def rule(self) -> ErrorRule:
        """The consequences of this kind."""
        return ERROR_RULES[self]


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorRule:
    """The consequences of one kind of response: a row of the table.

    Attributes:
        meaning: in a few words.
        outcome: for the account's limit and circuit breaker: SUCCESS; OVERLOAD counts for the limit and the outage
            detector; FAULT counts for the circuit breaker, if the attempt is the last of its call; IGNORED for neither.
        retryable: whether another attempt may succeed, unless the provider says otherwise (``x-should-retry``).
        throttled: whether the provider rejected the call before doing any work, so that nothing was used.
        can_fall_back: whether another account of the fallback chain may serve the call.
        counted_by: the part of the account that reacts, and how.
        caller_gets: when no attempt is left. A retry needs a permit of its own, and may be rejected instead.
    """

    meaning: str
    outcome: Outcome
    retryable: bool
    throttled: bool
    can_fall_back: bool
    counted_by: str
    caller_gets: str

    @property
    def uses_attempt(self) -> bool:
        """True if a retry uses one of `Retry.max_attempts`; only that of a throttled call does not."""
        return not self.throttled


_PROVIDERS_RESPONSE: Final = "the provider's response"
_REJECTED_RETRY: Final = "or `Overloaded` if the account rejects the retry"
_CONGESTION_COUNTED: Final = (
    "limit, if it is learned: lowered once such responses are too many to be chance; "
    "outage detector: rejects calls once none was accepted for `max_wait`"
)

ERROR_RULES: Final[Mapping[ErrorKind, ErrorRule]] = MappingProxyType(
    {
        ErrorKind.SUCCESS: ErrorRule(
            meaning="no error",
            outcome=Outcome.SUCCESS,
            retryable=False,
            throttled=False,
            can_fall_back=False,
            counted_by="quota: settled by the usage; limit: may grow",
            caller_gets=_PROVIDERS_RESPONSE,
        ),
        ErrorKind.RATE_LIMIT: ErrorRule(
            meaning="a quota (requests or tokens per period) is used up",
            outcome=Outcome.IGNORED,  # not congestion: the quota paces the calls, and fewer in flight would not help
            retryable=True,
            throttled=True,
            can_fall_back=True,
            counted_by=(
                "quota: the one that it fits is lowered; account: pauses its calls, and learns the rate; limit: as "
                "congestion, if evidence is for a limit on calls in flight"
            ),
            caller_gets=f"{_PROVIDERS_RESPONSE}, {_REJECTED_RETRY}",
        ),
        ErrorKind.CONCURRENCY_LIMIT: ErrorRule(
            meaning="too many calls in flight; also a 429 that gives no reason",
            outcome=Outcome.OVERLOAD,
            retryable=True,
            throttled=True,
            can_fall_back=True,
            counted_by=f"{_CONGESTION_COUNTED}; account: as `RATE_LIMIT`, if evidence is for a rate",
            caller_gets=f"{_PROVIDERS_RESPONSE}, {_REJECTED_RETRY}",
        ),
        ErrorKind.ACCELERATION_LIMIT: ErrorRule(
            meaning="usage grows too fast",
            outcome=Outcome.OVERLOAD,
            retryable=True,
            throttled=True,
            can_fall_back=True,
            counted_by=_CONGESTION_COUNTED,
            caller_gets=f"{_PROVIDERS_RESPONSE}, {_REJECTED_RETRY}",
        ),
        ErrorKind.OVERLOADED: ErrorRule(
            meaning="the provider has no capacity, for any customer",
            outcome=Outcome.OVERLOAD,
            retryable=True,
            throttled=True,
            can_fall_back=True,
            counted_by=_CONGESTION_COUNTED,
            caller_gets=f"{_PROVIDERS_RESPONSE}, {_REJECTED_RETRY}",
        ),
        ErrorKind.SPEND_CAP: ErrorRule(
            meaning="the account's money at the provider is used up",
            outcome=Outcome.IGNORED,
            retryable=False,  # every retry would be rejected, whatever x-should-retry says
            throttled=True,
            can_fall_back=True,
            counted_by=(
                "account: sends nothing but free calls for 60 s, or for Retry-After up to 1 h, and then one call at a "
                "time until one succeeds; without an error code once every call was refused so for 2 s, or "
                "twice the longest time between two accepted ones of the last minutes, and for 2 s at first"
            ),
            caller_gets=f"{_PROVIDERS_RESPONSE}; the calls after it `Overloaded`, limited by `budget`",
        ),
        ErrorKind.FAULT: ErrorRule(
            meaning="the provider, or the way to it, is broken",
            outcome=Outcome.FAULT,
            retryable=True,
            throttled=False,
            can_fall_back=True,
            counted_by="circuit breaker: counts the last attempt; "
            "retry budget for failures: counts each retry that is not served",
            caller_gets=f"{_PROVIDERS_RESPONSE} or the connection error, {_REJECTED_RETRY}",
        ),
        ErrorKind.TRANSIENT: ErrorRule(
            meaning="says nothing about the provider, and another attempt may succeed",
            outcome=Outcome.IGNORED,
            retryable=True,
            throttled=False,
            can_fall_back=False,
            counted_by="retry budget for failures: counts each retry that is not served",
            caller_gets=f"{_PROVIDERS_RESPONSE}, {_REJECTED_RETRY}",
        ),
        ErrorKind.CLIENT_ERROR: ErrorRule(
            meaning="the request is wrong, and would be wrong again",
            outcome=Outcome.IGNORED,
            retryable=False,
            throttled=False,
            can_fall_back=False,
            counted_by="nothing",
            caller_gets=_PROVIDERS_RESPONSE,
        ),
    }
)
"""The rule for each kind of response."""


@dataclass(frozen=True, slots=True)
class StatusRule:
    """The meaning of a status by itself, and the kinds that the rest of the response may turn it into.

    Attributes:
        kind: if neither body nor headers say more.
        by_body: kinds that an error code or the wording of a message may turn it into.
        by_headers: the kind if the headers name a quota: Retry-After, or a rate limit with nothing left.
    """

    kind: ErrorKind
    by_body: frozenset[ErrorKind] = frozenset({ErrorKind.SPEND_CAP})
    by_headers: ErrorKind | None = None


_CAPACITY: Final = StatusRule(ErrorKind.OVERLOADED, frozenset({ErrorKind.SPEND_CAP, ErrorKind.ACCELERATION_LIMIT}))
STATUS_RULES: Final[Mapping[int, StatusRule]] = MappingProxyType(
    {
        402: StatusRule(ErrorKind.SPEND_CAP),
        408: StatusRule(ErrorKind.TRANSIENT),
        409: StatusRule(ErrorKind.TRANSIENT),
        425: StatusRule(ErrorKind.TRANSIENT),
        # A 429 without reason, time or empty quota is taken for a concurrency limit at first: no provider has headers
        # for that one, and the limit tells congestion from noise. `RefusalCause` weighs it against the evidence.
        429: StatusRule(ErrorKind.CONCURRENCY_LIMIT, frozenset(ErrorKind), by_headers=ErrorKind.RATE_LIMIT),
        503: _CAPACITY,
        529: _CAPACITY,
    }
)
"""The kinds of single statuses; `OTHER_4XX` and `OTHER_5XX` hold for the others."""

OTHER_4XX: Final = StatusRule(ErrorKind.CLIENT_ERROR)
OTHER_5XX: Final = StatusRule(ErrorKind.FAULT, frozenset({ErrorKind.SPEND_CAP, ErrorKind.OVERLOADED}))
NO_RESPONSE: Final = ErrorKind.FAULT
"""The kind of an attempt without a response: a connection error, a stream that was cut off, or an unusual silence."""

ERROR_CODES: Final[Mapping[str, ErrorKind]] = MappingProxyType(
    {
        "insufficient_quota": ErrorKind.SPEND_CAP,
        "billing_hard_limit_reached": ErrorKind.SPEND_CAP,
        "billing_not_active": ErrorKind.SPEND_CAP,
        "billing_error": ErrorKind.SPEND_CAP,
        "enforced_spend_limit_reached": ErrorKind.SPEND_CAP,
        "insufficient_balance": ErrorKind.SPEND_CAP,
        "slow_down": ErrorKind.ACCELERATION_LIMIT,
        "overloaded_error": ErrorKind.OVERLOADED,
        "engine_overloaded": ErrorKind.OVERLOADED,
        "nocapacity": ErrorKind.OVERLOADED,
        "unavailable_error": ErrorKind.OVERLOADED,  # llama.cpp, while it loads its model
        "resource_exhausted": ErrorKind.RATE_LIMIT,  # Google's, even where its message speaks of billing
    }
)
"""Kinds by the code or type of an error, in lower case, under any status that allows it."""

STREAM_ERROR_CODES: Final[Mapping[str, ErrorKind]] = MappingProxyType(
    {
        "rate_limit_error": ErrorKind.RATE_LIMIT,
        "rate_limit_exceeded": ErrorKind.RATE_LIMIT,
        "invalid_request_error": ErrorKind.CLIENT_ERROR,
        "authentication_error": ErrorKind.CLIENT_ERROR,
        "permission_error": ErrorKind.CLIENT_ERROR,
        "not_found_error": ErrorKind.CLIENT_ERROR,
        "request_too_large": ErrorKind.CLIENT_ERROR,
        "invalid_prompt": ErrorKind.CLIENT_ERROR,
    }
)
"""The kinds of further codes in the middle of a stream, where there is no status."""

_WORDINGS: Final = (
    # Anthropic, both 400: "Your credit balance is too low", "You have reached your specified API usage limits". Behind
    # a colon, a quotation mark or a bracket it is more likely part of a request that the message repeats.
    (
        r"^[^:\"'`({\[]*(?:credit balance|insufficient (?:credits|balance)|spend(?:ing)? limit|api usage limits)",
        "SPEND_CAP",
    ),
    # OpenAI says "Request too large for gpt-4o" of a request that exceeds the whole quota
    (r"request too large", "CLIENT_ERROR"),
    # Anthropic speaks of a "maximum usage increase rate", and asks to "scale up more gradually"
    (r"acceleration limit|usage increase rate|more gradually", "ACCELERATION_LIMIT"),
    (r"concurren|in flight|simultaneous|parallel requests", "CONCURRENCY_LIMIT"),
    # OpenAI says "The engine is currently overloaded", Azure "experiencing high demand", Ollama "server busy"
    (r"overloaded|high demand|server busy|peak load|no slots available", "OVERLOADED"),
    (
        r"per (?:second|sec|minute|min|hour|day)\b|/ ?min\b|\b[io]?[rt]p[md]\b|(?:token|call|request) rate limit",
        "RATE_LIMIT",
    ),
)
WORDINGS: Final = tuple((re.compile(pattern), ErrorKind[name]) for pattern, name in _WORDINGS)
"""Kinds by the wording of a message, in lower case; the first that matches counts."""


def classify(status: int | None, headers: Mapping[str, str], body: bytes = b"") -> ErrorKind:
    """Return the kind of a response, by the tables above.

    Args:
        status: of the response; None if none came (a connection error or a timeout).
        headers: of the response.
        body: without its Content-Encoding; it may be empty, cut off, or anything but JSON.
    """
    if status is None:
        return NO_RESPONSE
    if status < _FIRST_ERROR_STATUS:
        return ErrorKind.SUCCESS
    rule = STATUS_RULES.get(status) or (OTHER_5XX if status >= _FIRST_SERVER_ERROR else OTHER_4XX)
    kind = _kind_in_body(body)
    if kind in rule.by_body:
        return kind
    if rule.by_headers is not None and _names_a_quota(headers):
        return rule.by_headers
    return rule.kind


def names_spend_cap(body: bytes) -> bool:
    """Return whether the code of an error says that the account's money is used up, not only a status or a message."""
    return any(ERROR_CODES.get(code) is ErrorKind.SPEND_CAP for code in _error_codes(_decode_error(body)))


def classify_stream_error(error: Any) -> ErrorKind:
    """Return the kind of an error that is reported in the middle of a stream, under the status 200.

    Args:
        error: decoded from the event: an object, a string or anything else.
    """
    kind, message = _read_error(error)
    if kind is not None:
        return kind
    for code in _error_codes(error):
        if code in STREAM_ERROR_CODES:
            return STREAM_ERROR_CODES[code]
    return _kind_by_wording(message) or ErrorKind.FAULT


def _names_a_quota(headers: Mapping[str, str]) -> bool:
    """Return whether the headers of a 429 say when to come back, or show a rate limit with nothing left."""
    found = normalize_headers(headers)
    if not found.keys().isdisjoint(RETRY_AFTER_HEADERS):
        return True
    return any(
        RATE_LIMIT_MARK in name and "remaining" in name and value in ("0", "0.0") for name, value in found.items()
    )


def _kind_in_body(body: bytes) -> ErrorKind | None:
    """Return the kind of an error by its body; None if the body does not show it."""
    if not body:
        return None
    error = _decode_error(body)
    if error is None:
        return _kind_by_wording(body[:_MAX_TEXT].decode("utf-8", "replace").lower())
    kind, message = _read_error(error)
    return kind or _kind_by_wording(message)


def _decode_error(body: bytes) -> Any:
    """Return the error object (or text) in the body of a response; None if it is not JSON, or too long."""
    try:
        error = msgspec.json.decode(body) if len(body) <= _MAX_BODY else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if isinstance(error, list) and error:  # Google's OpenAI-compatible endpoint wraps errors in a list
        error = error[0]
    return (error.get("error") or error) if isinstance(error, dict) else None


def _read_error(error: Any) -> tuple[ErrorKind | None, str]:
    """Return the kind of an error by its code or type; if these are unknown, None and its message in lower case."""
    if not isinstance(error, dict):
        return None, error[:_MAX_TEXT].lower() if isinstance(error, str) else ""
    for code in _error_codes(error):
        if code in ERROR_CODES:
            return ERROR_CODES[code], ""
    message = error.get("message")
    return None, message[:_MAX_TEXT].lower() if isinstance(message, str) else ""


def _error_codes(error: Any) -> list[str]:
    """Return an error's codes and types in lower case, with those of inner errors (Azure's, Anthropic's details)."""
    if not isinstance(error, dict):
        return []
    inner = [error.get(name) for name in ("innererror", "details")]
    objects = [error, *(part for part in inner if isinstance(part, dict))]
    codes = [part.get(field) for part in objects for field in ("code", "type", "status", "error_code")]
    return [code.lower() for code in codes if isinstance(code, str)]


def _kind_by_wording(message: str) -> ErrorKind | None:
    return next((kind for wording, kind in WORDINGS if wording.search(message)), None)
