"""Error responses and rate limit headers of OpenAI and of Anthropic: status, headers and body of every refusal.

The formats follow the public references and recorded answers (2024 to 2026):

- OpenAI: resets are durations until *full again* (``6m0s``, ``1.2s``, ``20ms``); ``retry-after`` is in whole seconds,
  with ``retry-after-ms``; the error's ``type`` tells requests from tokens; an account without credit gets a 429 with
  the code ``insufficient_quota``; a sudden rise of traffic gets a 503 *slow down*.
- Anthropic: resets are times (RFC 3339, UTC) at which the limit is full again; ``retry-after`` is in whole seconds;
  every 429 has the type ``rate_limit_error``, and only its message says which limit; the concurrency limit comes
  without rate limit headers; overload is 529.
- Both, from the proxies in front of them: a 502 is an HTML page, a 503 has an empty body, and neither has headers.
"""

from __future__ import annotations

import datetime as dt
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Final

import msgspec

from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect, ReportedLimits, Unit, Wording
from forebay.simulation.provider.rate_meters import MeterReading, RateShortage

_HTML: Final = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
_LIMITED: Final = frozenset(
    {RefusalReason.REQUESTS, RefusalReason.TOKENS, RefusalReason.INPUT_TOKENS, RefusalReason.OUTPUT_TOKENS}
)
_ORGANIZATION: Final = "org-simulated"


@dataclass(frozen=True, slots=True)
class RefusalDetails:
    """The facts that a refusal reports."""

    reason: RefusalReason
    model: str
    shortage: RateShortage | None = None
    next_minute_limit: float = 0.0  # of an acceleration limit
    reports: ReportedLimits = field(default_factory=ReportedLimits)


@dataclass(frozen=True, slots=True)
class HttpReply:
    """An HTTP response: status, headers and body."""

    status: int
    headers: dict[str, str]
    body: bytes


def format_duration(seconds: float) -> str:
    """Return `seconds` as OpenAI writes a duration, to the millisecond: ``20ms``, ``1.2s``, ``6m0s``, ``1h0m0s``."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:  # noqa: PLR2004 - a second
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text


def format_timestamp(epoch: float) -> str:
    """Return a time as Anthropic writes it: RFC 3339 in UTC, rounded up to whole seconds."""
    return dt.datetime.fromtimestamp(math.ceil(epoch - 1e-6), dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def rate_limit_headers(dialect: Dialect, readings: Iterable[MeterReading], wall: float) -> dict[str, str]:
    """Return the headers that report the account's rate limits; `wall` is the wall time in epoch seconds."""
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
    """Return Anthropic's ``tokens`` headers if only input and output are limited: the sums, and the earlier reset."""
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
    """Return the Retry-After headers for `wait` seconds; none for infinity."""
    if math.isinf(wait):
        return {}
    ms = math.ceil(wait * 1000 - 1e-6)
    headers = {"retry-after": str(math.ceil(ms / 1000))}
    return headers | {"retry-after-ms": str(ms)} if dialect is Dialect.OPENAI else headers


def request_id_header(dialect: Dialect, request_id: str) -> dict[str, str]:
    """Return the header that identifies a request to the provider's support."""
    return {"x-request-id" if dialect is Dialect.OPENAI else "request-id": request_id}


def refusal_response(dialect: Dialect, details: RefusalDetails, limits: dict[str, str], request_id: str) -> HttpReply:
    """Return the response for a refused call; `limits` are the rate limit headers, for refusals that carry them."""
    if details.reason is RefusalReason.BAD_GATEWAY:
        return HttpReply(502, {"content-type": "text/html"}, _HTML)
    if details.reason is RefusalReason.UNAVAILABLE:
        return HttpReply(503, {}, b"")
    if dialect is Dialect.OPENAI:
        status, body = _openai(details)
    else:
        status, body = _anthropic(details, request_id)
    headers = {"content-type": "application/json"} | request_id_header(dialect, request_id)
    if details.reason in _LIMITED or details.reason in (RefusalReason.TOO_LARGE, RefusalReason.ACCELERATION):
        headers |= limits
    if details.shortage is not None:
        headers |= retry_after_headers(dialect, details.shortage.wait)
    if status == 429:  # noqa: PLR2004 - only these depart from the truth
        headers, body = _as_reported(dialect, details, headers, body, request_id)
    return HttpReply(status, headers, msgspec.json.encode(body))


_WORDINGS: Final = {
    Wording.VAGUE: "Too many requests. Please slow down.",
    Wording.RATE: "Rate limit reached: too many requests per minute.",
    Wording.CONCURRENCY: "Too many requests in flight at once.",
}


def _as_reported(
    dialect: Dialect, details: RefusalDetails, headers: dict[str, str], body: dict[str, object], request_id: str
) -> tuple[dict[str, str], dict[str, object]]:
    """Return the headers and body of a 429 as the configuration wants them reported."""
    reports = details.reports
    if reports.retry_after is not None:
        headers = {name: value for name, value in headers.items() if not name.startswith("retry-after")}
        headers |= {"retry-after": reports.retry_after} if reports.retry_after else {}
    if reports.wording is not None:
        message = _WORDINGS[reports.wording]
        openai = dialect is Dialect.OPENAI
        body = (
            _openai_error(message, "requests", "rate_limit_exceeded")
            if openai
            else _anthropic_error(message, "rate_limit_error", request_id)
        )
    return headers, body


