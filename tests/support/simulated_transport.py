"""An httpx transport to a simulated provider: what a bound client meets, in virtual time and without a network."""

from __future__ import annotations

import asyncio
import json
import math
from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from typing import Any, Final

import httpx

from forebay import clock
from forebay.simulation.provider import wire_messages
from forebay.simulation.provider.fault_plan import RefusalReason
from forebay.simulation.provider.provider_config import Dialect
from forebay.simulation.provider.simulated_call import (
    CallCompleted,
    CallCut,
    CallRefused,
    FirstToken,
    SimulatedCall,
    TokensProduced,
)
from forebay.simulation.provider.simulated_provider import CallStream, SimulatedProvider
from forebay.simulation.provider.wire_messages import OpenAIWriter

URL: Final = "https://provider.test/v1/chat/completions"
POISON: Final = "poison"  # a request whose text begins so is answered with a 500
WRONG: Final = "wrong"  # and one whose text begins so with a 400 that asks for retries
_JSON: Final = {"content-type": "application/json"}
_ERROR: Final = b'{"error": {"message": "boom", "type": "server_error", "param": null, "code": null}}'
ERROR_AFTER: Final = 0.5  # seconds


@dataclass(slots=True)
class SentCall:
    """One attempt that reached the provider.

    Attributes:
        at: when it was sent.
        key: the API key.
        model: the model.
        text: of its first message.
        status: of its answer; 0 while there is none, or if it broke off.
        out_of_funds: it was refused because the spend cap of the account is reached.
    """

    at: float
    key: str
    model: str
    text: str
    status: int = 0
    out_of_funds: bool = False


def chat(model: str, text: str, *, key: str = "sk-1", output_tokens: int = 60, **fields: Any) -> httpx.Request:
    """Return a request; `output_tokens` are those of its answer, and the text names the bill that it is put on."""
    headers = {"Authorization": f"Bearer {key}", "x-simulated-output-tokens": str(output_tokens), **_JSON}
    body = {"model": model, "messages": [{"role": "user", "content": text}], **fields}
    return httpx.Request("POST", URL, headers=headers, content=json.dumps(body).encode())


class SimulatedTransport(httpx.AsyncBaseTransport):
    """A transport whose requests a simulated provider answers.

    Args:
        provider: on the running event loop.
        dead: models that answer every call with a 500.
        silent: models that never answer.
        dead_for: seconds that the answers of dead models give as their Retry-After; None: they give none.
        hidden_tokens: of each answer, the first tokens that a stream does not show, as hidden reasoning.
        reports_usage: streams end with their usage, if the request asks for it.

    Attributes:
        sent: all attempts, in their order.
        in_flight: attempts under way.
        peak: the most that ever were.
    """

    def __init__(  # noqa: PLR0913 - each is one habit of a provider
        self,
        provider: SimulatedProvider,
        *,
        dead: Iterable[str] = (),
        silent: Iterable[str] = (),
        dead_for: int | None = None,
        hidden_tokens: int = 0,
        reports_usage: bool = True,
    ) -> None:
        self.provider = provider
        self.sent: list[SentCall] = []
        self.in_flight = 0
        self.peak = 0
        self.hidden_tokens = hidden_tokens
        self._reports_usage = reports_usage
        self._dead = frozenset(dead)
        self._silent = frozenset(silent)
        self._dead_headers = _JSON if dead_for is None else {**_JSON, "retry-after": str(dead_for)}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        """Answer one attempt, unless its caller's read timeout ends it first."""
        body = wire_messages.read_request(await request.aread())
        key = request.headers["authorization"].removeprefix("Bearer ")
        text = str(body.messages[0].content)
        sent = SentCall(clock.now(), key, body.model, text)
        self.sent.append(sent)
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        patience = request.extensions.get("timeout", {}).get("read")
        streaming = False
        try:
            async with asyncio.timeout(patience):
                if body.model in self._silent:
                    await asyncio.sleep(math.inf if patience is None else patience + 1.0)
                if (dead := body.model in self._dead) or text.startswith(POISON):
                    await asyncio.sleep(ERROR_AFTER)
                    sent.status = 500
                    return httpx.Response(500, headers=self._dead_headers if dead else _JSON, content=_ERROR)
                if text.startswith(WRONG):
                    sent.status = 400
                    return httpx.Response(400, headers={**_JSON, "x-should-retry": "true"}, content=_ERROR)
                call = SimulatedCall(
                    model=body.model,
                    input_tokens=body.input_tokens(),
                    output_tokens=int(request.headers["x-simulated-output-tokens"]),
                    max_tokens=body.max_output_tokens,
                    stream=bool(body.stream),
                    key=key,
                    run=text.partition(" ")[0],
                    dialect=Dialect.OPENAI,
                )
                response = await self._answer(call, body, sent)
        except TimeoutError:
            message = "the provider did not answer in time"
            raise httpx.ReadTimeout(message, request=request) from None
        else:
            streaming = call.stream and response.status_code == 200
            return response
        finally:
            if not streaming:
                self.in_flight -= 1

    async def _answer(self, call: SimulatedCall, body: wire_messages.ChatRequest, sent: SentCall) -> httpx.Response:
        outcome = self.provider.try_open(call)
        if isinstance(outcome, CallRefused):
            await asyncio.sleep(self.provider.config.refusal_delay)
            sent.status = outcome.status
            sent.out_of_funds = outcome.reason is RefusalReason.SPEND_CAP
            return httpx.Response(outcome.status, headers=outcome.headers, content=outcome.body)
        include_usage = body.include_usage and self._reports_usage
        writer = OpenAIWriter(outcome.call_id, body.model, int(clock.wall_time()), include_usage=include_usage)
        sent.status = 200
        if call.stream:
            headers = outcome.headers | {"content-type": "text/event-stream"}
            return httpx.Response(200, headers=headers, stream=_Events(self, outcome, call, writer))
        with outcome:
            async for event in outcome:
                if isinstance(event, CallCompleted):
                    usage = event.usage.input_tokens, event.usage.output_tokens
                    content = writer.response(usage, stopped=call.stops)
                    return httpx.Response(200, headers=outcome.headers | _JSON, content=content)
                if isinstance(event, CallCut):
                    break
        sent.status = 0
        message = "the provider closed the connection"
        raise httpx.RemoteProtocolError(message)


class _Events(httpx.AsyncByteStream):
    """The body of a streaming answer."""

    def __init__(
        self, transport: SimulatedTransport, stream: CallStream, call: SimulatedCall, writer: OpenAIWriter
    ) -> None:
        self._transport = transport
        self._stream = stream
        self._call = call
        self._writer = writer
        self._closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        produced, hidden = 0, self._transport.hidden_tokens
        yield self._writer.stream_start(self._call.input_tokens)
        async for event in self._stream:
            match event:
                case FirstToken() | TokensProduced():
                    tokens = event.tokens if isinstance(event, TokensProduced) else 1
                    first, produced = max(produced, hidden), produced + tokens
                    if produced > first:
                        yield self._writer.stream_tokens(first, produced - first)
                case CallCompleted(usage=usage):
                    yield self._writer.stream_end((usage.input_tokens, usage.output_tokens), stopped=self._call.stops)
                case CallCut():
                    message = "the provider closed the connection"
                    raise httpx.ReadError(message)

    async def aclose(self) -> None:
        self._end()

    def __del__(self) -> None:  # as a socket that nobody holds is closed
        self._end()

    def _end(self) -> None:
        if not self._closed:
            self._closed = True
            self._stream.close()
            self._transport.in_flight -= 1
