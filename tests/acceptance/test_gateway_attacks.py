"""Malicious and malformed traffic: the gateway rejects it, and keeps working."""

from __future__ import annotations

import asyncio
import gzip
import json
import logging
import re
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    DONE,
    EVENT,
    NOTHING_LEFT,
    STOP,
    Behaviour,
    GatewayHarness,
    connect,
    leftovers,
    raw,
    read_to_end,
    request_bytes,
    responding,
    streaming,
    until,
    writing_raw,
)
from tests.support.metric_samples import total

from forebay.gateway import FallbackSettings, GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway

BODY = json.dumps(CHAT_REQUEST).encode()
HIDDEN = request_bytes(start=b"GET /openai/v1/hidden HTTP/1.1")  # a request hidden in the body of another
CHUNKED = b"transfer-encoding: chunked"


def chunks(body: bytes, *fields: bytes) -> bytes:
    return request_bytes(b"", CHUNKED, *fields) + body


async def check_works(harness: GatewayHarness, gateway: Gateway) -> None:
    """Check that the next call is served, and that earlier ones left nothing."""
    harness.provider.behaviour = harness.provider.reply
    status, _, _ = await harness.post(gateway)
    assert status == 200
    assert leftovers(gateway) == NOTHING_LEFT


# --- request smuggling ---


@pytest.mark.parametrize(
    "sent",
    [
        request_bytes(BODY, b"content-length: %d" % len(BODY)),
        *(
            request_bytes(b"", b"content-length: " + value) + b"{}"
            for value in (b"+2", b"0_2", b"2 2", b"0x2", b"", b"2,2")
        ),
        request_bytes(b"", b"content-length: 99999999999999999999999") + b"{}",
        request_bytes(b"", b"content-length : 2") + b"{}",
        chunks(b"0\r\n\r\n", b"content-length: 2"),
        chunks(b"0\r\n\r\n", CHUNKED),
        chunks(b"0\r\n\r\n", b"transfer-encoding: identity"),
        *(
            request_bytes(b"", b"transfer-encoding: " + value) + b"2\r\n{}\r\n0\r\n\r\n"
            for value in (b"xchunked", b"chunked, identity", b"identity", b"gzip, chunked", b"\x0bchunked")
        ),
        request_bytes(b"", b"transfer-encoding : chunked") + b"2\r\n{}\r\n0\r\n\r\n",
        request_bytes(b"{}", b"x: folded\r\n into: this"),
        request_bytes(b"{}", b"x: a\ny: b"),
        request_bytes(b"{}", b"x: a\ry: b"),
        request_bytes(b"{}", b"x: a\x00b"),
        request_bytes(b"{}", b"x y: a"),
        request_bytes(b"{}", b": a"),
        request_bytes(b"{}").replace(b"\r\n", b"\n"),
        *(
            chunks(size + b"\r\n{}\r\n0\r\n\r\n")
            for size in (b"-1", b"+2", b"0x2", b"0_2", b"2 ", b"2;\n", b"F" * 17 + b"2")
        ),
        chunks(b"2\n{}\n0\n\n"),
        chunks(b"2\r\n{}0\r\n\r\n"),
        chunks(b"2\r\n{}\r\n0\r\ncontent-length: 5\r\n\r\n"),
        request_bytes(b"", CHUNKED, start=b"POST /v1/chat/completions HTTP/1.0") + b"2\r\n{}\r\n0\r\n\r\n",
        request_bytes(b"{}", b"host: localhost"),
        request_bytes(b"{}").replace(b"host: localhost\r\n", b""),
    ],
)
async def test_an_ambiguous_request_is_rejected(harness: GatewayHarness, sent: bytes) -> None:
    async with Gateway(harness.settings()) as gateway:
        received = await raw(gateway, sent + HIDDEN)
        assert received[:12] in (b"HTTP/1.0 400", b"HTTP/1.1 501"), received
        assert len(re.findall(rb"HTTP/1\.[01] [0-9]{3} ", received)) == 1
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert harness.provider.requests == []
        await check_works(harness, gateway)


@pytest.mark.parametrize(
    "field",
    [
        b"authorization: Bearer sk-secret\x00",
        b"authorization : Bearer sk-secret",
        b"authorization: Bearer\rsk-secret",
        b"authorization: Bearer sk-secret\r\n folded sk-secret",
        b"authorization\x01: Bearer sk-secret",
        b"authorization: " + b"sk-secret" * 20_000,
        b"sk-secret",
        b"content-length: sk-secret",
        b"host: sk-secret\r\nhost: sk-secret",
    ],
)
async def test_a_400_repeats_no_bytes_of_the_request(
    harness: GatewayHarness, caplog: pytest.LogCaptureFixture, field: bytes
) -> None:
    async with Gateway(harness.settings()) as gateway:
        for sent in (request_bytes(b"{}", field), request_bytes(b"{}", start=b"POST /sk-secret\x01 HTTP/1.1")):
            received = await raw(gateway, sent)
            assert received[9:12] in (b"400", b"431"), received
            assert b"sk-secret" not in received
            assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert "sk-secret" not in caplog.text