def stream_error_body(dialect: Dialect, request_id: str) -> dict[str, object]:
    """Return the body of an error in the middle of an answer: the provider failed."""
    details = RefusalDetails(RefusalReason.OVERLOADED if dialect is Dialect.ANTHROPIC else RefusalReason.ERROR, "")
    return _openai(details)[1] if dialect is Dialect.OPENAI else _anthropic(details, request_id)[1]


def bad_request_response(dialect: Dialect, message: str, request_id: str) -> HttpReply:
    """Return a 400: the request is invalid."""
    if dialect is Dialect.OPENAI:
        body = _openai_error(message, "invalid_request_error", None)
    else:
        body = _anthropic_error(message, "invalid_request_error", request_id)
    headers = {"content-type": "application/json"} | request_id_header(dialect, request_id)
    return HttpReply(400, headers, msgspec.json.encode(body))


_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day"}


def _period(shortage: RateShortage) -> str:
    """Return the name of a limit's period; a period without a name is called a minute, which clients can parse."""
    return _PERIODS.get(shortage.period, "minute")


def _unit_text(shortage: RateShortage) -> str:
    return shortage.unit.value.replace("_", " ")


# --- OpenAI ---------------------------------------------------------------------------------------------------------

_ABBREVIATIONS: Final = {Unit.REQUESTS: "RP", Unit.TOKENS: "TP", Unit.INPUT_TOKENS: "ITP", Unit.OUTPUT_TOKENS: "OTP"}


def _openai(details: RefusalDetails) -> tuple[int, dict[str, object]]:
    if details.shortage is not None and details.reason not in (RefusalReason.ACCELERATION, RefusalReason.PENALTY):
        kind = "requests" if details.shortage.unit is Unit.REQUESTS else "tokens"
        return 429, _openai_error(_openai_limit(details, details.shortage), kind, "rate_limit_exceeded")
    status, message, kind, code = {
        RefusalReason.PENALTY: (429, "Too many requests. Please slow down.", "requests", "rate_limit_exceeded"),
        RefusalReason.CONCURRENCY: (429, "Too many requests in flight at once.", "requests", "rate_limit_exceeded"),
        RefusalReason.STRAY: (429, f"Rate limit reached for {details.model}.", "requests", "rate_limit_exceeded"),
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
            f"The model `{details.model}` does not exist or you do not have access to it.",
            "invalid_request_error",
            "model_not_found",
        ),
    }.get(details.reason, (500, "The server had an error while processing your request.", "server_error", None))
    return status, _openai_error(message, kind, code)


def _openai_limit(details: RefusalDetails, shortage: RateShortage) -> str:
    subject, period = f"{details.model} in organization {_ORGANIZATION}", _period(shortage)
    unit = f"{_unit_text(shortage)} per {period[:3]} ({_ABBREVIATIONS[shortage.unit]}{period[0].upper()})"
    if details.reason is RefusalReason.TOO_LARGE:
        return (
            f"Request too large for {subject} on {unit}: Limit {shortage.limit:.0f}, "
            f"Requested {shortage.requested:.0f}. The input or output tokens must be reduced in order to run "
            "successfully."
        )
    used = shortage.limit - max(0, math.floor(shortage.remaining))
    return (
        f"Rate limit reached for {subject} on {unit}: Limit {shortage.limit:.0f}, Used {used:.0f}, "
        f"Requested {shortage.requested:.0f}. Please try again in {format_duration(shortage.wait)}."
    )


def _openai_error(message: str, kind: str, code: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


# --- Anthropic ------------------------------------------------------------------------------------------------------


def _anthropic(details: RefusalDetails, request_id: str) -> tuple[int, dict[str, object]]:
    status, kind, message = {
        RefusalReason.OVERLOADED: (529, "overloaded_error", "Overloaded"),
        RefusalReason.SPEND_CAP: (402, "billing_error", "Your credit balance is too low to access the Anthropic API."),
        RefusalReason.UNKNOWN_MODEL: (404, "not_found_error", f"model: {details.model}"),
        RefusalReason.ERROR: (500, "api_error", "Internal server error"),
    }.get(details.reason, (429, "rate_limit_error", ""))
    return status, _anthropic_error(message or _anthropic_limit(details), kind, request_id)


def _anthropic_limit(details: RefusalDetails) -> str:
    if details.reason is RefusalReason.CONCURRENCY:
        return "Number of concurrent connections has exceeded your rate limit. Please try again later."
    if details.shortage is None or details.reason is RefusalReason.PENALTY:
        return "This request would exceed your account's rate limit. Please try again later."
    unit, period = _unit_text(details.shortage), _period(details.shortage)
    if details.reason is RefusalReason.ACCELERATION:
        return (
            f"This request would exceed your organization's maximum usage increase rate for {unit} per minute "
            f"(model: {details.model}). Your current limit is {details.shortage.limit:,.0f} {unit} per minute, and "
            f"will increase to {details.next_minute_limit:,.0f} at the next minute boundary. Please scale up more "
            "gradually to stay within the acceleration limit."
        )
    return (
        f"This request would exceed the rate limit for your organization ({_ORGANIZATION}) of "
        f"{details.shortage.limit:,.0f} {unit} per {period}. You can see the response headers for current usage."
    )


def _anthropic_error(message: str, kind: str, request_id: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
