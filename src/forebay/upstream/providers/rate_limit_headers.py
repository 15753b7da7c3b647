"""What a provider's headers say: its quotas as notices, and when to come back.

Families of limit headers that are read, whoever sends them:

- OpenAI and those who follow it: ``x-ratelimit-{limit,remaining,reset}-{requests,tokens,input-tokens,output-tokens}``,
  resets as durations until *full again* (``6m0s``). Source: OpenAI's guide "Rate limits", "Rate limits in headers".
- Anthropic: ``anthropic-ratelimit-{requests,tokens,input-tokens,output-tokens}-{limit,remaining,reset}``, resets in
  RFC 3339. Its ``tokens`` tell the most restrictive limit of the moment, so they are passed over beside the other two.
  Source: Anthropic's "Rate limits", "Response headers".
- Hosts that tell of requests alone: ``x-ratelimit-{limit,remaining,reset}`` and ``ratelimit-{limit,remaining,reset}``
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
from forebay.upstream.providers.http_headers import normalize_headers

_DAY: Final = 86_400.0
_LONGEST_RESET: Final = 32 * _DAY  # seconds; what is further away than a month is no reset
_EPOCH_SECONDS: Final = 1e9  # from here on a number is a moment (2001), not a duration
_EPOCH_MS: Final = 1e11
_LARGEST: Final = 10**15  # of a limit
_LONGEST_VALUE: Final = 64  # characters of a header worth reading
_SKEW: Final = 2.0  # seconds by which the clocks must differ before the provider's own is used

_PLAIN: Final = re.compile(
    r"\s*(-?\d+(?:\.\d+)?)\s*(?:[,;].*)?", re.ASCII | re.DOTALL
)  # a second value is a repetition
_PART: Final = re.compile(r"(\d+(?:\.\d+)?)(ms|us|µs|ns|d|h|m|s)", re.ASCII)  # as Go writes it
_SECONDS: Final = {"d": _DAY, "h": 3600.0, "m": 60.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "µs": 1e-6, "ns": 1e-9}
_HINT: Final = re.compile(
    rb"(?:try again|retry) (?:in|after) (\d{1,9}(?:\.\d{1,9})?) ?(milliseconds|ms|seconds?|s\b|minutes?|m(?:in)?\b)",
    re.IGNORECASE,
)
_HINTED: Final = 8192  # bytes of a body in which a hint is looked for

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
_FAMILY: Final = {name: number for number, (_, *names) in enumerate(_FAMILIES) for name in names}
_NONE: Final = -1


def read_rate_limits(headers: Mapping[str, str], *, wall: float) -> tuple[RateLimitHeaders, ...]:
    """What the headers say of the account's quotas, one notice for a unit at most; what makes no sense is left out.

    Args:
        headers: of any answer.
        wall: epoch seconds, now.
    """
    told = normalize_headers(headers)
    here = set(map(_FAMILY.get, told, repeat(_NONE)))  # one look at each header; there are ten families
    here.discard(_NONE)
    if not here:
        return ()
    moment: float | None = None
    found: dict[str, RateLimitHeaders] = {}
    for number in sorted(here):
        unit, limit_name, remaining_name, reset_name = _FAMILIES[number]
        if unit in found:
            continue
        limit, remaining = _amount(told.get(limit_name)), _amount(told.get(remaining_name), least=0)
        if limit is not None or remaining is not None:
            text = told.get(reset_name, "")
            reset = _duration(text) if len(text) <= _LONGEST_VALUE else None
            if reset is None or reset > _LONGEST_RESET:  # no duration: it may be a moment, and mean theirs
                moment = _provider_time(told, wall) if moment is None else moment
                reset = read_reset(text, wall=moment)
            found[unit] = RateLimitHeaders(unit=unit, limit=limit, remaining=remaining, reset=reset)
    if "anthropic-ratelimit-tokens-limit" in told and ("input_tokens" in found or "output_tokens" in found):
        found.pop("tokens", None)
    return tuple(found.values())


def _amount(text: str | None, *, least: int | None = None) -> int | None:
    """A limit or what remains of it; below zero is `least`, and None where that is None."""
    if text is None or len(text) > _LONGEST_VALUE:
        return None
    if text.isdecimal():  # nearly all, and a tenth of the price
        amount = int(text)
        return amount if amount <= _LARGEST else None
    match = _PLAIN.fullmatch(text)
    if match is None:
        return None
    value = float(match[1])
    if value < 0:
        return least
    return int(value) if value <= _LARGEST else None


def read_reset(text: str, *, wall: float) -> float | None:
    """Seconds until a reset, of whatever form: never negative, and None if it is none or more than a month away.

    Forms: ``6m0s``, ``20ms`` (as Go writes durations); RFC 3339; an HTTP date; seconds; epoch seconds or milliseconds.
    """
    text = text.strip()
    if not text or len(text) > _LONGEST_VALUE:
        return None
    match = _PLAIN.fullmatch(text)
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
    if seconds is None or not seconds <= _LONGEST_RESET:
        return None
    return max(0.0, seconds)


def _duration(text: str) -> float | None:
    total, length = 0.0, 0
    for number, unit in _PART.findall(text):
        total += float(number) * _SECONDS[unit]
        length += len(number) + len(unit)
    return total if 0 < length == len(text) and total < math.inf else None


def _rfc3339(text: str) -> float | None:
    try:
        at = dt.datetime.fromisoformat(text)
    except ValueError:
        return None
    return _epoch(at)


@lru_cache(maxsize=64)  # every answer of a second bears the same one
def _http_date(text: str) -> float | None:
    if len(text) > _LONGEST_VALUE:
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


def _provider_time(told: Mapping[str, str], wall: float) -> float:
    """Now, by the provider's clock if it says so and the two differ: a moment of its own is meant by that one."""
    theirs = _http_date(told["date"]) if "date" in told else None
    return wall if theirs is None or abs(theirs - wall) <= _SKEW else theirs