async def test_a_404_repeats_no_query(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        status, _, body = await harness.post(gateway, "/nowhere/v1/models?key=sk-secret")
        assert (status, "sk-secret" in str(body)) == (404, False)


async def test_pipelined_calls_are_answered_in_order(harness: GatewayHarness) -> None:
    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        asked = json.loads(await request.read())
        return web.json_response({"echo": asked["seed"], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    harness.provider.behaviour = echo
    async with Gateway(harness.settings()) as gateway:
        last: list[tuple[bytes, ...]] = [()] * 19 + [(b"connection: close",)]
        sent = [request_bytes(json.dumps({**CHAT_REQUEST, "seed": n}).encode(), *end) for n, end in enumerate(last)]
        answers = re.findall(rb'"echo": ([0-9]+)', await raw(gateway, b"".join(sent)))
        assert answers == [b"%d" % n for n in range(20)]


@pytest.mark.parametrize("method", [b"HEAD", b"POST"])
async def test_the_next_response_is_found_after_any_body(harness: GatewayHarness, method: bytes) -> None:
    harness.provider.behaviour = responding(200, b"HTTP/1.1 200 OK\r\n\r\n")
    async with Gateway(harness.settings()) as gateway:
        first = request_bytes(BODY if method == b"POST" else b"", start=method + b" /openai/v1/other HTTP/1.1")
        last = request_bytes(b"", b"connection: close", start=b"GET /healthz HTTP/1.1")
        received = await raw(gateway, first + last)
        assert received.endswith(b'{"status":"ok"}')
        head, _, rest = received.partition(b"\r\n\r\n")
        assert rest.startswith(b"HTTP/1.1 200 OK\r\n\r\nHTTP" if method == b"POST" else b"HTTP"), head


async def test_http_1_0_is_answered_without_chunks(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, STOP, DONE)
    async with Gateway(harness.settings()) as gateway:
        body = json.dumps({**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}).encode()
        received = await raw(gateway, request_bytes(body, start=b"POST /v1/chat/completions HTTP/1.0"))
        assert received.partition(b"\r\n\r\n")[2] == EVENT + STOP + DONE
        assert b"chunked" not in received
        await check_works(harness, gateway)


# --- paths and hosts ---


@pytest.mark.parametrize(
    "path",
    [
        "/v1/../admin", "/openai/../admin", "/openai/v1/%2e%2e/admin", "/openai/v1/.%2E/admin", "/openai/..%2fadmin",
        "/openai/..%5cadmin", "/openai/v1\\..\\admin", "/openai/v1/./x", "/openai//v1/x", "/v1//chat/completions",
        "/v1/chat/%63ompletions", "/openai/%76%31/x", "http://localhost:1/openai/v1/x", "http://evil.example/v1/models",
        "*", "/", "/v1", "/v2/models", "/openai", "/openai@evil.example/v1/x", "/.well-known/x",
    ],
)  # fmt: skip
async def test_a_path_outside_the_targets_is_a_404(harness: GatewayHarness, path: str) -> None:
    async with Gateway(harness.settings()) as gateway:
        method = b"OPTIONS " if path == "*" else b"GET "
        received = await raw(
            gateway, request_bytes(b"", b"connection: close", start=method + path.encode() + b" HTTP/1.1")
        )
        assert received.startswith(b"HTTP/1.1 404"), received
        assert harness.provider.requests == []


async def test_a_path_below_a_target_is_forwarded_unchanged(harness: GatewayHarness) -> None:
    path = "/v1/models/meta%2Fllama%203?a=%2e%2e&b=../c&c=%00"
    async with Gateway(harness.settings()) as gateway:
        start = f"GET /openai{path} HTTP/1.1".encode()
        assert (await raw(gateway, request_bytes(b"", b"connection: close", start=start))).startswith(b"HTTP/1.1 200")
        (request,) = harness.provider.requests
        assert request.raw_path == path


@pytest.mark.parametrize("start", [b"CONNECT evil.example:443", b"TRACE /openai/v1/x"])
async def test_connect_and_trace_are_rejected(harness: GatewayHarness, start: bytes) -> None:
    async with Gateway(harness.settings()) as gateway:
        received = await raw(gateway, request_bytes(b"", b"cookie: SECRET", start=start + b" HTTP/1.1"))
        assert received.startswith(b"HTTP/1.1 405")
        assert b"SECRET" not in received
        assert harness.provider.requests == []


async def test_a_foreign_web_page_is_rejected(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        for headers in (
            {"host": "evil.example"},  # DNS rebinding: the name resolves to loopback
            {"host": "127.0.0.1.evil.example:80"},
            {"host": "[::1"},
            {"origin": "https://evil.example"},
            {"origin": "https://localhost.evil.example"},
            {"origin": "null"},
            {"sec-fetch-site": "cross-site"},
        ):
            for path in ("/v1/chat/completions", "/metrics", "/healthz"):
                status, _, body = await harness.post(gateway, path, headers=headers)
                assert (status, "token" in body["error"]["message"]) == (403, True), headers
        assert harness.provider.requests == []
        for headers in (
            {"host": f"localhost:{gateway.port}", "origin": "http://localhost:3000"},
            {"host": "[::1]:80"},
            {"host": "a.localhost"},
            {"host": "127.9.9.9"},
            {"host": "host.docker.internal:8787"},
        ):
            assert (await harness.post(gateway, headers=headers))[0] == 200, headers


async def test_with_the_token_any_host_and_origin_pass(harness: GatewayHarness) -> None:
    token = "0123456789abcdef0123"  # noqa: S105 - of this test
    settings = harness.settings(gateway={"token_env": "GATE"})
    async with Gateway(settings, {"GATE": token}) as gateway:
        sent = {"host": "api.example", "origin": "https://chat.example"}
        assert (await harness.post(gateway, headers=sent))[0] == 401
        for wrong in ("", token[:-1], token + "x", "ü" * 20, token.upper()):
            assert (await harness.post(gateway, headers={**sent, "x-forebay-token": wrong}))[0] == 401
        assert (await harness.post(gateway, headers={**sent, "x-forebay-token": token}))[0] == 200
        assert len(harness.provider.requests) == 1


# --- slow and endless traffic ---


async def drip(gateway: Gateway, start: bytes, piece: bytes) -> bytes:
    """Send a start and then a piece now and then; return what comes back, to the end of the connection."""
    reader, writer = await connect(gateway, start)
    coming = asyncio.create_task(read_to_end(reader))
    while not coming.done():
        writer.write(piece)
        await asyncio.wait([coming], timeout=0.01)
    writer.close()
    return await coming


async def test_a_slow_head_times_out(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"idle_timeout": 0.1})) as gateway:
        for start in (b"GET /", request_bytes()[:-2]):  # from the start, or in the middle of the headers
            assert await drip(gateway, start, b"a") == b""
        assert await raw(gateway, b"") == b""  # nothing at all
        _, writer = await connect(gateway, request_bytes(BODY))
        await until(lambda: len(harness.provider.bodies) == 1)
        await until(lambda: not gateway._web.connections)  # it was kept alive, and no other call came
        writer.close()
        await check_works(harness, gateway)


async def test_a_slow_body_times_out(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"body_timeout": 0.1})) as gateway:
        for field, piece in ((b"content-length: 1000000", b"a"), (CHUNKED, b"1\r\na\r\n")):
            received = await drip(gateway, request_bytes(b"", field), piece)
            assert received.startswith(b"HTTP/1.1 408")
            assert b"timeout_error" in received
        assert harness.provider.requests == []
        await check_works(harness, gateway)


