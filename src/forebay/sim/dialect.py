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

from forebay.sim.config import Dialect, Unit
from forebay.sim.faults import Reason
from forebay.sim.quota import Reading, Shortage

_HTML: Final = b"<html><head><title>502 Bad Gateway</title></head><body><h1>502 Bad Gateway</h1></body></html>"
_LIMITED: Final = frozenset({Reason.REQUESTS, Reason.TOKENS, Reason.INPUT_TOKENS, Reason.OUTPUT_TOKENS})
_ORGANIZATION: Final = "org-plant"


@dataclass(frozen=True, slots=True)
class Why:
    """What a refusal has to tell."""

    reason: Reason
    model: str
    shortage: Shortage | None = None
    next_allowed: float = 0.0  # of an acceleration limit, in the next minute


@dataclass(frozen=True, slots=True)
class Reply:
    """A refusal as it goes over the wire."""

    status: int
    headers: dict[str, str]
    body: bytes


def duration(seconds: float) -> str:
    """Seconds as OpenAI writes them, to the millisecond: ``20ms``, ``1.2s``, ``6m0s``, ``1h0m0s``."""
    ms = math.ceil(seconds * 1000 - 1e-6)
    if ms < 1000:  # noqa: PLR2004 - a second
        return f"{ms}ms" if ms else "0s"
    minutes, ms = divmod(ms, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{ms / 1000:.3f}".rstrip("0").rstrip(".") + "s"
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text


def moment(epoch: float) -> str:
    """A moment as Anthropic writes it: RFC 3339 in UTC, whole seconds, never early."""
    return dt.datetime.fromtimestamp(math.ceil(epoch - 1e-6), dt.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def limit_headers(dialect: Dialect, readings: Iterable[Reading], wall: float) -> dict[str, str]:
    """What every answer tells of the account's limits; `wall` is the time in epoch seconds."""
    headers: dict[str, str] = {}
    for reading in readings:
        kind = reading.unit.value.replace("_", "-")
        limit, remaining = f"{reading.limit:.0f}", f"{math.floor(reading.remaining + 1e-6)}"
        if dialect is Dialect.OPENAI:
            headers[f"x-ratelimit-limit-{kind}"] = limit
            headers[f"x-ratelimit-remaining-{kind}"] = remaining
            headers[f"x-ratelimit-reset-{kind}"] = duration(reading.full_in)
        else:
            headers[f"anthropic-ratelimit-{kind}-limit"] = limit
            headers[f"anthropic-ratelimit-{kind}-remaining"] = remaining
            headers[f"anthropic-ratelimit-{kind}-reset"] = moment(wall + reading.full_in)
    if dialect is Dialect.ANTHROPIC:
        headers |= _combined(headers)
    return headers


def _combined(headers: dict[str, str]) -> dict[str, str]:
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


def retry_headers(dialect: Dialect, wait: float) -> dict[str, str]:
    """When to come back, in `wait` seconds; nothing for never."""
    if math.isinf(wait):
        return {}
    ms = math.ceil(wait * 1000 - 1e-6)
    headers = {"retry-after": str(math.ceil(ms / 1000))}
    return headers | {"retry-after-ms": str(ms)} if dialect is Dialect.OPENAI else headers


def identity(dialect: Dialect, request_id: str) -> dict[str, str]:
    """The header that names a request in a conversation with the provider's support."""
    return {"x-request-id" if dialect is Dialect.OPENAI else "request-id": request_id}


def refusal(dialect: Dialect, why: Why, limits: dict[str, str], request_id: str) -> Reply:
    """A refusal in full; `limits` are the account's limit headers, for those refusals that carry them."""
    name = identity(dialect, request_id)
    if why.reason is Reason.BAD_GATEWAY:
        return Reply(502, {"content-type": "text/html"}, _HTML)
    if why.reason is Reason.UNAVAILABLE:
        return Reply(503, {}, b"")
    if dialect is Dialect.OPENAI:
        status, body = _openai(why)
    else:
        status, body = _anthropic(why, request_id)
    headers = {"content-type": "application/json"} | name
    if why.reason in _LIMITED or why.reason in (Reason.TOO_LARGE, Reason.ACCELERATION):
        headers |= limits
    if why.shortage is not None:
        headers |= retry_headers(dialect, why.shortage.wait)
    return Reply(status, headers, msgspec.json.encode(body))


def error_body(dialect: Dialect, request_id: str) -> dict[str, object]:
    """The error that is told in the middle of an answer: the provider broke down."""
    why = Why(Reason.OVERLOADED if dialect is Dialect.ANTHROPIC else Reason.ERROR, "")
    return _openai(why)[1] if dialect is Dialect.OPENAI else _anthropic(why, request_id)[1]


def bad_request(dialect: Dialect, message: str, request_id: str) -> Reply:
    """A 400: the request makes no sense."""
    if dialect is Dialect.OPENAI:
        body = _openai_error(message, "invalid_request_error", None)
    else:
        body = _anthropic_error(message, "invalid_request_error", request_id)
    headers = {"content-type": "application/json"} | identity(dialect, request_id)
    return Reply(400, headers, msgspec.json.encode(body))


_PERIODS: Final = {1.0: "second", 60.0: "minute", 3600.0: "hour", 86400.0: "day"}


def _period(shortage: Shortage) -> str:
    """The name of the period of a limit; one without a name is told by the minute, as clients expect."""
    return _PERIODS.get(shortage.per, "minute")


def _words(shortage: Shortage) -> str:
    return shortage.unit.value.replace("_", " ")


# --- OpenAI ---------------------------------------------------------------------------------------------------------

_SHORT: Final = {Unit.REQUESTS: "RP", Unit.TOKENS: "TP", Unit.INPUT_TOKENS: "ITP", Unit.OUTPUT_TOKENS: "OTP"}


def _openai(why: Why) -> tuple[int, dict[str, object]]:
    if why.shortage is not None and why.reason is not Reason.ACCELERATION:
        kind = "requests" if why.shortage.unit is Unit.REQUESTS else "tokens"
        return 429, _openai_error(_openai_limit(why, why.shortage), kind, "rate_limit_exceeded")
    status, message, kind, code = {
        Reason.CONCURRENCY: (429, "Too many requests in flight at once.", "requests", "rate_limit_exceeded"),
        Reason.STRAY: (429, f"Rate limit reached for {why.model}.", "requests", "rate_limit_exceeded"),
        Reason.SPEND_CAP: (
            429,
            "You exceeded your current quota, please check your plan and billing details.",
            "insufficient_quota",
            "insufficient_quota",
        ),
        Reason.ACCELERATION: (503, "Slow down: your request rate has risen too fast.", "server_error", "slow_down"),
        Reason.OVERLOADED: (503, "The engine is currently overloaded, please try again later.", "server_error", None),
        Reason.UNKNOWN_MODEL: (
            404,
            f"The model `{why.model}` does not exist or you do not have access to it.",
            "invalid_request_error",
            "model_not_found",
        ),
    }.get(why.reason, (500, "The server had an error while processing your request.", "server_error", None))
    return status, _openai_error(message, kind, code)


def _openai_limit(why: Why, shortage: Shortage) -> str:
    what, period = f"{why.model} in organization {_ORGANIZATION}", _period(shortage)
    unit = f"{_words(shortage)} per {period[:3]} ({_SHORT[shortage.unit]}{period[0].upper()})"
    if why.reason is Reason.TOO_LARGE:
        return (
            f"Request too large for {what} on {unit}: Limit {shortage.limit:.0f}, Requested {shortage.requested:.0f}. "
            "The input or output tokens must be reduced in order to run successfully."
        )
    used = shortage.limit - max(0, math.floor(shortage.remaining))
    return (
        f"Rate limit reached for {what} on {unit}: Limit {shortage.limit:.0f}, Used {used:.0f}, "
        f"Requested {shortage.requested:.0f}. Please try again in {duration(shortage.wait)}."
    )


def _openai_error(message: str, kind: str, code: str | None) -> dict[str, object]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


# --- Anthropic ------------------------------------------------------------------------------------------------------


def _anthropic(why: Why, request_id: str) -> tuple[int, dict[str, object]]:
    status, kind, message = {
        Reason.OVERLOADED: (529, "overloaded_error", "Overloaded"),
        Reason.SPEND_CAP: (402, "billing_error", "Your credit balance is too low to access the Anthropic API."),
        Reason.UNKNOWN_MODEL: (404, "not_found_error", f"model: {why.model}"),
        Reason.ERROR: (500, "api_error", "Internal server error"),
    }.get(why.reason, (429, "rate_limit_error", ""))
    return status, _anthropic_error(message or _anthropic_limit(why), kind, request_id)


def _anthropic_limit(why: Why) -> str:
    if why.reason is Reason.CONCURRENCY:
        return "Number of concurrent connections has exceeded your rate limit. Please try again later."
    if why.shortage is None:
        return "This request would exceed your account's rate limit. Please try again later."
    unit, period = _words(why.shortage), _period(why.shortage)
    if why.reason is Reason.ACCELERATION:
        return (
            f"This request would exceed your organization's maximum usage increase rate for {unit} per minute "
            f"(model: {why.model}). Your current limit is {why.shortage.limit:,.0f} {unit} per minute, and will "
            f"increase to {why.next_allowed:,.0f} at the next minute boundary. Please scale up more gradually to stay "
            "within the acceleration limit."
        )
    return (
        f"This request would exceed the rate limit for your organization ({_ORGANIZATION}) of "
        f"{why.shortage.limit:,.0f} {unit} per {period}. You can see the response headers for current usage."
    )


def _anthropic_error(message: str, kind: str, request_id: str) -> dict[str, object]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": request_id}
