"""Error responses of the gateway itself, in the format that the caller's SDK expects of its provider."""

from __future__ import annotations

import math
import re
from collections.abc import Set as AbstractSet
from typing import Final, Literal

import msgspec

from forebay.errors import Overloaded

ApiProtocol = Literal["openai", "anthropic"]
StreamProtocol = Literal["openai", "openai-responses", "anthropic"]

JSON: Final = "application/json"
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_MAX_BUDGET_WAIT: Final = 6.0  # seconds in which dollars that calls under way have reserved may be returned
_MAX_SDK_WAIT: Final = 60.0  # seconds: an SDK ignores a longer retry-after and retries at once
_SERVER_ERRORS: Final = 500
_UNMETERED: Final = {
    "unreadable": 415,
    "unpriced": 400,
    "unbounded": 400,
}  # status of a call that cannot be counted, by its reason
_PAYMENT, _TIMEOUT, _TOO_LARGE, _TOO_MANY, _BAD_GATEWAY = 402, 408, 413, 429, 502

# The error type of a status. Sources: the error pages of OpenAI ("Error codes") and Anthropic ("Errors").
_OPENAI_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "insufficient_quota",
    404: "invalid_request_error",
    408: "timeout_error",
    413: "invalid_request_error",
    415: "invalid_request_error",
    429: "rate_limit_error",
}
_ANTHROPIC_TYPES: Final = {
    400: "invalid_request_error",
    401: "authentication_error",
    402: "billing_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    415: "invalid_request_error",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


class GatewayResponse(msgspec.Struct, frozen=True):
    """A whole response.

    Attributes:
        status: the HTTP status.
        headers: by name, as they are sent, without content-length.
        body: its bytes.
        names: those of the headers in lower case, and maybe of others that came with them; None to find them out.
    """

    status: int
    headers: tuple[tuple[str, str], ...]
    body: bytes
    names: AbstractSet[str] | None = None


class EarlyResponse(Exception):
    """A response that ends a request before a provider is asked.

    Args:
        response: sent to the caller.
        close: whether to close the connection after it, because the rest of the request cannot be read.
    """

    def __init__(self, response: GatewayResponse, *, close: bool = False) -> None:
        self.response = response
        self.close = close


def printable(text: str) -> str:
    """Return a header's value with a space for each control character, with which it could not be sent."""
    return text if text.isprintable() else _CONTROLS.sub(" ", text)


def error_response(
    protocol: ApiProtocol, status: int, code: str, message: str, *headers: tuple[str, str]
) -> GatewayResponse:
    """Return an error that a retry would not cure (``x-should-retry: false``).

    Args:
        protocol: of the caller's SDK.
        status: the HTTP status.
        code: for programs.
        message: for a person, with what to do.
        headers: to add.
    """
    no_retry = ("x-should-retry", "false")
    body = _body(protocol, status, code, message)
    return GatewayResponse(status, (("content-type", JSON), no_retry, *headers), body)


def capacity_response(
    protocol: ApiProtocol, code: str, message: str, *, seconds: float, limited_by: str | None = None
) -> GatewayResponse:
    """Return an error for a call that the gateway has no capacity for now, with a Retry-After.

    Args:
        protocol: of the caller's SDK.
        code: for programs.
        message: for a person.
        seconds: until the caller should retry.
        limited_by: what the gateway lacks, for the header ``x-forebay-limited-by``.
    """
    status = _unavailable(protocol)
    overloaded = Overloaded(message, limited_by=limited_by, retry_after=seconds)
    headers = (("content-type", JSON), ("x-should-retry", "true"), *overloaded.headers().items())
    return GatewayResponse(status, headers, _body(protocol, status, code, message))


def overloaded_response(protocol: ApiProtocol, error: Overloaded) -> GatewayResponse:
    """Return the response for a call that an upstream rejected, by the limit that rejected it.

    ============================================  ===========================================
    limited by                                    status
    ============================================  ===========================================
    ``budget``                                    402
    ``deadline``, which has passed                408
    ``unreadable``: its body cannot be read       415
    ``unpriced``: a budget cannot count it        400
    ``unbounded``: a strict quota cannot          400
    a quota that the call can never fit           413
    ``breaker``, ``outage``                       503; for Anthropic 529
    a quota, ``concurrency``, the queue, other    429
    ============================================  ===========================================

    With a Retry-After (``retry-after-ms``), a different one for each caller, where a later retry may succeed.
    """
    limit = (error.limited_by or "").rpartition(":")[2]
    if limit in _UNMETERED:
        status = _UNMETERED[limit]
    elif limit == "budget":
        status = _PAYMENT
    elif limit == "deadline" and error.retry_after is None:
        status = _TIMEOUT  # it has passed
    elif error.load == math.inf:
        status = _TOO_LARGE  # the call exceeds its whole quota
    elif limit in ("breaker", "outage"):
        status = _unavailable(protocol)
    else:
        status = _TOO_MANY
    after = error.retry_after
    longest = _MAX_BUDGET_WAIT if status == _PAYMENT else _MAX_SDK_WAIT
    retry = status != _TOO_LARGE and after is not None and after <= longest
    headers = {"content-type": JSON, "x-should-retry": "true" if retry else "false", **error.headers()}
    if status == _TOO_LARGE:
        headers.pop("retry-after", None)
        headers.pop("retry-after-ms", None)
    return GatewayResponse(status, tuple(headers.items()), _body(protocol, status, "forebay_overloaded", str(error)))


def stream_error_event(protocol: StreamProtocol, message: str) -> bytes:
    """Return the event that reports an error within a stream that has started."""
    code = "forebay_upstream_failed"
    if protocol == "anthropic":
        return b"event: error\ndata: " + _body("anthropic", _BAD_GATEWAY, code, message) + b"\n\n"
    body = _body("openai", _BAD_GATEWAY, code, message)
    if protocol == "openai":
        return b"data: " + body + b"\n\n"
    # Some SDKs read the fields of the event, others those of its error. Source: OpenAI's reference of streaming events.
    event = {"type": "error", "code": code, "message": message, "param": None, "sequence_number": 0}
    return b"event: error\ndata: " + msgspec.json.encode({**event, **msgspec.json.decode(body)}) + b"\n\n"


def _unavailable(protocol: ApiProtocol) -> int:
    """Return the status with which a provider of this protocol says that it has no capacity."""
    return 529 if protocol == "anthropic" else 503


def _body(protocol: ApiProtocol, status: int, code: str, message: str) -> bytes:
    if protocol == "anthropic":
        kind = _ANTHROPIC_TYPES.get(status, "invalid_request_error" if status < _SERVER_ERRORS else "api_error")
        return msgspec.json.encode({"type": "error", "error": {"type": kind, "message": message, "code": code}})
    kind = _OPENAI_TYPES.get(status, "invalid_request_error" if status < _SERVER_ERRORS else "server_error")
    return msgspec.json.encode({"error": {"message": message, "type": kind, "param": None, "code": code}})