@pytest.mark.parametrize(
    ("start", "piece", "status"),
    [
        (b"", b"a" * 1000, 400),  # a method
        (b"GET /", b"a" * 1000, 431),
        (b"GET / HTTP/1.1\r\nx: ", b"a" * 1000, 431),
        (b"GET / HTTP/1.1\r\n", b"x: " + b"a" * 1000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n", b"x: a\r\n", 431),
        (b"", b"\r\n" * 500, 431),
    ],
)
async def test_an_endless_head_is_rejected(harness: GatewayHarness, start: bytes, piece: bytes, status: int) -> None:
    async with Gateway(harness.settings(gateway={"max_header_bytes": 10_000})) as gateway:
        received = await drip(gateway, start, piece)
        assert int(received.split()[1]) == status
        assert json.loads(received.partition(b"\r\n\r\n")[2])["error"]["message"]
        await check_works(harness, gateway)


async def test_headers_are_limited_together(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings(gateway={"max_header_bytes": 10_000})) as gateway:
        status, _, body = await harness.post(gateway, headers={f"x-{n}": "a" * 3_000 for n in range(4)})
        assert (status, "10,000" in body["error"]["message"]) == (431, True)
        assert harness.provider.requests == []
        assert (await harness.post(gateway, headers={f"x-{n}": "a" * 3_000 for n in range(3)}))[0] == 200


async def test_an_endless_body_is_rejected(harness: GatewayHarness) -> None:
    taken = 0
    async with Gateway(harness.settings(gateway={"max_body_bytes": 1 << 20})) as gateway:
        reader, writer = await connect(gateway, request_bytes(b"", CHUNKED))
        coming = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        while not coming.done() and taken < 100 << 20:
            writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            taken += 0x10000
            await writer.drain()
        assert (await coming).startswith(b"HTTP/1.1 413")
        writer.close()
        assert taken < 32 << 20  # what sockets buffer; then reading stopped
        assert harness.provider.requests == []
        await check_works(harness, gateway)


@pytest.mark.parametrize("stream", [False, True])
async def test_a_caller_that_reads_nothing_is_disconnected_and_its_call_ends(
    harness: GatewayHarness, *, stream: bool
) -> None:
    async def flood(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        if not stream:
            return web.Response(body=b"a" * (32 << 20))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(EVENT * 1000)

    harness.provider.behaviour = flood
    async with Gateway(harness.settings(gateway={"send_timeout": 0.2})) as gateway:
        reader, writer = await connect(gateway, request_bytes(json.dumps({**CHAT_REQUEST, "stream": stream}).encode()))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: len(gateway._web.connections) == 1)
        (connection,) = gateway._web.connections
        held = 0
        while gateway._web.connections:
            held = max(held, connection._wire.get_write_buffer_size())  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        if stream:
            await harness.provider.disconnected.wait()
            assert 0 < held < 1 << 20
        writer.close()
        del reader
        await check_works(harness, gateway)


async def test_a_caller_that_reads_nothing_does_not_delay_the_end(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT * 100_000, None)
    gateway = Gateway(harness.settings(gateway={"drain_timeout": 0.1}))
    await gateway.__aenter__()
    _, writer = await connect(gateway, request_bytes(json.dumps({**CHAT_REQUEST, "stream": True}).encode()))
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: any(connection.writing_paused for connection in gateway._web.connections))
    (connection,) = gateway._web.connections
    async with asyncio.timeout(20):  # less than its send_timeout
        await gateway.__aexit__(None, None, None)
    assert connection._wire.get_write_buffer_size() == 0  # type: ignore[attr-defined] # the socket is closed
    await harness.provider.disconnected.wait()
    assert leftovers(gateway) == NOTHING_LEFT
    writer.close()


