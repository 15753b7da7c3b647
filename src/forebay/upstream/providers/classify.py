"""What an answer means: which limit refused it, or who is at fault."""

from __future__ import annotations

import re
from collections.abc import Mapping
from enum import Enum
from typing import Any, Final

import msgspec

from forebay.interfaces import Outcome
from forebay.upstream.providers.http_headers import RATE_LIMIT_MARK, normalize_headers

_LONGEST: Final = 65_536  # bytes of an error's body worth decoding
_WORDS: Final = 4096  # characters of it worth reading


class ErrorKind(Enum):
    """What an answer means to whoever sent the call, and to those who come after it."""

    __hash__ = object.__hash__  # an enum hashes its name, in Python; each call looks some up

    SUCCESS = "success"
    RATE_LIMIT = "rate"  # a quota is used up: pace it
    CONCURRENCY_LIMIT = "concurrency"  # too many at once, or a refusal that gives no reason: lower the limit
    ACCELERATION_LIMIT = "acceleration"  # use grows too fast: grow slower
    OVERLOADED = "overloaded"  # the provider has no capacity left, for anybody
    SPEND_CAP = "spend_cap"  # the money is used up: stop, for every retry would be refused
    FAULT = "fault"  # the provider is broken, or the way to it
    TRANSIENT = "try_again"  # 408, 409, 425: says nothing of the provider, and another try may do
    CLIENT_ERROR = "client_error"  # the request is wrong and stays so

    @property
    def outcome(self) -> Outcome:
        """What it says to a limit and a breaker. A used-up quota is no congestion: it is paced, not fled from."""
        return _OUTCOMES.get(self, Outcome.IGNORED)

    @property
    def retryable(self) -> bool:
        """Whether another attempt may help."""
        return self not in _FINAL

    @property
    def uses_attempt(self) -> bool:
        """Whether an attempt is used up by it: not by *not now*, which the deadline bounds."""
        return self in (ErrorKind.FAULT, ErrorKind.TRANSIENT)


_OUTCOMES: Final = {
    ErrorKind.SUCCESS: Outcome.SUCCESS,
    ErrorKind.CONCURRENCY_LIMIT: Outcome.OVERLOAD,
    ErrorKind.ACCELERATION_LIMIT: Outcome.OVERLOAD,
    ErrorKind.OVERLOADED: Outcome.OVERLOAD,
    ErrorKind.FAULT: Outcome.FAULT,
}
_FINAL: Final = frozenset({ErrorKind.SUCCESS, ErrorKind.SPEND_CAP, ErrorKind.CLIENT_ERROR})

# The codes and types of errors, lower case. Sources: the error pages of OpenAI ("Error codes"), Anthropic ("Errors"),
# Azure OpenAI, and the sources of Ollama, llama.cpp's server and vLLM.
_CODES: Final = {
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
    "resource_exhausted": ErrorKind.RATE_LIMIT,  # Google's, whatever its words say of billing
}
_WORDINGS: Final = [
    # Anthropic, both 400: "Your credit balance is too low", "You have reached your specified API usage limits"
    (
        re.compile(r"credit balance|insufficient (?:credits|balance)|spend(?:ing)? limit|specified api usage limits"),
        ErrorKind.SPEND_CAP,
    ),
    # OpenAI says "Request too large for gpt-4o" of what is larger than the bucket ever is
    (re.compile(r"request too large"), ErrorKind.CLIENT_ERROR),
    # Anthropic speaks of a "maximum usage increase rate", and asks to "scale up more gradually"
    (re.compile(r"acceleration limit|usage increase rate|more gradually"), ErrorKind.ACCELERATION_LIMIT),
    (re.compile(r"concurren|in flight|simultaneous|parallel requests"), ErrorKind.CONCURRENCY_LIMIT),
    # OpenAI says "The engine is currently overloaded", Azure "experiencing high demand", Ollama "server busy"
    (re.compile(r"overloaded|high demand|server busy|peak load|no slots available"), ErrorKind.OVERLOADED),
    (
        re.compile(
            r"per (?:second|sec|minute|min|hour|day)\b|/ ?min\b|\b[io]?[rt]p[md]\b|(?:token|call|request) rate limit"
        ),
        ErrorKind.RATE_LIMIT,
    ),
]
_IN_STREAM: Final = {
    "rate_limit_error": ErrorKind.RATE_LIMIT,
    "rate_limit_exceeded": ErrorKind.RATE_LIMIT,
    "invalid_request_error": ErrorKind.CLIENT_ERROR,
    "authentication_error": ErrorKind.CLIENT_ERROR,
    "permission_error": ErrorKind.CLIENT_ERROR,
    "not_found_error": ErrorKind.CLIENT_ERROR,
    "request_too_large": ErrorKind.CLIENT_ERROR,
    "invalid_prompt": ErrorKind.CLIENT_ERROR,
}
_REFUSED, _SPENT, _UNAVAILABLE, _OVERLOADED = 429, 402, 503, 529
_ERRORS, _SERVER_ERRORS = 400, 500
_AGAIN: Final = frozenset({408, 409, 425})  # 408 and 409 as the SDKs of OpenAI and Anthropic retry them


