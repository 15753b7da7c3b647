from __future__ import annotations

import math

import pytest

from forebay import Priority
from forebay.gateway.caller import CallerReader, InvalidHeader, read_client_timeouts
from forebay.gateway.settings import Trust
from forebay.upstream.call_request import Caller

TOLD = {
    "x-forebay-priority": "High",
    "x-forebay-deadline": "1000.5",
    "x-forebay-tenant": "acme",
    "x-forebay-task": "run-7",
}


def read(headers: dict[str, str], *, trust: Trust = "anyone", token: str | None = None, share: bool = False) -> Caller:
    return CallerReader(trust, token, ("X-User-Id", "x-agent")).read(headers, offset=-900.0, shared_account=share)


def test_headers_tell_on_whose_behalf() -> None:
    sender = read(TOLD)
    assert sender == Caller(priority=Priority.HIGH, deadline=100.5, tenant="acme", task_id="run-7")


def test_without_them_it_is_anybody() -> None:
    assert read({}) == Caller() == Caller(priority=Priority.NORMAL, deadline=math.inf, tenant="default")


def test_a_tenant_may_be_named_as_others_do() -> None:
    assert read({"x-agent": "a", "x-user-id": "u"}).tenant == "u"
    assert read({"x-agent": "a", "x-forebay-tenant": "t"}).tenant == "t"


def test_who_is_not_trusted_is_not_heard() -> None:
    token = "0123456789abcdef"
    assert read(TOLD, trust="nobody") == Caller()
    assert read(TOLD, trust="token", token=token) == Caller()
    assert read({**TOLD, "x-forebay-token": "0123456789abcdeF"}, trust="token", token=token) == Caller()
    assert read({**TOLD, "x-forebay-token": token}, trust="token", token=token).tenant == "acme"


def test_who_has_the_token_may_enter() -> None:
    senders = CallerReader("token", "0123456789abcdef", ())
    assert not senders.is_authorized({})
    assert not senders.is_authorized({"x-forebay-token": "wröng"})
    assert senders.is_authorized({"x-forebay-token": "0123456789abcdef"})
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
def test_what_cannot_be_meant_is_told(header: str, value: str) -> None:
    with pytest.raises(InvalidHeader, match=header):
        read({header: value})


def test_callers_of_one_key_or_of_all() -> None:
    assert read({}).api_key is None
    assert read({}, share=True).api_key == ""


@pytest.mark.parametrize(
    ("headers", "line", "silence"),
    [
        ({}, 60.0, 600.0),
        ({"x-stainless-read-timeout": "600"}, 599.0, 605.0),
        ({"x-stainless-read-timeout": "2.5"}, 2.25, 7.5),
        ({"x-stainless-timeout": "30"}, 29.0, 35.0),
        ({"x-stainless-read-timeout": "never"}, 60.0, 600.0),
        ({"x-stainless-read-timeout": "-1"}, 60.0, 600.0),
        ({"x-stainless-read-timeout": "1e12"}, 86_399.0, 86_405.0),
    ],
)
def test_patience_is_what_the_sdk_hints(headers: dict[str, str], line: float, silence: float) -> None:
    assert read_client_timeouts(headers) == (line, silence)
