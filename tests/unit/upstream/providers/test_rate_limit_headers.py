"""Rate-limit headers, Retry-After and x-should-retry."""

from __future__ import annotations

import datetime as dt

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.interfaces import RateLimitHeaders
from forebay.quota import RateScope
from forebay.upstream.providers import read_rate_limits, read_rate_scope, read_retry_after, read_should_retry
from forebay.upstream.providers.rate_limit_headers import read_reset

WALL = dt.datetime(2026, 4, 1, 12, 0, 0, tzinfo=dt.UTC).timestamp()
DAY = 86_400.0


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("6m0s", 360.0),
        ("1s", 1.0),
        ("20ms", 0.02),
        ("59.999s", 59.999),
        ("1m12.5s", 72.5),
        ("4m12.172s", 252.172),
        ("23h18m29.144s", 83_909.144),
        ("7d", 604_800.0),
        ("500µs", 0.0005),
        ("500us", 0.0005),
        ("0s", 0.0),
        ("30", 30.0),
        ("0.5", 0.5),
        (" 12 ", 12.0),
        ("2026-04-01T12:01:00Z", 60.0),
        ("2026-04-01T14:01:00+02:00", 60.0),
        ("2026-04-01T12:00:00.250Z", 0.25),
        ("2026-04-01T12:01:00", 60.0),
        ("2026-04-01T11:00:00Z", 0.0),  # in the past
        ("Wed, 01 Apr 2026 12:00:30 GMT", 30.0),
        (f"{WALL + 90:.3f}", 90.0),  # epoch seconds
        (f"{(WALL + 90) * 1000:.0f}", 90.0),  # epoch milliseconds
        (f"{WALL - 90:.0f}", 0.0),
        ("-5", 0.0),
    ],
)
def test_a_reset_is_read_in_any_form(text: str, seconds: float) -> None:
    assert read_reset(text, wall=WALL) == pytest.approx(seconds, abs=1e-3)


@pytest.mark.parametrize(
    "text",
    [
        *("", "soon", "1x", "s", "m", "1m2", "1 m", "--5", "1e9s", "nan", "inf", "0x10", "٣", "9" * 64, "1m" * 40),
        *("3000000", "999999999d", "9999-12-31T23:59:59Z", "2026-13-01T00:00:00Z", f"{WALL + 33 * DAY:.0f}"),
    ],
)
def test_an_invalid_reset_is_none(text: str) -> None:
    assert read_reset(text, wall=WALL) is None


def test_openai_headers_limit_requests_and_tokens() -> None:
    headers = {
        "X-RateLimit-Limit-Requests": "500",
        "x-ratelimit-remaining-requests": "499",
        "x-ratelimit-reset-requests": "120ms",
        "x-ratelimit-limit-tokens": "1500000",
        "x-ratelimit-remaining-tokens": "1482750",
        "x-ratelimit-reset-tokens": "16m33.562s",
        "x-ratelimit-limit-tokens_usage_based": "1500000",
    }
    assert read_rate_limits(headers, wall=WALL) == (
        RateLimitHeaders(unit="requests", limit=500, remaining=499, reset=0.12),
        RateLimitHeaders(unit="tokens", limit=1_500_000, remaining=1_482_750, reset=16 * 60 + 33.562),
    )


def test_anthropics_most_restrictive_limit_is_ignored_next_to_input_and_output() -> None:
    headers = {
        "anthropic-ratelimit-requests-limit": "50",
        "anthropic-ratelimit-requests-remaining": "48",
        "anthropic-ratelimit-requests-reset": "2026-04-01T12:00:02Z",
        "anthropic-ratelimit-input-tokens-limit": "30000",
        "anthropic-ratelimit-input-tokens-remaining": "27000",
        "anthropic-ratelimit-input-tokens-reset": "2026-04-01T12:00:06Z",
        "anthropic-ratelimit-output-tokens-limit": "8000",
        "anthropic-ratelimit-output-tokens-remaining": "7000",
        "anthropic-ratelimit-output-tokens-reset": "2026-04-01T12:00:08Z",
        "anthropic-ratelimit-tokens-limit": "38000",
        "anthropic-ratelimit-tokens-remaining": "34000",
        "anthropic-ratelimit-tokens-reset": "2026-04-01T12:00:06Z",
    }
    assert read_rate_limits(headers, wall=WALL) == (
        RateLimitHeaders(unit="requests", limit=50, remaining=48, reset=2.0),
        RateLimitHeaders(unit="input_tokens", limit=30_000, remaining=27_000, reset=6.0),
        RateLimitHeaders(unit="output_tokens", limit=8_000, remaining=7_000, reset=8.0),
    )
    alone = {name: value for name, value in headers.items() if "put-tokens" not in name}
    assert [rate_limit.unit for rate_limit in read_rate_limits(alone, wall=WALL)] == ["requests", "tokens"]


@pytest.mark.parametrize("prefix", ["x-ratelimit", "ratelimit"])
def test_other_hosts_limit_requests_only(prefix: str) -> None:
    headers = {f"{prefix}-limit": "60", f"{prefix}-remaining": "12", f"{prefix}-reset": "30"}
    assert read_rate_limits(headers, wall=WALL) == (
        RateLimitHeaders(unit="requests", limit=60, remaining=12, reset=30.0),
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"limit": "100, 100;w=60", "remaining": "7.0"}, RateLimitHeaders(unit="requests", limit=100, remaining=7)),
        (
            {"limit": "-1", "remaining": "-3"},
            RateLimitHeaders(unit="requests", remaining=0),
        ),  # a debt; and no limit at all
        ({"limit": "100", "remaining": "lots"}, RateLimitHeaders(unit="requests", limit=100)),
        ({"remaining": "5", "reset": "yesterday"}, RateLimitHeaders(unit="requests", remaining=5)),
        ({"limit": "9" * 40, "remaining": "5"}, RateLimitHeaders(unit="requests", remaining=5)),
    ],
)
def test_invalid_values_are_left_out(values: dict[str, str], expected: RateLimitHeaders) -> None:
    headers = {f"x-ratelimit-{name}-requests": value for name, value in values.items()}
    assert read_rate_limits(headers, wall=WALL) == (expected,)


