"""The simulated provider over HTTP, with the routes that OpenAI's and Anthropic's clients use and some for tests.

- ``POST /v1/chat/completions`` and ``POST /v1/messages``, streaming or not; ``GET /v1/models``.
- ``GET /simulation/statistics``, ``GET /simulation/runs``; ``POST /simulation/reset`` restarts the provider at second
  0, with another `ProviderConfig` if the body is its JSON.

Headers of a call can fix what is otherwise estimated or drawn: ``x-simulated-input-tokens`` and
``x-simulated-output-tokens``. ``x-simulated-run`` (otherwise ``x-forebay-task``) names the run that its tokens are
billed to.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
from typing import Final

import msgspec
from aiohttp import web

from forebay import clock
from forebay.simulation.provider import wire_errors, wire_messages
from forebay.simulation.provider.provider_config import Dialect, InvalidProviderConfig, ProviderConfig
from forebay.simulation.provider.simulated_call import (
    CallCompleted,
    CallCut,
    CallRefused,
    FirstToken,
    SimulatedCall,
    TokensProduced,
)
from forebay.simulation.provider.simulated_provider import CallStream, SimulatedProvider
from forebay.simulation.provider.traffic import Traffic

_JSON: Final = "application/json"
_MAX_REQUEST_BYTES: Final = 8 << 20
_SSE: Final = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}

AnswerWriter = wire_messages.OpenAIWriter | wire_messages.AnthropicWriter


class ProviderServer:
    """A simulated provider behind HTTP routes. Create it in the event loop that serves it.

    Args:
        config: its capacity, limits and faults.
        seed: seeds all randomness.
        traffic: the traffic whose output lengths are drawn; None: `Traffic.conversation()`.
    """

    def __init__(self, config: ProviderConfig, *, seed: int = 0, traffic: Traffic | None = None) -> None:
        self._seed = seed
        self._traffic = traffic or Traffic.conversation()
        self._restart(config)

    @property
    def config(self) -> ProviderConfig:
        """The provider's current configuration."""
        return self._provider.config

    def application(self) -> web.Application:
        """Return an aiohttp application with all routes."""
        app = web.Application(client_max_size=_MAX_REQUEST_BYTES)
        app.on_response_prepare.append(_set_date)
        app.router.add_post("/v1/chat/completions", self._chat_completions)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/simulation/statistics", self._statistics)
        app.router.add_get("/simulation/runs", self._runs)
        app.router.add_post("/simulation/reset", self._reset)
        return app

    def _restart(self, config: ProviderConfig) -> None:
        self._provider = SimulatedProvider(config, self._seed, epoch=clock.wall_time())
        self._lengths = random.Random(f"{self._seed}/lengths")

    # --- calls ------------------------------------------------------------------------------------------------------

    async def _chat_completions(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Dialect.OPENAI)

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        return await self._answer(request, Dialect.ANTHROPIC)

    async def _answer(self, request: web.Request, dialect: Dialect) -> web.StreamResponse:
        try:
            body = wire_messages.read_request(await request.read())
            call = self._call(request, body, dialect)
        except (msgspec.MsgspecError, ValueError) as error:
            return _response(wire_errors.bad_request_response(dialect, str(error), "req_invalid"))
        outcome = self._provider.try_open(call)
        if isinstance(outcome, CallRefused):
            await asyncio.sleep(self._provider.config.refusal_delay)
            return _response(outcome)
        with outcome as stream:
            if dialect is Dialect.OPENAI:
                writer: AnswerWriter = wire_messages.OpenAIWriter(
                    stream.call_id, body.model, int(clock.wall_time()), include_usage=body.include_usage
                )
            else:
                writer = wire_messages.AnthropicWriter(stream.call_id, body.model)
            try:
                return await (_send_events if call.stream else _send_whole)(request, call, stream, writer)
            except ConnectionResetError:  # the client hung up; leaving the block hangs up at the provider
                return _drop_connection(request)

    def _call(self, request: web.Request, body: wire_messages.ChatRequest, dialect: Dialect) -> SimulatedCall:
        headers = request.headers
        given = headers.get("x-simulated-input-tokens")
        input_tokens = int(given) if given else body.input_tokens()
        given = headers.get("x-simulated-output-tokens")
        output_tokens = int(given) if given else self._traffic.output_tokens(self._lengths, input_tokens)
        return SimulatedCall(
            model=body.model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            max_tokens=body.max_output_tokens,
            stream=bool(body.stream),
            key=headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer "),
            run=headers.get("x-simulated-run") or headers.get("x-forebay-task"),
            dialect=dialect,
        )

    # --- readings ---------------------------------------------------------------------------------------------------

    async def _models(self, _request: web.Request) -> web.Response:
        return web.Response(body=wire_messages.model_list([*self.config.prices]), content_type=_JSON)

    async def _statistics(self, _request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._provider.statistics()), content_type=_JSON)

    async def _runs(self, _request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._provider.bills()), content_type=_JSON)

    async def _reset(self, request: web.Request) -> web.Response:
        body = await request.read()
        try:
            self._restart(ProviderConfig.from_json(body) if body else self.config)
        except InvalidProviderConfig as error:
            return web.Response(status=400, body=msgspec.json.encode({"error": str(error)}), content_type=_JSON)
        return web.Response(body=b"{}", content_type=_JSON)


