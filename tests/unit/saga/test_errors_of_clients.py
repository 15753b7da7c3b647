"""What the errors of real HTTP clients say about the effect of a step."""

from __future__ import annotations

import asyncio
import json
import smtplib
import socket
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import aiohttp
import anthropic
import botocore.exceptions
import httpx
import openai
import pytest
import redis
import requests

from forebay.saga.step import is_ambiguous


class Answers(BaseHTTPRequestHandler):
    """Answers with the status in the path; with 0 it closes the connection instead.

    Other paths are answers with a status of 200: ``cut`` ends in its middle, ``odd`` is no JSON.
    """

    def do_GET(self) -> None:
        path = self.path.strip("/")
        if path in ("cut", "odd"):
            body = b"<html>"
            self.send_response(200)
            self.send_header("content-type", "text/html")
            self.send_header("content-length", str(len(body) + (path == "cut")))
            self.end_headers()
            self.wfile.write(body)
            self.close_connection = True
        elif status := int(path):
            self.send_response(status)
            self.send_header("content-length", "0")
            self.end_headers()
        else:
            self.close_connection = True

    def log_message(self, *_: object) -> None:
        """Print nothing."""


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as answers:
        thread = Thread(target=answers.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{answers.server_port}"
        answers.shutdown()
        thread.join()


@pytest.fixture
def refusing() -> str:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        return f"http://127.0.0.1:{closed.getsockname()[1]}"


def with_httpx(url: str) -> None:
    httpx.get(url, trust_env=False).raise_for_status().json()


def with_requests(url: str) -> None:
    answer = requests.get(url, timeout=5, allow_redirects=False)
    answer.raise_for_status()
    answer.json()


def with_urllib(url: str) -> None:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:  # noqa: S310 - of this test
            json.load(answer)
    except urllib.error.HTTPError as error:
        error.close()
        raise


def with_aiohttp(url: str) -> None:
    async def get() -> None:
        async with aiohttp.ClientSession() as session, session.get(url) as answer:
            answer.raise_for_status()
            await answer.json()

    asyncio.run(get())


CLIENTS = pytest.mark.parametrize("get", [with_httpx, with_requests, with_urllib, with_aiohttp])


def error_of(get: Callable[[str], None], url: str) -> Exception:
    with pytest.raises(Exception) as raised:  # noqa: PT011 - each client has its own
        get(url)
    return raised.value


@CLIENTS
@pytest.mark.parametrize(("status", "ambiguous"), [(400, False), (408, True), (422, False), (500, True), (503, True)])
def test_the_status_says_whether_it_may_have_had_an_effect(
    server: str, get: Any, status: int, *, ambiguous: bool
) -> None:
    assert is_ambiguous(error_of(get, f"{server}/{status}")) == ambiguous


@CLIENTS
def test_a_connection_that_ends_without_an_answer_leaves_it_open(server: str, get: Any) -> None:
    assert is_ambiguous(error_of(get, f"{server}/0"))


@CLIENTS
@pytest.mark.parametrize("path", ["cut", "odd"])
def test_an_answer_that_cannot_be_read_leaves_it_open(server: str, get: Any, path: str) -> None:
    assert is_ambiguous(error_of(get, f"{server}/{path}"))


def test_a_redirection_that_is_not_followed_leaves_it_open(server: str) -> None:
    assert is_ambiguous(error_of(with_httpx, f"{server}/302"))


@CLIENTS
def test_a_connection_that_is_refused_says_that_it_had_none(get: Any, refusing: str) -> None:
    assert not is_ambiguous(error_of(get, f"{refusing}/200"))


@pytest.mark.parametrize(("retries", "ambiguous"), [(0, False), (1, True)])
@pytest.mark.parametrize("sdk", [openai.OpenAI, anthropic.Anthropic])
def test_a_connection_that_is_refused_says_nothing_of_the_attempts_that_an_sdk_made_before(
    refusing: str, sdk: Any, retries: int, *, ambiguous: bool
) -> None:
    def get(url: str) -> None:
        with sdk(api_key="x", base_url=url, max_retries=retries) as client:
            client.models.list()

    error = error_of(get, refusing)
    assert type(error).__name__ == "APIConnectionError"
    assert is_ambiguous(error) == ambiguous


def test_a_redis_that_refuses_the_connection_has_done_nothing(refusing: str) -> None:
    def get(url: str) -> None:
        with redis.Redis(port=int(url.rpartition(":")[2])) as client:
            client.ping()

    assert not is_ambiguous(error_of(get, refusing))


@pytest.mark.parametrize(("answer", "ambiguous"), [(b"", True), (b"554 no\r\n", False)])
def test_a_mail_is_open_unless_the_server_refuses_it(answer: bytes, *, ambiguous: bool) -> None:
    def serve(listening: socket.socket) -> None:
        connection, _ = listening.accept()
        with connection, connection.makefile("rb") as lines:
            connection.sendall(b"220 ready\r\n")
            while lines.readline() != b"data\r\n":
                connection.sendall(b"250 ok\r\n")
            connection.sendall(b"354 go on\r\n")
            while lines.readline() != b".\r\n":
                pass
            if answer:
                connection.sendall(answer)
                lines.readline()  # the client's RSET

    def send(_: str) -> None:
        with smtplib.SMTP("127.0.0.1", port, local_hostname="x", timeout=5) as mail:
            mail.sendmail("a@example.org", "b@example.org", "paid")

    with socket.create_server(("127.0.0.1", 0)) as listening:
        port = listening.getsockname()[1]
        thread = Thread(target=serve, args=(listening,))
        thread.start()
        error = error_of(send, "")
        thread.join()
    assert isinstance(error, smtplib.SMTPException)
    assert is_ambiguous(error) == ambiguous


@pytest.mark.parametrize(("status", "ambiguous"), [(400, False), (503, True)])
def test_the_status_of_an_answer_of_aws(status: int, *, ambiguous: bool) -> None:
    answer: Any = {"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert is_ambiguous(botocore.exceptions.ClientError(answer, "SendMessage")) == ambiguous
