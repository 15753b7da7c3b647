"""Exceptions of SDKs: the answers and the timeouts that they report."""

from __future__ import annotations

import urllib.error
from email.message import Message
from http import HTTPStatus
from typing import Any

import httpx
import pytest

from forebay.upstream.sdk_exceptions import find_error_answer, is_timeout, never_connected


class SdkError(Exception):
    """An exception with the given attributes."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__("no")
        vars(self).update(attributes)


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


def raised_while(error: Exception, context: Exception) -> Exception:
    error.__context__ = context
    return error


def http_status_error() -> Exception:
    request = httpx.Request("POST", "https://provider.test")
    response = httpx.Response(429, headers={"Retry-After": "7"}, content=b'{"error": {}}', request=request)
    return httpx.HTTPStatusError("no", request=request, response=response)


def url_error() -> Exception:
    headers = Message()
    headers["Retry-After"] = "7"
    return urllib.error.HTTPError("https://provider.test", 429, "no", headers, None)


@pytest.mark.parametrize(
    "error",
    [
        http_status_error(),
        url_error(),
        SdkError(status_code=429, response=SdkError(headers={"Retry-After": "7"})),
        SdkError(status=429, headers={"retry-after": "7"}),
        SdkError(code=HTTPStatus(429), headers={"RETRY-AFTER": 7}),
        SdkError(response={"ResponseMetadata": {"HTTPStatusCode": 429, "HTTPHeaders": {"retry-after": "7"}}}),
        raised_from(RuntimeError("the tool failed"), raised_from(ValueError(), http_status_error())),
        raised_while(RuntimeError("the tool failed"), http_status_error()),
        ExceptionGroup("two tools failed", [ValueError(), http_status_error()]),
        raised_from(SdkError(status_code=429, headers=None, body={"message": "no"}), http_status_error()),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_answer_is_found_wherever_an_exception_carries_it(error: Exception) -> None:
    answer = find_error_answer(error)
    assert answer is not None
    assert (answer.status, answer.headers["retry-after"]) == (429, "7")


def test_the_body_is_found_too() -> None:
    answer = find_error_answer(SdkError(status_code=429, body={"error": {"code": "insufficient_quota"}}))
    assert answer is not None
    assert answer.body == b'{"error":{"code":"insufficient_quota"}}'


def test_what_an_exception_lacks_is_not_taken_from_one_with_another_status() -> None:
    error = raised_from(SdkError(status_code=503, body={"error": "no"}), http_status_error())
    answer = find_error_answer(error)
    assert answer is not None
    assert (answer.status, dict(answer.headers), answer.body) == (503, {}, b'{"error":"no"}')


def test_properties_that_raise_are_not_there() -> None:
    class Unread(SdkError):
        @property
        def content(self) -> bytes:
            raise httpx.ResponseNotRead

    answer = find_error_answer(SdkError(response=Unread(status_code=503, headers=None)))
    assert answer == (503, {}, b"")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("429"),
        SdkError(status_code=200),
        SdkError(code=7),
        SdkError(code="429"),
        SdkError(status=True),
        raised_while(raised_from(ValueError(), KeyError()), http_status_error()),
    ],
)
def test_other_exceptions_report_no_answer(error: Exception) -> None:
    assert find_error_answer(error) is None


class APITimeoutError(Exception):
    """A timeout as the SDKs of OpenAI and Anthropic raise it."""


@pytest.mark.parametrize(
    ("error", "timeout"),
    [
        (TimeoutError(), True),
        (httpx.ReadTimeout("slow"), True),
        (APITimeoutError(), True),
        (raised_from(RuntimeError(), TimeoutError()), True),
        (ExceptionGroup("two tools failed", [ValueError(), TimeoutError()]), True),
        (httpx.ConnectTimeout("slow"), False),
        (raised_from(APITimeoutError(), httpx.ConnectTimeout("slow")), False),
        (httpx.PoolTimeout("slow"), False),
        (TimeoutError(110, "Connection timed out"), False),
        (ConnectionResetError(), False),
    ],
)
def test_a_timeout_is_told_from_a_connection_that_failed(error: Exception, timeout: bool) -> None:  # noqa: FBT001
    assert is_timeout(error) is timeout


@pytest.mark.parametrize(
    ("error", "sent"),
    [
        (ConnectionRefusedError(), False),
        (httpx.ConnectError("no route"), False),
        (raised_from(APITimeoutError(), httpx.ConnectTimeout("slow")), False),
        (httpx.ReadTimeout("slow"), True),
        (ConnectionResetError(), True),
        (raised_while(RuntimeError(), ConnectionRefusedError()), True),
        (ValueError(), True),
    ],
)
def test_an_exception_shows_whether_anything_can_have_been_sent(error: Exception, sent: bool) -> None:  # noqa: FBT001
    assert never_connected(error) is not sent