async def _set_date(_request: web.Request, response: web.StreamResponse) -> None:
    """Set the Date header from the clock that the resets are computed from, which may be virtual."""
    response.headers["date"] = email.utils.formatdate(clock.wall_time(), usegmt=True)


def _response(answer: wire_errors.HttpReply | CallRefused) -> web.Response:
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


async def _send_whole(
    request: web.Request, call: SimulatedCall, stream: CallStream, writer: AnswerWriter
) -> web.StreamResponse:
    async for event in stream:
        if isinstance(event, CallCompleted):
            usage = event.usage.input_tokens, event.usage.output_tokens
            body = writer.response(usage, stopped=call.stops)
            return web.Response(body=body, headers=stream.headers, content_type=_JSON)
        if isinstance(event, CallCut):
            if event.reported:
                dialect = call.dialect or Dialect.OPENAI
                error = msgspec.json.encode(wire_errors.stream_error_body(dialect, stream.request_id))
                return web.Response(status=500, body=error, headers=stream.headers, content_type=_JSON)
            break
    return _drop_connection(request)


async def _send_events(
    request: web.Request, call: SimulatedCall, stream: CallStream, writer: AnswerWriter
) -> web.StreamResponse:
    response = web.StreamResponse(headers=stream.headers | _SSE)
    await response.prepare(request)
    await response.write(writer.stream_start(call.input_tokens))
    sent = 0
    async for event in stream:
        match event:
            case FirstToken() | TokensProduced():
                tokens = event.tokens if isinstance(event, TokensProduced) else 1
                await response.write(writer.stream_tokens(sent, tokens))
                sent += tokens
            case CallCompleted(usage=usage):
                totals = usage.input_tokens, usage.output_tokens
                await response.write(writer.stream_end(totals, stopped=call.stops))
                await response.write_eof()
            case CallCut(reported=True):
                dialect = call.dialect or Dialect.OPENAI
                await response.write(writer.stream_error(wire_errors.stream_error_body(dialect, stream.request_id)))
                await response.write_eof()
            case CallCut():
                _drop_connection(request)
    return response


def _drop_connection(request: web.Request) -> web.Response:
    """Close the connection without an answer; the returned response is never sent."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def start_server(server: ProviderServer, *, port: int = 0) -> tuple[web.AppRunner, str]:
    """Serve on 127.0.0.1; return the runner, which the caller must clean up, and the URL. Port 0 is any free one."""
    runner = web.AppRunner(server.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
    address = runner.addresses[0]
    return runner, f"http://{address[0]}:{address[1]}"
