"""How a provider puts its limits and its refusals: statuses, headers and error bodies of OpenAI and of Anthropic.

Shapes and meanings as their public references and recorded answers have them (2024 to 2026):

- OpenAI: resets are durations until *full again* (``6m0s``, ``1.2s``, ``20ms``); ``retry-after`` in whole seconds and
  ``retry-after-ms``; the error's ``type`` tells requests from tokens; a spent account is a 429 with the code
  ``insufficient_quota``; a sudden rise is a 503 *slow down*.
- Anthropic: resets are moments (RFC 3339, UTC) when it is full again; ``retry-after`` in whole seconds; every 429 has
  the type ``rate_limit_error`` and only its words tell which; the concurrency kind comes without any limit's headers;
  overload is 529.
- Both, from the machines in front of them: a 502 is a page of HTML, a 503 has an empty body, neither has headers.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import msgspec

from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect, Unit
from forebay.simulation.provider.rate_meters import MeterReading, RateShortage

_HTML: Final = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
_LIMITED: Final = frozenset(
    {RefusalReason.REQUESTS, RefusalReason.TOKENS, RefusalReason.INPUT_TOKENS, RefusalReason.OUTPUT_TOKENS}
)
_ORGANIZATION: Final = "org-plant"


@dataclass(frozen=True, slots=True)
class RefusalDetails:
    """What a refusal has to tell."""

    reason: RefusalReason
    model: str
    shortage: RateShortage | None = None
    next_minute_limit: float = 0.0  # of an acceleration limit, in the next minute


@dataclass(frozen=True, slots=True)
class HttpReply:
    """A refusal as it goes over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


def format_duration(seconds: float) -> str:
    """Seconds as OpenAI writes them, to the millisecond: ``20ms``, ``1.2s``, ``6m0s``, ``1h0m0s``."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:  # noqa: PLR2004 - a second
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text


def format_timestamp(epoch: float) -> str:
    """A moment as Anthropic writes it: RFC 3339 in UTC, whole seconds, never early."""
    return dt.datetime.fromtimestamp(math.ceil(epoch - 1e-6), dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rate_limit_headers(dialect: Dialect, readings: Iterable[MeterReading], wall: float) -> dict[str, str]:
    """What every answer tells of the account's limits; `wall` is the time in epoch seconds."""
    headers: dict[str, str] = {}
    for reading in readings:
        kind = reading.unit.value.replace("_", "-")
        limit, remaining = f"{reading.limit:.0f}", f"{math.floor(reading.remaining + 1e-6)}"
        if dialect is Dialect.OPENAI:
            headers[f"x-ratelimit-limit-{kind}"] = limit
            headers[f"x-ratelimit-remaining-{kind}"] = remaining
            headers[f"x-ratelimit-reset-{kind}"] = format_duration(reading.full_in)
        else:
            headers[f"anthropic-ratelimit-{kind}-limit"] = limit
            headers[f"anthropic-ratelimit-{kind}-remaining"] = remaining
            headers[f"anthropic-ratelimit-{kind}-reset"] = format_timestamp(wall + reading.full_in)
    if dialect is Dialect.ANTHROPIC:
        headers |= _combined_token_headers(headers)
    return headers


def _combined_token_headers(headers: dict[str, str]) -> dict[str, str]:
    """Anthropic's ``tokens`` headers, where only input and output have allowances: their sum, and the earlier reset."""
    family = "anthropic-ratelimit-{}tokens-{}"
    parts = [p for p in ("input-", "output-") if family.format(p, "limit") in headers]
    if not parts or family.format("", "limit") in headers:
        return {}
    combined = {
        family.format("", field): str(sum(int(headers[family.format(part, field)]) for part in parts))
        for field in ("limit", "remaining")
    }
    return combined | {family.format("", "reset"): min(headers[family.format(part, "reset")] for part in parts)}


def retry_after_headers(dialect: Dialect, wait: float) -> dict[str, str]:
    """When to come back, in `wait` seconds; nothing for never."""
    if math.isinf(wait):
        return {}
    ms = math.ceil(wait * 1000 - 1e-6)
    headers = {"retry-after": str(math.ceil(ms / 1000))}
    return headers | {"retry-after-ms": str(ms)} if dialect is Dialect.OPENAI else headers


def request_id_header(dialect: Dialect, request_id: str) -> dict[str, str]:
    """The header that names a request in a conversation with the provider's support."""
    return {"x-request-id" if dialect is Dialect.OPENAI else "request-id": request_id}


def refusal_response(dialect: Dialect, why: RefusalDetails, limits: dict[str, str], request_id: str) -> HttpReply:
    """A refusal in full; `limits` are the account's limit headers, for those refusals that carry them."""
    name = request_id_header(dialect, request_id)
    if why.reason is RefusalReason.BAD_GATEWAY:
        return HttpReply(502, {"content-type": "text/html"}, _HTML)
    if why.reason is RefusalReason.UNAVAILABLE:
        return HttpReply(503, {}, b"")
    if dialect is Dialect.OPENAI:
        status, body = _openai(why)
    else:
        status, body = _anthropic(why, request_id)
    headers = {"content-type": "application/json"} | name
    if why.reason in _LIMITED or why.reason in (RefusalReason.TOO_LARGE, RefusalReason.ACCELERATION):
        headers |= limits
    if why.shortage is not None:
        headers |= retry_after_headers(dialect, why.shortage.wait)
    return HttpReply(status, headers, msgspec.json.encode(body))