def test_a_reset_alone_is_ignored() -> None:
    assert read_rate_limits({"x-ratelimit-reset-requests": "1s"}, wall=WALL) == ()


def test_a_point_in_time_is_read_by_the_clock_of_the_provider() -> None:
    headers = {
        "date": "Wed, 01 Apr 2026 12:10:00 GMT",  # ours is ten minutes behind
        "anthropic-ratelimit-requests-remaining": "0",
        "anthropic-ratelimit-requests-reset": "2026-04-01T12:10:05Z",
        "retry-after": "Wed, 01 Apr 2026 12:10:09 GMT",
    }
    assert read_rate_limits(headers, wall=WALL)[0].reset == 5.0
    assert read_retry_after(headers, wall=WALL) == 9.0


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7.0),
        ({"retry-after": "0.73"}, 0.73),
        ({"retry-after": "0"}, 0.0),
        ({"retry-after": "86400"}, DAY),
        ({"retry-after": "Wed, 01 Apr 2026 12:00:45 GMT"}, 45.0),
        ({"retry-after": "Wed, 01 Apr 2026 11:00:00 GMT"}, 0.0),
        ({"retry-after": "1", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "3", "retry-after-ms": "soon"}, 3.0),
        ({"llm_provider-retry-after": "7"}, 7.0),
        ({"llm_provider-retry-after": "7", "retry-after": "3"}, 3.0),
        ({"retry-after": "5, 5"}, 5.0),
        ({"retry-after": "-5"}, None),
        ({"retry-after": "9" * 40}, 32 * DAY),
        ({"retry-after-ms": "9" * 40}, 32 * DAY),
        ({"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}, 32 * DAY),
        ({"retry-after": "1e400"}, None),
        ({"retry-after": "nan"}, None),
        ({"retry-after": "inf"}, None),
        ({"retry-after": "a while"}, None),
        ({"retry-after": ""}, None),
        ({}, None),
    ],
)
def test_retry_after_is_read_and_an_invalid_one_is_none(headers: dict[str, str], seconds: float | None) -> None:
    assert read_retry_after(headers, wall=WALL) == seconds


@pytest.mark.parametrize(
    ("message", "seconds"),
    [
        (b"... Requested 3082. Please try again in 9.816s. Visit", 9.816),
        (b"Please try again in 644ms.", 0.644),
        (b"... S0 pricing tier. Please retry after 37 seconds. Please contact", 37.0),
        (b"Please try again in 2m.", 120.0),
        (b"Please try again in 999999999 minutes.", 32 * DAY),
        (b"Please try again later.", None),
        (b"", None),
    ],
)
def test_retry_after_is_read_from_the_message_if_no_header_has_it(message: bytes, seconds: float | None) -> None:
    assert read_retry_after({}, message, wall=WALL) == seconds
    assert read_retry_after({"retry-after": "1"}, message, wall=WALL) == 1.0


@pytest.mark.parametrize(
    ("message", "scope"),
    [
        (b"Rate limit reached for gpt-4o on requests per min (RPM): Limit 3, Used 3", RateScope("requests", 60.0)),
        (b"Rate limit reached for gpt-4o on tokens per day (TPD): Limit 9", RateScope("tokens", DAY)),
        (b"exceed the rate limit of 50,000 input tokens per minute", RateScope("input_tokens", 60.0)),
        (b"ITPM exceeded", RateScope("input_tokens", 60.0)),
        (b"RPS: 5", RateScope("requests", 1.0)),
        (b"more than 9 calls per hour", None),
        (b"Too many requests. Please try again in 120ms.", None),
        (b"", None),
    ],
)
def test_the_named_rate_is_read_from_the_message(message: bytes, scope: RateScope | None) -> None:
    assert read_rate_scope(message) == scope


@pytest.mark.parametrize(("value", "expected"), [("true", True), ("False", False), ("maybe", None), ("", None)])
def test_x_should_retry_is_read(value: str, expected: bool | None) -> None:  # noqa: FBT001
    assert read_should_retry({"X-Should-Retry": value}) is expected


NAMES = st.sampled_from(
    [f"x-ratelimit-{field}-{unit}" for field in ("limit", "remaining", "reset") for unit in ("requests", "tokens")]
    + ["anthropic-ratelimit-tokens-reset", "ratelimit-remaining", "retry-after", "retry-after-ms", "date"]
)
VALUES = st.text(max_size=80) | st.from_regex(r"[0-9.:TZmshd+-]{0,40}") | st.floats().map(str) | st.integers().map(str)


@given(headers=st.dictionaries(NAMES | st.text(max_size=20), VALUES, max_size=12), wall=st.floats(0, 4e9))
def test_no_header_raises(headers: dict[str, str], wall: float) -> None:
    for rate_limit in read_rate_limits(headers, wall=wall):
        assert rate_limit.reset is None or 0.0 <= rate_limit.reset <= 32 * DAY
        assert rate_limit.remaining is None or rate_limit.remaining >= 0
        assert rate_limit.limit is None or rate_limit.limit >= 0
    seconds = read_retry_after(headers, wall=wall)
    assert seconds is None or seconds >= 0.0
    assert read_should_retry(headers) in (True, False, None)
