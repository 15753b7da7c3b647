"""Rate-limit headers, Retry-After, x-should-retry and the named rate of a provider's response.

These families of rate-limit headers are read, from any provider:

- OpenAI and those who follow it: ``x-ratelimit-{limit,remaining,reset}-{requests,tokens,input-tokens,output-tokens}``,
  resets as durations until *full again* (``6m0s``). Source: OpenAI's guide "Rate limits", "Rate limits in headers".
- Anthropic: ``anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}``, resets in
  RFC 3339. Its ``tokens`` repeat whichever limit is the most restrictive, so they are ignored next to the other two.
  Source: Anthropic's "Rate limits", "Response headers".
- Hosts that limit requests only: ``x-ratelimit-{limit,remaining,reset}`` and ``ratelimit-{limit,remaining,reset}``
  (the early drafts of the IETF's RateLimit fields), resets in seconds, epoch seconds or epoch milliseconds.
"""

from __future__ import annotations

import datetime as dt
import math
import re
from collections.abc import Mapping
from email.utils import parsedate_to_datetime
from functools import lru_cache
from itertools import repeat
from typing import Final

from forebay.interfaces import RateLimitHeaders
from forebay.quota import RateScope
from forebay.quota.quota import PERIODS
from forebay.upstream.providers.http_headers import RETRY_AFTER_HEADERS, normalize_headers

_DAY: Final = 86_400.0
_MAX_RESET: Final = 32 * _DAY  # seconds; a reset more than a month away is ignored
_EPOCH_SECONDS: Final = 1e9  # from here on a number is a point in time (2001), not a duration
_EPOCH_MS: Final = 1e11
_MAX_LIMIT: Final = 10**15
_MAX_VALUE: Final = 64  # characters of a header; longer ones are ignored
_MAX_CLOCK_SKEW: Final = 2.0  # seconds; from there on points in time are read by the provider's clock