def stream_error_body(dialect: Dialect, request_id: str) -> dict[str, object]:
    """The error that is told in the middle of an answer: the provider broke down."""
    why = RefusalDetails(RefusalReason.OVERLOADED if dialect is Dialect.ANTHROPIC else RefusalReason.ERROR, "")
    return _openai(why)[1] if dialect is Dialect.OPENAI else _anthropic(why, request_id)[1]


def bad_request_response(dialect: Dialect, message: str, request_id: str) -> HttpReply:
    """A 400: the request makes no sense."""
    if dialect is Dialect.OPENAI:
        body = _openai_error(message, "invalid_request_error", None)
    else:
        body = _anthropic_error(message, "invalid_request_error", request_id)
    headers = {"content-type": "application/json"} | request_id_header(dialect, request_id)
    return HttpReply(400, headers, msgspec.json.encode(body))


_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day"}


def _period(shortage: RateShortage) -> str:
    """The name of the period of a limit; one without a name is told by the minute, as clients expect."""
    return _PERIODS.get(shortage.per, "minute")


def _unit_text(shortage: RateShortage) -> str:
    return shortage.unit.value.replace("_", " ")


# --- OpenAI ---------------------------------------------------------------------------------------------------------

_SHORT: Final = {Unit.REQUESTS: "RP", Unit.TOKENS: "TP", Unit.INPUT_TOKENS: "ITP", Unit.OUTPUT_TOKENS: "OTP"}


def _openai(why: RefusalDetails) -> tuple[int, dict[str, object]]:
    if why.shortage is not None and why.reason is not RefusalReason.ACCELERATION:
        kind = "requests" if why.shortage.unit is Unit.REQUESTS else "tokens"
        return 429, _openai_error(_openai_limit(why, why.shortage), kind, "rate_limit_exceeded")
    status, message, kind, code = {
        RefusalReason.CONCURRENCY: (429, "Too many requests in flight at once.", "requests", "rate_limit_exceeded"),
        RefusalReason.STRAY: (429, f"Rate limit reached for {why.model}.", "requests", "rate_limit_exceeded"),
        RefusalReason.SPEND_CAP: (
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            "insufficient_quota",
            "insufficient_quota",
        ),
        RefusalReason.ACCELERATION: (
            503,
            "Slow down: your request rate has risen too fast.",
            "server_error",
            "slow_down",
        ),
        RefusalReason.OVERLOADED: (
            503,
            "The engine is currently overloaded, please try again later.",
            "server_error",
            None,
        ),
        RefusalReason.UNKNOWN_MODEL: (
            404,
            f"The model `{why.model}` does not exist or you do not have access to it.",
            "invalid_request_error",
            "model_not_found",
        ),
    }.get(why.reason, (500, "The server had an error while processing your request.", "server_error", None))
    return status, _openai_error(message, kind, code)


def _openai_limit(why: RefusalDetails, shortage: RateShortage) -> str:
    what, period = f"{why.model} in organization {_ORGANIZATION}", _period(shortage)
    unit = f"{_unit_text(shortage)} per {period[:3]} ({_SHORT[shortage.unit]}{period[0].upper()})"
    if why.reason is RefusalReason.TOO_LARGE:
        return (
            f"Request too large for {what} on {unit}: Limit {shortage.limit:.0f}, Requested {shortage.requested:.0f}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
    used = shortage.limit - max(0, math.floor(shortage.remaining))
    return (
        f"Rate limit reached for {what} on {unit}: Limit {shortage.limit:.0f}, Used {used:.0f}, "
        f"Requested {shortage.requested:.0f}. Please try again in {format_duration(shortage.wait)}."
    )


def _openai_error(message: str, kind: str, code: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


# --- Anthropic ------------------------------------------------------------------------------------------------------


def _anthropic(why: RefusalDetails, request_id: str) -> tuple[int, dict[str, object]]:
    status, kind, message = {
        RefusalReason.OVERLOADED: (529, "overloaded_error", "Overloaded"),
        RefusalReason.SPEND_CAP: (402, "billing_error", "Your credit balance is too low to access the Anthropic API."),
        RefusalReason.UNKNOWN_MODEL: (404, "not_found_error", f"model: {why.model}"),
        RefusalReason.ERROR: (500, "api_error", "Internal server error"),
    }.get(why.reason, (429, "rate_limit_error", ""))
    return status, _anthropic_error(message or _anthropic_limit(why), kind, request_id)


def _anthropic_limit(why: RefusalDetails) -> str:
    if why.reason is RefusalReason.CONCURRENCY:
        return "Number of concurrent connections has exceeded your rate limit. Please try again later."
    if why.shortage is None:
        return "This request would exceed your account's rate limit. Please try again later."
    unit, period = _unit_text(why.shortage), _period(why.shortage)
    if why.reason is RefusalReason.ACCELERATION:
        return (
            f"This request would exceed your organization's maximum usage increase rate for {unit} per minute "
            f"(model: {why.model}). Your current limit is {why.shortage.limit:,.0f} {unit} per minute, and will "
            f"increase to {why.next_minute_limit:,.0f} at the next minute boundary. Please scale up more gradually to stay "
            "within the acceleration limit."
        )
    return (
        f"This request would exceed the rate limit for your organization ({_ORGANIZATION}) of "
        f"{why.shortage.limit:,.0f} {unit} per {period}. You can see the response headers for current usage."
    )


def _anthropic_error(message: str, kind: str, request_id: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
