"""The harness of the gateway's tests: a scripted provider, a gateway and a caller."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
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
MESSAGE_RESPONSE = {  # of Anthropic's API
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-sonnet-4",
    "content": [{"type": "text", "text": "The Danube."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 30, "output_tokens": 20},
}
HELD_KEY = "sk-held-by-the-gateway"  # of a provider
CHAT_REQUEST = {"model": "gpt-4o", "messages": [{"role": "user", "content": "Rivers?"}], "max_tokens": 50}
EVENT = b'data: {"choices":[{"index":0,"delta":{"content":"The "},"finish_reason":null}]}\n\n'
STOP = b'data: {"choices":[{"index":0,"delta":{},"finish_reason":"stop"}]}\n\n'
DONE = b"data: [DONE]\n\n"

Behaviour = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class ScriptedProvider:
    """A provider that responds as its `behaviour` says, and records its requests."""

    def __init__(self) -> None:
        self.behaviour: Behaviour = self.reply
        self.requests: list[web.BaseRequest] = []
        self.bodies: list[Any] = []  # of requests answered by `reply`
        self.disconnected = asyncio.Event()  # a caller has disconnected

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        self.requests.append(request)
        try:
            return await self.behaviour(request)
        except asyncio.CancelledError:
            self.disconnected.set()
            raise

    async def reply(self, request: web.BaseRequest) -> web.StreamResponse:
        self.bodies.append(json.loads(await request.read() or b"null"))
        return web.json_response(CHAT_RESPONSE, headers={"x-request-id": "req_1", "x-should-retry": "true"})


def streaming(*pieces: bytes | float | None, kind: str = "text/event-stream", encoding: str = "") -> Behaviour:
    """Return a behaviour that streams pieces; None waits forever, and a number closes the connection."""

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        response = web.StreamResponse(headers={"content-type": kind})
        if encoding:
            response.headers["content-encoding"] = encoding
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
    """Return a behaviour that gives this response."""

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return web.Response(status=status, body=body, headers=named)

    return behave


class GatewayHarness:
    """A scripted provider, settings of a gateway in front of it, and a caller.

    Args:
        provider: the scripted provider.
        url: of the provider.
        session: of the caller.
    """

    def __init__(self, provider: ScriptedProvider, url: str, session: aiohttp.ClientSession) -> None:
        self.provider = provider
        self.url = url
        self.session = session
        self.gateway: Gateway | None = None

    def settings(self, *, gateway: dict[str, Any] | None = None, **target: Any) -> GatewaySettings:
        targets = tuple(TargetSettings(**{"name": name, "url": self.url, **target}) for name in ("openai", "anthropic"))
        return GatewaySettings(targets=targets, **{"listen": "127.0.0.1:0", "drain_timeout": 5.0, **(gateway or {})})

    def at(self, gateway: Gateway, path: str = "/v1/chat/completions") -> str:
        return f"http://127.0.0.1:{gateway.port}{path}"

    async def post(self, gateway: Gateway, path: str = "/v1/chat/completions", **how: Any) -> tuple[int, Any, Any]:
        """Make a call; return status, headers and decoded body."""
        how = how if "data" in how else {"json": CHAT_REQUEST, **how}
        async with self.session.post(self.at(gateway, path), **how) as response:
            raw = await response.read()
            return response.status, response.headers, json.loads(raw) if raw[:1] == b"{" else raw


@contextlib.asynccontextmanager
async def gateway_harness() -> AsyncIterator[GatewayHarness]:
    """Serve a scripted provider, and yield its harness."""
    provider = ScriptedProvider()
    server = web.Server(provider.handle, handler_cancellation=True, auto_decompress=False, access_log=None)
    listening = await asyncio.get_running_loop().create_server(server, "127.0.0.1", 0)
    port = listening.sockets[0].getsockname()[1]
    async with aiohttp.ClientSession() as session:
        yield GatewayHarness(provider, f"http://127.0.0.1:{port}", session)
    listening.close()
    server.pre_shutdown()
    await server.shutdown(0.1)


def leftovers(gateway: Gateway) -> tuple[int, int, int]:
    """Return the calls in flight, the queued ones, and those that hold quotas; all must be 0 in the end."""
    accounts = [account.account for target in gateway.forwarder.targets for account in target.upstream.core.accounts]
    reserved = sum(len(account.quotas._open) for account in accounts)
    return sum(account.in_flight for account in accounts), sum(len(account.queue) for account in accounts), reserved


NOTHING_LEFT = (0, 0, 0)


async def until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; a test that waits in vain ends by its timeout."""
    while not condition():  # noqa: ASYNC110 - sockets bring it about, without an event
        await asyncio.sleep(0)


async def raw(gateway: Gateway, sent: bytes) -> bytes:
    """Send bytes; return what comes back, to the end of the connection."""
    reader, writer = await connect(gateway, sent)
    received = await read_to_end(reader)
    writer.close()
    return received


async def read_to_end(reader: asyncio.StreamReader) -> bytes:
    """Return what arrives until the connection is closed or reset."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := await reader.read(1 << 16):
            received += piece
    return received


def request_bytes(body: bytes = b"", *fields: bytes, start: bytes = b"POST /v1/chat/completions HTTP/1.1") -> bytes:
    """Return the bytes of a request, with a content-length unless it is empty."""
    length = (b"content-length: %d" % len(body),) if body else ()
    return b"\r\n".join((start, b"host: localhost", *fields, *length, b"", body))


def writing_raw(*pieces: bytes, stays: bool = False, pause: bool = False) -> Behaviour:
    """Return a behaviour that writes raw bytes, and then closes the connection unless it `stays`.

    Args:
        pieces: the bytes.
        stays: the connection stays open.
        pause: the pieces arrive one by one, most likely.
    """

    async def behave(request: web.BaseRequest) -> web.StreamResponse:
        await request.read()
        assert request.transport is not None
        for piece in pieces:
            request.transport.write(piece)
            for _ in range(10 if pause else 0):
                await asyncio.sleep(0)
        if stays:
            await asyncio.Event().wait()
        request.transport.close()
        return web.Response()

    return behave


async def connect(gateway: Gateway, sent: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Open a connection and send bytes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.port)
    writer.write(sent)
    return reader, writer
