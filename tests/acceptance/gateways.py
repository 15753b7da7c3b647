"""The words in which the tests of the gateway speak: a provider that does as it is told, and somebody who calls."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway

CHAT_RESPONSE = {
    "id": "c",
    "object": "chat.completion",
    "model": "gpt-4o",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "The Danube."}}],
    "usage": {"prompt_tokens": 30, "completion_tokens": 20, "total_tokens": 50},
}
CHAT_REQUEST = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 50}
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"The "},"finish_reason":null}]}\n\n'
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"

Behaviour = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Provider:
    """Does as its behaviour says, and keeps what it was asked."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = self.answer
        self.asked: list[web.BaseRequest] = []
        self.bodies: list[Any] = []  # of those that were answered
        self.left = asyncio.Event()  # a caller has hung up

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request)
        try:
            return await self.behaviour(request)
        except asyncio.CancelledError:
            self.left.set()
            raise

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.bodies.append(json.loads(await request.read() or b"null"))
        return web.json_response(CHAT_RESPONSE, headers={"x-request-id": "req_1", "x-should-retry": "true"})


def streaming(*pieces: bytes | float | None, kind: str = "text/event-stream") -> Behaviour:
    """Events: a number waits so many seconds, None for ever, and what follows breaks the connection off."""

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": kind})
        await response.prepare(request)
        for piece in pieces:
            if piece is None:
                await asyncio.Event().wait()
            elif isinstance(piece, float):
                assert request.transport is not None
                request.transport.close()
                return response
            else:
                await response.write(piece)
        await response.write_eof()
        return response

    return behave


CUT = 0.0


def responding(status: int, body: bytes = b"{}", **headers: str) -> Behaviour:
    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, headers=named)

    return behave


class GatewayHarness:
    """A provider, a gateway before it, and somebody who calls."""

    def __init__(self, provider: Provider, url: str, session: aiohttp.ClientSession) -> None:
        self.provider = provider
        self.url = url
        self.session = session
        self.gateway: Gateway | None = None

    def settings(self, *, gateway: dict[str, Any] | None = None, **target: Any) -> GatewaySettings:
        both = tuple(TargetSettings(**{"name": name, "url": self.url, **target}) for name in ("openai", "anthropic"))
        return GatewaySettings(targets=both, **{"listen": "127.0.0.1:0", "drain_timeout": 5.0, **(gateway or {})})

    def at(self, gateway: Gateway, path: str = "/v1/chat/completions") -> str:
        return f"http://127.0.0.1:{gateway.port}{path}"

    async def post(self, gateway: Gateway, path: str = "/v1/chat/completions", **how: Any) -> tuple[int, Any, Any]:
        """Status, headers and decoded body."""
        how = how if "data" in how else {"json": CHAT_REQUEST, **how}
        async with self.session.post(self.at(gateway, path), **how) as answer:
            raw = await answer.read()
            return answer.status, answer.headers, json.loads(raw) if raw[:1] == b"{" else raw


def leftovers(gateway: Gateway) -> tuple[int, int, int]:
    """Calls in flight, in line, and tokens reserved: nothing may be left behind."""
    accounts = [desk.account for target in gateway.forwarder.targets for desk in target.upstream.core.accounts]
    reserved = sum(sum(account.quotas._under_way.values()) for account in accounts)
    return sum(account.in_flight for account in accounts), sum(len(account.queue) for account in accounts), reserved


NOTHING = (0, 0, 0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for what events will bring about; a test that waits in vain ends by its timeout."""
    while not condition():  # noqa: ASYNC110 - sockets of the machine bring it about, and they have no event
        await asyncio.sleep(0)


async def raw(gateway: Gateway, sent: bytes) -> bytes:
    """What comes back for these bytes, to the end of the connection."""
    reader, writer = await connect(gateway, sent)
    told = await read_to_end(reader)
    writer.close()
    return told


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """What comes until a connection is closed, or reset."""
    told = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            told += piece
    return told


def request_bytes(body: bytes = b"", *fields: bytes, start: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    """A request as it stands on the wire, its length told unless it is empty."""
    length = (b"content-length: %d" % len(body),) if body else ()
    return b"\r\n".join((start, b"host: localhost", *fields, *length, b"", body))


def writing_raw(*said: bytes, stays: bool = False) -> Behaviour:
    """These bytes, whatever HTTP wants; then the connection closes, unless it stays."""

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        for piece in said:
            request.transport.write(piece)
        if stays:
            await asyncio.Event().wait()
        request.transport.close()
        return web.Response()

    return behave


async def connect(gateway: Gateway, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A connection on which these bytes were sent."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(sent)
    return reader, writer
