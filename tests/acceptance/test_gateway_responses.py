"""Responses of providers: compressed in any way, and larger than memory. All are metered, bounded, and lose nothing."""

from __future__ import annotations

import asyncio
import errno
import gzip
import json
import zlib
from collections.abc import Callable
from typing import Any

import aiohappyeyeballs
import aiohttp
import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    CHAT_RESPONSE,
    CUT,
    DONE,
    EVENT,
    NOTHING_LEFT,
    STOP,
    GatewayHarness,
    connect,
    leftovers,
    read_to_end,
    request_bytes,
    responding,
    streaming,
    until,
    writing_raw,
)
from tests.support.metric_samples import total

from forebay.gateway.server import Gateway

USAGE = b'data: {"choices":[],"usage":{"prompt_tokens":30,"completion_tokens":20}}\n\n'
STREAM = (EVENT, STOP, USAGE, DONE)
ASKING: dict[str, Any] = {
    "json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}},
    "headers": {"accept-encoding": "gzip, deflate, br"},
}
OK = b"HTTP/1.1 200 OK\r\n"


def gzip_flushed(*events: bytes) -> list[bytes]:
    packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
    return [packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH) for event in events]  # and no trailer


def raw_deflate(*events: bytes) -> list[bytes]:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return [packer.compress(event) + packer.flush(zlib.Z_SYNC_FLUSH) for event in events]


WAYS: dict[str, tuple[str, list[bytes]]] = {
    "a member for each event": ("gzip", [gzip.compress(event) for event in STREAM]),
    "flushed": ("gzip", gzip_flushed(*STREAM)),
    "raw deflate": ("deflate", raw_deflate(*STREAM)),
    "one byte at a time": ("gzip", [bytes([byte]) for byte in gzip.compress(b"".join(STREAM))]),
}


def counted(gateway: Gateway) -> dict[str, float]:
    """Return the output tokens and the failed attempts, of all accounts."""
    return {
        "tokens": total(gateway, "forebay_tokens_total", direction="output"),
        "failed": total(gateway, "forebay_attempts_total", outcome="failed"),
        **{status: total(gateway, "forebay_gateway_requests_total", status=status) for status in ("499", "500", "502")},
        "files": total(gateway, "forebay_gateway_rejections_total", limited_by="files"),
    }


async def received(harness: GatewayHarness, gateway: Gateway, **how: Any) -> bytes:
    async with harness.session.post(harness.at(gateway), auto_decompress=False, **how) as response:
        return await response.read()


# --- compressed ---


@pytest.mark.parametrize("way", WAYS)
async def test_streams_compressed_in_any_way_are_metered_and_no_faults(harness: GatewayHarness, way: str) -> None:
    encoding, packed = WAYS[way]
    harness.provider.behaviour = streaming(*packed, encoding=encoding)
    async with Gateway(harness.settings()) as gateway:
        for _ in range(40):
            assert await received(harness, gateway, **ASKING) == b"".join(packed)
        assert counted(gateway) | {"tokens": 800.0, "failed": 0.0} == counted(gateway)
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize(("encoding", "packed"), [("br", b"\x0b\x02\x80"), ("gzip", b"no gzip"), ("zstd", b"\x28\xb5")])
async def test_streams_that_cannot_be_read_pass_and_are_no_faults(
    harness: GatewayHarness, encoding: str, packed: bytes
) -> None:
    harness.provider.behaviour = streaming(packed, encoding=encoding)
    async with Gateway(harness.settings()) as gateway:
        for _ in range(40):
            assert await received(harness, gateway, **ASKING) == packed
        assert counted(gateway)["failed"] == 0.0


@pytest.mark.parametrize("way", WAYS)
async def test_added_usage_does_not_reach_a_caller_whose_provider_compresses_unasked(
    harness: GatewayHarness, way: str
) -> None:
    encoding, packed = WAYS[way]
    harness.provider.behaviour = streaming(*packed, encoding=encoding)
    async with Gateway(harness.settings()) as gateway:
        asking = {**ASKING, "json": {**CHAT_REQUEST, "stream": True}}
        async with harness.session.post(harness.at(gateway), **asking) as response:
            assert "content-encoding" not in response.headers
            assert await response.read() == EVENT + STOP + DONE
        assert harness.provider.requests[0].headers["accept-encoding"] == "identity"
        assert counted(gateway) | {"tokens": 20.0, "failed": 0.0} == counted(gateway)


