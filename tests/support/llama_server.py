"""A double of llama-server, in the event loop of a test. The events of its answers have a word each."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from typing import Any, Final

from aiohttp import web

WORDS: Final = ("The ", "Danube ", "is ", "long.")
INPUT_TOKENS, OUTPUT_TOKENS = 11, 7  # that each call reports


class LlamaServer:
    """The double. A test changes what it does by its attributes.

    Attributes:
        url: the base URL for clients.
        slots: that ``/props`` tells; None: there is no such path, as at other servers.
        loading: how often ``/v1/models`` answers 503 before the model is loaded.
        props_body: what ``/props`` answers with instead; "hangs": nothing, until `go`; None: it closes the connection.
        model: the first one that is listed.
        endless_error: whether each call is answered with an error that does not end.
        hangs: whether ``/v1/models`` waits for `go`.
        api_key: that calls must have.
        refusal: the status and the message of each answer to a call; None: calls are answered.
        events: lines sent instead of the whole answer.
        pause_after: how many words are sent before `go` is waited for.
        go: lets answers that have paused go on.
        bodies: of the calls.
        hung_up: how many clients have closed the connection of a call before its end.
    """

    def __init__(self) -> None:
        self.url = ""
        self.slots: int | None = None
        self.props_body: object = ""
        self.model = "tiny.gguf"
        self.endless_error = False
        self.loading = 0
        self.hangs = False
        self.api_key = ""
        self.refusal: tuple[int, dict[str, Any]] | None = None
        self.events: list[bytes] | None = None
        self.pause_after: int | None = None
        self.go = asyncio.Event()
        self.bodies: list[dict[str, Any]] = []
        self.hung_up = 0
        self.is_changed = asyncio.Event()

    async def models(self, _request: web.Request) -> web.Response:
        """Answer with the models, once one is loaded."""
        if self.hangs:
            await self.go.wait()
        if self.loading:
            self.loading -= 1
            return web.json_response({"error": {"code": 503, "message": "Loading model"}}, status=503)
        return web.json_response({"object": "list", "data": [{"id": self.model}, {"id": "another"}]})

    async def props(self, request: web.Request) -> web.Response:
        """Answer with the properties, as llama-server does."""
        if self.props_body == "hangs":
            await self.go.wait()
        if self.props_body is None:
            assert request.transport is not None
            request.transport.abort()
        if isinstance(self.props_body, bytes):
            return web.Response(body=self.props_body)
        if self.slots is None:
            return web.json_response({"error": "not found"}, status=404)
        return web.json_response({"total_slots": self.slots, "model_path": "/models/tiny.gguf"})

    async def complete(self, request: web.Request) -> web.StreamResponse:
        """Answer a call."""
        self.bodies.append(await request.json())
        self._change()
        if self.api_key and request.headers.get("authorization") != f"Bearer {self.api_key}":
            return web.json_response({"error": {"code": 401, "message": "Invalid API Key"}}, status=401)
        if self.refusal is not None:
            return web.json_response(self.refusal[1], status=self.refusal[0])
        response = web.StreamResponse(
            status=500 if self.endless_error else 200, headers={"content-type": "text/event-stream"}
        )
        await response.prepare(request)
        try:
            async for line in self._lines():
                await response.write(line)
        except (asyncio.CancelledError, ConnectionResetError):
            self.hung_up += 1
            self._change()
            raise
        return response

    async def _lines(self) -> AsyncIterator[bytes]:
        while self.endless_error:
            yield b"x" * 65_536
        if self.events is not None:
            for line in self.events:
                yield line
            return
        yield _event({"delta": {"role": "assistant", "content": None}, "finish_reason": None})
        for number, word in enumerate(WORDS):
            if number == self.pause_after:
                await self.go.wait()
            yield _event({"delta": {"content": word}, "finish_reason": None})
        yield _event({"delta": {}, "finish_reason": "stop"})
        usage = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
        yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    def _change(self) -> None:
        self.is_changed.set()
        self.is_changed.clear()

    async def until_calls(self, count: int) -> None:
        """Wait until so many calls have arrived."""
        while len(self.bodies) < count:
            await self.is_changed.wait()

    async def until_hung_up(self, count: int) -> None:
        """Wait until so many clients have hung up."""
        while self.hung_up < count:
            await self.is_changed.wait()


def _event(choice: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps({"choices": [{"index": 0, **choice}]}).encode() + b"\n\n"


@contextlib.asynccontextmanager
async def llama_server() -> AsyncIterator[LlamaServer]:
    """Serve a double on the loopback interface while the block runs."""
    double = LlamaServer()
    application = web.Application()
    application.router.add_post("/v1/chat/completions", double.complete)
    application.router.add_get("/v1/models", double.models)
    application.router.add_get("/props", double.props)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        double.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
        yield double
    finally:
        double.go.set()
        await runner.cleanup()
