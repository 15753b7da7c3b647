"""Callers, read from the headers of their requests."""

from __future__ import annotations

import math
from typing import Any

import msgspec
import pytest

from forebay import Priority
from forebay.gateway.callers.caller import CallerReader, InvalidHeader, check_one_credential
from forebay.gateway.callers.issued_keys import IssuedKey
from forebay.gateway.settings import Trust
from forebay.upstream.call_request import Caller

HEADERS = {
    "x-forebay-priority": "High",
    "x-forebay-deadline": "1000.5",
    "x-forebay-tenant": "acme",
    "x-forebay-task": "run-7",
}


def read(headers: dict[str, str], *, trust: Trust = "anyone", token: str | None = None, shared: bool = False) -> Caller:
    return CallerReader(trust, token, ("X-User-Id", "x-agent")).read(headers, offset=-900.0, shared_account=shared)


def test_the_caller_is_read_from_the_headers() -> None:
    assert read(HEADERS) == Caller(priority=Priority.HIGH, deadline=100.5, tenant="acme", task_id="run-7")


def test_without_headers_the_caller_has_the_defaults() -> None:
    assert read({}) == Caller() == Caller(priority=Priority.NORMAL, deadline=math.inf, tenant="default")


def test_other_headers_may_name_the_tenant() -> None:
    assert read({"x-agent": "a", "x-user-id": "u"}).tenant == "u"
    assert read({"x-agent": "a", "x-forebay-tenant": "t"}).tenant == "t"


def test_the_headers_of_a_caller_that_is_not_trusted_are_ignored() -> None:
    token = "0123456789abcdef"
    assert read(HEADERS, trust="nobody") == Caller()
    assert read(HEADERS, trust="token", token=token) == Caller()
    assert read({**HEADERS, "x-forebay-token": "0123456789abcdeF"}, trust="token", token=token) == Caller()
    assert read({**HEADERS, "x-forebay-token": token}, trust="token", token=token).tenant == "acme"


def test_a_caller_with_the_token_is_authorized() -> None:
    callers = CallerReader("token", "0123456789abcdef", ())
    assert not callers.is_authorized({})
    assert not callers.is_authorized({"x-forebay-token": "wröng"})
    assert callers.is_authorized({"x-forebay-token": "0123456789abcdef"})
    assert CallerReader("anyone", None, ()).is_authorized({})


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("x-forebay-priority", "urgent"),
        ("x-forebay-deadline", "tomorrow"),
        ("x-forebay-deadline", "nan"),
        ("x-forebay-tenant", "a" * 257),
        ("x-forebay-task", "a\x00b"),
        ("x-user-id", "a\nb"),
    ],
)
def test_an_invalid_header_is_named(header: str, value: str) -> None:
    with pytest.raises(InvalidHeader, match=header):
        read({header: value})


def test_the_account_is_that_of_the_key_or_shared() -> None:
    assert read({}).api_key is None
    assert read({}, shared=True).api_key == ""


@pytest.mark.parametrize("other", ["x-api-key", "api-key", "x-goog-api-key", "ocp-apim-subscription-key"])
def test_two_keys_for_a_server_that_may_read_either_are_rejected(other: str) -> None:
    key, path = {"authorization": "Bearer sk-1"}, "/v1/chat/completions"
    for provider in ("openai-compatible", "generic", "vllm"):
        with pytest.raises(InvalidHeader, match=other):
            check_one_credential({**key, other: "sk-2"}, path, provider)
        check_one_credential({**key, other: "sk-1"}, path, provider)
        check_one_credential(key, path, provider)
        check_one_credential({other: "sk-1"}, path, provider)
        check_one_credential({}, path + "?key=sk-1", provider)
    check_one_credential({**key, other: "sk-2"}, path, "openai")


@pytest.mark.parametrize("query", ["?key=sk-2", "?a=b&api-key=sk-2", "?Subscription-Key=sk-2"])
def test_a_key_in_the_query_beside_one_in_a_header_is_rejected(query: str) -> None:
    for provider in ("openai-compatible", "azure"):
        with pytest.raises(InvalidHeader, match="query"):
            check_one_credential({"authorization": "Bearer sk-1"}, "/v1/x" + query, provider)
        check_one_credential({}, "/v1/x" + query, provider)
    check_one_credential({"authorization": "Bearer sk-1"}, "/v1/x" + query, "openai")


def test_an_issued_key_says_whom_the_headers_may_name() -> None:
    def read_with(headers: dict[str, str], **fields: Any) -> Caller:
        callers = CallerReader("nobody", None, ("X-User-Id",))
        key = IssuedKey(name="writer", **fields)
        return callers.read_with_key(headers, key, offset=-900.0, shared_account=False)

    own = Caller(tenant="writer", key_name="writer")
    assert read_with(HEADERS) == msgspec.structs.replace(own, deadline=100.5, task_id="writer:run-7")
    assert read_with({}, tenant="acme", priority="low") == msgspec.structs.replace(
        own, tenant="acme", priority=Priority.LOW
    )
    assert read_with(HEADERS, max_priority="critical").priority is Priority.HIGH
    assert read_with(HEADERS, sets_tenant=True).tenant == "acme"
    assert read_with({"x-user-id": "u"}, sets_tenant=True).tenant == "u"
    assert read_with({"x-user-id": ""}, sets_tenant=True).tenant == "writer"
    with pytest.raises(InvalidHeader):
        read_with({"x-forebay-priority": "urgent"})
