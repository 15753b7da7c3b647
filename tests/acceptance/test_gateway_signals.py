"""The process of a gateway, as `forebay gateway` starts it, and how it ends."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.acceptance.gateways import CHAT_REQUEST, DONE, EVENT, STOP, GatewayHarness, streaming, until

pytestmark = pytest.mark.slow  # a process needs a second to start

FILES = 64  # that a process may have open when it begins, and more only if it asks for more
STREAM: Any = {"json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}}


class Running:
    """One process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    async def ended(self) -> int:
        """Its status; it may have said nothing of errors."""
        _, told = await self.process.communicate()
        assert b"Traceback" not in told, told.decode()
        assert self.process.returncode is not None
        return self.process.returncode


Start = Callable[..., Coroutine[Any, Any, Running]]


@pytest.fixture
async def start(scene: GatewayHarness, tmp_path: Path) -> AsyncIterator[Start]:
    """Starts a gateway before the scene's provider, with so many seconds to drain."""
    begun: list[asyncio.subprocess.Process] = []

    async def start(drain_timeout: float = 60.0, port: int = 0) -> Running:
        file = tmp_path / "forebay.toml"
        file.write_text(f"[gateway]\ndrain_timeout = {drain_timeout}\n")
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", f'ulimit -S -n {FILES} && exec "$@"', "sh"),
            *(sys.executable, "-m", "forebay.cli", "gateway", "--config", str(file), "--max-concurrent", "2"),
            *("--target", f"openai={scene.url}", "--target", f"anthropic={scene.url}"),
            *("--listen", f"127.0.0.1:{port}"),
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        begun.append(process)
        assert process.stdout is not None
        told = (await process.stdout.readline()).decode().split()
        assert told[:2] == ["listening", "on"]
        return Running(process, told[2])

    yield start
    for process in begun:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def until_it_drains(scene: GatewayHarness, running: Running) -> None:
    while True:
        async with scene.session.get(f"{running.url}/healthz") as answer:
            if answer.status == 503:
                assert await answer.json() == {"status": "draining"}
                return


async def read(
    scene: GatewayHarness, running: Running, path: str = "/v1/chat/completions", **how: Any
) -> tuple[int, bytes]:
    async with scene.session.post(running.url + path, **(how or {"json": CHAT_REQUEST})) as answer:
        return answer.status, await answer.read()


async def until_one_waits(scene: GatewayHarness, running: Running) -> None:
    while True:
        async with scene.session.get(f"{running.url}/metrics") as answer:
            lines = (await answer.text()).splitlines()
        if [line for line in lines if line.startswith("forebay_calls_queued{") and line.endswith(" 1.0")]:
            return


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_who_is_under_way_or_in_line_is_served_to_the_end(
    scene: GatewayHarness, start: Start, number: int
) -> None:
    gate = asyncio.Event()

    async def gated(request: web.BaseRequest) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            await gate.wait()
            return await scene.provider.answer(request)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(EVENT)
        await gate.wait()
        await response.write(STOP + DONE)
        return response

    scene.provider.behaviour = gated
    running = await start()
    async with asyncio.TaskGroup() as group:
        stream = group.create_task(read(scene, running, **STREAM))
        await until(lambda: len(scene.provider.asked) == 1)
        plain = group.create_task(read(scene, running))
        await until(lambda: len(scene.provider.asked) == 2)
        waits = group.create_task(read(scene, running))
        await until_one_waits(scene, running)
        running.process.send_signal(number)
        await until_it_drains(scene, running)
        status, told = await read(scene, running)
        assert (status, b"forebay_draining" in told) == (503, True)
        gate.set()
    assert stream.result() == (200, EVENT + STOP + DONE)
    assert plain.result()[0] == waits.result()[0] == 200
    assert await running.ended() == 0
    with pytest.raises(aiohttp.ClientConnectionError):
        await read(scene, running)


@pytest.mark.parametrize("again", [False, True])
async def test_what_is_left_at_the_limit_or_the_second_signal_is_cut_off_and_told_so(
    scene: GatewayHarness,
    start: Start,
    again: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    scene.provider.behaviour = streaming(EVENT, None)
    running = await start(drain_timeout=600.0 if again else 0.5)
    async with asyncio.TaskGroup() as group:
        openai = [group.create_task(read(scene, running, **STREAM)) for _ in range(2)]
        claude = group.create_task(read(scene, running, "/v1/messages", **STREAM))
        await until(lambda: len(scene.provider.asked) == 3)
        waits = group.create_task(read(scene, running))
        await until_one_waits(scene, running)
        running.process.send_signal(signal.SIGTERM)
        if again:
            await until_it_drains(scene, running)
            running.process.send_signal(signal.SIGTERM)
    for call in openai:
        assert call.result()[1].startswith(EVENT + b'data: {"error"')
    assert claude.result()[1].startswith(EVENT + b"event: error\n")
    status, told = waits.result()
    assert (status, b"forebay_draining" in told) == (503, True)
    assert await running.ended() == 0


async def test_one_that_is_killed_leaves_nothing_in_the_way_of_the_next(scene: GatewayHarness, start: Start) -> None:
    scene.provider.behaviour = streaming(EVENT, None)
    running = await start()
    async with scene.session.post(f"{running.url}/v1/chat/completions", **STREAM) as answer:
        assert await answer.content.readany() == EVENT
        running.process.kill()
        with pytest.raises(aiohttp.ClientError):
            await answer.read()
    await scene.provider.left.wait()
    assert await running.ended() == -signal.SIGKILL
    scene.provider.behaviour = scene.provider.answer
    again = await start(port=int(running.url.rpartition(":")[2]))
    assert (await read(scene, again))[0] == 200
    again.process.terminate()
    assert await again.ended() == 0


async def test_it_takes_as_many_connections_as_the_machine_allows(scene: GatewayHarness, start: Start) -> None:
    running = await start()
    port = int(running.url.rpartition(":")[2])
    open_ = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * FILES)]
    for reader, writer in open_:
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    for _, writer in open_:
        writer.close()
    assert (await read(scene, running))[0] == 200
    running.process.terminate()
    assert await running.ended() == 0
