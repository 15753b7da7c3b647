"""What the errors of real HTTP clients say about the effect of a step."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import botocore.exceptions
import httpx
import pytest
import requests

from forebay.saga.step import is_ambiguous


class Answers(BaseHTTPRequestHandler):
    """Answers with the status in the path; with 0 it closes the connection instead."""

    def do_GET(self) -> None:
        status = int(self.path.strip("/"))
        if status:
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


def with_httpx(url: str) -> None:
    httpx.get(url, trust_env=False).raise_for_status()


def with_requests(url: str) -> None:
    requests.get(url, timeout=5).raise_for_status()


def with_urllib(url: str) -> None:
    try:
        urllib.request.urlopen(url, timeout=5).close()  # noqa: S310 - of this test
    except urllib.error.HTTPError as error:
        error.close()
        raise


CLIENTS = pytest.mark.parametrize("get", [with_httpx, with_requests, with_urllib])


def error_of(get: Any, url: str) -> Exception:
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
def test_a_connection_that_is_refused_says_that_it_had_none(get: Any) -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), Answers) as closed:
        port = closed.server_port
    assert not is_ambiguous(error_of(get, f"http://127.0.0.1:{port}/200"))


@pytest.mark.parametrize(("status", "ambiguous"), [(400, False), (503, True)])
def test_the_status_of_an_answer_of_aws(status: int, *, ambiguous: bool) -> None:
    answer: Any = {"Error": {"Code": "x"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    assert is_ambiguous(botocore.exceptions.ClientError(answer, "SendMessage")) == ambiguous
