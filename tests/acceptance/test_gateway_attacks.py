"""What is sent to a gateway by those who mean no good, or know no better: it says no, and lives on."""

from __future__ import annotations

import json
import re

import pytest
from aiohttp import web
from tests.acceptance.gateways import (
    ASK,
    NOTHING,
    Scene,
    left,
    raw,
    written,
)  # fmt: skip

from forebay.gateway.server import Gateway

BODY = json.dumps(ASK).encode()
HIDDEN = written(start=b"GET /openai/v1/hidden HTTP/1.1")  # what is to pass as the body of another
CHUNKED = b"transfer-encoding: chunked"


def chunks(body: bytes, *fields: bytes) -> bytes:
    return written(b"", CHUNKED, *fields) + body


async def lives(scene: Scene, gateway: Gateway) -> None:
    """It serves the next one, and nothing is held of those before."""
    scene.provider.behaviour = scene.provider.answer
    status, _, _ = await scene.post(gateway)
    assert status == 200
    assert left(gateway) == NOTHING


# --- one request that is two ---


@pytest.mark.parametrize(
    "sent",
    [
        written(BODY, b"content-length: %d" % len(BODY)),
        *(written(b"", b"content-length: " + told) + b"{}" for told in (b"+2", b"0_2", b"2 2", b"0x2", b"", b"2,2")),
        written(b"", b"content-length: 99999999999999999999999") + b"{}",
        written(b"", b"content-length : 2") + b"{}",
        chunks(b"0\r\n\r\n", b"content-length: 2"),
        chunks(b"0\r\n\r\n", CHUNKED),
        chunks(b"0\r\n\r\n", b"transfer-encoding: identity"),
        *(
            written(b"", b"transfer-encoding: " + told) + b"2\r\n{}\r\n0\r\n\r\n"
            for told in (b"xchunked", b"chunked, identity", b"identity", b"gzip, chunked", b"\x0bchunked")
        ),
        written(b"", b"transfer-encoding : chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        written(b"{}", b"x: folded\r\n into: this"),
        written(b"{}", b"x: a\ny: b"),
        written(b"{}", b"x: a\ry: b"),
        written(b"{}", b"x: a\x00b"),
        written(b"{}", b"x y: a"),
        written(b"{}", b": a"),
        written(b"{}").replace(b"\r\n", b"\n"),
        *(
            chunks(size + b"\r\n{}\r\n0\r\n\r\n")
            for size in (b"-1", b"+2", b"0x2", b"0_2", b"2 ", b"2;\n", b"F" * 17 + b"2")
        ),
        chunks(b"2\n{}\n0\n\n"),
        chunks(b"2\r\n{}0\r\n\r\n"),
        chunks(b"2\r\n{}\r\n0\r\ncontent-length: 5\r\n\r\n"),
        written(b"", CHUNKED, start=b"POST /v1/chat/completions HTTP/1.0") + b"2\r\n{}\r\n0\r\n\r\n",
        written(b"{}", b"host: localhost"),
        written(b"{}").replace(b"host: localhost\r\n", b""),
    ],
)
async def test_what_two_could_read_differently_is_read_by_nobody(scene: Scene, sent: bytes) -> None:
    async with Gateway(scene.settings()) as gateway:
        told = await raw(gateway, sent + HIDDEN)
        assert told[:12] in (b"HTTP/1.0 400", b"HTTP/1.1 501"), told
        assert len(re.findall(rb"HTTP/1\.[01] [0-9]{3} ", told)) == 1
        assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert scene.provider.asked == []
        await lives(scene, gateway)


async def test_calls_in_a_row_are_answered_in_a_row(scene: Scene) -> None:
    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        asked = json.loads(await request.read())
        return web.json_response({"echo": asked["seed"], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    scene.provider.behaviour = echo
    async with Gateway(scene.settings()) as gateway:
        last: list[tuple[bytes, ...]] = [()] * 19 + [(b"connection: close",)]
        sent = [written(json.dumps({**ASK, "seed": n}).encode(), *end) for n, end in enumerate(last)]
        answers = re.findall(rb'"echo": ([0-9]+)', await raw(gateway, b"".join(sent)))
        assert answers == [b"%d" % n for n in range(20)]


# --- paths and hosts that are not its own ---


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../admin", "/openai/../admin", "/openai/v1/%2e%2e/admin", "/openai/v1/.%2E/admin", "/openai/..%2fadmin",
        "/openai/..%5cadmin", "/openai/v1\\..\\admin", "/openai/v1/./x", "/openai//v1/x", "/v1//chat/completions",
        "/v1/chat/%63ompletions", "/openai/%76%31/x", "http://localhost:1/openai/v1/x", "http://evil.example/v1/models",
        "*", "/", "/v1", "/v2/models", "/openai", "/openai@evil.example/v1/x", "/.well-known/x",
    ],
)  # fmt: skip
async def test_what_is_not_below_a_target_is_nowhere(scene: Scene, path: str) -> None:
    async with Gateway(scene.settings()) as gateway:
        method = b"OPTIONS " if path == "*" else b"GET "
        told = await raw(gateway, written(b"", b"connection: close", start=method + path.encode() + b" HTTP/1.1"))
        assert told.startswith(b"HTTP/1.1 404"), told
        assert scene.provider.asked == []


async def test_what_is_below_a_target_goes_there_as_it_is(scene: Scene) -> None:
    path = "/v1/models/meta%2Fllama%203?a=%2e%2e&b=../c&c=%00"
    async with Gateway(scene.settings()) as gateway:
        start = f"GET /openai{path} HTTP/1.1".encode()
        assert (await raw(gateway, written(b"", b"connection: close", start=start))).startswith(b"HTTP/1.1 200")
        (asked,) = scene.provider.asked
        assert asked.raw_path == path


@pytest.mark.parametrize("start", [b"CONNECT evil.example:443", b"TRACE /openai/v1/x"])
async def test_it_is_no_tunnel_and_no_mirror(scene: Scene, start: bytes) -> None:
    async with Gateway(scene.settings()) as gateway:
        told = await raw(gateway, written(b"", b"cookie: SECRET", start=start + b" HTTP/1.1"))
        assert told.startswith(b"HTTP/1.1 405")
        assert b"SECRET" not in told
        assert scene.provider.asked == []


async def test_a_web_page_from_elsewhere_gets_nothing(scene: Scene) -> None:
    async with Gateway(scene.settings()) as gateway:
        for headers in (
            {"host": "evil.example"},  # its name leads to loopback by now: DNS rebinding
            {"host": "127.0.0.1.evil.example:80"},
            {"host": "[::1"},
            {"origin": "https://evil.example"},
            {"origin": "https://localhost.evil.example"},
            {"origin": "null"},
        ):
            for path in ("/v1/chat/completions", "/metrics", "/healthz"):
                status, _, body = await scene.post(gateway, path, headers=headers)
                assert (status, "token" in body["error"]["message"]) == (403, True), headers
        assert scene.provider.asked == []
        for headers in (
            {"host": f"localhost:{gateway.port}", "origin": "http://localhost:3000"},
            {"host": "[::1]:80"},
            {"host": "a.localhost"},
            {"host": "127.9.9.9"},
        ):
            assert (await scene.post(gateway, headers=headers))[0] == 200, headers


async def test_who_has_the_token_may_come_by_any_name(scene: Scene) -> None:
    token = "0123456789abcdef0123"  # noqa: S105 - of this test
    settings = scene.settings(gateway={"token_env": "GATE"})
    async with Gateway(settings, {"GATE": token}) as gateway:
        told = {"host": "api.example", "origin": "https://chat.example"}
        assert (await scene.post(gateway, headers=told))[0] == 401
        for wrong in ("", token[:-1], token + "x", "ü" * 20, token.upper()):
            assert (await scene.post(gateway, headers={**told, "x-forebay-token": wrong}))[0] == 401
        assert (await scene.post(gateway, headers={**told, "x-forebay-token": token}))[0] == 200
        assert len(scene.provider.asked) == 1
