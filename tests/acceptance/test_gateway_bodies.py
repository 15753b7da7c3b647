"""What the bodies of all requests take together, by raw sockets: bounded, told to whoever comes beyond, given back."""

from __future__ import annotations

import asyncio
import json

import pytest
from aiohttp import web
from tests.acceptance.gateways import ASK, NOTHING, Scene, connect, left, raw, streaming, to_the_end, until, written

from forebay.gateway.server import Gateway

EACH = 60_000  # bytes of one body at most
TOGETHER = 100_000
ANTHROPIC = b"POST /v1/messages HTTP/1.1"
CHUNKED = written(b"", b"transfer-encoding: chunked")


def bounded(scene: Scene) -> Gateway:
    return Gateway(scene.settings(gateway={"max_body_bytes": EACH, "max_held_bytes": TOGETHER}))


def ask(size: int) -> bytes:
    """A body of so many bytes."""
    return json.dumps(ASK).encode().ljust(size)


def chunk(size: int) -> bytes:
    return b"%x\r\n%b\r\n" % (size, b" " * size)


def begun(size: int, *fields: bytes) -> bytes:
    """A request whose last byte does not come."""
    return written(ask(size), *fields)[:-1]


def told(answer: bytes) -> tuple[int, dict[str, str], dict[str, str]]:
    """Its status, its headers, and its error."""
    head, _, body = answer.partition(b"\r\n\r\n")
    status, *lines = head.decode().split("\r\n")
    headers = {name.lower(): value for name, value in (line.split(": ", 1) for line in lines)}
    return int(status.split()[1]), headers, json.loads(body)["error"]


@pytest.mark.parametrize(("start", "status"), [(b"POST /v1/chat/completions HTTP/1.1", 503), (ANTHROPIC, 529)])
async def test_a_body_beyond_what_all_may_take_is_not_read_and_its_caller_comes_back(
    scene: Scene, start: bytes, status: int
) -> None:
    async with bounded(scene) as gateway:
        reader, writer = await connect(gateway, begun(50_000))
        await until(lambda: gateway.proxy.bodies.held == 49_999)
        said, headers, error = told(await raw(gateway, written(ask(50_002), start=start)[:-20_000]))
        assert said == status
        assert headers["x-should-retry"] == "true"
        assert 2_000 <= int(headers["retry-after-ms"]) <= 6_000
        assert int(headers["retry-after"]) >= 2
        assert headers["connection"] == "close"
        assert error["code"] == "forebay_bodies"
        assert "max_held_bytes" in error["message"]
        assert gateway.proxy.bodies.held == 49_999
        assert b'forebay_gateway_refusals_total{binding="bodies"' in gateway.proxy.counts.text()
        assert (await raw(gateway, written(ask(50_000), b"connection: close"))).startswith(b"HTTP/1.1 200")
        writer.write(b" ")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        await until(lambda: gateway.proxy.bodies.held == 0)
        assert len(scene.provider.asked) == 2


async def test_what_was_announced_and_has_not_come_takes_nothing(scene: Scene) -> None:
    async with bounded(scene) as gateway:
        waiting = [await connect(gateway, written(ask(EACH))[: -EACH + 10]) for _ in range(20)]
        await until(lambda: gateway.proxy.bodies.held == 20 * 10)
        assert (await raw(gateway, written(ask(EACH), b"connection: close"))).startswith(b"HTTP/1.1 200")
        for _, writer in waiting:
            writer.close()
        await until(lambda: gateway.proxy.bodies.held == 0)


async def test_those_whose_length_is_not_told_are_bounded_together_too(scene: Scene) -> None:
    async with bounded(scene) as gateway:
        _, writer = await connect(gateway, CHUNKED + chunk(50_000))
        await until(lambda: gateway.proxy.bodies.held == 50_000)
        other, sender = await connect(gateway, CHUNKED + chunk(30_000))
        await until(lambda: gateway.proxy.bodies.held == 80_000)
        sender.write(chunk(25_000))
        assert told(await to_the_end(other))[0] == 503
        sender.close()
        assert gateway.proxy.bodies.held == 50_000  # what had come of it as well
        writer.close()
        await until(lambda: gateway.proxy.bodies.held == 0)
        assert not scene.provider.asked


async def test_one_that_is_too_long_by_itself_is_told_so_and_not_to_come_back(scene: Scene) -> None:
    async with bounded(scene) as gateway:
        said, headers, error = told(await raw(gateway, written(ask(EACH + 1))[:-10]))
        assert (said, headers["x-should-retry"], error["code"]) == (413, "false", "forebay_too_long")


async def test_a_body_is_held_until_its_call_has_ended(scene: Scene) -> None:
    answer = asyncio.Event()

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await answer.wait()
        return await scene.provider.answer(request)

    scene.provider.behaviour = behave
    async with bounded(scene) as gateway:
        first = asyncio.create_task(raw(gateway, written(ask(EACH), b"connection: close")))
        await until(lambda: len(scene.provider.asked) == 1)
        assert gateway.proxy.bodies.held == EACH
        assert told(await raw(gateway, written(ask(EACH))))[0] == 503
        answer.set()
        assert (await first).startswith(b"HTTP/1.1 200")
        assert (await raw(gateway, written(ask(EACH), b"connection: close"))).startswith(b"HTTP/1.1 200")
        assert gateway.proxy.bodies.held == 0


async def test_who_hangs_up_gives_its_body_back_whenever_that_is(scene: Scene) -> None:
    scene.provider.behaviour = streaming(b"data: {}\n\n", None)
    async with bounded(scene) as gateway:
        for sent in (begun(EACH), CHUNKED + chunk(EACH // 2), written(ask(EACH))):
            _, writer = await connect(gateway, sent)
            await until(lambda: gateway.proxy.bodies.held > EACH // 3)
            writer.close()
            await until(lambda: gateway.proxy.bodies.held == 0)
        reader, writer = await connect(gateway, written(ask(EACH)))
        await reader.readuntil(b"data: {}")
        assert gateway.proxy.bodies.held == EACH  # its answer has begun
        writer.close()
        await until(lambda: gateway.proxy.bodies.held == 0)
        assert left(gateway) == NOTHING
