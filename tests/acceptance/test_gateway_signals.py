"""The process of `forebay gateway`: signals, draining, open files."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import aiohttp
import pytest
from aiohttp import web
from tests.support.gateway_harness import CHAT_REQUEST, DONE, EVENT, STOP, GatewayHarness, streaming, until

pytestmark = pytest.mark.slow  # a process takes a second to start

FILES = 64  # soft limit of open files with which the process starts
STREAM: Any = {"json": {**CHAT_REQUEST, "stream": True, "stream_options": {"include_usage": True}}}


class GatewayProcess:
    """A gateway in its own process."""

    def __init__(self, process: asyncio.subprocess.Process, url: str) -> None:
        self.process = process
        self.url = url

    async def ended(self) -> int:
        """Return its exit status, and check that it printed no traceback."""
        _, errors = await self.process.communicate()
        assert b"Traceback" not in errors, errors.decode()
        assert self.process.returncode is not None
        return self.process.returncode


Start = Callable[..., Coroutine[Any, Any, GatewayProcess]]


@pytest.fixture
async def start(harness: GatewayHarness, tmp_path: Path) -> AsyncIterator[Start]:
    """Return a function that starts a gateway in front of the harness's provider."""
    started: list[asyncio.subprocess.Process] = []

    async def start(
        drain_timeout: float = 60.0, port: int = 0, config: str | None = None, *, has_config: bool = True
    ) -> GatewayProcess:
        file = tmp_path / "forebay.toml"
        file.write_text(f"[gateway]\ndrain_timeout = {drain_timeout}\n" if config is None else config)
        process = await asyncio.create_subprocess_exec(
            *("/bin/sh", "-c", f'ulimit -S -n {FILES} && exec "$@"', "sh"),
            *(sys.executable, "-m", "forebay.cli", "gateway", *(("--config", str(file)) if has_config else ())),
            *(("--max-concurrent", "2") if config is None else ()),
            *("--target", f"openai={harness.url}", "--target", f"anthropic={harness.url}"),
            *(() if "listen" in (config or "") else ("--listen", f"127.0.0.1:{port}")),
            env={**os.environ, "XDG_STATE_HOME": str(tmp_path / "state")},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        started.append(process)
        assert process.stdout is not None
        output = (await process.stdout.readline()).decode().split()
        assert output[:2] == ["listening", "on"]
        return GatewayProcess(process, output[2])

    yield start
    for process in started:
        if process.returncode is None:
            process.kill()
            await process.wait()


async def wait_until_draining(harness: GatewayHarness, running: GatewayProcess) -> None:
    while True:
        async with harness.session.get(f"{running.url}/readyz") as response:
            if response.status == 503:
                assert await response.json() == {"status": "unready", "problems": ["draining"]}
                return


async def read(
    harness: GatewayHarness, running: GatewayProcess, path: str = "/v1/chat/completions", **how: Any
) -> tuple[int, bytes]:
    async with harness.session.post(running.url + path, **(how or {"json": CHAT_REQUEST})) as response:
        return response.status, await response.read()


async def wait_until_queued(harness: GatewayHarness, running: GatewayProcess) -> None:
    while True:
        async with harness.session.get(f"{running.url}/metrics") as response:
            lines = (await response.text()).splitlines()
        if [line for line in lines if line.startswith("forebay_calls_queued{") and line.endswith(" 1.0")]:
            return


@pytest.mark.parametrize(
    ("number", "has_config"), [(signal.SIGTERM, True), (signal.SIGINT, True), (signal.SIGHUP, False)]
)
async def test_a_signal_drains_calls_in_flight_and_in_the_queue(
    harness: GatewayHarness,
    start: Start,
    number: int,
    has_config: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    gate = asyncio.Event()

    async def gated(request: web.BaseRequest) -> web.StreamResponse:
        if not (await request.json()).get("stream"):
            await gate.wait()
            return await harness.provider.reply(request)
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        await response.write(EVENT)
        await gate.wait()
        await response.write(STOP + DONE)
        return response

    harness.provider.behaviour = gated
    running = await start(has_config=has_config)
    async with asyncio.TaskGroup() as group:
        stream = group.create_task(read(harness, running, **STREAM))
        await until(lambda: len(harness.provider.requests) == 1)
        plain = group.create_task(read(harness, running))
        await until(lambda: len(harness.provider.requests) == 2)
        waits = group.create_task(read(harness, running))
        await wait_until_queued(harness, running)
        running.process.send_signal(number)
        await wait_until_draining(harness, running)
        status, received = await read(harness, running)
        assert (status, b"forebay_draining" in received) == (503, True)
        gate.set()
    assert stream.result() == (200, EVENT + STOP + DONE)
    assert plain.result()[0] == waits.result()[0] == 200
    assert await running.ended() == 0
    with pytest.raises(aiohttp.ClientConnectionError):
        await read(harness, running)


@pytest.mark.parametrize("again", [False, True])
async def test_calls_left_after_drain_timeout_or_a_second_signal_are_aborted(
    harness: GatewayHarness,
    start: Start,
    again: bool,  # noqa: FBT001 - a parameter of the test
) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    running = await start(drain_timeout=600.0 if again else 0.5)
    async with asyncio.TaskGroup() as group:
        openai = [group.create_task(read(harness, running, **STREAM)) for _ in range(2)]
        claude = group.create_task(read(harness, running, "/v1/messages", **STREAM))
        await until(lambda: len(harness.provider.requests) == 3)
        waits = group.create_task(read(harness, running))
        await wait_until_queued(harness, running)
        running.process.send_signal(signal.SIGTERM)
        if again:
            await wait_until_draining(harness, running)
            running.process.send_signal(signal.SIGTERM)
    for call in openai:
        assert call.result()[1].startswith(EVENT + b'data: {"error"')
    assert claude.result()[1].startswith(EVENT + b"event: error\n")
    status, received = waits.result()
    assert (status, b"forebay_draining" in received) == (503, True)
    assert await running.ended() == 0


async def test_after_a_kill_a_new_gateway_starts_on_the_same_port(harness: GatewayHarness, start: Start) -> None:
    harness.provider.behaviour = streaming(EVENT, None)
    running = await start()
    async with harness.session.post(f"{running.url}/v1/chat/completions", **STREAM) as response:
        assert await response.content.readany() == EVENT
        running.process.kill()
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    await harness.provider.disconnected.wait()
    assert await running.ended() == -signal.SIGKILL
    harness.provider.behaviour = harness.provider.reply
    again = await start(port=int(running.url.rpartition(":")[2]))
    assert (await read(harness, again))[0] == 200
    again.process.terminate()
    assert await again.ended() == 0


async def test_the_limit_of_open_files_is_raised(harness: GatewayHarness, start: Start) -> None:
    running = await start()
    port = int(running.url.rpartition(":")[2])
    open_ = [await asyncio.open_connection("127.0.0.1", port) for _ in range(2 * FILES)]
    for reader, writer in open_:
        writer.write(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    for _, writer in open_:
        writer.close()
    assert (await read(harness, running))[0] == 200
    running.process.terminate()
    assert await running.ended() == 0


async def test_the_access_log_is_on_the_standard_output_by_default(harness: GatewayHarness, start: Start) -> None:
    running = await start()
    assert (await read(harness, running))[0] == 200
    assert " 200 answered POST /v1/chat/completions tenant=default " in await line_of(running.process.stdout, "20")
    running.process.terminate()
    assert await running.ended() == 0


# --- SIGHUP, with a file ---


async def line_of(stream: asyncio.StreamReader | None, start: str) -> str:
    """Return the next line that starts so."""
    assert stream is not None
    while not (line := (await stream.readline()).decode()).startswith(start):
        assert line, f"no line starts with {start!r}"
    return line.rstrip()


async def hang_up(running: GatewayProcess, file: Path) -> None:
    """Send a SIGHUP, and wait until the file is reloaded."""
    running.process.send_signal(signal.SIGHUP)
    assert await line_of(running.process.stdout, "reloaded") == f"reloaded {file}"


async def test_a_hang_up_reloads_the_file_and_what_was_spent_stays_spent(
    harness: GatewayHarness, start: Start, tmp_path: Path
) -> None:
    file = tmp_path / "forebay.toml"
    price = "[targets.openai.prices.'*']\ninput = 1.0\noutput = 10.0\n"
    text = "[gateway]\naccess_log = 'off'\n[targets.openai]\nbudget_usd = {usd}\n" + price
    running = await start(config=text.format(usd=5))
    assert (await read(harness, running))[0] == 200
    await hang_up(running, file)
    assert await spent(harness, running) == pytest.approx(0.00023)
    file.write_text(text.format(usd=0.0002))
    await hang_up(running, file)
    status, received = await read(harness, running)
    assert (status, b"it has 0.0002 USD a day" in received) == (402, True)
    running.process.terminate()
    assert await running.ended() == 0


async def spent(harness: GatewayHarness, running: GatewayProcess) -> float:
    async with harness.session.get(f"{running.url}/metrics") as response:
        lines = (await response.text()).splitlines()
    name = 'forebay_budget_spent_usd{target="openai"}'
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


async def test_a_file_with_a_mistake_is_not_reloaded(harness: GatewayHarness, start: Start, tmp_path: Path) -> None:
    file = tmp_path / "forebay.toml"
    running = await start(config="[targets.openai]\nrpm = 1\n")
    assert (await read(harness, running))[0] == 200
    for text, problem in (
        ("[targets.openai]\nrpm = 'many'\n", "targets.openai.rpm is a string; it must be a whole number"),
        ("[targets.openai\n", "Expected"),
        ("[targets.openai]\nrpm = '${MISSING}'\n", "needs the environment variable MISSING, which is not set"),
    ):
        file.write_text(text)
        running.process.send_signal(signal.SIGHUP)
        line = await line_of(running.process.stderr, "nothing is reloaded")
        assert line.startswith("nothing is reloaded, and the old settings stay: ")
        assert str(file) in line
        assert problem in line
    status, _ = await read(harness, running, json=CHAT_REQUEST, headers={"x-stainless-read-timeout": "3"})
    assert status == 429  # by the old rate
    running.process.terminate()
    assert await running.ended() == 0


async def test_a_new_address_is_said_to_need_a_restart(harness: GatewayHarness, start: Start, tmp_path: Path) -> None:
    running = await start(config="[gateway]\nlisten = '127.0.0.1:0'\n")
    (tmp_path / "forebay.toml").write_text("[gateway]\nlisten = '127.0.0.1:1'\n")
    await hang_up(running, tmp_path / "forebay.toml")
    line = await line_of(running.process.stderr, "reloaded")
    assert line == "reloaded, but it listens on 127.0.0.1:0 until it is started again, not on 127.0.0.1:1"
    assert (await read(harness, running))[0] == 200
    running.process.terminate()
    assert await running.ended() == 0


@pytest.mark.skipif(sys.platform == "win32", reason="there are no pseudo-terminals")
async def test_a_closed_terminal_stops_a_gateway_with_a_file_too(harness: GatewayHarness, tmp_path: Path) -> None:
    import pty  # noqa: PLC0415 - not on Windows
    import termios  # noqa: PLC0415

    file = tmp_path / "forebay.toml"
    file.write_text("")
    ours, theirs = pty.openpty()

    def take_terminal() -> None:
        import fcntl  # noqa: PLC0415

        fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)

    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "forebay.cli", "gateway", "--config", str(file), "--listen", "127.0.0.1:0"),
        *("--target", f"openai={harness.url}"),
        stdin=theirs,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
        preexec_fn=take_terminal,
    )
    os.close(theirs)
    try:
        running = GatewayProcess(process, (await line_of(process.stdout, "listening on")).split()[2])
        await hang_up(running, file)  # a signal alone reloads
        assert (await read(harness, running))[0] == 200
        os.close(ours)  # the terminal is closed
        assert await running.ended() == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