async def test_an_unfinished_request_makes_no_call(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        for part in (1, 40, len(request_bytes(BODY)) - 1):
            _, writer = await connect(gateway, request_bytes(BODY)[:part])
            await until(lambda: len(gateway._web.connections) == 1)
            writer.close()
            await until(lambda: not gateway._web.connections)
        assert harness.provider.requests == []
        await check_works(harness, gateway)


async def test_a_slow_reader_gets_the_whole_response(harness: GatewayHarness) -> None:
    harness.provider.behaviour = responding(200, b"a" * (16 << 20))
    async with Gateway(harness.settings(gateway={"send_timeout": 2.0})) as gateway:
        reader, writer = await connect(gateway, request_bytes(BODY, b"connection: close"))
        await reader.readuntil(b"\r\n\r\n")
        size = 0
        while piece := await reader.read(1 << 16):
            size += len(piece)
            await asyncio.sleep(0.01)  # all in all longer than send_timeout
        writer.close()
        assert size == 16 << 20


# --- bodies ---


async def test_expect_100_continue_is_answered(harness: GatewayHarness) -> None:
    expects = b"expect: 100-continue"
    async with Gateway(harness.settings(gateway={"max_body_bytes": 1_000})) as gateway:
        reader, writer = await connect(gateway, request_bytes(BODY, expects).removesuffix(BODY))
        assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        writer.write(BODY)
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        for fields, status in (
            ((expects, b"content-length: 1001"), 413),
            ((expects, b"content-length: 9", b"x-forebay-priority: urgent"), 400),
            ((b"expect: the worst",), 417),
        ):
            received = await raw(gateway, request_bytes(b"", *fields))
            assert int(received.split()[1]) == status, received
            assert b"100 Continue" not in received
            assert b"connection: close" in received.lower()
        assert len(harness.provider.requests) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"{}"', b"{", b"{}{}", b"{'model': 1}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1,}',
        b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b'{"a": "\\ud800}', b'["\\ud800"]',
        b'{"a": "\x00"}', "{}".encode("utf-16"), b"[" * 100_000,
        b'{"a":' * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"\x1f\x8b\x08\x00", b"model=gpt-4o",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_a_body_that_is_not_a_json_object_is_a_400(harness: GatewayHarness, path: str, body: bytes) -> None:
    async with Gateway(harness.settings()) as gateway:
        status, _, received = await harness.post(gateway, path, data=body)
        assert (status, received["error"]["type"]) == (400, "invalid_request_error")
        assert received["error"]["message"].startswith("the body is not a JSON object: ")
        assert harness.provider.requests == []
        await check_works(harness, gateway)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a", "model": "b"}', b'{"model": 7}', b'{"max_tokens": 1' + b"0" * 4_000 + b"}", b'{"n": -1}',
        b'{"a": "\\ud800"}', b'{"messages": [{"content": "\\udfff"}], "model": "\\ud83d"}',
        b'{"messages": {"a": [[[]]]}, "stream": "soon"}', b'{"temperature": 1e308}',
        b'{"messages": [' + b"[" * 500 + b"]" * 500 + b"]}",
    ],
)  # fmt: skip
async def test_odd_json_is_forwarded_unchanged(harness: GatewayHarness, body: bytes) -> None:
    got: list[bytes] = []

    async def keep(request: web.BaseRequest) -> web.StreamResponse:
        got.append(await request.read())
        return web.json_response({})

    harness.provider.behaviour = keep
    async with Gateway(harness.settings()) as gateway:
        assert (await harness.post(gateway, data=body))[0] == 200
        assert got == [body]
        await check_works(harness, gateway)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_compressed_body_is_forwarded_unread(harness: GatewayHarness, coding: str) -> None:
    got: list[tuple[bytes, str]] = []

    async def keep(request: web.BaseRequest) -> web.StreamResponse:
        pieces = [piece async for piece in request.content.iter_any()]
        got.append((b"".join(pieces), request.headers["content-encoding"]))
        return web.json_response({})

    harness.provider.behaviour = keep
    bomb = gzip.compress(b" " * (8 << 20))
    async with Gateway(harness.settings()) as gateway:
        status, _, _ = await harness.post(gateway, data=bomb, headers={"content-encoding": coding})
        assert status == 200
        assert got == [(bomb, coding)]


# --- broken providers ---

