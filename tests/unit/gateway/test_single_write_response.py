"""A response that is written at once: with all that HTTP asks for, and nothing twice."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

import pytest
from aiohttp import HttpVersion, HttpVersion10, HttpVersion11

from forebay.gateway.single_write_response import SingleWriteResponse, fits_single_write

JSON = ("content-type", "application/json")


class WriterDouble:
    def __init__(self) -> None:
        self.written: list[bytes] = []

    async def write_eof(self, chunk: bytes) -> None:
        self.written.append(chunk)


@dataclass
class RequestDouble:
    method: str = "POST"
    version: HttpVersion = HttpVersion11
    keep_alive: bool = True
    writer: WriterDouble = field(default_factory=WriterDouble)


def send(
    *headers: tuple[str, str], status: int = 200, close: bool = False, keep_alive: bool = True
) -> tuple[str, list[str], bytes]:
    """Send a response; return its status line, its headers and its body."""
    request: Any = RequestDouble(keep_alive=keep_alive)
    response = SingleWriteResponse(status, headers, {name.lower() for name, _ in headers}, b"{}")
    if close:
        response.force_close()
    asyncio.run(response.send(request))
    [written] = request.writer.written
    head, _, body = written.partition(b"\r\n\r\n")
    line, *lines = head.decode().split("\r\n")
    return line, lines, body


def test_the_head_and_the_body_are_one_write() -> None:
    line, lines, body = send(JSON, ("x-own", "1"), ("Date", "now"), ("server", "nginx"))
    assert line == "HTTP/1.1 200 OK"
    assert lines == ["content-type: application/json", "x-own: 1", "Date: now", "server: nginx", "Content-Length: 2"]
    assert body == b"{}"


def test_a_date_a_server_and_a_content_type_are_added_where_they_are_missing() -> None:
    _, lines, _ = send()
    assert [line.partition(":")[0] for line in lines] == ["Content-Type", "Date", "Server", "Content-Length"]


@pytest.mark.parametrize("options", [{"close": True}, {"keep_alive": False}])
def test_a_caller_is_told_that_its_connection_ends(options: dict[str, bool]) -> None:
    assert "Connection: close" in send(JSON, **options)[1]


def test_a_status_without_a_phrase_is_sent() -> None:
    assert send(JSON, status=529)[0] == "HTTP/1.1 529 "


@pytest.mark.parametrize(
    ("method", "version", "status", "body", "fits"),
    [
        ("POST", HttpVersion11, 200, b"{}", True),
        ("HEAD", HttpVersion11, 200, b"{}", False),
        ("POST", HttpVersion10, 200, b"{}", False),
        ("POST", HttpVersion11, 204, b"{}", False),
        ("POST", HttpVersion11, 304, b"{}", False),
        ("POST", HttpVersion11, 200, b"", False),
        ("POST", HttpVersion11, 200, bytes(1 << 20), False),
    ],
)
def test_only_a_response_with_a_short_body_is_written_at_once(
    method: str, version: HttpVersion, status: int, body: bytes, *, fits: bool
) -> None:
    request: Any = RequestDouble(method, version)
    assert fits_single_write(request, status, body) is fits
