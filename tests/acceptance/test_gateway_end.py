"""The end of a gateway: everybody who still calls is told so, and nobody's connection is reset."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter

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
    GatewayHarness,
    connect,
    leftovers,
    read_to_end,
    request_bytes,
    streaming,
    until,
)

from forebay.gateway.server import Gateway

CALL = request_bytes(json.dumps(CHAT_REQUEST).encode())


async def loop_until_refused(harness: GatewayHarness, port: int, ends: Counter[str]) -> None:
    url = f"http://127.0.0.1:{port}/v1/chat/completions"
    while True:
        try:
            async with harness.session.post(url, json=CHAT_REQUEST) as response:
                await response.read()
                ends[str(response.status)] += 1
        except aiohttp.ClientConnectorError:
            return
        except aiohttp.ClientError as error:
            ends[type(error).__name__] += 1
            return


async def test_looping_callers_are_told_503_until_nobody_listens(harness: GatewayHarness) -> None:
    ends: Counter[str] = Counter()
    async with asyncio.TaskGroup() as group, Gateway(harness.settings()) as gateway:
        for _ in range(60):
            group.create_task(loop_until_refused(harness, gateway.port, ends))
        await until(lambda: ends["200"] >= 120)
        gateway.drain()
        await until(lambda: ends["503"] >= 120)
    assert set(ends) == {"200", "503"}


async def test_a_caller_that_has_connected_and_was_not_accepted_yet_is_told(harness: GatewayHarness) -> None:
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(Gateway(harness.settings()))
        callers = [socket.create_connection(("127.0.0.1", gateway.port)) for _ in range(50)]  # without a loop's turn
        ending = asyncio.create_task(stack.aclose())
        for caller in callers:
            reader, writer = await asyncio.open_connection(sock=caller)
            writer.write(CALL)
            assert (await read_to_end(reader)).startswith(b"HTTP/1.1 503 ")
            writer.close()
        await ending


async def test_a_caller_that_is_about_to_send_its_first_request_is_told(harness: GatewayHarness) -> None:
    async with contextlib.AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(Gateway(harness.settings()))
        listening = gateway._server
        assert listening is not None
        reader, writer = await connect(gateway)
        await until(lambda: len(gateway._web.connections) == 1)
        ending = asyncio.create_task(stack.aclose())
        await until(lambda: not listening.is_serving())
        for piece in (CALL[:100], CALL[100:]):
            writer.write(piece)
            await asyncio.sleep(0)
        assert (await read_to_end(reader)).startswith(b"HTTP/1.1 503 ")
        writer.close()
        await ending


async def test_an_idle_connection_does_not_delay_the_end(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.gateway.server._LAST_REQUEST_GRACE", 3600.0)
    async with Gateway(harness.settings()) as gateway:
        assert (await harness.post(gateway))[0] == 200
        assert len(gateway._web.connections) == 1
    assert len(gateway._web.connections) == 0


async def test_a_connection_that_sends_nothing_delays_the_end_for_a_moment_only(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.gateway.server._LAST_REQUEST_GRACE", 0.01)
    async with Gateway(harness.settings()) as gateway:
        reader, writer = await connect(gateway)
        await until(lambda: len(gateway._web.connections) == 1)
    assert await read_to_end(reader) == b""
    writer.close()


# --- callers who close their sending side ---


async def test_a_caller_that_has_closed_its_sending_side_gets_its_answer(
    harness: GatewayHarness, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("forebay.gateway.server._PROBE", 0.0)
    gate = asyncio.Event()

    async def slow(request: web.BaseRequest) -> web.StreamResponse:
        await gate.wait()
        return await harness.provider.reply(request)

    harness.provider.behaviour = slow
    async with Gateway(harness.settings()) as gateway:
        reader, writer = await connect(gateway, CALL)
        writer.write_eof()
        for _ in range(3):
            assert await reader.readuntil(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
        gate.set()
        received = await read_to_end(reader)  # which ends at once
        assert received.rpartition(b"100 Continue\r\n\r\n")[2].startswith(b"HTTP/1.1 200 OK\r\n")
        assert received.endswith(json.dumps(CHAT_RESPONSE).encode())
        writer.close()
        assert leftovers(gateway) == NOTHING_LEFT


async def test_pipelined_calls_of_such_a_caller_are_all_answered(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        reader, writer = await connect(gateway, CALL * 3)
        writer.write_eof()
        received = await read_to_end(reader)
        assert received.count(b"HTTP/1.1 200 OK\r\n") == 3
        writer.close()


async def test_such_a_caller_gets_its_stream(harness: GatewayHarness) -> None:
    harness.provider.behaviour = streaming(EVENT, STOP, DONE)
    async with Gateway(harness.settings()) as gateway:
        reader, writer = await connect(
            gateway, request_bytes(json.dumps({**CHAT_REQUEST, "stream": True}).encode(), b"connection: close")
        )
        writer.write_eof()
        received = await read_to_end(reader)
        assert DONE in received
        writer.close()


@pytest.mark.parametrize("streams", [False, True])
async def test_a_caller_that_has_left_ends_its_call(
    harness: GatewayHarness,
    streams: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    harness.provider.behaviour = streaming(*([EVENT] if streams else []), None)
    async with Gateway(harness.settings()) as gateway:
        reader, writer = await connect(gateway, CALL)
        await until(lambda: len(harness.provider.requests) == 1)
        if streams:
            await reader.readuntil(b"200 OK")
        writer.close()
        await harness.provider.disconnected.wait()
        await until(lambda: leftovers(gateway) == NOTHING_LEFT)


async def test_a_caller_that_closes_within_its_request_has_left(harness: GatewayHarness) -> None:
    async with Gateway(harness.settings()) as gateway:
        for sent in (CALL[:-5], CALL[:40], b""):
            reader, writer = await connect(gateway, sent)
            writer.write_eof()
            assert await read_to_end(reader) == b""
            writer.close()
        assert harness.provider.requests == []