def read_retry_after(headers: Mapping[str, str], body: bytes = b"", *, wall: float) -> float | None:
    """Seconds that the provider asks to wait, as it says: a day stays a day. None if it says nothing, or nonsense.

    Years are a month: nobody can mean them, but it does say *not soon*.

    By ``retry-after-ms``, else ``retry-after`` (seconds, with decimals, or an HTTP date), else the words of an error's
    message ("Please try again in 6s"), where some hosts say it only.

    Sources: RFC 9110, 10.2.3; the retry code of OpenAI's and Anthropic's SDKs for ``retry-after-ms``; Azure's errors.
    """
    told = normalize_headers(headers)
    for name, scale in (("retry-after-ms", 1000.0), ("retry-after", 1.0)):
        text = told.get(name, "")
        if not text or len(text) > _LONGEST_VALUE:
            continue
        match = _PLAIN.fullmatch(text)
        if match is not None:
            seconds = float(match[1]) / scale
            if seconds >= 0:
                return min(seconds, _LONGEST_RESET)
        elif name == "retry-after":
            at = _http_date(text)
            if at is not None:
                return min(max(0.0, at - _provider_time(told, wall)), _LONGEST_RESET)
    return _retry_after_in_message(body)


def _retry_after_in_message(body: bytes) -> float | None:
    match = _HINT.search(body[:_HINTED])
    if match is None:
        return None
    unit = match[2].lower()
    scale = 1e-3 if unit.startswith((b"ms", b"milli")) else 60.0 if unit.startswith(b"m") else 1.0
    return min(float(match[1]) * scale, _LONGEST_RESET)


def read_should_retry(headers: Mapping[str, str]) -> bool | None:
    """Whether the provider says that this may be tried again (``x-should-retry``); None if it does not say.

    Source: the retry code of OpenAI's and Anthropic's SDKs, which go by it before anything else.
    """
    return {"true": True, "false": False}.get(normalize_headers(headers).get("x-should-retry", "").lower())