def classify(status: int, headers: Mapping[str, str], body: bytes = b"") -> ErrorKind:
    """What an answer with this status means. The body may be empty, no JSON, or not all there.

    A 429 that gives no reason, no time and no quota that is used up counts as CONCURRENCY: that is the one limit of
    which providers say nothing in headers, and the limiter tells noise from congestion.
    """
    if status < _ERRORS:
        return ErrorKind.SUCCESS
    told = _kind_in_body(body)
    if status == _SPENT or told is ErrorKind.SPEND_CAP:
        return ErrorKind.SPEND_CAP
    if status == _REFUSED:
        return told or (ErrorKind.RATE_LIMIT if _names_a_quota(headers) else ErrorKind.CONCURRENCY_LIMIT)
    if status in (_UNAVAILABLE, _OVERLOADED):
        return told if told is ErrorKind.ACCELERATION_LIMIT else ErrorKind.OVERLOADED
    if status >= _SERVER_ERRORS:
        return told if told is ErrorKind.OVERLOADED else ErrorKind.FAULT
    return ErrorKind.TRANSIENT if status in _AGAIN else ErrorKind.CLIENT_ERROR


def classify_stream_error(error: Any) -> ErrorKind:
    """What an error means that is told in the middle of an answer, when the status has long been 200."""
    code_meaning, words = _read_error(error)
    if code_meaning is not None:
        return code_meaning
    for name in _error_codes(error):
        if name in _IN_STREAM:
            return _IN_STREAM[name]
    return _kind_by_wording(words) or ErrorKind.FAULT


def _names_a_quota(headers: Mapping[str, str]) -> bool:
    """Whether the headers of a refusal tell of a quota: one that is used up, or when to come back."""
    told = normalize_headers(headers)
    if "retry-after" in told or "retry-after-ms" in told:
        return True
    return any(
        RATE_LIMIT_MARK in name and "remaining" in name and value in ("0", "0.0") for name, value in told.items()
    )


def _kind_in_body(body: bytes) -> ErrorKind | None:
    """What the body of an error says; None if it says nothing that is known."""
    if not body:
        return None
    error: Any = None
    if len(body) <= _LONGEST:
        try:
            error = msgspec.json.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError):
            error = None
    if isinstance(error, list) and error:  # Google's compatible endpoint wraps its errors in a list
        error = error[0]
    if not isinstance(error, dict):
        return _kind_by_wording(body[:_WORDS].decode("utf-8", "replace").lower())
    code_meaning, words = _read_error(error.get("error", error))
    return code_meaning or _kind_by_wording(words)


def _read_error(error: Any) -> tuple[ErrorKind | None, str]:
    """What an error's code or type means, and its words in lower case."""
    if not isinstance(error, dict):
        return None, error[:_WORDS].lower() if isinstance(error, str) else ""
    for name in _error_codes(error):
        if name in _CODES:
            return _CODES[name], ""
    message = error.get("message")
    return None, message[:_WORDS].lower() if isinstance(message, str) else ""


def _error_codes(error: Any) -> list[str]:
    """The codes and types that an error bears, its inner ones (Azure, Anthropic's details) included."""
    if not isinstance(error, dict):
        return []
    inner = [error.get(name) for name in ("innererror", "details")]
    every = [error, *(part for part in inner if isinstance(part, dict))]
    names = [part.get(field) for part in every for field in ("code", "type", "status", "error_code")]
    return [name.lower() for name in names if isinstance(name, str)]


def _kind_by_wording(words: str) -> ErrorKind | None:
    return next((meaning for wording, meaning in _WORDINGS if wording.search(words)), None)
