"""A step: its arguments, how its function is called, how its output is kept, and what its errors say of its effect."""

from __future__ import annotations

import asyncio
import concurrent.futures.process
import http.client
import json
import smtplib
import sqlite3
import ssl
import subprocess
import threading
import urllib.error
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiohttp
import anyio
import botocore.exceptions
import httpx
import msgspec
import openai
import pydantic
import pytest
import redis.exceptions
import requests
import urllib3.exceptions

from forebay import Retry
from forebay.errors import InvalidHandler, InvalidStep
from forebay.saga.step import NotEncodable, NothingDone, Step, call, is_ambiguous, step_of

REQUEST = httpx.Request("POST", "http://localhost/pay")
SDK_REQUEST: Any = REQUEST  # the SDK may be made for another version of httpx


def step(function: Any, *args: Any, name: Any = "pay", **options: Any) -> Step:
    given: dict[str, Any] = {"compensate": None, "pivot": False, "retry": None, "check": None, "idempotent": False}
    return step_of(name, function, args, **{**given, **options})


async def pay(amount: int = 1) -> str:
    return f"paid {amount}"


# --- what its errors say ---------------------------------------------------------------------------------------------


def caused(error: BaseException, cause: BaseException) -> BaseException:
    error.__cause__ = cause
    return error


def met_while(error: BaseException, earlier: BaseException) -> BaseException:
    error.__context__ = earlier
    return error


def httpx_status(status: int) -> Exception:
    return httpx.HTTPStatusError("bad", request=REQUEST, response=httpx.Response(status, request=REQUEST))


def openai_status(status: int) -> Exception:
    response: Any = httpx.Response(status, request=REQUEST)
    return openai.APIStatusError("bad", response=response, body=None)


def aiohttp_status(status: int) -> Exception:
    return aiohttp.ClientResponseError(None, (), status=status)  # type: ignore[arg-type]


def requests_status(status: int) -> Exception:
    response = requests.Response()
    response.status_code = status
    return requests.HTTPError("bad", response=response)


