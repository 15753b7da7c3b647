"""The end of a gateway: everybody who still calls is told so, and nobody's connection is reset."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections import Counter

import aiohttp
import pytest
from tests.support.gateway_harness import (
    CHAT_REQUEST,
    GatewayHarness,
    connect,
    read_to_end,
    request_bytes,
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
