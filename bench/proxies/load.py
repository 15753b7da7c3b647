"""The load: calls over raw connections, as cheap as Python allows, and their latencies."""

from __future__ import annotations

import asyncio
import json
import re
import time
from typing import cast

KEY = "sk-0123456789abcdef0123456789abcdef"
"""The API key of the callers; litellm accepts no weaker one."""
_QUESTION = "Which rivers flow into the Black Sea? " * 20
_LENGTH = re.compile(rb"content-length: (\d+)", re.IGNORECASE)


def request(*, stream: bool = False) -> bytes:
    """Return one request, as the openai SDK writes it."""
    payload = {"model": "gpt-4o", "messages": [{"role": "user", "content": _QUESTION}], "max_tokens": 200}
    body = json.dumps({**payload, "stream": stream}, separators=(",", ":")).encode()
    head = (
        "POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\naccept: application/json\r\n"
        f"content-type: application/json\r\nuser-agent: AsyncOpenAI/Python 3.57.0\r\nauthorization: Bearer {KEY}\r\n"
        "x-stainless-lang: python\r\nx-stainless-package-version: 3.57.0\r\nx-stainless-os: Linux\r\n"
        "x-stainless-arch: x64\r\nx-stainless-runtime: CPython\r\nx-stainless-runtime-version: 3.13.5\r\n"
        "x-stainless-async: async:asyncio\r\nx-stainless-retry-count: 0\r\nx-stainless-read-timeout: 600\r\n"
        f"accept-encoding: gzip, deflate\r\nconnection: keep-alive\r\ncontent-length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


class Caller(asyncio.Protocol):
    """One connection, with one call at a time."""

    def __init__(self) -> None:
        self.buffer = b""
        self.done: asyncio.Future[None] | None = None
        self.streaming = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast("asyncio.Transport", transport)  # those of uvloop are no subclass

    def data_received(self, data: bytes) -> None:
        """Complete the call: a stream with its first event, any other answer with its last byte."""
        self.buffer += data
        end = self.buffer.find(b"\r\n\r\n")
        if end < 0 or self.done is None or self.done.done():
            return
        assert self.buffer.startswith(b"HTTP/1.1 200"), self.buffer[:200]
        length = _LENGTH.search(self.buffer[:end])
        if (self.streaming and b"data: " in self.buffer) or (length and len(self.buffer) >= end + 4 + int(length[1])):
            self.buffer = b""
            self.done.set_result(None)

    def connection_lost(self, exc: Exception | None) -> None:
        """Fail the call under way."""
        if self.done is not None and not self.done.done():
            self.done.set_exception(exc or ConnectionResetError())

    async def call(self, sent: bytes) -> float:
        """Make one call; return its seconds."""
        self.done = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self.transport.write(sent)
        await self.done
        return time.perf_counter() - started


async def connect(port: int) -> Caller:
    """Open a connection."""
    _, caller = await asyncio.get_running_loop().create_connection(Caller, "127.0.0.1", port)
    return caller


async def closed_loop(port: int, *, callers: int, calls: int) -> tuple[list[float], float]:
    """Run callers that each make one call after the other; return the seconds of each call, and of all."""
    connections = [await connect(port) for _ in range(callers)]
    sent = request()
    latencies: list[float] = []

    async def go(caller: Caller) -> None:
        latencies.extend([await caller.call(sent) for _ in range(calls // callers)])

    started = time.perf_counter()
    await asyncio.gather(*(go(caller) for caller in connections))
    seconds = time.perf_counter() - started
    for caller in connections:
        caller.transport.close()
    return latencies, seconds


async def open_streams(port: int, count: int) -> list[Caller]:
    """Open `count` streams, and leave them open after their first event."""
    sent = request(stream=True)
    callers = []
    for _ in range(count):
        caller = await connect(port)
        caller.streaming = True
        await caller.call(sent)
        callers.append(caller)
    return callers
