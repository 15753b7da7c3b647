"""What the bodies of all requests take together, by raw sockets: bounded, told to whoever comes beyond, given back."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from tests.acceptance.gateways import (
    CHAT_REQUEST,
    NOTHING,
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

EACH = 60_000  # bytes of one body at most
TOGETHER = 100_000
PATIENCE = 10.0  # seconds that nothing here takes
ANTHROPIC = b"POST /v1/messages HTTP/1.1"
CHUNKED = request_bytes(b"", b"transfer-encoding: chunked")


def bounded(scene: GatewayHarness) -> Gateway:
    return Gateway(scene.settings(gateway={"max_body_bytes": EACH, "max_held_bytes": TOGETHER}))


def ask(size: int) -> bytes:
    """A body of so many bytes."""
    return json.dumps(CHAT_REQUEST).encode().ljust(size)


def only(gateway: Gateway) -> Any:
    """The handler of the only connection."""
    (handler,) = gateway._web.connections
    return handler


def chunk(size: int) -> bytes:
    return b"%x\r\n%b\r\n" % (size, b" " * size)


def begun(size: int, *fields: bytes) -> bytes:
    """A request whose last byte does not come."""
    return request_bytes(ask(size), *fields)[:-1]


def told(answer: bytes) -> tuple[int, dict[str, str], dict[str, str]]:
    """Its status, its headers, and its error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)["error"]


@pytest.mark.parametrize(("start", "status"), [(b"POST /v1/chat/completions HTTP/1.1", 503), (ANTHROPIC, 529)])
async def test_a_body_beyond_what_all_may_take_is_not_read_and_its_caller_comes_back(
    scene: GatewayHarness, start: bytes, status: int
) -> None:
    async with bounded(scene) as gateway:
        reader, writer = await connect(gateway, begun(50_000))
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 49_999)
        said, headers, error = told(await raw(gateway, request_bytes(ask(50_002), start=start)[:-20_000]))
        assert said == status
        assert headers["x-should-retry"] == "true"
        assert 2_000 <= int(headers["retry-after-ms"]) <= 6_000
        assert int(headers["retry-after"]) >= 2
        assert headers["connection"] == "close"
        assert error["code"] == "forebay_bodies"
        assert "max_held_bytes" in error["message"]
        assert gateway.forwarder.body_memory.held_bytes == 49_999
        assert b'forebay_gateway_rejections_total{limited_by="bodies"' in gateway.forwarder.metrics.render()
        assert (await raw(gateway, request_bytes(ask(50_000), b"connection: close"))).startswith(b"HTTP/1.1 200")
        writer.write(b" ")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        assert len(scene.provider.asked) == 2


async def test_what_was_announced_and_has_not_come_takes_nothing(scene: GatewayHarness) -> None:
    async with bounded(scene) as gateway:
        waiting = [await connect(gateway, request_bytes(ask(EACH))[: -EACH + 10]) for _ in range(20)]
        try:
            async with asyncio.timeout(10):
                await until(lambda: gateway.forwarder.body_memory.held_bytes == 20 * 10)
            assert (await raw(gateway, request_bytes(ask(EACH), b"connection: close"))).startswith(b"HTTP/1.1 200")
        finally:  # else the gateway would be waited for, should this fail
            for _, writer in waiting:
                writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)


async def test_those_whose_length_is_not_told_are_bounded_together_too(scene: GatewayHarness) -> None:
    async with bounded(scene) as gateway:
        _, writer = await connect(gateway, CHUNKED + chunk(50_000))
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 50_000)
        other, sender = await connect(gateway, CHUNKED + chunk(30_000))
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 80_000)
        sender.write(chunk(25_000))
        assert told(await read_to_end(other))[0] == 503
        sender.close()
        assert gateway.forwarder.body_memory.held_bytes == 50_000  # what had come of it as well
        writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        assert not scene.provider.asked


async def test_one_that_is_too_long_by_itself_is_told_so_and_not_to_come_back(scene: GatewayHarness) -> None:
    async with bounded(scene) as gateway:
        said, headers, error = told(await raw(gateway, request_bytes(ask(EACH + 1))[:-10]))
        assert (said, headers["x-should-retry"], error["code"]) == (413, "false", "forebay_too_long")


async def test_a_body_is_held_until_its_call_has_ended(scene: GatewayHarness) -> None:
    answer = asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await answer.wait()
        return await scene.provider.answer(request)

    scene.provider.behaviour = behave
    async with bounded(scene) as gateway:
        first = asyncio.create_task(raw(gateway, request_bytes(ask(EACH), b"connection: close")))
        await until(lambda: len(scene.provider.asked) == 1)
        assert gateway.forwarder.body_memory.held_bytes == EACH
        assert told(await raw(gateway, request_bytes(ask(EACH))))[0] == 503
        answer.set()
        assert (await first).startswith(b"HTTP/1.1 200")
        assert (await raw(gateway, request_bytes(ask(EACH), b"connection: close"))).startswith(b"HTTP/1.1 200")
        assert gateway.forwarder.body_memory.held_bytes == 0


