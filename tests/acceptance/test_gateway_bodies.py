"""The memory of all request bodies together, over raw sockets: limited, and released."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    NOTHING_LEFT,
    GatewayHarness,
    connect,
    leftovers,
    raw,
    read_to_end,
    request_bytes,
    streaming,
    until,
)

from forebay.gateway.server import Gateway

EACH = 60_000  # bytes of one body
TOGETHER = 100_000
TEST_TIMEOUT = 10.0  # seconds, much more than anything here takes
ANTHROPIC = b"POST /v1/messages HTTP/1.1"
CHUNKED = request_bytes(b"", b"transfer-encoding: chunked")


def limited_gateway(harness: GatewayHarness) -> Gateway:
    return Gateway(harness.settings(gateway={"max_body_bytes": EACH, "max_held_bytes": TOGETHER}))


def body_of(size: int) -> bytes:
    """Return a body of `size` bytes."""
    return json.dumps(CHAT_REQUEST).encode().ljust(size)


def only_connection(gateway: Gateway) -> Any:
    """Return the only connection of a gateway."""
    (connection,) = gateway._web.connections
    return connection


def chunk(size: int) -> bytes:
    return b"%x\r\n%b\r\n" % (size, b" " * size)


def unfinished(size: int, *fields: bytes) -> bytes:
    """Return a request without its last byte."""
    return request_bytes(body_of(size), *fields)[:-1]


def parse_error(response: bytes) -> tuple[int, dict[str, str], dict[str, str]]:
    """Return the status, the headers and the error of a response."""
    head, _, body = response.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)["error"]


@pytest.mark.parametrize(("start", "status"), [(b"POST /v1/chat/completions HTTP/1.1", 503), (ANTHROPIC, 529)])
async def test_a_body_beyond_the_memory_of_all_is_not_read_and_its_caller_retries(
    harness: GatewayHarness, start: bytes, status: int
) -> None:
    async with limited_gateway(harness) as gateway:
        reader, writer = await connect(gateway, unfinished(50_000))
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 49_999)
        received, headers, error = parse_error(
            await raw(gateway, request_bytes(body_of(50_002), start=start)[:-20_000])
        )
        assert received == status
        assert headers["x-should-retry"] == "true"
        assert 2_000 <= int(headers["retry-after-ms"]) <= 6_000
        assert int(headers["retry-after"]) >= 2
        assert headers["connection"] == "close"
        assert error["code"] == "forebay_bodies"
        assert "max_held_bytes" in error["message"]
        assert gateway.forwarder.body_memory.held_bytes == 49_999
        assert b'forebay_gateway_rejections_total{limited_by="bodies"' in gateway.forwarder.metrics.render()
        assert (await raw(gateway, request_bytes(body_of(50_000), b"connection: close"))).startswith(b"HTTP/1.1 200")
        writer.write(b" ")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        assert len(harness.provider.requests) == 2


async def test_announced_bytes_take_no_memory(harness: GatewayHarness) -> None:
    async with limited_gateway(harness) as gateway:
        waiting = [await connect(gateway, request_bytes(body_of(EACH))[: -EACH + 10]) for _ in range(20)]
        try:
            async with asyncio.timeout(10):
                await until(lambda: gateway.forwarder.body_memory.held_bytes == 20 * 10)
            assert (await raw(gateway, request_bytes(body_of(EACH), b"connection: close"))).startswith(b"HTTP/1.1 200")
        finally:  # so that the gateway can end if this fails
            for _, writer in waiting:
                writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)


async def test_chunked_bodies_are_limited_together_too(harness: GatewayHarness) -> None:
    async with limited_gateway(harness) as gateway:
        _, writer = await connect(gateway, CHUNKED + chunk(50_000))
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 50_000)
        other, sender = await connect(gateway, CHUNKED + chunk(30_000))
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 80_000)
        sender.write(chunk(25_000))
        assert parse_error(await read_to_end(other))[0] == 503
        sender.close()
        assert gateway.forwarder.body_memory.held_bytes == 50_000  # its own bytes were released too
        writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        assert not harness.provider.requests


async def test_a_body_that_is_too_long_by_itself_is_a_413(harness: GatewayHarness) -> None:
    async with limited_gateway(harness) as gateway:
        received, headers, error = parse_error(await raw(gateway, request_bytes(body_of(EACH + 1))[:-10]))
        assert (received, headers["x-should-retry"], error["code"]) == (413, "false", "forebay_too_long")


async def test_a_body_is_held_until_its_call_has_ended(harness: GatewayHarness) -> None:
    responding = asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await responding.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = behave
    async with limited_gateway(harness) as gateway:
        first = asyncio.create_task(raw(gateway, request_bytes(body_of(EACH), b"connection: close")))
        await until(lambda: len(harness.provider.requests) == 1)
        assert gateway.forwarder.body_memory.held_bytes == EACH
        assert parse_error(await raw(gateway, request_bytes(body_of(EACH))))[0] == 503
        responding.set()
        assert (await first).startswith(b"HTTP/1.1 200")
        assert (await raw(gateway, request_bytes(body_of(EACH), b"connection: close"))).startswith(b"HTTP/1.1 200")
        assert gateway.forwarder.body_memory.held_bytes == 0


async def test_a_disconnect_releases_the_body_at_any_time(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(b"data: {}\n\n", None)
    async with limited_gateway(harness) as gateway:
        for sent in (unfinished(EACH), CHUNKED + chunk(EACH // 2), request_bytes(body_of(EACH))):
            _, writer = await connect(gateway, sent)
            await until(lambda: gateway.forwarder.body_memory.held_bytes > EACH // 3)
            writer.close()
            await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        reader, writer = await connect(gateway, request_bytes(body_of(EACH)))
        await reader.readuntil(b"data: {}")
        assert gateway.forwarder.body_memory.held_bytes == EACH  # its response has started
        writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        assert leftovers(gateway) == NOTHING_LEFT


async def test_pipelined_requests_are_read_ahead_up_to_a_head_and_answered_in_order(
    harness: GatewayHarness,
) -> None:
    requests, first = 30, asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await first.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = behave
    async with limited_gateway(harness) as gateway, asyncio.timeout(TEST_TIMEOUT):
        reader, writer = await connect(gateway, request_bytes(body_of(EACH)))
        await until(lambda: len(harness.provider.requests) == 1)
        writer.write(request_bytes(body_of(EACH)) * (requests - 1) + request_bytes(body_of(EACH), b"connection: close"))
        connection = only_connection(gateway)
        await until(lambda: not connection._wire.is_reading())
        for _ in range(100):
            await asyncio.sleep(0)
        limit = gateway.settings.max_header_bytes + (256 << 10)  # and one read of a socket
        assert sum(body.total_bytes for _, body in connection._messages) <= limit
        first.set()
        assert (await read_to_end(reader)).count(b"HTTP/1.1 200") == 1 + requests
        writer.close()
        assert gateway.forwarder.body_memory.held_bytes == 0


@pytest.mark.parametrize("start", [b"POST /v1/chat/completions HTTP/1.1", b"POST /nowhere HTTP/1.1"])
@pytest.mark.parametrize("whole", [False, True])
async def test_reading_resumes_when_a_pipelined_request_has_its_turn(
    harness: GatewayHarness, start: bytes, *, whole: bool
) -> None:
    first = asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await first.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = behave
    settings = harness.settings(gateway={"max_header_bytes": 1000, "max_body_bytes": EACH, "max_held_bytes": TOGETHER})
    async with Gateway(settings) as gateway, asyncio.timeout(TEST_TIMEOUT):
        reader, writer = await connect(gateway, request_bytes(body_of(100)))
        await until(lambda: len(harness.provider.requests) == 1)
        connection = only_connection(gateway)
        second = request_bytes(body_of(3000), start=start)
        length = len(second) if whole else 2500
        writer.write(second[:length])
        await until(lambda: not connection._wire.is_reading())
        first.set()
        await until(connection._wire.is_reading)
        writer.write(second[length:] + request_bytes(body_of(3000), b"connection: close"))
        received = await read_to_end(reader)
        statuses = [received.split(b"HTTP/1.1 ")[number][:3] for number in (1, 2)]
        assert statuses == [b"200", b"404" if b"nowhere" in start else b"200"]
        assert received.count(b"HTTP/1.1 200") == (3 if b"nowhere" not in start else 2 if whole else 1)
        writer.close()


async def test_an_endless_head_behind_a_call_is_rejected_and_the_call_is_answered(harness: GatewayHarness) -> None:
    first = asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await first.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = behave
    async with limited_gateway(harness) as gateway, asyncio.timeout(TEST_TIMEOUT):
        reader, writer = await connect(gateway, request_bytes(body_of(100)))
        await until(lambda: len(harness.provider.requests) == 1)
        connection = only_connection(gateway)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        for number in range(20):
            writer.write(b"x-%d: %b\r\n" % (number, b"a" * 10_000))
        await until(lambda: connection._close)
        writer.write(b"content-length: 2\r\n\r\n{}")
        first.set()
        received = await read_to_end(reader)
        assert received.startswith(b"HTTP/1.1 200")
        assert received.count(b"HTTP/1.1 ") == 1
        writer.close()
        assert gateway.forwarder.body_memory.held_bytes == 0