def botocore_status(status: int) -> Exception:
    found: Any = {"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = botocore.exceptions.ClientError(found, "PutItem")
    return error


def sdk_status(status: int, *, name: str = "http_status") -> Exception:
    """Return an error of an SDK that has its status under a name of its own."""
    error = RuntimeError("bad")
    setattr(error, name, status)
    return error


def openai_refused(attempts_before: int) -> BaseException:
    request: Any = httpx.Request("POST", REQUEST.url, headers={"x-stainless-retry-count": str(attempts_before)})
    return caused(openai.APIConnectionError(request=request), httpx.ConnectError("refused"))


def openai_unreadable() -> Exception:
    response: Any = httpx.Response(200, request=REQUEST)
    return openai.APIResponseValidationError(response=response, body=None)


class OddError(Exception):
    """An error whose attributes cannot be read."""

    @property
    def response(self) -> object:
        raise RuntimeError("no response yet")

    @property
    def reason(self) -> object:
        raise RuntimeError("no reason")


class LedgerError(OSError):
    """An error of a user's own that says that it is one of the operating system."""


NEW_CONNECTION = urllib3.exceptions.NewConnectionError(None, "refused")  # type: ignore[arg-type]

AMBIGUOUS = [
    TimeoutError(),
    asyncio.CancelledError(),
    ConnectionResetError(),
    BrokenPipeError(),
    NotEncodable(),
    httpx.ReadTimeout("slow", request=REQUEST),
    httpx.WriteTimeout("slow", request=REQUEST),
    httpx.ReadError("gone", request=REQUEST),
    httpx.WriteError("gone", request=REQUEST),
    httpx.RemoteProtocolError("gone", request=REQUEST),
    httpx.DecodingError("odd", request=REQUEST),
    httpx.StreamClosed(),
    httpx.ResponseNotRead(),
    httpx.TooManyRedirects("around", request=REQUEST),
    httpx_status(200),  # it was answered: what failed is later
    httpx_status(302),
    httpx_status(499),
    httpx_status(500),
    httpx_status(504),
    httpx_status(408),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ServerTimeoutError(),
    aiohttp.SocketTimeoutError(),
    aiohttp.ClientOSError(104, "reset"),
    aiohttp.ClientPayloadError("cut"),
    aiohttp.ClientConnectionError("Connection closed"),
    aiohttp.ClientConnectionResetError("Cannot write to closing transport"),
    aiohttp.ContentTypeError(None, (), status=200),  # type: ignore[arg-type]
    aiohttp.ContentTypeError(None, ()),  # type: ignore[arg-type]
    aiohttp_status(503),
    openai.APITimeoutError(request=SDK_REQUEST),
    openai.APIConnectionError(request=SDK_REQUEST),
    caused(openai.APIConnectionError(request=SDK_REQUEST), httpx.ConnectError("refused")),  # after attempts of its own
    openai_refused(attempts_before=1),
    openai_unreadable(),
    openai.APIError("the stream failed", SDK_REQUEST, body=None),
    openai_status(200),
    openai_status(500),
    openai_status(408),
    requests.ReadTimeout(),
    requests.ConnectionError("aborted"),
    met_while(requests.ConnectionError("aborted"), urllib3.exceptions.ProtocolError("aborted")),
    requests.exceptions.ChunkedEncodingError(),
    requests.exceptions.JSONDecodeError("no", "<html>", 0),
    requests.exceptions.RetryError("too many 503 error responses"),
    requests_status(301),
    requests_status(502),
    urllib3.exceptions.ReadTimeoutError(None, "/", "slow"),  # type: ignore[arg-type]
    botocore.exceptions.ReadTimeoutError(endpoint_url="x"),
    botocore.exceptions.ConnectionClosedError(endpoint_url="x"),
    botocore.exceptions.ResponseStreamingError(error="cut"),
    botocore.exceptions.IncompleteReadError(actual_bytes=1, expected_bytes=2),
    botocore.exceptions.HTTPClientError(error="odd"),
    botocore_status(200),
    botocore_status(500),
    sdk_status(500),
    sdk_status(503, name="code"),
    caused(ValueError("could not pay"), sdk_status(500)),
    json.JSONDecodeError("no", "<html>", 0),
    UnicodeDecodeError("utf-8", b"\xff", 0, 1, "no"),
    msgspec.DecodeError("cut"),
    http.client.IncompleteRead(b""),
    http.client.BadStatusLine("x"),
    http.client.RemoteDisconnected("gone"),
    urllib.error.URLError(TimeoutError()),
    urllib.error.URLError(ssl.SSLEOFError(8, "EOF")),
    urllib3.exceptions.MaxRetryError(None, "/", urllib3.exceptions.ResponseError("too many 503")),  # type: ignore[arg-type]
    smtplib.SMTPServerDisconnected("Connection unexpectedly closed"),
    sqlite3.OperationalError("disk I/O error"),
    subprocess.TimeoutExpired("pay", 3.0),
    concurrent.futures.CancelledError(),
    concurrent.futures.process.BrokenProcessPool(),
    EOFError(),
    asyncio.IncompleteReadError(b"", 3),
    anyio.EndOfStream(),
    anyio.BrokenResourceError(),
    ssl.SSLEOFError(8, "EOF occurred in violation of protocol"),
    ssl.SSLError(1, "bad record mac"),
    met_while(ssl.SSLEOFError(8, "EOF"), ConnectionRefusedError()),  # of another server, before
    met_while(redis.exceptions.ConnectionError("closed"), httpx_status(404)),  # of another server, before
    OSError(113, "no route to host"),
    FileExistsError(17, "exists"),
    LedgerError("not written"),
    ExceptionGroup("both", [ValueError(), TimeoutError()]),
    ExceptionGroup("both", [ConnectionRefusedError(), ExceptionGroup("more", [KeyError(), httpx_status(500)])]),
    BaseExceptionGroup("cut off", [asyncio.CancelledError()]),
    caused(ValueError("could not pay"), ExceptionGroup("both", [TimeoutError()])),
    redis.exceptions.TimeoutError("slow"),
    redis.exceptions.ConnectionError("closed by the server"),
    caused(ValueError("could not pay"), TimeoutError()),
    met_while(ValueError("could not pay"), httpx.ReadTimeout("slow", request=REQUEST)),
    caused(RuntimeError("could not pay"), httpx_status(500)),
    met_while(httpx.ReadTimeout("slow", request=REQUEST), ConnectionRefusedError()),  # of another server, before
]
DEFINITE = [
    ValueError("no such account"),
    KeyError("x"),
    TypeError("no"),
    AssertionError(),
    RuntimeError("no"),
    IndexError(),
    OddError(),
    OSError("disk full"),
    FileNotFoundError(2, "no such file"),
    PermissionError(13, "denied"),
    NothingDone(),
    ConnectionRefusedError(),
    ssl.SSLCertVerificationError("the certificate has expired"),
    urllib.error.URLError(ConnectionRefusedError()),
    smtplib.SMTPConnectError(421, "busy"),
    smtplib.SMTPSenderRefused(550, b"no", "a@example.org"),
    smtplib.SMTPDataError(554, b"no"),
    sdk_status(402),
    sdk_status(404, name="code"),
    sdk_status(7, name="code"),  # no HTTP status
    ExceptionGroup("both", [ValueError(), ConnectionRefusedError(), httpx_status(422)]),
    httpx.ConnectError("refused", request=REQUEST),
    httpx.ConnectTimeout("slow", request=REQUEST),
    caused(httpx.ConnectTimeout("slow", request=REQUEST), TimeoutError()),
    httpx.PoolTimeout("full", request=REQUEST),
    httpx_status(400),
    httpx_status(409),
    httpx_status(429),
    aiohttp_status(422),
    aiohttp.ContentTypeError(None, (), status=404),  # type: ignore[arg-type]
    aiohttp.ClientConnectorError(None, OSError("refused")),  # type: ignore[arg-type]
    aiohttp.ConnectionTimeoutError(),
    aiohttp.InvalidURL("x"),
    openai_refused(attempts_before=0),
    openai_status(401),
    openai_status(429),
    requests.ConnectTimeout(),
    met_while(requests.ConnectionError("refused"), caused(NEW_CONNECTION, ConnectionRefusedError())),
    requests.exceptions.MissingSchema("no scheme"),
    requests_status(404),
    botocore.exceptions.EndpointConnectionError(endpoint_url="x"),
    botocore.exceptions.ConnectTimeoutError(endpoint_url="x"),
    botocore_status(400),
    caused(ValueError("could not pay"), ConnectionRefusedError()),
    caused(RuntimeError("could not pay"), httpx_status(400)),
]


def label(error: BaseException) -> str:
    behind = error.__cause__ or error.__context__
    return type(error).__name__ + (f" of {type(behind).__name__}" if behind else "")


@pytest.mark.parametrize("error", AMBIGUOUS, ids=label)
def test_an_error_without_a_whole_answer_leaves_open_whether_there_is_an_effect(error: BaseException) -> None:
    assert is_ambiguous(error)


@pytest.mark.parametrize("error", DEFINITE, ids=label)
def test_any_other_error_says_that_there_is_none(error: BaseException) -> None:
    assert not is_ambiguous(error)


def test_a_group_that_was_raised_from_itself_is_judged() -> None:
    group = ExceptionGroup("both", [error := ValueError()])
    error.__cause__ = group
    assert not is_ambiguous(group)


def test_groups_in_groups_are_judged_however_deep_they_are() -> None:
    error: Exception = ValueError()
    for _ in range(10_000):
        error = ExceptionGroup("more", [error])
    assert not is_ambiguous(error)


def test_errors_that_were_raised_from_each_other_in_a_circle_are_judged() -> None:
    error = ValueError()
    error.__cause__ = caused(KeyError(), error)
    assert not is_ambiguous(error)


# --- its arguments ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda: step(pay, name=""), "1 to 200 characters"),
        (lambda: step(pay, name="x" * 201), "1 to 200 characters"),
        (lambda: step(pay, name=7), "1 to 200 characters"),
        (lambda: step(7), "it needs a function or an agent, and was given a int"),
        (lambda: step(pay()), "pass the function and its arguments"),
        (lambda: step(pay, compensate=7), "compensate= must be a function, without parentheses, and not a int"),
        (lambda: step(pay, check="x"), "check= must be a function, without parentheses, and not a str"),
        (lambda: step(pay, pivot=True, compensate=pay), "the pivot, which is not undone"),
        (lambda: step(pay, retry=3), "retry= must be a Retry"),
    ],
)
def test_an_argument_that_is_invalid_is_rejected(make: Callable[[], Step], why: str) -> None:
    with pytest.raises(InvalidStep, match=why):
        make()


