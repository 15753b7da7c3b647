"""The simulated provider over HTTP: what OpenAI's and Anthropic's clients expect to find, and a window for the tests.

- ``POST /v1/chat/completions`` and ``POST /v1/messages``, streaming and not; ``GET /v1/models``.
- ``GET /plant/statistics``, ``GET /plant/runs``, ``POST /plant/reset`` (an empty body begins anew as configured, a JSON
  body is another `ProviderConfig`).

A call may fix what is otherwise estimated or drawn: the headers ``x-plant-input-tokens`` and ``x-plant-output-tokens``;
``x-plant-run`` (else ``x-forebay-task``) names the run that its tokens are counted for.
"""

from __future__ import annotations

import asyncio
import email.utils
import random
from typing import Final

import msgspec
from aiohttp import web

from forebay import clock
from forebay.simulation.provider import wire_errors as dialect
from forebay.simulation.provider import wire_messages as wire
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
_MOST_BYTES: Final = 8 << 20  # of a request
_SSE: Final = {"content-type": "text/event-stream; charset=utf-8", "cache-control": "no-cache"}


class ProviderServer:
    """One simulated provider behind HTTP routes; made in the loop that serves it."""

    def __init__(self, config: ProviderConfig, *, seed: int = 0, traffic: Traffic | None = None) -> None:
        self._seed = seed
        self._traffic = traffic or Traffic.conversation()
        self._begin(config)

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=_MOST_BYTES)
        app.on_response_prepare.append(_date)
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_post("/v1/messages", self._messages)
        app.router.add_get("/v1/models", self._models)
        app.router.add_get("/plant/statistics", self._statistics)
        app.router.add_get("/plant/runs", self._runs)
        app.router.add_post("/plant/reset", self._reset)
        return app

    def _begin(self, config: ProviderConfig) -> None:
        self._provider = SimulatedProvider(config, self._seed, epoch=clock.wall_time())
        self._lengths = random.Random(f"{self._seed}/lengths")

    # --- calls ------------------------------------------------------------------------------------------------------

    async def _chat(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, Dialect.OPENAI)

    async def _messages(self, request: web.Request) -> web.StreamResponse:
        return await self._serve(request, Dialect.ANTHROPIC)

    async def _serve(self, request: web.Request, spoken: Dialect) -> web.StreamResponse:
        try:
            asked = wire.read_request(await request.read())
            call = self._call(request, asked, spoken)
        except (msgspec.MsgspecError, ValueError) as error:
            return _plain(dialect.bad_request_response(spoken, str(error), "req_unread"))
        answer = self._provider.try_open(call)
        if isinstance(answer, CallRefused):
            await asyncio.sleep(self._provider.config.refusal_delay)
            return _plain(answer)
        with answer:
            if spoken is Dialect.OPENAI:
                created = int(clock.wall_time())
                voice: AnswerWriter = wire.OpenAIWriter(
                    answer.call_id, asked.model, created, include_usage=asked.include_usage
                )
            else:
                voice = wire.AnthropicWriter(answer.call_id, asked.model)
            try:
                return await (_stream if call.stream else _whole)(request, call, answer, voice)
            except ConnectionResetError:  # the client has left; so does the call, with this block
                return _drop(request)

    def _call(self, request: web.Request, asked: wire.ChatRequest, spoken: Dialect) -> SimulatedCall:
        headers = request.headers
        told = headers.get("x-plant-input-tokens")
        input_tokens = int(told) if told else asked.input_tokens()
        told = headers.get("x-plant-output-tokens")
        output_tokens = int(told) if told else self._traffic.output_tokens(self._lengths, input_tokens)
        return SimulatedCall(
            model=asked.model,
            input_tokens=input_tokens,
            output_tokens=output_tokens,
            max_tokens=asked.max_output_tokens,
            stream=bool(asked.stream),
            key=headers.get("x-api-key") or headers.get("authorization", "").removeprefix("Bearer "),
            run=headers.get("x-plant-run") or headers.get("x-forebay-task"),
            dialect=spoken,
        )

    # --- the window -------------------------------------------------------------------------------------------------

    async def _models(self, _request: web.Request) -> web.Response:
        return web.Response(body=wire.model_list([*self.config.prices]), content_type=_JSON)

    async def _statistics(self, _request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._provider.statistics()), content_type=_JSON)

    async def _runs(self, _request: web.Request) -> web.Response:
        return web.Response(body=msgspec.json.encode(self._provider.bills()), content_type=_JSON)

    async def _reset(self, request: web.Request) -> web.Response:
        body = await request.read()
        try:
            self._begin(ProviderConfig.from_json(body) if body else self.config)
        except InvalidProviderConfig as error:
            return web.Response(status=400, body=msgspec.json.encode({"error": str(error)}), content_type=_JSON)
        return web.Response(body=b"{}", content_type=_JSON)

    @property
    def config(self) -> ProviderConfig:
        """What the provider is like at present."""
        return self._provider.config