# A value after a comma or a semicolon is ignored: the header was repeated, or has parameters.
_NUMBER: Final = re.compile(r"\s*(-?\d+(?:\.\d+)?)\s*(?:[,;].*)?", re.ASCII | re.DOTALL)
_DURATION_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|d|h|m|s)", re.ASCII)  # as Go writes it
_SECONDS: Final = {"d": _DAY, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_RETRY_MESSAGE: Final = re.compile(
    rb"(?:try again|retry) (?:in|after) (\d{1,9}(?:\.\d{1,9})?) ?(milliseconds|ms|seconds?|s\b|minutes?|m(?:in)?\b)",
    re.IGNORECASE,
)
_MAX_MESSAGE: Final = 8192  # bytes of a body that are searched for it

_RATE: Final = re.compile(
    rb"\b(?:(requests|(?:input |output )?tokens) per (sec|min|hour|day)|([io]?[tr])p([smhd])\b)", re.IGNORECASE
)
_RATE_UNITS: Final = {"r": "requests", "t": "tokens", "it": "input_tokens", "ot": "output_tokens"}
_RATE_PERIODS: Final = {name[0]: seconds for name, seconds in PERIODS.items()}

_UNITS: Final = ("requests", "tokens", "input-tokens", "output-tokens")
_PATTERNS: Final = [
    *((unit, f"anthropic-ratelimit-{unit}-%s") for unit in _UNITS),
    *((unit, f"x-ratelimit-%s-{unit}") for unit in _UNITS),
    ("requests", "x-ratelimit-%s"),
    ("requests", "ratelimit-%s"),
]
_FAMILIES: Final = [
    (unit.replace("-", "_"), pattern % "limit", pattern % "remaining", pattern % "reset") for unit, pattern in _PATTERNS
]
_FAMILY_OF: Final = {name: number for number, (_, *names) in enumerate(_FAMILIES) for name in names}
_NO_FAMILY: Final = -1


def read_rate_limits(headers: Mapping[str, str], *, wall: float) -> tuple[RateLimitHeaders, ...]:
    """Return the rate limits in the headers: at most one for each unit; invalid ones are left out.

    Args:
        headers: of any response.
        wall: epoch seconds, now.
    """
    values = normalize_headers(headers)
    present = set(map(_FAMILY_OF.get, values, repeat(_NO_FAMILY)))  # one look at each header; there are ten families
    present.discard(_NO_FAMILY)
    if not present:
        return ()
    now: float | None = None
    found: dict[str, RateLimitHeaders] = {}
    for number in sorted(present):
        unit, limit_name, remaining_name, reset_name = _FAMILIES[number]
        if unit in found:
            continue
        limit, remaining = _amount(values.get(limit_name)), _amount(values.get(remaining_name), if_negative=0)
        if limit is not None or remaining is not None:
            text = values.get(reset_name, "")
            reset = _duration(text) if len(text) <= _MAX_VALUE else None
            if reset is None or reset > _MAX_RESET:  # perhaps a point in time, by the provider's clock
                now = _provider_time(values, wall) if now is None else now
                reset = read_reset(text, wall=now)
            found[unit] = RateLimitHeaders(unit=unit, limit=limit, remaining=remaining, reset=reset)
    if "anthropic-ratelimit-tokens-limit" in values and ("input_tokens" in found or "output_tokens" in found):
        found.pop("tokens", None)
    return tuple(found.values())


def _amount(text: str | None, *, if_negative: int | None = None) -> int | None:
    """Return the number in a limit or remaining header; None if it is not valid, and `if_negative` below zero."""
    if text is None or len(text) > _MAX_VALUE:
        return None
    if text.isdecimal():  # nearly all are, and this is ten times as fast
        amount = int(text)
        return amount if amount <= _MAX_LIMIT else None
    match = _NUMBER.fullmatch(text)
    if match is None:
        return None
    value = float(match[1])
    if value < 0:
        return if_negative
    return int(value) if value <= _MAX_LIMIT else None


def read_reset(text: str, *, wall: float) -> float | None:
    """Return the seconds until a reset, at least 0; None if the text is not one, or it is more than a month away.

    These forms are read: ``6m0s``, ``20ms`` (as Go writes durations); RFC 3339; an HTTP date; seconds; epoch seconds or
    milliseconds.
    """
    text = text.strip()
    if not text or len(text) > _MAX_VALUE:
        return None
    match = _NUMBER.fullmatch(text)
    if match is not None:
        number = float(match[1])
        if number >= _EPOCH_MS:
            number = number / 1000 - wall
        elif number >= _EPOCH_SECONDS:
            number -= wall
        seconds: float | None = number
    else:
        seconds = _duration(text)
        if seconds is None:
            at = _rfc3339(text) or _http_date(text)
            seconds = None if at is None else at - wall
    if seconds is None or not seconds <= _MAX_RESET:
        return None
    return max(0.0, seconds)


def _duration(text: str) -> float | None:
    total, length = 0.0, 0
    for number, unit in _DURATION_PART.findall(text):
        total += float(number) * _SECONDS[unit]
        length += len(number) + len(unit)
    return total if 0 < length == len(text) and total < math.inf else None


def _rfc3339(text: str) -> float | None:
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return _epoch(at)


@lru_cache(maxsize=64)  # all responses of a second have the same one
def _http_date(text: str) -> float | None:
    if len(text) > _MAX_VALUE:
        return None
    try:
        at = parsedate_to_datetime(text)
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return _epoch(at)


def _epoch(at: dt.datetime) -> float | None:
    try:
        return (at if at.tzinfo else at.replace(tzinfo=dt.UTC)).timestamp()
    except (ValueError, OverflowError):
        return None


def _provider_time(headers: Mapping[str, str], wall: float) -> float:
    """Return the current epoch seconds: by the provider's clock if its Date header differs from ours, else `wall`."""
    theirs = _http_date(headers["date"]) if "date" in headers else None
    return wall if theirs is None or abs(theirs - wall) <= _MAX_CLOCK_SKEW else theirs


def read_retry_after(headers: Mapping[str, str], body: bytes = b"", *, wall: float) -> float | None:
    """Return the seconds that the provider asks to wait, up to 32 days; None if it does not ask, or makes no sense.

    Read are ``retry-after-ms``, else ``retry-after`` (seconds, with decimals, or an HTTP date), else what litellm's
    proxy makes of that, ``llm_provider-retry-after``, else the message of an error ("Please try again in 6s"), the only
    place where some hosts say it. A longer time is cut to 32 days: such a value is a mistake, but does say *not soon*.

    Sources: RFC 9110, 10.2.3; the retry code of OpenAI's and Anthropic's SDKs for ``retry-after-ms``; Azure's errors.
    """
    values = normalize_headers(headers)
    for name in RETRY_AFTER_HEADERS:
        text = values.get(name, "")
        if not text or len(text) > _MAX_VALUE:
            continue
        match = _NUMBER.fullmatch(text)
        if match is not None:
            seconds = float(match[1]) / (1000.0 if name == "retry-after-ms" else 1.0)
            if seconds >= 0:
                return min(seconds, _MAX_RESET)
        elif name != "retry-after-ms":
            at = _http_date(text)
            if at is not None:
                return min(max(0.0, at - _provider_time(values, wall)), _MAX_RESET)
    return _retry_after_in_message(body)


def _retry_after_in_message(body: bytes) -> float | None:
    match = _RETRY_MESSAGE.search(body[:_MAX_MESSAGE])
    if match is None:
        return None
    unit = match[2].lower()
    scale = 1e-3 if unit.startswith((b"ms", b"milli")) else 60.0 if unit.startswith(b"m") else 1.0
    return min(float(match[1]) * scale, _MAX_RESET)


def read_rate_scope(body: bytes) -> RateScope | None:
    """Return the rate that the message of an error names, as in "requests per day (RPD)"; None if it names none."""
    match = _RATE.search(body[:_MAX_MESSAGE])
    if match is None:
        return None
    unit, period, short_unit, short_period = (part.decode().lower() if part else "" for part in match.groups())
    return RateScope(
        unit=unit.replace(" ", "_") or _RATE_UNITS.get(short_unit), period=_RATE_PERIODS[period[:1] or short_period]
    )


def read_should_retry(headers: Mapping[str, str]) -> bool | None:
    """Return whether the provider wants the call to be retried (``x-should-retry``); None if it does not say.

    Source: the retry code of OpenAI's and Anthropic's SDKs, where it outweighs everything else.
    """
    return {"true": True, "false": False}.get(normalize_headers(headers).get("x-should-retry", "").lower())