def test_valid_arguments_are_kept() -> None:
    retry = Retry(max_attempts=2)
    made = step(pay, 7, name="x" * 200, compensate=pay, retry=retry, check=pay, idempotent=True)
    assert (made.args, made.retry, made.idempotent, made.pivot) == ((7,), retry, True, False)
    assert made.function_name.endswith("pay")


class Agent:
    """An agent that knows how it is called."""

    def __forebay_handler__(self) -> Any:
        from forebay.adapters import Handler  # noqa: PLC0415 - as an agent of a user's does

        async def answer(task: Any) -> Any:
            return task.payload, task.task_id, task.thread_id

        return Handler(call=answer)


async def test_an_agent_gets_one_argument_and_the_key_of_its_step() -> None:
    assert await step(Agent(), "question").call("s/1/pay", None) == ("question", "s/1/pay", "s/1/pay")
    with pytest.raises(InvalidStep, match="takes one argument, and was given 2"):
        step(Agent(), "one", "two")


# --- how its function is called --------------------------------------------------------------------------------------


async def with_key(first: object, *, key: str) -> Any:
    return first, key


async def with_a_key_that_may_be_given_by_position(first: object, key: str = "") -> Any:
    return first, key


async def without_key(first: object) -> Any:
    return first, None


async def with_any_names(first: object, **names: object) -> Any:
    return first, names.get("key")