async def test_who_hangs_up_gives_its_body_back_whenever_that_is(scene: GatewayHarness) -> None:
    scene.provider.behaviour = streaming(b"data: {}\n\n", None)
    async with bounded(scene) as gateway:
        for sent in (begun(EACH), CHUNKED + chunk(EACH // 2), request_bytes(ask(EACH))):
            _, writer = await connect(gateway, sent)
            await until(lambda: gateway.forwarder.body_memory.held_bytes > EACH // 3)
            writer.close()
            await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        reader, writer = await connect(gateway, request_bytes(ask(EACH)))
        await reader.readuntil(b"data: {}")
        assert gateway.forwarder.body_memory.held_bytes == EACH  # its answer has begun
        writer.close()
        await until(lambda: gateway.forwarder.body_memory.held_bytes == 0)
        assert leftovers(gateway) == NOTHING


async def test_who_sends_ahead_of_its_answers_is_not_read_beyond_a_head_but_answered_in_turn(
    scene: GatewayHarness,
) -> None:
    ahead, first = 30, asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await first.wait()
        return await scene.provider.answer(request)

    scene.provider.behaviour = behave
    async with bounded(scene) as gateway, asyncio.timeout(PATIENCE):
        reader, writer = await connect(gateway, request_bytes(ask(EACH)))
        await until(lambda: len(scene.provider.asked) == 1)
        writer.write(request_bytes(ask(EACH)) * (ahead - 1) + request_bytes(ask(EACH), b"connection: close"))
        handler = only(gateway)
        await until(lambda: not handler._wire.is_reading())
        for _ in range(100):
            await asyncio.sleep(0)
        most = gateway.settings.max_header_bytes + (256 << 10)  # and what one look at a socket brings
        assert sum(body.total_bytes for _, body in handler._messages) <= most
        first.set()
        assert (await read_to_end(reader)).count(b"HTTP/1.1 200") == 1 + ahead
        writer.close()
        assert gateway.forwarder.body_memory.held_bytes == 0


@pytest.mark.parametrize("start", [b"POST /v1/chat/completions HTTP/1.1", b"POST /nowhere HTTP/1.1"])
@pytest.mark.parametrize("whole", [False, True])
async def test_who_was_not_read_on_is_read_again_when_its_turn_has_come(
    scene: GatewayHarness, start: bytes, *, whole: bool
) -> None:
    first = asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await first.wait()
        return await scene.provider.answer(request)

    scene.provider.behaviour = behave
    settings = scene.settings(gateway={"max_header_bytes": 1000, "max_body_bytes": EACH, "max_held_bytes": TOGETHER})
    async with Gateway(settings) as gateway, asyncio.timeout(PATIENCE):
        reader, writer = await connect(gateway, request_bytes(ask(100)))
        await until(lambda: len(scene.provider.asked) == 1)
        handler = only(gateway)
        second = request_bytes(ask(3000), start=start)
        length = len(second) if whole else 2500
        writer.write(second[:length])
        await until(lambda: not handler._wire.is_reading())
        first.set()
        await until(handler._wire.is_reading)
        writer.write(second[length:] + request_bytes(ask(3000), b"connection: close"))
        told = await read_to_end(reader)
        answers = [told.split(b"HTTP/1.1 ")[number][:3] for number in (1, 2)]
        assert answers == [b"200", b"404" if b"nowhere" in start else b"200"]
        assert told.count(b"HTTP/1.1 200") == (3 if b"nowhere" not in start else 2 if whole else 1)
        writer.close()


async def test_a_head_without_end_behind_a_call_is_not_read_on_and_the_call_is_answered(scene: GatewayHarness) -> None:
    first = asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await first.wait()
        return await scene.provider.answer(request)

    scene.provider.behaviour = behave
    async with bounded(scene) as gateway, asyncio.timeout(PATIENCE):
        reader, writer = await connect(gateway, request_bytes(ask(100)))
        await until(lambda: len(scene.provider.asked) == 1)
        handler = only(gateway)
        writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n")
        for number in range(20):
            writer.write(b"x-%d: %b\r\n" % (number, b"a" * 10_000))
        await until(lambda: handler._close)
        writer.write(b"content-length: 2\r\n\r\n{}")
        first.set()
        told = await read_to_end(reader)
        assert told.startswith(b"HTTP/1.1 200")
        assert told.count(b"HTTP/1.1 ") == 1
        writer.close()
        assert gateway.forwarder.body_memory.held_bytes == 0
