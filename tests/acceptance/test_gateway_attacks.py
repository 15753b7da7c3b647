"""What is sent to a gateway by those who mean no good, or know no better: it says no, and lives on."""

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
from tests.acceptance.gateways import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    DONE,
    EVENT,
    NOTHING,
    STOP,
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

from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway

BODY = json.dumps(CHAT_REQUEST).encode()
HIDDEN = request_bytes(start=b"GET /openai/v1/hidden HTTP/1.1")  # what is to pass as the body of another
CHUNKED = b"transfer-encoding: chunked"


def chunks(body: bytes, *fields: bytes) -> bytes:
    return request_bytes(b"", CHUNKED, *fields) + body


async def lives(scene: GatewayHarness, gateway: Gateway) -> None:
    """It serves the next one, and nothing is held of those before."""
    scene.provider.behaviour = scene.provider.answer
    status, _, _ = await scene.post(gateway)
    assert status == 200
    assert leftovers(gateway) == NOTHING


# --- one request that is two ---


@pytest.mark.parametrize(
    "sent",
    [
        request_bytes(BODY, b"content-length: %d" % len(BODY)),
        *(
            request_bytes(b"", b"content-length: " + told) + b"{}"
            for told in (b"+2", b"0_2", b"2 2", b"0x2", b"", b"2,2")
        ),
        request_bytes(b"", b"content-length: 99999999999999999999999") + b"{}",
        request_bytes(b"", b"content-length : 2") + b"{}",
        chunks(b"0\r\n\r\n", b"content-length: 2"),
        chunks(b"0\r\n\r\n", CHUNKED),
        chunks(b"0\r\n\r\n", b"transfer-encoding: identity"),
        *(
            request_bytes(b"", b"transfer-encoding: " + told) + b"2\r\n{}\r\n0\r\n\r\n"
            for told in (b"xchunked", b"chunked, identity", b"identity", b"gzip, chunked", b"\x0bchunked")
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
async def test_what_two_could_read_differently_is_read_by_nobody(scene: GatewayHarness, sent: bytes) -> None:
    async with Gateway(scene.settings()) as gateway:
        told = await raw(gateway, sent + HIDDEN)
        assert told[:12] in (b"HTTP/1.0 400", b"HTTP/1.1 501"), told
        assert len(re.findall(rb"HTTP/1\.[01] [0-9]{3} ", told)) == 1
        assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]
        assert scene.provider.asked == []
        await lives(scene, gateway)


async def test_calls_in_a_row_are_answered_in_a_row(scene: GatewayHarness) -> None:
    async def echo(request: web.BaseRequest) -> web.StreamResponse:
        asked = json.loads(await request.read())
        return web.json_response({"echo": asked["seed"], "usage": {"prompt_tokens": 1, "completion_tokens": 1}})

    scene.provider.behaviour = echo
    async with Gateway(scene.settings()) as gateway:
        last: list[tuple[bytes, ...]] = [()] * 19 + [(b"connection: close",)]
        sent = [request_bytes(json.dumps({**CHAT_REQUEST, "seed": n}).encode(), *end) for n, end in enumerate(last)]
        answers = re.findall(rb'"echo": ([0-9]+)', await raw(gateway, b"".join(sent)))
        assert answers == [b"%d" % n for n in range(20)]


@pytest.mark.parametrize("method", [b"HEAD", b"POST"])
async def test_the_next_answer_is_found_whatever_the_one_before_was(scene: GatewayHarness, method: bytes) -> None:
    scene.provider.behaviour = responding(200, b"HTTP/1.1 200 OK\r\n\r\n")
    async with Gateway(scene.settings()) as gateway:
        first = request_bytes(BODY if method == b"POST" else b"", start=method + b" /openai/v1/other HTTP/1.1")
        last = request_bytes(b"", b"connection: close", start=b"GET /healthz HTTP/1.1")
        told = await raw(gateway, first + last)
        assert told.endswith(b'{"status":"ok"}')
        head, _, rest = told.partition(b"\r\n\r\n")
        assert rest.startswith(b"13\r\nHTTP/1.1 200 OK\r\n\r\n\r\n0\r\n\r\nHTTP" if method == b"POST" else b"HTTP"), (
            head
        )


async def test_who_speaks_an_older_http_is_answered_in_it(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(EVENT, STOP, DONE)
    async with Gateway(scene.settings()) as gateway:
        body = json.dumps({**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}).encode()
        told = await raw(gateway, request_bytes(body, start=b"POST /v1/chat/completions HTTP/1.0"))
        assert told.partition(b"\r\n\r\n")[2] == EVENT + STOP + DONE
        assert b"chunked" not in told
        await lives(scene, gateway)


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
async def test_what_is_not_below_a_target_is_nowhere(scene: GatewayHarness, path: str) -> None:
    async with Gateway(scene.settings()) as gateway:
        method = b"OPTIONS " if path == "*" else b"GET "
        told = await raw(gateway, request_bytes(b"", b"connection: close", start=method + path.encode() + b" HTTP/1.1"))
        assert told.startswith(b"HTTP/1.1 404"), told
        assert scene.provider.asked == []


async def test_what_is_below_a_target_goes_there_as_it_is(scene: GatewayHarness) -> None:
    path = "/v1/models/meta%2Fllama%203?a=%2e%2e&b=../c&c=%00"
    async with Gateway(scene.settings()) as gateway:
        start = f"GET /openai{path} HTTP/1.1".encode()
        assert (await raw(gateway, request_bytes(b"", b"connection: close", start=start))).startswith(b"HTTP/1.1 200")
        (asked,) = scene.provider.asked
        assert asked.raw_path == path


@pytest.mark.parametrize("start", [b"CONNECT evil.example:443", b"TRACE /openai/v1/x"])
async def test_it_is_no_tunnel_and_no_mirror(scene: GatewayHarness, start: bytes) -> None:
    async with Gateway(scene.settings()) as gateway:
        told = await raw(gateway, request_bytes(b"", b"cookie: SECRET", start=start + b" HTTP/1.1"))
        assert told.startswith(b"HTTP/1.1 405")
        assert b"SECRET" not in told
        assert scene.provider.asked == []


async def test_a_web_page_from_elsewhere_gets_nothing(scene: GatewayHarness) -> None:
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
            {"host": "host.docker.internal:8787"},
        ):
            assert (await scene.post(gateway, headers=headers))[0] == 200, headers


async def test_who_has_the_token_may_come_by_any_name(scene: GatewayHarness) -> None:
    token = "0123456789abcdef0123"  # noqa: S105 - of this test
    settings = scene.settings(gateway={"token_env": "GATE"})
    async with Gateway(settings, {"GATE": token}) as gateway:
        told = {"host": "api.example", "origin": "https://chat.example"}
        assert (await scene.post(gateway, headers=told))[0] == 401
        for wrong in ("", token[:-1], token + "x", "ü" * 20, token.upper()):
            assert (await scene.post(gateway, headers={**told, "x-forebay-token": wrong}))[0] == 401
        assert (await scene.post(gateway, headers={**told, "x-forebay-token": token}))[0] == 200
        assert len(scene.provider.asked) == 1


# --- the slow, and what has no end ---


async def drip(gateway: Gateway, begun: bytes, piece: bytes) -> bytes:
    """What comes back to somebody who sends a piece now and then, to the end of the connection."""
    reader, writer = await connect(gateway, begun)
    coming = asyncio.create_task(read_to_end(reader))
    while not coming.done():
        writer.write(piece)
        await asyncio.wait([coming], timeout=0.01)
    writer.close()
    return await coming


async def test_a_head_that_drips_is_not_waited_for(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(gateway={"idle_timeout": 0.1})) as gateway:
        for begun in (b"GET /", request_bytes()[:-2]):  # from the start, or in the middle of the headers
            assert await drip(gateway, begun, b"a") == b""
        assert await raw(gateway, b"") == b""  # nothing at all
        _, writer = await connect(gateway, request_bytes(BODY))
        await until(lambda: len(scene.provider.bodies) == 1)
        await until(lambda: not gateway._web.connections)  # it was kept for another call, and none came
        writer.close()
        await lives(scene, gateway)


async def test_a_body_that_drips_is_not_waited_for(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(gateway={"body_timeout": 0.1})) as gateway:
        for field, piece in ((b"content-length: 1000000", b"a"), (CHUNKED, b"1\r\na\r\n")):
            told = await drip(gateway, request_bytes(b"", field), piece)
            assert told.startswith(b"HTTP/1.1 408")
            assert b"timeout_error" in told
        assert scene.provider.asked == []
        await lives(scene, gateway)


@pytest.mark.parametrize(
    ("begun", "piece", "status"),
    [
        (b"", b"a" * 1000, 400),  # a method
        (b"GET /", b"a" * 1000, 400),
        (b"GET / HTTP/1.1\r\nx: ", b"a" * 1000, 400),
        (b"GET / HTTP/1.1\r\n", b"x: " + b"a" * 1000 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\n", b"x: a\r\n", 400),
        (b"", b"\r\n" * 500, 431),
    ],
)
async def test_a_head_without_end_is_not_read_on(
    scene: GatewayHarness, begun: bytes, piece: bytes, status: int
) -> None:
    async with Gateway(scene.settings(gateway={"max_header_bytes": 10_000})) as gateway:
        told = await drip(gateway, begun, piece)
        assert int(told.split()[1]) == status
        assert json.loads(told.partition(b"\r\n\r\n")[2])["error"]["message"]
        await lives(scene, gateway)


async def test_headers_are_bounded_together_not_each(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings(gateway={"max_header_bytes": 10_000})) as gateway:
        status, _, body = await scene.post(gateway, headers={f"x-{n}": "a" * 3_000 for n in range(4)})
        assert (status, "10,000" in body["error"]["message"]) == (431, True)
        assert scene.provider.asked == []
        assert (await scene.post(gateway, headers={f"x-{n}": "a" * 3_000 for n in range(3)}))[0] == 200


async def test_a_body_without_end_is_not_read_on(scene: GatewayHarness) -> None:
    taken = 0
    async with Gateway(scene.settings(gateway={"max_body_bytes": 1 << 20})) as gateway:
        reader, writer = await connect(gateway, request_bytes(b"", CHUNKED))
        coming = asyncio.create_task(reader.readuntil(b"\r\n\r\n"))
        while not coming.done() and taken < 100 << 20:
            writer.write(b"10000\r\n" + b" " * 0x10000 + b"\r\n")
            taken += 0x10000
            await writer.drain()
        assert (await coming).startswith(b"HTTP/1.1 413")
        writer.close()
        assert taken < 32 << 20  # what sockets hold, and then nobody read on
        assert scene.provider.asked == []
        await lives(scene, gateway)


@pytest.mark.parametrize("stream", [False, True])
async def test_who_does_not_read_is_hung_up_on_and_so_is_the_provider(scene: GatewayHarness, *, stream: bool) -> None:
    async def flood(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        if not stream:
            return web.Response(body=b"a" * (32 << 20))
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        while True:
            await response.write(EVENT * 1000)

    scene.provider.behaviour = flood
    async with Gateway(scene.settings(gateway={"send_timeout": 0.2})) as gateway:
        reader, writer = await connect(gateway, request_bytes(json.dumps({**CHAT_REQUEST, "stream": stream}).encode()))
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        await until(lambda: len(gateway._web.connections) == 1)
        (handler,) = gateway._web.connections
        held = 0
        while gateway._web.connections:
            held = max(held, handler._wire.get_write_buffer_size())  # type: ignore[attr-defined]
            await asyncio.sleep(0)
        if stream:
            await scene.provider.left.wait()
            assert 0 < held < 1 << 20
        writer.close()
        del reader
        await lives(scene, gateway)


async def test_who_does_not_read_holds_nothing_up_at_the_end(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(EVENT * 100_000, None)
    gateway = Gateway(scene.settings(gateway={"drain_timeout": 0.1}))
    await gateway.__aenter__()
    _, writer = await connect(gateway, request_bytes(json.dumps({**CHAT_REQUEST, "stream": True}).encode()))
    writer.transport.pause_reading()  # type: ignore[attr-defined]
    await until(lambda: any(handler.writing_paused for handler in gateway._web.connections))
    (handler,) = gateway._web.connections
    async with asyncio.timeout(20):  # less than its send_timeout
        await gateway.__aexit__(None, None, None)
    assert handler._wire.get_write_buffer_size() == 0  # type: ignore[attr-defined] # the socket is closed
    await scene.provider.left.wait()
    assert leftovers(gateway) == NOTHING
    writer.close()


async def test_who_hangs_up_in_the_middle_of_its_request_has_not_called(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        for part in (1, 40, len(request_bytes(BODY)) - 1):
            _, writer = await connect(gateway, request_bytes(BODY)[:part])
            await until(lambda: len(gateway._web.connections) == 1)
            writer.close()
            await until(lambda: not gateway._web.connections)
        assert scene.provider.asked == []
        await lives(scene, gateway)


async def test_who_reads_slowly_gets_all_of_it(scene: GatewayHarness) -> None:
    scene.provider.behaviour = responding(200, b"a" * (16 << 20))
    async with Gateway(scene.settings(gateway={"send_timeout": 0.2})) as gateway:
        reader, writer = await connect(gateway, request_bytes(BODY, b"connection: close"))
        await reader.readuntil(b"\r\n\r\n")
        size = 0
        while piece := await reader.read(1 << 16):
            size += len(piece)
            await asyncio.sleep(0.002)  # in all it takes longer than nothing may be taken for
        writer.close()
        assert size == 16 << 20


# --- bodies ---


async def test_who_asks_whether_to_send_its_body_is_told(scene: GatewayHarness) -> None:
    expects = b"expect: 100-continue"
    async with Gateway(scene.settings(gateway={"max_body_bytes": 1_000})) as gateway:
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
            told = await raw(gateway, request_bytes(b"", *fields))
            assert int(told.split()[1]) == status, told
            assert b"100 Continue" not in told
            assert b"connection: close" in told.lower()
        assert len(scene.provider.asked) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"", b"null", b"[]", b'"{}"', b"{", b"{}{}", b"{'model': 1}", b'{"a": NaN}', b'{"a": Infinity}', b'{"a": 1,}',
        b"\xef\xbb\xbf{}", b'{"a": "\xff"}', b'{"a": "\\ud800"}',
        b'{"a": "\x00"}', "{}".encode("utf-16"), b"[" * 100_000,
        b'{"a":' * 100_000, b'{"a":' * 100_000 + b"1" + b"}" * 100_000, b"\x1f\x8b\x08\x00", b"model=gpt-4o",
    ],
)  # fmt: skip
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages"])
async def test_what_is_no_json_object_is_answered_here(scene: GatewayHarness, path: str, body: bytes) -> None:
    async with Gateway(scene.settings()) as gateway:
        status, _, told = await scene.post(gateway, path, data=body)
        assert (status, told["error"]["type"]) == (400, "invalid_request_error")
        assert told["error"]["message"].startswith("the body is no JSON object: ")
        assert scene.provider.asked == []
        await lives(scene, gateway)


@pytest.mark.parametrize(
    "body",
    [
        b'{"model": "a", "model": "b"}', b'{"model": 7}', b'{"max_tokens": 1' + b"0" * 4_000 + b"}", b'{"n": -1}',
        b'{"messages": {"a": [[[]]]}, "stream": "yes"}', b'{"temperature": 1e308}',
        b'{"messages": [' + b"[" * 500 + b"]" * 500 + b"]}",
    ],
)  # fmt: skip
async def test_json_that_only_its_provider_can_judge_goes_there_as_it_is(scene: GatewayHarness, body: bytes) -> None:
    got: list[bytes] = []

    async def keep(request: web.BaseRequest) -> web.StreamResponse:
        got.append(await request.read())
        return web.json_response({})

    scene.provider.behaviour = keep
    async with Gateway(scene.settings()) as gateway:
        assert (await scene.post(gateway, data=body))[0] == 200
        assert got == [body]
        await lives(scene, gateway)


@pytest.mark.parametrize("coding", ["gzip", "deflate", "br", "zstd"])
async def test_a_packed_body_goes_on_unread_whatever_it_unpacks_to(scene: GatewayHarness, coding: str) -> None:
    got: list[tuple[bytes, str]] = []

    async def keep(request: web.BaseRequest) -> web.StreamResponse:
        pieces = [piece async for piece in request.content.iter_any()]
        got.append((b"".join(pieces), request.headers["content-encoding"]))
        return web.json_response({})

    scene.provider.behaviour = keep
    bomb = gzip.compress(b" " * (8 << 20))
    async with Gateway(scene.settings()) as gateway:
        status, _, _ = await scene.post(gateway, data=bomb, headers={"content-encoding": coding})
        assert status == 200
        assert got == [(bomb, coding)]


# --- targets that go wrong ---

OK = b"HTTP/1.1 200 OK\r\n"
SAID = b'{"a": 1}'
LENGTH = b"content-length: %d\r\n\r\n" % len(SAID)
CHUNKS = b"transfer-encoding: chunked\r\n\r\n8\r\n" + SAID + b"\r\n"


@pytest.mark.parametrize(
    "said",
    [
        b"",
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        SAID,
        OK,
        OK + b"x: a\x00b\r\n" + LENGTH + SAID,
        OK + b"x: " + b"a" * 100_000 + b"\r\n" + LENGTH + SAID,
        OK + b"x: a\r\n" * 10_000 + LENGTH + SAID,
        b"HTTP/1.1 200 O\rK\r\n" + LENGTH + SAID,
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\nhello",
        OK + b"content-length: 9\r\n" + LENGTH + SAID,
        OK + b"content-length: 8\r\n" + CHUNKS + b"0\r\n\r\n",
        OK + b"transfer-encoding: chunked\r\n\r\nzz\r\n" + SAID,
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/messages", "/openai/v1/other"])
async def test_what_is_no_answer_is_told_as_a_502(scene: GatewayHarness, path: str, said: bytes) -> None:
    scene.provider.behaviour = writing_raw(said)
    async with Gateway(scene.settings(max_attempts=1)) as gateway:
        status, headers, body = await scene.post(gateway, path)
        assert (status, body["error"]["code"]) == (502, "forebay_upstream_failed")
        assert headers["x-should-retry"] == "false"
        assert len(scene.provider.asked) == 1
        await lives(scene, gateway)


@pytest.mark.parametrize(
    "said",
    [
        OK + b"content-length: 99\r\n\r\n" + SAID,
        OK + CHUNKS,
        OK + b"content-length: 99\r\n\r\n",
        OK + b"content-encoding: gzip\r\ncontent-length: 99\r\n\r\n\x1f\x8b",
    ],
)
async def test_an_answer_that_breaks_off_is_not_taken_for_a_whole_one(scene: GatewayHarness, said: bytes) -> None:
    scene.provider.behaviour = writing_raw(said)
    async with Gateway(scene.settings(max_attempts=1)) as gateway:
        status, _, body = await scene.post(gateway)
        assert (status, body["error"]["code"]) == (502, "forebay_upstream_failed")
        with pytest.raises(aiohttp.ClientPayloadError):  # this one passes while it comes
            await scene.post(gateway, "/openai/v1/other")
        await lives(scene, gateway)


@pytest.mark.parametrize(
    ("said", "status", "body"),
    [
        (b"HTTP/1.1 100 Continue\r\n\r\n" + OK + LENGTH + SAID, 200, SAID),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" + OK + LENGTH + SAID, 200, SAID),
        (b"HTTP/1.1 204 No Content\r\n\r\n", 204, b""),
        (b"HTTP/1.1 304 Not Modified\r\netag: a\r\n\r\n", 304, b""),
        (b"HTTP/1.1 200\r\n" + LENGTH + SAID, 200, SAID),
        (b"HTTP/1.0 200 OK\r\n\r\n" + SAID, 200, SAID),
        (OK + b"trailer: x-t\r\n" + CHUNKS + b"0\r\nx-t: a\r\n\r\n", 200, SAID),
        (OK + b"content-encoding: br\r\n" + LENGTH + SAID, 200, SAID),
        (OK + b"content-encoding: gzip\r\n" + LENGTH + SAID, 200, SAID),
        (b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n", 404, b""),
    ],
)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/openai/v1/other"])
async def test_what_is_an_answer_however_odd_passes(
    scene: GatewayHarness, path: str, said: bytes, status: int, body: bytes
) -> None:
    scene.provider.behaviour = writing_raw(said)
    async with Gateway(scene.settings(max_attempts=1)) as gateway:
        sent = request_bytes(BODY, b"connection: close", start=b"POST " + path.encode() + b" HTTP/1.1")
        head, _, told = (await raw(gateway, sent)).partition(b"\r\n\r\n")
        assert int(head.split()[1]) == status
        assert told in (body, b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        assert re.search(rb"(?i)^trailer|^x-t|early", head, re.MULTILINE) is None
        assert (b"content-encoding: br" in head.lower()) == (b"\r\ncontent-encoding: br" in said)
        await lives(scene, gateway)


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_nobody_is_followed_elsewhere_with_a_key(scene: GatewayHarness, status: int) -> None:
    there = f"{scene.url}/elsewhere"
    scene.provider.behaviour = responding(status, b"", location=there)
    async with Gateway(scene.settings()) as gateway:
        how: dict[str, Any] = {
            "json": CHAT_REQUEST,
            "allow_redirects": False,
            "headers": {"authorization": "Bearer sk-1"},
        }
        async with scene.session.post(scene.at(gateway), **how) as answer:
            assert (answer.status, answer.headers["location"]) == (status, there)
        assert len(scene.provider.asked) == 1


@pytest.mark.parametrize("head", [b"", OK, OK + b"x: ", OK + b"content-type: application/json\r\n\r\n"])
async def test_an_answer_without_end_is_not_held(scene: GatewayHarness, head: bytes) -> None:
    async def endless(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        request.transport.write(head)
        piece = b"x: " + b"a" * 1000 + b"\r\n" if head == OK else b"a" * (1 << 20)
        while not request.transport.is_closing():
            request.transport.write(piece)
            await asyncio.sleep(0)
        return web.Response()

    scene.provider.behaviour = endless
    async with Gateway(scene.settings(max_attempts=3)) as gateway:
        status, _, body = await scene.post(gateway, headers={"x-stainless-read-timeout": "60"})
        assert (status, body["error"]["code"]) == (502, "forebay_upstream_failed")
        if head.endswith(b"\r\n\r\n"):
            assert "longer than 67,108,864 bytes" in body["error"]["message"]
            assert len(scene.provider.asked) == 1  # all of it again would be no better
        await lives(scene, gateway)


async def test_an_answer_that_unpacks_to_more_than_is_held_passes_unread(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        for megabytes in (1, 80):
            content = "{" + " " * (megabytes << 20) + json.dumps(CHAT_RESPONSE)[1:]  # its usage stands at the end
            packed = gzip.compress(content.encode(), 1)
            scene.provider.behaviour = responding(200, packed, content_encoding="gzip")
            async with scene.session.post(scene.at(gateway), json=CHAT_REQUEST, auto_decompress=False) as answer:
                assert await answer.read() == packed
            tokens = re.search(rb'direction="output".* ([0-9.]+)', gateway.forwarder.metrics.render())
            assert tokens is not None
            assert float(tokens[1]) == 20.0  # of the first alone
        await lives(scene, gateway)


@pytest.mark.slow
async def test_a_stream_that_hangs_is_given_up_when_its_caller_would(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(EVENT, None)
    async with Gateway(scene.settings()) as gateway:
        told: dict[str, Any] = {
            "json": {**CHAT_REQUEST, "stream": True},
            "headers": {"x-stainless-read-timeout": "0.1"},
        }
        async with scene.session.post(scene.at(gateway), **told) as answer:
            last = (await answer.read()).removeprefix(EVENT)
        assert b'"error"' in last
        await scene.provider.left.wait()
        await lives(scene, gateway)


async def test_a_target_that_hangs_before_it_says_a_word_is_given_up_too(
    scene: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def hang(_: web.BaseRequest) -> web.StreamResponse:
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr("forebay.gateway.caller._GRACE", 0.1)
    scene.provider.behaviour = hang
    async with Gateway(scene.settings()) as gateway:
        for path, ask in (("/v1/chat/completions", CHAT_REQUEST), ("/v1/messages", {**CHAT_REQUEST, "stream": True})):
            scene.provider.left.clear()
            told: dict[str, Any] = {"json": ask, "headers": {"x-stainless-read-timeout": "0.1"}}
            status, _, body = await scene.post(gateway, path, **told)
            assert (status, body["error"]["code"]) == (502, "forebay_upstream_failed")
            await scene.provider.left.wait()
        await lives(scene, gateway)


async def test_what_a_target_says_too_much_is_nobody_elses_answer(scene: GatewayHarness) -> None:
    for extra in (OK + LENGTH + b'{"b": 2}', b"garbage"):
        scene.provider.behaviour = writing_raw(OK + LENGTH + SAID, extra, stays=True)
        async with Gateway(scene.settings(max_attempts=1)) as gateway:
            status, _, _ = await scene.post(gateway)
            assert status in (200, 502)  # as both came at once, or one after the other
            scene.provider.behaviour = scene.provider.answer
            assert (await scene.post(gateway))[2] == CHAT_RESPONSE


# --- headers ---


async def test_headers_of_one_hop_go_no_further(scene: GatewayHarness) -> None:
    said = b"connection: x-foo\r\nconnection: x-bar, close\r\nx-foo: 1\r\nx-bar: 1\r\nproxy-authenticate: 1\r\n"
    scene.provider.behaviour = writing_raw(OK + said + b"keep-alive: timeout=5\r\nx-kept: 1\r\n" + LENGTH + SAID)
    own = "connection: close, x-foo|connection: x-bar|x-foo: 1|x-bar: 1|te: trailers|trailer: x-t|keep-alive: timeout=5"
    own += "|proxy-authorization: Basic c2VjcmV0|proxy-connection: keep-alive|x-forebay-task: t"
    sent = request_bytes(BODY, *own.encode().split(b"|"), b"x-kept: 1", b"accept-encoding: br, zstd, gzip")
    async with Gateway(scene.settings()) as gateway:
        told = (await raw(gateway, sent)).partition(b"\r\n\r\n")[0].lower()
        assert b"\r\nx-kept: 1" in told
        for name in (b"x-foo", b"x-bar", b"proxy-authenticate", b"keep-alive"):
            assert b"\r\n" + name not in told
        (asked,) = scene.provider.asked
        assert {name.lower(): value for name, value in asked.headers.items()} == {
            "x-kept": "1",
            "accept-encoding": "gzip",
            "host": scene.url.removeprefix("http://"),
            "content-length": str(len(BODY)),
        }


async def test_keys_are_told_to_nobody_but_their_provider(
    scene: GatewayHarness, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    asyncio.get_running_loop().set_debug(True)
    token = "0123456789-gateway-token"  # noqa: S105 - of this test
    keys = ("sk-caller-0123456789", "sk-ant-0123456789", "azure-0123456789")
    headers = dict(zip(("authorization", "x-api-key", "api-key"), keys, strict=True))
    settings = scene.settings(gateway={"token_env": "GATE"}, max_attempts=1, rpm=1)
    told: list[str] = []

    async def ask(gateway: Gateway, path: str, **how: Any) -> None:
        sent = {**headers, "x-forebay-token": token, "x-stainless-read-timeout": "1", **how.pop("headers", {})}
        _, back, body = await scene.post(gateway, path, headers=sent, **how)
        told.append(f"{back} {body}")

    async with Gateway(settings, {"GATE": token}) as gateway:
        for behaviour in (
            scene.provider.answer,
            writing_raw(b"garbage"),
            responding(500),
            responding(429),
            streaming(EVENT),
        ):
            scene.provider.behaviour = behaviour
            for path in ("/v1/chat/completions", "/v1/messages", "/openai/v1/x", "/nowhere", "/metrics", "/healthz"):
                await ask(gateway, path)
        await ask(gateway, "/v1/chat/completions", data=b"{")
        await ask(gateway, "/v1/chat/completions", headers={"x-forebay-token": "wrong" * 5})
        await ask(gateway, "/v1/chat/completions", headers={"x-forebay-deadline": "soon"})
        await ask(gateway, "/v1/chat/completions", headers={"upgrade": "websocket", "connection": "upgrade"})
        told.append(repr(gateway.forwarder.targets[0].upstream.statistics()))
        told.append(repr(gateway.settings))
    assert len(scene.provider.asked) > 1
    for asked in scene.provider.asked:
        assert token not in str(asked.headers)
    for secret in (*keys, token):
        assert secret not in "\n".join(told)
        assert secret not in caplog.text


async def test_the_password_of_a_proxy_is_told_to_nobody(caplog: pytest.LogCaptureFixture) -> None:
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
            told = (await raw(gateway, request_bytes(BODY, b"connection: close"))).decode()
    assert told.startswith("HTTP/1.1 502")
    assert "answered 407" in told
    assert "swordfish" not in told + caplog.text


async def test_what_would_become_something_else_than_http_stays_http(scene: GatewayHarness) -> None:
    async with Gateway(scene.settings()) as gateway:
        opens = (b"connection: upgrade", b"upgrade: websocket", b"sec-websocket-key: a", b"sec-websocket-version: 13")
        told = await raw(gateway, request_bytes(b"", *opens, start=b"GET /v1/realtime HTTP/1.1"))
        assert told.startswith(b"HTTP/1.1 400")
        assert b"WebSockets do not pass" in told
        assert scene.provider.asked == []
        # Some clients ask for HTTP/2 with their first request: that is not taken up, and the next is served too.
        reader, writer = await connect(
            gateway, request_bytes(BODY, b"connection: upgrade, http2-settings", b"upgrade: h2c")
        )
        for _ in range(2):
            assert await reader.readline() == b"HTTP/1.1 200 OK\r\n"
            length = int((re.search(rb"(?i)content-length: ([0-9]+)", await reader.readuntil(b"\r\n\r\n")) or [b""])[1])
            await reader.readexactly(length)
            writer.write(request_bytes(BODY))
        writer.close()
        assert "upgrade" not in scene.provider.asked[0].headers