async def with_key_first(key: object, data: object) -> Any:
    return key, data


def plain_with_key(first: object, *, key: str) -> Any:
    return first, key


class WithKey:
    async def __call__(self, first: object, *, key: str) -> Any:
        return first, key


@pytest.mark.parametrize(
    ("function", "takes_key"),
    [
        (with_key, True),
        (with_a_key_that_may_be_given_by_position, True),
        (without_key, False),
        (with_any_names, False),
        (plain_with_key, True),
        (WithKey(), True),
        (WithKey().__call__, True),
        (partial(with_key), True),
        (partial(plain_with_key), True),
    ],
)
async def test_a_function_gets_the_key_if_it_has_a_parameter_of_that_name(
    function: Callable[..., Any],
    takes_key: bool,  # noqa: FBT001
) -> None:
    with ThreadPoolExecutor() as threads:
        assert await call(function, 7, key="k", threads=threads) == (7, "k" if takes_key else None)


@pytest.mark.parametrize(
    ("function", "args", "found"),
    [
        (with_key_first, ("name", "data"), ("name", "data")),
        (with_a_key_that_may_be_given_by_position, (7, "name"), (7, "name")),
        (partial(with_a_key_that_may_be_given_by_position, 7), ("name",), (7, "name")),
        (partial(with_a_key_that_may_be_given_by_position, 7), (), (7, "the key")),
        (partial(with_a_key_that_may_be_given_by_position, 7, "name"), (), (7, "name")),
        (partial(with_key, key="name"), (7,), (7, "name")),
        (partial(partial(plain_with_key, key="name"), 7), (), (7, "name")),
        (partial(with_key_first, data="data"), (), ("the key", "data")),
    ],
)
async def test_a_parameter_key_that_is_given_already_keeps_what_it_was_given(
    function: Callable[..., Any], args: tuple[object, ...], found: object
) -> None:
    with ThreadPoolExecutor() as threads:
        for _ in range(2):  # the second time its signature is known
            assert await call(function, *args, key="the key", threads=threads) == found