OK = b"HTTP/1.1 200 OK\r\n"
JSON_BODY = b'{"a": 1}'
LENGTH = b"content-length: %d\r\n\r\n" % len(JSON_BODY)
CHUNKS = CHUNKED + b"\r\n\r\n8\r\n" + JSON_BODY + b"\r\n"


@pytest.mark.parametrize(
    "response",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        JSON_BODY,
        OK,
        OK + b"x: " + b"a" * 200_000 + b"\r\n" + LENGTH + JSON_BODY,
        OK + b"x: a\r\n" * 10_000 + LENGTH + JSON_BODY,
        OK + b"x\x01: a\r\n" + LENGTH + JSON_BODY,
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello",
        OK + b"content-length: 9\r\n" + LENGTH + JSON_BODY,
        OK + b"content-length: 8\r\n" + CHUNKS + b"0\r\n\r\n",
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/openai/v1/other"])
async def test_an_invalid_response_is_a_502(harness: GatewayHarness, path: str, response: bytes) -> None:
    harness.provider.behaviour = writing_raw(response)
    broke_off = response in (b"", OK)
    async with Gateway(harness.settings(max_attempts=1 if broke_off else 3)) as gateway:
        status, headers, body = await harness.post(gateway, path)
        assert (status, body["error"]["code"]) == (502, "forebay_upstream_failed")
        assert headers["x-should-retry"] == "false"
        assert len(harness.provider.requests) == 1  # what is bound to be the same again is not asked for again
        await check_works(harness, gateway)


@pytest.mark.parametrize("extra", [b"x", b"\r\n\r\nx", JSON_BODY, b"\0" * 100_000, OK + LENGTH + JSON_BODY])
@pytest.mark.parametrize(
    "framing", [LENGTH + JSON_BODY, CHUNKS + b"0\r\n\r\n", b"connection: close\r\n" + LENGTH + JSON_BODY]
)
@pytest.mark.parametrize("split", ["", "after the head", "in the body", "before the extra bytes"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/openai/v1/other"])  # which is held, and which is streamed
async def test_a_whole_response_with_bytes_behind_it_reaches_its_caller(
    harness: GatewayHarness, path: str, split: str, framing: bytes, extra: bytes
) -> None:
    whole = OK + framing
    at = {"": 0, "after the head": len(whole) - len(framing.partition(b"\r\n\r\n")[2]), "in the body": len(whole) - 6}
    cut = at.get(split, len(whole))
    harness.provider.behaviour = writing_raw(whole[:cut], whole[cut:] + extra, pause=True)
    async with Gateway(harness.settings(max_attempts=6)) as gateway:
        status, _, body = await harness.post(gateway, path)
        assert (status, body) == (200, json.loads(JSON_BODY))
        assert len(harness.provider.requests) == 1
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize(
    "head", [b"204 No Content\r\n\r\n", b"200 OK\r\ncontent-length: 0\r\n\r\n", b"400 No\r\n" + LENGTH + JSON_BODY]
)
async def test_bytes_behind_any_whole_response_are_dropped(harness: GatewayHarness, head: bytes) -> None:
    harness.provider.behaviour = writing_raw(b"HTTP/1.1 100 Continue\r\n\r\n" * 1_100, b"HTTP/1.1 " + head + b"x")
    async with Gateway(harness.settings(max_attempts=1)) as gateway:
        status, _, _ = await harness.post(gateway)
        assert status == int(head[:3])


@pytest.mark.parametrize("arrival", ["later", "at once", "as its first chunk"])
@pytest.mark.parametrize(
    ("path", "begin", "status"),
    [
        ("/v1/chat/completions", OK + CHUNKS, 502),
        (
            "/v1/chat/completions",
            OK + b"content-type: text/event-stream\r\n" + CHUNKED + b"\r\n\r\n9\r\ndata: 1\n\n\r\n",
            200,
        ),
        ("/openai/v1/other", OK + CHUNKS, 200),  # streamed, as the one before
    ],
)
async def test_an_invalid_body_ends_its_call(
    harness: GatewayHarness, path: str, begin: bytes, status: int, arrival: str
) -> None:
    valid, invalid = begin, b"zz\r\n"
    if arrival == "as its first chunk":
        valid = b"".join(begin.partition(b"\r\n\r\n")[:2])
    pieces = (valid, invalid) if arrival == "later" else (valid + invalid,)
    harness.provider.behaviour = writing_raw(*pieces, pause=True, stays=True)
    async with Gateway(harness.settings(max_attempts=6)) as gateway:
        async with harness.session.post(harness.at(gateway, path), json=CHAT_REQUEST) as response:
            assert response.status == status
            if path == "/openai/v1/other":  # nothing else can say that it is not whole
                with pytest.raises(aiohttp.ClientPayloadError):
                    await response.read()
            else:
                assert b"not valid HTTP" in await response.read()
        assert len(harness.provider.requests) == 1  # what is bound to be the same again is not asked for again
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize(
    "response",
    [
        OK + b"content-length: 99\r\n\r\n" + JSON_BODY,
        OK + CHUNKS,
        OK + b"content-length: 99\r\n\r\n",
        OK + b"content-encoding: gzip\r\ncontent-length: 99\r\n\r\n\x1f\x8b",
    ],
)
async def test_a_response_that_breaks_off_is_a_502(harness: GatewayHarness, response: bytes) -> None:
    harness.provider.behaviour = writing_raw(response)
    async with Gateway(harness.settings(max_attempts=1)) as gateway:
        status, _, body = await harness.post(gateway)
        assert (status, body["error"]["code"]) == (502, "forebay_upstream_failed")
        with pytest.raises(aiohttp.ClientPayloadError):  # this one is streamed
            await harness.post(gateway, "/openai/v1/other")
        await check_works(harness, gateway)


@pytest.mark.parametrize(
    ("response", "status", "body"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + LENGTH + JSON_BODY, 200, JSON_BODY),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK + LENGTH + JSON_BODY, 200, JSON_BODY),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\netag: a\r\n\r\n", 304, b""),
        (b"HTTP/1.1 200\r\n" + LENGTH + JSON_BODY, 200, JSON_BODY),
        (b"HTTP/1.1 200 O\rK\r\n" + LENGTH + JSON_BODY, 200, JSON_BODY),
        (b"HTTP/1.1 200 O\x7fK\r\nx: a\x00b\x01\x1b[2Jc\rd\r\n" + LENGTH + JSON_BODY, 200, JSON_BODY),
        (OK + b"x: " + b"a" * 100_000 + b"\r\n" + LENGTH + JSON_BODY, 200, JSON_BODY),
        (OK + b"x: a\r\n" * 500 + LENGTH + JSON_BODY, 200, JSON_BODY),
        (b"HTTP/1.0 200 OK\r\n\r\n" + JSON_BODY, 200, JSON_BODY),
        (OK + b"trailer: x-t\r\n" + CHUNKS + b"0\r\nx-t: a\r\n\r\n", 200, JSON_BODY),
        (OK + b"content-encoding: br\r\n" + LENGTH + JSON_BODY, 200, JSON_BODY),
        (OK + b"content-encoding: gzip\r\n" + LENGTH + JSON_BODY, 200, JSON_BODY),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", 404, b""),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/openai/v1/other"])
async def test_an_odd_but_valid_response_passes(
    harness: GatewayHarness, path: str, response: bytes, status: int, body: bytes
) -> None:
    harness.provider.behaviour = writing_raw(response)
    async with Gateway(harness.settings(max_attempts=1)) as gateway:
        sent = request_bytes(BODY, b"connection: close", start=b"POST " + path.encode() + b" HTTP/1.1")
        head, _, received = (await raw(gateway, sent)).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        assert received in (body, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert re.search(rb"(?i)^trailer|^x-t|early|[^\r\n\t -~]", head, re.MULTILINE) is None
        assert (b"content-encoding: br" in head.lower()) == (b"\r\ncontent-encoding: br" in response)
        await check_works(harness, gateway)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects_are_not_followed(harness: GatewayHarness, status: int) -> None:
    there = f"{harness.url}/elsewhere"
    harness.provider.behaviour = responding(status, b"", location=there)
    async with Gateway(harness.settings()) as gateway:
        how: dict[str, Any] = {
            "json": CHAT_REQUEST,
            "allow_redirects": False,
            "headers": {"authorization": "Bearer sk-1"},
        }
        async with harness.session.post(harness.at(gateway), **how) as response:
            assert (response.status, response.headers["location"]) == (status, there)
        assert len(harness.provider.requests) == 1


@pytest.mark.parametrize("head", [b"", OK, OK + b"x: "])
async def test_an_endless_head_is_a_502(harness: GatewayHarness, head: bytes) -> None:
    async def endless(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        request.transport.write(head)
        piece = b"x: " + b"a" * 1000 + b"\r\n" if head == OK else b"a" * (1 << 20)
        while not request.transport.is_closing():
            request.transport.write(piece)
            await asyncio.sleep(0)
        return web.Response()

    harness.provider.behaviour = endless
    async with Gateway(harness.settings(max_attempts=3)) as gateway:
        status, _, body = await harness.post(gateway, headers={"x-stainless-read-timeout": "60"})
        assert (status, body["error"]["code"]) == (502, "forebay_upstream_failed")
        assert len(harness.provider.requests) == 1  # a retry would not help
        await check_works(harness, gateway)


async def test_a_decompression_bomb_passes_unread(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        for megabytes in (1, 80):
            content = "{" + " " * (megabytes << 20) + json.dumps(CHAT_RESPONSE)[1:]  # its usage is at the end
            packed = gzip.compress(content.encode(), 1)
            harness.provider.behaviour = responding(200, packed, content_encoding="gzip")
            async with harness.session.post(harness.at(gateway), json=CHAT_REQUEST, auto_decompress=False) as response:
                assert await response.read() == packed
            assert total(gateway, "gen_ai_client_token_usage_sum") == 30 + 20  # of the first only
        await check_works(harness, gateway)


@pytest.mark.slow
async def test_a_stalled_stream_ends_with_the_timeout_of_its_caller(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    async with Gateway(harness.settings()) as gateway:
        options: dict[str, Any] = {
            "json": {**CHAT_REQUEST, "stream": True},
            "headers": {"x-stainless-read-timeout": "0.1"},
        }
        async with harness.session.post(harness.at(gateway), **options) as response:
            last = (await response.read()).removeprefix(EVENT)
        assert b'"error"' in last
        await harness.provider.disconnected.wait()
        await check_works(harness, gateway)


async def test_a_silent_provider_ends_with_the_timeout_of_its_caller(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_: web.BaseRequest) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("forebay.gateway.requests.client_timeouts._GRACE", 0.1)
    harness.provider.behaviour = hang
    async with Gateway(harness.settings()) as gateway:
        for path, body in (("/v1/chat/completions", CHAT_REQUEST), ("/v1/messages", {**CHAT_REQUEST, "stream": True})):
            harness.provider.disconnected.clear()
            options: dict[str, Any] = {"json": body, "headers": {"x-stainless-read-timeout": "0.1"}}
            status, _, error = await harness.post(gateway, path, **options)
            assert (status, error["error"]["code"]) == (502, "forebay_upstream_failed")
            await harness.provider.disconnected.wait()
        await check_works(harness, gateway)


async def test_surplus_bytes_of_a_provider_reach_no_other_call(harness: GatewayHarness) -> None:
    for extra in (OK + LENGTH + b'{"b": 2}', b"garbage"):
        harness.provider.behaviour = writing_raw(OK + LENGTH + JSON_BODY, extra, stays=True)
        async with Gateway(harness.settings(max_attempts=1)) as gateway:
            status, _, _ = await harness.post(gateway)
            assert status in (200, 502)  # depending on whether both came at once
            harness.provider.behaviour = harness.provider.reply
            assert (await harness.post(gateway))[2] == CHAT_RESPONSE


# --- headers ---


async def test_hop_by_hop_headers_are_not_forwarded(harness: GatewayHarness) -> None:
    fields = b"connection: x-foo\r\nconnection: x-bar, close\r\nx-foo: 1\r\nx-bar: 1\r\nproxy-authenticate: 1\r\n"
    harness.provider.behaviour = writing_raw(
        OK + fields + b"keep-alive: timeout=5\r\nx-kept: 1\r\n" + LENGTH + JSON_BODY
    )
    own = "connection: close, x-foo|connection: x-bar|x-foo: 1|x-bar: 1|te: trailers|trailer: x-t|keep-alive: timeout=5"
    own += "|proxy-authorization: Basic c2VjcmV0|proxy-connection: keep-alive|x-forebay-task: t"
    sent = request_bytes(BODY, *own.encode().split(b"|"), b"x-kept: 1", b"accept-encoding: br, zstd, gzip")
    async with Gateway(harness.settings()) as gateway:
        received = (await raw(gateway, sent)).partition(b"\r\n\r\n")[0].lower()
        assert b"\r\nx-kept: 1" in received
        for name in (b"x-foo", b"x-bar", b"proxy-authenticate", b"keep-alive"):
            assert b"\r\n" + name not in received
        (request,) = harness.provider.requests
        assert {name.lower(): value for name, value in request.headers.items()} == {
            "x-kept": "1",
            "accept-encoding": "gzip",
            "host": harness.url.removeprefix("http://"),
            "content-length": str(len(BODY)),
        }


async def test_keys_reach_only_their_provider(harness: GatewayHarness, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    token = "0123456789-gateway-token"  # noqa: S105 - of this test
    keys = ("sk-caller-0123456789", "sk-ant-0123456789", "azure-0123456789")
    headers = dict(zip(("authorization", "x-api-key", "api-key"), keys, strict=True))
    settings = harness.settings(gateway={"token_env": "GATE"}, max_attempts=1, rpm=1)
    shown: list[str] = []

    async def call(gateway: Gateway, path: str, **options: Any) -> None:
        sent = {**headers, "x-forebay-token": token, "x-stainless-read-timeout": "1", **options.pop("headers", {})}
        _, back, body = await harness.post(gateway, path, headers=sent, **options)
        shown.append(f"{back} {body}")

    async with Gateway(settings, {"GATE": token}) as gateway:
        for behaviour in (
            harness.provider.reply,
            writing_raw(b"garbage"),
            responding(500),
            responding(429),
            streaming(EVENT),
        ):
            harness.provider.behaviour = behaviour
            for path in ("/v1/chat/completions", "/v1/messages", "/openai/v1/x", "/nowhere", "/metrics", "/healthz"):
                await call(gateway, path)
        await call(gateway, "/v1/chat/completions", data=b"{")
        await call(gateway, "/v1/chat/completions", headers={"x-forebay-token": "wrong" * 5})
        await call(gateway, "/v1/chat/completions", headers={"x-forebay-deadline": "soon"})
        await call(gateway, "/v1/chat/completions", headers={"upgrade": "websocket", "connection": "upgrade"})
        shown.append(repr(gateway.forwarder.targets[0].upstream.statistics()))
        shown.append(repr(gateway.settings))
    assert len(harness.provider.requests) > 1
    for request in harness.provider.requests:
        assert token not in str(request.headers)
    for secret in (*keys, token):
        assert secret not in "\n".join(shown)
        assert secret not in caplog.text


async def test_the_password_of_an_http_proxy_is_never_shown(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)

    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 407 Proxy Authentication Required\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(refuse, "127.0.0.1", 0) as proxy:
        port = proxy.sockets[0].getsockname()[1]
        target = TargetSettings(name="openai", url="https://api.example", max_attempts=1)
        settings = GatewaySettings(targets=(target,), listen="127.0.0.1:0")
        environment = {"HTTPS_PROXY": f"http://me:swordfish@127.0.0.1:{port}"}
        async with Gateway(settings, environment) as gateway:
            received = (await raw(gateway, request_bytes(BODY, b"connection: close"))).decode()
    assert received.startswith("HTTP/1.1 502")
    assert "answered 407" in received
    assert "swordfish" not in received + caplog.text


async def test_upgrades_are_not_accepted(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        opens = (b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-key: a", b"sec-websocket-version: 13")
        received = await raw(gateway, request_bytes(b"", *opens, start=b"GET /v1/realtime HTTP/1.1"))
        assert received.startswith(b"HTTP/1.1 400")
        assert b"WebSockets do not pass" in received
        assert harness.provider.requests == []
        # Some clients offer HTTP/2 with their first request: it is ignored, and the next request is served too.
        reader, writer = await connect(
            gateway, request_bytes(BODY, b"connection: upgrade, http2-settings", b"upgrade: h2c")
        )
        for _ in range(2):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            length = int((re.search(rb"(?i)content-length: ([0-9]+)", await reader.readuntil(b"\r\n\r\n")) or [b""])[1])
            await reader.readexactly(length)
            writer.write(request_bytes(BODY))
        writer.close()
        assert "upgrade" not in harness.provider.requests[0].headers


# --- the key of a fallback ---


def with_fallback(harness: GatewayHarness, **target: Any) -> GatewaySettings:
    """Return settings of a target whose calls fall back to one with a key of the operator."""
    spare = TargetSettings(name="spare", url=f"{harness.url}/spare", provider="openai-compatible")
    elsewhere = FallbackSettings(target="spare", api_key_env="SPARE")
    own = TargetSettings(name="openai", url=harness.url, fallback=(elsewhere,), **target)
    return GatewaySettings(targets=(own, spare), listen="127.0.0.1:0")


def knows_keys(harness: GatewayHarness, *keys: str) -> Behaviour:
    """Return a provider that refuses all keys but these."""

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        known = request.headers.get("authorization") in {f"Bearer {key}" for key in ("sk-spare", *keys)}
        return await (harness.provider.reply if known else responding(401))(request)

    return behave


def spare_calls(harness: GatewayHarness) -> int:
    return sum(request.path.startswith("/spare") for request in harness.provider.requests)


@pytest.mark.parametrize("headers", [{"authorization": "Bearer junk"}, {}], ids=["junk key", "no key"])
@pytest.mark.parametrize("share_keys", [False, True])
async def test_callers_whose_key_was_refused_get_no_key_of_a_fallback(
    harness: GatewayHarness,
    headers: dict[str, str],
    share_keys: bool,  # noqa: FBT001
) -> None:
    harness.provider.behaviour = knows_keys(harness)
    async with Gateway(with_fallback(harness, rpm=2, share_keys=share_keys), {"SPARE": "sk-spare"}) as gateway:
        sent = {"x-stainless-read-timeout": "2", **headers}
        assert [(await harness.post(gateway, headers=sent))[0] for _ in range(4)] == [401, 401, 429, 429]
        assert spare_calls(harness) == 0


async def test_callers_whose_key_was_not_tried_get_no_key_of_a_fallback(harness: GatewayHarness) -> None:
    harness.provider.behaviour = knows_keys(harness)
    async with Gateway(with_fallback(harness, output_tpm=10), {"SPARE": "sk-spare"}) as gateway:
        status, _, body = await harness.post(gateway, headers={"authorization": "Bearer junk"})
        assert status == 413  # it is larger than the quota: the provider was not asked
        assert "whose own key was accepted" in str(body)
        assert spare_calls(harness) == 0


async def test_a_key_that_was_refused_and_is_accepted_again_may_use_the_key_of_a_fallback(
    harness: GatewayHarness,
) -> None:
    async with Gateway(with_fallback(harness, rpm=2), {"SPARE": "sk-spare"}) as gateway:
        sent = {"authorization": "Bearer sk-1", "x-stainless-read-timeout": "2"}
        statuses = []
        for behaviour in (knows_keys(harness), *[knows_keys(harness, "sk-1")] * 2):
            harness.provider.behaviour = behaviour
            statuses.append((await harness.post(gateway, headers=sent))[0])
        assert statuses == [401, 200, 200]
        assert spare_calls(harness) == 1


async def test_a_new_key_may_use_the_key_of_a_fallback_while_its_provider_fails(harness: GatewayHarness) -> None:
    async def fail_but_at_spare(request: web.BaseRequest) -> web.StreamResponse:
        own = not request.path.startswith("/spare")
        return await (responding(500, x_should_retry="false") if own else harness.provider.reply)(request)

    harness.provider.behaviour = fail_but_at_spare
    async with Gateway(with_fallback(harness), {"SPARE": "sk-spare"}) as gateway:
        assert (await harness.post(gateway, headers={"authorization": "Bearer sk-1"}))[0] == 200
        assert spare_calls(harness) == 1