async def test_a_stream_to_change_that_is_corrupt_breaks_off(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(gzip.compress(EVENT)[:-8] + b"no gzip", None, encoding="gzip")
    async with Gateway(harness.settings()) as gateway:
        asking = {**ASKING, "json": {**CHAT_REQUEST, "stream": True}}
        assert b"cannot be decompressed" in await received(harness, gateway, **asking)
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize(
    ("accepted", "asked"),
    [
        *(("gzip, br", "gzip"), ("br, GZIP ; q=0.5", "gzip"), ("br", "identity"), ("gzip-x", "identity")),
        *(("gzip;q=0", "identity"), (f"br, gzip{' ' * 5_000}; q=0.00", "identity")),
    ],
)
async def test_only_an_encoding_that_the_caller_accepts_is_asked_for(
    harness: GatewayHarness, accepted: str, asked: str
) -> None:
    async with Gateway(harness.settings()) as gateway:
        await harness.post(gateway, headers={"accept-encoding": accepted})
    assert harness.provider.requests[0].headers["accept-encoding"] == asked


async def test_a_large_compressed_response_is_metered(harness: GatewayHarness) -> None:
    content = b'{"data": [' + b"".join(b"%d.25, " % number for number in range(400_000)) + b"1]"
    packed = gzip.compress(content + b', "usage": {"prompt_tokens": 5, "completion_tokens": 7}}', 1)
    harness.provider.behaviour = responding(200, packed, content_encoding="gzip", content_type="application/json")
    async with Gateway(harness.settings()) as gateway:
        assert await received(harness, gateway, json=CHAT_REQUEST) == packed
        assert counted(gateway)["tokens"] == 7.0


# --- large ---


def large(size: int, *, chunked: bool = False, **headers: str) -> Callable[[web.BaseRequest], Any]:
    """Return a behaviour that sends a JSON response of about `size` bytes, in pieces."""
    piece = b" " * (1 << 16)
    pieces = [b"{", *[piece] * (size // len(piece)), json.dumps(CHAT_RESPONSE).encode()[1:]]

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "application/json", **headers})
        if not chunked:
            response.content_length = sum(map(len, pieces))
        await response.prepare(request)
        for piece in pieces:
            await response.write(piece)
        await response.write_eof()
        return response

    return behave


@pytest.mark.parametrize("chunked", [False, True])
async def test_a_response_larger_than_any_that_is_held_passes_and_is_metered(
    harness: GatewayHarness,
    chunked: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    harness.provider.behaviour = large(80 << 20, chunked=chunked)
    async with Gateway(harness.settings()) as gateway:
        most_held = 0
        async with harness.session.post(harness.at(gateway), json=CHAT_REQUEST) as response:
            size = 0
            async for piece in response.content.iter_any():
                size += len(piece)
                most_held = max(most_held, gateway.forwarder.response_memory.held_bytes)
        assert (response.status, size) == (200, (80 << 20) + len(json.dumps(CHAT_RESPONSE)))
        assert response.content_length == (None if chunked else size)
        assert most_held <= 17 << 20
        assert gateway.forwarder.response_memory.held_bytes == 0
        assert counted(gateway)["tokens"] == 20.0
        assert leftovers(gateway) == NOTHING_LEFT


async def test_responses_are_bounded_together_and_pass_without_being_held(harness: GatewayHarness) -> None:
    harness.provider.behaviour = large(4 << 20)
    async with Gateway(harness.settings(gateway={"max_held_response_bytes": 10 << 20})) as gateway:
        memory = gateway.forwarder.response_memory
        sent = request_bytes(json.dumps(CHAT_REQUEST).encode(), b"connection: close")
        callers = [await connect(gateway, sent) for _ in range(6)]  # none of them reads
        await until(lambda: len(harness.provider.requests) == 6 and memory.held_bytes > 6 << 20)
        assert memory.held_bytes <= 10 << 20
        for reader, writer in callers:
            assert (await read_to_end(reader)).endswith(json.dumps(CHAT_RESPONSE).encode()[1:])
            writer.close()
        await until(lambda: memory.held_bytes == 0)
        assert counted(gateway)["tokens"] == 120.0
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_response_is_held_until_its_caller_has_taken_it(harness: GatewayHarness) -> None:
    harness.provider.behaviour = large(12 << 20)
    async with Gateway(harness.settings()) as gateway:
        memory = gateway.forwarder.response_memory
        reader, writer = await connect(gateway, request_bytes(json.dumps(CHAT_REQUEST).encode(), b"connection: close"))
        await until(lambda: memory.held_bytes > 12 << 20)
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)
        assert memory.held_bytes > 12 << 20  # the call has ended, and its caller has not read yet
        await read_to_end(reader)
        await until(lambda: memory.held_bytes == 0)
        writer.close()


async def test_a_caller_that_leaves_releases_the_response(harness: GatewayHarness) -> None:
    for size in (12 << 20, 60 << 20):  # held, and passed on
        harness.provider.behaviour = large(size)
        async with Gateway(harness.settings()) as gateway:
            memory = gateway.forwarder.response_memory
            _, writer = await connect(gateway, request_bytes(json.dumps(CHAT_REQUEST).encode()))
            await until(lambda: sum(leftovers(gateway)) > 0)
            writer.transport.abort()
            await until(lambda: memory.held_bytes == 0 and leftovers(gateway) == NOTHING_LEFT)  # noqa: B023 - used at once


async def test_an_endless_response_takes_no_more_memory_than_any(harness: GatewayHarness) -> None:
    async def endless(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        while True:
            await response.write(b" " * (1 << 16))

    harness.provider.behaviour = endless
    async with Gateway(harness.settings()) as gateway:
        async with harness.session.post(harness.at(gateway), json=CHAT_REQUEST) as response:
            for _ in range(500):
                assert await response.content.readany()
                assert gateway.forwarder.response_memory.held_bytes <= 17 << 20
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)


async def test_of_an_endless_error_the_begin_is_passed_on(harness: GatewayHarness) -> None:
    async def endless(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(status=400, headers={"content-type": "text/plain"})
        await response.prepare(request)
        while True:
            await response.write(b"x" * (1 << 16))

    harness.provider.behaviour = endless
    async with Gateway(harness.settings()) as gateway:
        async with harness.session.post(harness.at(gateway), json=CHAT_REQUEST) as response:
            body = await response.read()
        assert response.status == 400
        assert 1 << 20 <= len(body) <= 3 << 20
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_large_response_that_breaks_off_is_not_taken_for_whole(harness: GatewayHarness) -> None:
    harness.provider.behaviour = writing_raw(
        OK + b"content-type: application/json\r\ncontent-length: 40000000\r\n\r\n{" + b" " * (20 << 20)
    )
    async with Gateway(harness.settings()) as gateway:
        with pytest.raises(aiohttp.ClientPayloadError):
            await received(harness, gateway, json=CHAT_REQUEST)
        assert counted(gateway) | {"failed": 1.0, "502": 1.0, "499": 0.0} == counted(gateway)
        assert len(harness.provider.requests) == 1


# --- what is whose fault ---


async def test_heads_beyond_our_bounds_are_no_faults_of_the_provider(harness: GatewayHarness) -> None:
    harness.provider.behaviour = writing_raw(OK + b"x: " + b"a" * 200_000 + b"\r\ncontent-length: 0\r\n\r\n")
    async with Gateway(harness.settings()) as gateway:
        for _ in range(20):
            assert (await harness.post(gateway))[0] == 502
        assert len(harness.provider.requests) == 20  # each asked once, and the breaker is closed
        assert counted(gateway)["failed"] == 0.0
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE])
async def test_a_process_without_files_is_no_fault_of_the_provider(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    connect_to = aiohappyeyeballs.start_connection

    async def fail(**how: Any) -> Any:
        if how["addr_infos"][0][4][1] == gateway.port:
            return await connect_to(**how)
        raise OSError(number, "Too many open files")

    async with Gateway(harness.settings()) as gateway:
        monkeypatch.setattr(aiohappyeyeballs, "start_connection", fail)
        for path, status in (("/v1/chat/completions", 503), ("/v1/messages", 529)):
            for _ in range(20):
                answer = await harness.post(gateway, path)
                assert (answer[0], answer[2]["error"]["code"]) == (status, "forebay_files")
                assert answer[1]["x-forebay-limited-by"] == "host:files"
                assert answer[1]["x-should-retry"] == "true"
                assert 1000 <= int(answer[1]["retry-after-ms"]) <= 3000
        monkeypatch.undo()
        assert (await harness.post(gateway))[0] == 200  # the breaker is closed
        assert counted(gateway) | {"failed": 0.0, "files": 40.0} == counted(gateway)
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_stream_that_its_provider_cuts_counts_as_502(harness: GatewayHarness) -> None:
    for pieces in ((EVENT, CUT), (EVENT[:10], CUT)):  # at the end of an event, and within one
        harness.provider.behaviour = streaming(*pieces)
        async with Gateway(harness.settings()) as gateway:
            try:
                await received(harness, gateway, **ASKING)
            except aiohttp.ClientPayloadError:
                assert pieces[0] != EVENT
            assert counted(gateway) | {"499": 0.0, "502": 1.0} == counted(gateway)


async def test_a_bug_of_the_gateway_counts_as_500(harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError

    async with Gateway(harness.settings()) as gateway:
        monkeypatch.setattr("forebay.gateway.forwarder._check_call", fail)
        assert (await harness.post(gateway))[0] == 500
        assert counted(gateway) | {"499": 0.0, "500": 1.0} == counted(gateway)


async def test_a_caller_that_leaves_counts_as_499(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    async with Gateway(harness.settings()) as gateway:
        async with harness.session.post(harness.at(gateway), **ASKING) as response:
            await response.content.readany()
        await harness.provider.disconnected.wait()
        await until(lambda: counted(gateway)["499"] == 1.0)


async def test_a_stream_with_a_head_that_cannot_be_passed_on_releases_its_permit(harness: GatewayHarness) -> None:
    harness.provider.behaviour = writing_raw(
        b"HTTP/1.1 200 \x00\x1b\r\ncontent-type: text/event-stream\r\nx-a: \x7f\r\n\r\n" + EVENT + STOP + DONE
    )
    async with Gateway(harness.settings()) as gateway:
        assert await received(harness, gateway, **ASKING) == EVENT + STOP + DONE
        await asyncio.sleep(0)
        assert leftovers(gateway) == NOTHING_LEFT


@pytest.mark.parametrize("content", [b"data: " + b"x" * (64 << 20), b"\n" * (64 << 20), EVENT * (1 << 19)])
async def test_bombs_in_streams_pass_unread_and_hold_up_nobody(harness: GatewayHarness, content: bytes) -> None:
    packed = gzip.compress(content, 6)
    harness.provider.behaviour = streaming(packed, encoding="gzip")
    async with Gateway(harness.settings()) as gateway:
        assert await received(harness, gateway, **ASKING) == packed
        assert counted(gateway) | {"failed": 0.0} == counted(gateway)
        assert leftovers(gateway) == NOTHING_LEFT


async def test_an_error_of_the_callers_connection_is_no_fault_of_the_provider(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = gzip.compress(b"".join(b"data: %d\n\n" % number for number in range(20_000)), 0)
    harness.provider.behaviour = streaming(packed, None, encoding="gzip")

    write = web.StreamResponse.write

    async def fail(response: web.StreamResponse, data: bytes) -> None:
        if "x-should-retry" in response.headers:  # of the gateway
            raise ConnectionResetError
        await write(response, data)

    async with Gateway(harness.settings()) as gateway:
        monkeypatch.setattr(web.StreamResponse, "write", fail)
        reader, writer = await connect(gateway, request_bytes(json.dumps(ASKING["json"]).encode()))
        await until(lambda: counted(gateway)["499"] + counted(gateway)["502"] == 1.0)
        writer.close()
        await read_to_end(reader)
        assert counted(gateway) | {"failed": 0.0, "502": 0.0} == counted(gateway)
        assert leftovers(gateway) == NOTHING_LEFT


async def test_a_response_in_many_small_pieces_takes_no_more_memory(harness: GatewayHarness) -> None:
    async def drip(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": "application/json"})
        await response.prepare(request)
        for byte in json.dumps(CHAT_RESPONSE).encode():
            await response.write(bytes([byte]))
        return response

    harness.provider.behaviour = drip
    async with Gateway(harness.settings()) as gateway:
        assert (await harness.post(gateway))[2] == CHAT_RESPONSE
        assert counted(gateway)["tokens"] == 20.0
