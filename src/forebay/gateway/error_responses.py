"""Answers of the gateway's own, in the shape that the caller's SDK expects of its provider."""

from __future__ import annotations

import math
from typing import Final, Literal

import msgspec

from forebay.errors import Overloaded

ApiProtocol = Literal["openai", "anthropic"]

JSON: Final = "application/json"
_LONGEST_COMEBACK: Final = 60.0  # seconds: an SDK that is told to stay away longer comes back at once instead

# What kind of error a status is. Sources: the error pages of OpenAI ("Error codes") and Anthropic ("Errors").
_OPENAI_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    404: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class GatewayResponse(msgspec.Struct, frozen=True):
    """A whole answer.

    Attributes:
        status: of HTTP.
        headers: by name, as they go out; the length of the body is not among them.
        body: its bytes.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes


class EarlyResponse(Exception):
    """A request was answered here; nobody else is asked.

    Args:
        answer: what it is told.
        close: whether its connection ends with it, for what else comes on it cannot be read.
    """

    def __init__(self, response: GatewayResponse, *, close: bool = False) -> None:
        self.response = response
        self.close = close


def error_response(
    protocol: ApiProtocol, status: int, code: str, message: str, *headers: tuple[str, str]
) -> GatewayResponse:
    """An error that another attempt would not cure.

    Args:
        protocol: whose shape it takes.
        status: of HTTP.
        code: one word for programs.
        message: for a person: what to do.
        headers: to add.
    """
    stay = ("x-should-retry", "false")
    return GatewayResponse(status, (("content-type", JSON), stay, *headers), _body(protocol, status, code, message))


def capacity_response(protocol: ApiProtocol, code: str, message: str, *, seconds: float) -> GatewayResponse:
    """There is no room in the gateway itself for a call, but in so many `seconds` there may be.

    Args:
        protocol: whose shape it takes.
        code: one word for programs.
        message: for a person.
        seconds: after which to come again.
    """
    status = _busy(protocol)
    back = (("x-should-retry", "true"), *_after(seconds))
    return GatewayResponse(status, (("content-type", JSON), *back), _body(protocol, status, code, message))


def overloaded_response(protocol: ApiProtocol, error: Overloaded) -> GatewayResponse:
    """A call that was not let through; when to come back is in ``retry-after-ms``, each caller another time."""
    part = (error.limited_by or "").rpartition(":")[2]
    if part == "budget":
        status = 402
    elif part == "deadline" and error.retry_after is None:
        status = 408  # it has passed
    elif error.load == math.inf:
        status = 413  # it is larger than its bucket will ever be
    elif part in ("breaker", "outage"):
        status = _busy(protocol)
    else:
        status = 429
    after = error.retry_after
    back = status not in (402, 413) and after is not None and after <= _LONGEST_COMEBACK
    headers = [("content-type", JSON), ("x-should-retry", "true" if back else "false")]
    if error.limited_by:
        headers.append(("x-forebay-limited-by", error.limited_by))
    if after is not None and status != 413:  # noqa: PLR2004
        headers.extend(_after(after))
    return GatewayResponse(status, tuple(headers), _body(protocol, status, "forebay_overloaded", str(error)))


def stream_error_event(protocol: ApiProtocol, message: str) -> bytes:
    """The event that tells of an error where an answer has begun as a stream."""
    body = _body(protocol, 502, "forebay_upstream_failed", message)
    return b"event: error\ndata: " + body + b"\n\n" if protocol == "anthropic" else b"data: " + body + b"\n\n"


def _busy(protocol: ApiProtocol) -> int:
    """The status of a provider that takes nobody now."""
    return 529 if protocol == "anthropic" else 503


def _after(seconds: float) -> tuple[tuple[str, str], ...]:
    return ("retry-after", str(math.ceil(seconds))), ("retry-after-ms", str(math.ceil(1000 * seconds)))


def _body(protocol: ApiProtocol, status: int, code: str, message: str) -> bytes:
    if protocol == "anthropic":
        kind = _ANTHROPIC_TYPES.get(status, "api_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message, "code": code}})
    kind = _OPENAI_TYPES.get(status, "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})