async def test_a_built_in_function_can_be_a_step() -> None:
    with ThreadPoolExecutor() as threads:
        assert await call(max, 1, 2, key="k", threads=threads) == 2


async def test_a_plain_function_runs_in_a_thread_and_may_return_an_awaitable() -> None:
    found: list[threading.Thread] = []

    def begin() -> Any:
        found.append(threading.current_thread())
        return pay(3)

    with ThreadPoolExecutor() as threads:
        assert await call(begin, key="k", threads=threads) == "paid 3"
    assert found != [threading.current_thread()]


@pytest.mark.parametrize("error", [ValueError("x"), StopIteration("x"), asyncio.CancelledError("x")])
async def test_what_a_plain_function_raises_is_raised(error: BaseException) -> None:
    def fail() -> None:
        raise error

    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with ThreadPoolExecutor() as threads, pytest.raises(expected):
        await call(fail, key="k", threads=threads)


async def test_a_plain_function_has_really_ended_when_its_step_was_cancelled() -> None:
    begun, may_end, ended = asyncio.Event(), threading.Event(), threading.Event()
    loop = asyncio.get_running_loop()

    def work() -> str:
        loop.call_soon_threadsafe(begun.set)
        may_end.wait(10.0)
        ended.set()
        return "done"

    with ThreadPoolExecutor() as threads:
        task = asyncio.ensure_future(call(work, key="k", threads=threads))
        await begun.wait()
        task.cancel()
        task.cancel()
        await asyncio.sleep(0)
        assert not task.done()
        may_end.set()
        assert await task == "done"  # it has had its effect: that is no time to forget its output
    assert ended.is_set()


async def test_an_async_function_is_cancelled_at_once() -> None:
    task = asyncio.ensure_future(call(asyncio.sleep, 1_000.0, key="k", threads=None))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# --- how its output is kept ------------------------------------------------------------------------------------------


@dataclass
class Receipt:
    number: int
    lines: list[str]


class Note(msgspec.Struct):
    text: str


class Bill(pydantic.BaseModel):
    total: int


def receipt() -> Receipt: ...  # type: ignore[empty-body]
def note() -> Note: ...  # type: ignore[empty-body]
def bill() -> Bill: ...  # type: ignore[empty-body]
def bills() -> list[Bill]: ...  # type: ignore[empty-body]
def perhaps() -> Receipt | None: ...


@pytest.mark.parametrize(
    ("function", "output", "plain"),
    [
        (receipt, Receipt(1, ["a"]), {"number": 1, "lines": ["a"]}),
        (note, Note("x"), {"text": "x"}),
        (bill, Bill(total=3), {"total": 3}),
        (bills, [Bill(total=3)], [{"total": 3}]),
        (perhaps, Receipt(1, []), {"number": 1, "lines": []}),
        (perhaps, None, None),
        (partial(partial(note)), Note("x"), {"text": "x"}),
    ],
)
def test_an_output_of_the_type_that_the_function_says_is_kept_as_plain_data(
    function: Callable[..., Any], output: object, plain: object
) -> None:
    codec = step(function).codec
    assert codec is not None
    assert codec.dump(codec.coerce(output)) == plain
    assert codec.load(plain) == output


def says_nothing(): ...  # type: ignore[no-untyped-def]
def plain_data() -> dict[str, list[int | None]]: ...  # type: ignore[empty-body]
def anything() -> Any: ...
def cannot_be_resolved() -> NoSuchType: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize("function", [says_nothing, plain_data, anything, cannot_be_resolved, max])
def test_plain_outputs_and_those_of_which_nothing_is_known_are_kept_as_they_are(function: Callable[..., Any]) -> None:
    assert step(function).codec is None


def test_what_has_no_handler_is_rejected_as_an_agent() -> None:
    class Odd:
        def __forebay_handler__(self) -> Any:
            return 7

    with pytest.raises(InvalidHandler):
        step(Odd(), "x")
