"""What responses of providers mean, by examples as they occur."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given

from forebay.interfaces import Outcome
from forebay.upstream.providers import ErrorKind, classify, classify_stream_error

SALES = "or contact sales at https://www.anthropic.com/contact-sales to discuss your options for a rate limit increase."


def openai(message: str, kind: str | None, code: str | None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def anthropic(message: str, kind: str) -> dict[str, Any]:
    return {"type": "error", "error": {"type": kind, "message": message}, "request_id": "req_011C"}


TPM = "gpt-4o in organization org-x on tokens per min (TPM): Limit 30000"
CASES: list[tuple[str, int, Any, ErrorKind]] = [
    # --- a rate limit
    ("openai tpm", 429, openai(f"Rate limit reached for {TPM}, Used 29937, Requested 385. Please try again in 644ms.",
                               "tokens", "rate_limit_exceeded"), ErrorKind.RATE_LIMIT),
    ("openai rpd", 429, openai("Rate limit reached for gpt-4o on requests per day (RPD): Limit 200, Used 200.",
                               "requests", "rate_limit_exceeded"), ErrorKind.RATE_LIMIT),
    ("openai, 2023", 429, openai("Rate limit reached for 10KTPM-200RPM in organization org-x. Limit: 10000 / min.",
                                  "requests", None), ErrorKind.RATE_LIMIT),
    ("anthropic itpm", 429, anthropic("This request would exceed the rate limit for your organization (abc) of 20,000 "
                                      "input tokens per minute. For details, refer to: ...", "rate_limit_error"),
     ErrorKind.RATE_LIMIT),
    ("azure tokens", 429, {"error": {"code": "429", "message": "Requests to the ChatCompletions_Create Operation under "
     "Azure OpenAI API version 2024-10-01-preview have exceeded token rate limit of your current OpenAI S0 pricing "
     "tier. Please retry after 37 seconds."}}, ErrorKind.RATE_LIMIT),
    ("google", 429, [{"error": {"code": 429, "status": "RESOURCE_EXHAUSTED", "message": "You exceeded your current "
     "quota, please check your plan and billing details."}}], ErrorKind.RATE_LIMIT),
    # --- a concurrency limit
    ("anthropic connections", 429, anthropic("Number of concurrent connections has exceeded your rate limit. Please "
                                             f"try again later {SALES}", "rate_limit_error"),
     ErrorKind.CONCURRENCY_LIMIT),
    ("no reason", 429, anthropic("This request would exceed your account's rate limit. Please try again later.",
                                 "rate_limit_error"), ErrorKind.CONCURRENCY_LIMIT),
    ("no body", 429, b"", ErrorKind.CONCURRENCY_LIMIT),
    # --- an acceleration limit
    ("anthropic acceleration", 429, anthropic("This request would exceed your organization's maximum usage increase "
     "rate for input tokens per minute. Please scale up more gradually to stay within the acceleration limit.",
                                              "rate_limit_error"), ErrorKind.ACCELERATION_LIMIT),
    ("openai slow down", 503, openai("Slow Down", "server_error", "slow_down"), ErrorKind.ACCELERATION_LIMIT),
    # --- no capacity
    ("anthropic overloaded", 529, anthropic("Overloaded", "overloaded_error"), ErrorKind.OVERLOADED),
    ("529 without a body", 529, b"", ErrorKind.OVERLOADED),
    ("openai overloaded", 503, openai("The engine is currently overloaded, please try again later", "server_error",
                                      None), ErrorKind.OVERLOADED),
    ("openai overloaded, as 429", 429, openai("The engine is currently overloaded, please try again later", None,
                                              "engine_overloaded"), ErrorKind.OVERLOADED),
    ("azure no capacity", 429, {"error": {"code": "NoCapacity", "message": "The system is currently experiencing high "
                                          "demand and cannot process your request."}}, ErrorKind.OVERLOADED),
    ("ollama", 503, {"error": "server busy, please try again.  maximum pending requests exceeded"},
     ErrorKind.OVERLOADED),
    ("ollama, 2024", 500, {"error": "server busy, please try again. maximum pending requests exceeded"},
     ErrorKind.OVERLOADED),
    ("llama.cpp loads", 503, {"error": {"code": 503, "message": "Loading model", "type": "unavailable_error"}},
     ErrorKind.OVERLOADED),
    ("a load balancer", 503, b"", ErrorKind.OVERLOADED),
    # --- a spend cap
    ("openai quota", 429, openai("You exceeded your current quota, please check your plan and billing details.",
                                 "insufficient_quota", "insufficient_quota"), ErrorKind.SPEND_CAP),
    ("openai hard limit", 400, openai("Billing hard limit has been reached", "invalid_request_error",
                                      "billing_hard_limit_reached"), ErrorKind.SPEND_CAP),
    ("anthropic credit", 400, anthropic("Your credit balance is too low to access the Anthropic API. Please go to "
                                        "Plans & Billing.", "invalid_request_error"), ErrorKind.SPEND_CAP),
    ("anthropic usage limits", 400, anthropic("You have reached your specified API usage limits. You will regain "
                                              "access on 2026-05-01 at 00:00 UTC.", "invalid_request_error"),
     ErrorKind.SPEND_CAP),
    ("anthropic spend", 429, {"type": "error", "error": {"type": "rate_limit_error", "message": "Spend limit reached",
                              "details": {"error_code": "enforced_spend_limit_reached"}}}, ErrorKind.SPEND_CAP),
    ("anthropic billing", 402, anthropic("There's an issue with your billing", "billing_error"), ErrorKind.SPEND_CAP),
    ("402 without a body", 402, b"", ErrorKind.SPEND_CAP),
    ("a prompt that an error repeats", 400, openai("Invalid 'user': 'what is my credit balance'", None, "bad_value"),
     ErrorKind.CLIENT_ERROR),
    ("a prompt after a colon", 400, anthropic("messages.0: my spending limit is too long", "invalid_request_error"),
     ErrorKind.CLIENT_ERROR),
    # --- faults
    ("openai error", 500, openai("The server had an error while processing your request.", "server_error", None),
     ErrorKind.FAULT),
    ("anthropic error", 500, anthropic("Internal server error", "api_error"), ErrorKind.FAULT),
    ("an HTML page", 502, b"<html><head><title>502 Bad Gateway</title></head></html>", ErrorKind.FAULT),
    ("timeout", 504, anthropic("Request timed out", "timeout_error"), ErrorKind.FAULT),
    ("cloudflare", 524, b"error code: 524", ErrorKind.FAULT),
    ("no status", 999, b"\x00\xff", ErrorKind.FAULT),
    # --- client errors
    ("context", 400, openai("This model's maximum context length is 8192 tokens.", "invalid_request_error",
                            "context_length_exceeded"), ErrorKind.CLIENT_ERROR),
    ("key", 401, openai("Incorrect API key provided", "invalid_request_error", "invalid_api_key"),
     ErrorKind.CLIENT_ERROR),
    ("forbidden", 403, b"", ErrorKind.CLIENT_ERROR),
    ("model", 404, anthropic("model: claude-9", "not_found_error"), ErrorKind.CLIENT_ERROR),
    ("body too large", 413, anthropic("Request exceeds the maximum size", "request_too_large"),
     ErrorKind.CLIENT_ERROR),
    ("fields", 422, {"detail": [{"loc": ["body", "model"], "msg": "field required"}]}, ErrorKind.CLIENT_ERROR),
    ("larger than the quota", 429, openai(f"Request too large for {TPM}, Requested 30601. The input or output tokens "
                                           "must be reduced in order to run successfully.", "tokens",
                                           "rate_limit_exceeded"), ErrorKind.CLIENT_ERROR),
    # --- transient
    ("request timeout", 408, b"", ErrorKind.TRANSIENT),
    ("conflict", 409, b"", ErrorKind.TRANSIENT),
    # --- successes
    ("ok", 200, b"", ErrorKind.SUCCESS),
    ("moved", 307, b"", ErrorKind.SUCCESS),
]  # fmt: skip


@pytest.mark.parametrize(("status", "body", "kind"), [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_a_response_is_classified(status: int, body: Any, kind: ErrorKind) -> None:
    sent = body if isinstance(body, bytes) else json.dumps(body).encode()
    assert classify(status, {}, sent) is kind


@pytest.mark.parametrize(
    "headers",
    [
        {"Retry-After": "3"},
        {"retry-after-ms": "200"},
        {"llm_provider-retry-after": "3"},
        {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "1s"},
        {"anthropic-ratelimit-input-tokens-remaining": "0"},
    ],
)
def test_a_429_with_retry_after_or_an_empty_quota_is_a_rate_limit(headers: dict[str, str]) -> None:
    assert classify(429, headers, b"") is ErrorKind.RATE_LIMIT
    assert classify(429, {"x-ratelimit-remaining-requests": "12"}, b"") is ErrorKind.CONCURRENCY_LIMIT


def test_the_wording_outweighs_a_header() -> None:
    body = json.dumps(anthropic("Number of concurrent connections has exceeded your rate limit.", "rate_limit_error"))
    assert classify(429, {"retry-after": "3"}, body.encode()) is ErrorKind.CONCURRENCY_LIMIT


@pytest.mark.parametrize(
    ("kind", "outcome", "follows"),
    [
        (ErrorKind.SUCCESS, Outcome.SUCCESS, "uses_attempt"),
        (ErrorKind.RATE_LIMIT, Outcome.IGNORED, "retryable throttled can_fall_back"),
        (ErrorKind.CONCURRENCY_LIMIT, Outcome.OVERLOAD, "retryable throttled can_fall_back"),
        (ErrorKind.ACCELERATION_LIMIT, Outcome.OVERLOAD, "retryable throttled can_fall_back"),
        (ErrorKind.OVERLOADED, Outcome.OVERLOAD, "retryable throttled can_fall_back"),
        (ErrorKind.SPEND_CAP, Outcome.IGNORED, "throttled can_fall_back"),
        (ErrorKind.FAULT, Outcome.FAULT, "retryable uses_attempt can_fall_back"),
        (ErrorKind.TRANSIENT, Outcome.IGNORED, "retryable uses_attempt"),
        (ErrorKind.CLIENT_ERROR, Outcome.IGNORED, "uses_attempt"),
    ],
)
def test_what_follows_from_each_kind(kind: ErrorKind, outcome: Outcome, follows: str) -> None:
    assert kind.rule.outcome is outcome
    names = ("retryable", "uses_attempt", "throttled", "can_fall_back")
    assert [name for name in names if getattr(kind.rule, name)] == [name for name in names if name in follows.split()]


def test_no_response_is_a_fault() -> None:
    assert classify(None, {}) is ErrorKind.FAULT


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        ({"type": "overloaded_error", "message": "Overloaded"}, ErrorKind.OVERLOADED),
        ({"type": "rate_limit_error", "message": "..."}, ErrorKind.RATE_LIMIT),
        ({"type": "api_error", "message": "Internal server error"}, ErrorKind.FAULT),
        ({"type": "server_error", "code": None, "message": "The server had an error"}, ErrorKind.FAULT),
        ({"code": "rate_limit_exceeded", "message": "Rate limit reached"}, ErrorKind.RATE_LIMIT),
        ({"code": "insufficient_quota", "message": "You exceeded your current quota"}, ErrorKind.SPEND_CAP),
        ({"type": "invalid_request_error", "message": "..."}, ErrorKind.CLIENT_ERROR),
        ("the engine is overloaded", ErrorKind.OVERLOADED),
        (None, ErrorKind.FAULT),
        (17, ErrorKind.FAULT),
    ],
)
def test_an_error_in_the_middle_of_a_stream_is_classified(error: Any, kind: ErrorKind) -> None:
    assert classify_stream_error(error) is kind


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["error", "code", "type", "message", "details"]), inner, max_size=4)
    ),
)


@given(status=st.integers(-1, 1000), body=st.binary(max_size=300) | JSON.map(lambda v: json.dumps(v).encode()))
def test_no_body_raises(status: int, body: bytes) -> None:
    assert (classify(status, {}, body) is ErrorKind.SUCCESS) == (status < 400)


@pytest.mark.parametrize("body", [b"[" * 100_000, b'{"error":' * 20_000, b"x" * 10_000_000])
def test_no_body_is_too_deep_or_too_long(body: bytes) -> None:
    assert classify(500, {}, body) is ErrorKind.FAULT