AnswerWriter = wire.OpenAIWriter | wire.AnthropicWriter


async def _date(_request: web.Request, response: web.StreamResponse) -> None:
    """By the clock that its resets are told by, be that a virtual one."""
    response.headers["date"] = email.utils.formatdate(clock.wall_time(), usegmt=True)


def _plain(answer: dialect.HttpReply | CallRefused) -> web.Response:
    return web.Response(status=answer.status, headers=answer.headers, body=answer.body)


async def _whole(
    request: web.Request, call: SimulatedCall, answer: CallStream, voice: AnswerWriter
) -> web.StreamResponse:
    async for event in answer:
        if isinstance(event, CallCompleted):
            usage = event.usage.input_tokens, event.usage.output_tokens
            body = voice.response(usage, voice.finish_reason(stopped=call.stops))
            return web.Response(body=body, headers=answer.headers, content_type=_JSON)
        if isinstance(event, CallCut):
            if event.reported:
                spoken = call.dialect or Dialect.OPENAI
                error = msgspec.json.encode(dialect.stream_error_body(spoken, answer.request_id))
                return web.Response(status=500, body=error, headers=answer.headers, content_type=_JSON)
            break
    return _drop(request)


async def _stream(
    request: web.Request, call: SimulatedCall, answer: CallStream, voice: AnswerWriter
) -> web.StreamResponse:
    response = web.StreamResponse(headers=answer.headers | _SSE)
    await response.prepare(request)
    await response.write(voice.stream_start(call.input_tokens))
    told = 0
    async for event in answer:
        match event:
            case FirstToken() | TokensProduced():
                fresh = event.tokens if isinstance(event, TokensProduced) else 1
                await response.write(voice.stream_tokens(told, fresh))
                told += fresh
            case CallCompleted(usage=usage):
                tokens = usage.input_tokens, usage.output_tokens
                await response.write(voice.stream_end(tokens, voice.finish_reason(stopped=call.stops)))
                await response.write_eof()
            case CallCut(reported=True):
                spoken = call.dialect or Dialect.OPENAI
                await response.write(voice.stream_error(dialect.stream_error_body(spoken, answer.request_id)))
                await response.write_eof()
            case CallCut():
                _drop(request)
    return response


def _drop(request: web.Request) -> web.Response:
    """The connection goes away without a word."""
    if request.transport is not None:
        request.transport.abort()
    return web.Response(status=500)


async def start_server(plant: ProviderServer, *, host: str = "127.0.0.1", port: int = 0) -> tuple[web.AppRunner, str]:
    """Serve; returns what to clean up at the end, and the URL."""
    runner = web.AppRunner(plant.application(), handler_cancellation=True, access_log=None, shutdown_timeout=0.5)
    await runner.setup()
    await web.TCPSite(runner, host, port, backlog=1024).start()
    address = runner.addresses[0]
    return runner, f"http://{address[0]}:{address[1]}"
