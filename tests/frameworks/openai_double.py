"""A double of OpenAI's chat completions and responses over HTTP: its model calls a tool so often, then answers in text.

It serves in a thread with an event loop of its own, so clients of every kind can call it. A test decides when calls are
answered (`hold`, `release`), and which are refused (`refuse`), and reads the `requests`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from aiohttp import web

T = TypeVar("T")

INPUT_TOKENS, OUTPUT_TOKENS = 11, 7  # that each call reports
ANSWER = "The Danube."
_PATIENCE = 20.0  # seconds after which a test fails that waits


@dataclass(slots=True)
class Request:
    """A request that has arrived.

    Attributes:
        headers: by lower-case name.
        body: its JSON.
        status: of the answer; None while it has none; 499 if the client hung up first.
    """

    headers: dict[str, str]
    body: dict[str, Any]
    status: int | None = None

    @property
    def text(self) -> str:
        """The first message of the user."""
        return next(str(each["content"]) for each in self.body["messages"] if each["role"] == "user")


class TokenBucket:
    """A rate limit: a bucket that is full at first, and filled again in a period of seconds."""

    def __init__(self, size: int, period: float, *, tells: bool) -> None:
        self._tells = tells
        self._size, self._left, self._rate = size, float(size), size / period
        self._at: float | None = None

    def take(self, now: float) -> float:
        """Take a token, and return 0; or return the seconds until there is one."""
        since = 0.0 if self._at is None else now - self._at
        self._left, self._at = min(self._size, self._left + since * self._rate), now
        if self._left < 1:
            return (1 - self._left) / self._rate
        self._left -= 1
        return 0.0

    def headers(self) -> dict[str, str]:
        """Return OpenAI's headers about it; none, if the provider does not tell."""
        if not self._tells:
            return {}
        return {
            "x-ratelimit-limit-requests": str(self._size),
            "x-ratelimit-remaining-requests": str(int(self._left)),
            "x-ratelimit-reset-requests": f"{(self._size - self._left) / self._rate:.3f}s",
        }


class OpenAIDouble:
    """The double.

    Attributes:
        url: the base URL for clients.
        calls: how many calls an agent makes in one run, the last one answered in text.
        requests: that have arrived, in their order.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.url = ""
        self.calls = 3
        self.requests: list[Request] = []
        self._loop = loop
        self._refusals: list[tuple[int, dict[str, str]]] = []
        self._rate: TokenBucket | None = None
        self._changed = threading.Condition()
        self._go = asyncio.Event()
        self._go.set()

    # --- for tests ---

    def hold(self) -> None:
        """Answer no call until `release`."""
        self._loop.call_soon_threadsafe(self._go.clear)

    def release(self) -> None:
        """Answer the calls that are held, and further ones at once."""
        self._loop.call_soon_threadsafe(self._go.set)

    def refuse(self, status: int, times: int = 1000, **headers: str) -> None:
        """Answer the next calls with an error."""
        self._refusals += [(status, {name.replace("_", "-"): value for name, value in headers.items()})] * times

    def limit(self, requests: int, period: float, *, tells: bool = True) -> None:
        """Accept so many requests in a period of seconds, and refuse the others with 429.

        Args:
            requests: in a period, and at once.
            period: in seconds.
            tells: whether answers have OpenAI's headers about the limit.
        """
        self._rate = TokenBucket(requests, period, tells=tells)

    async def until(self, holds: Callable[[OpenAIDouble], bool]) -> None:
        """Wait until something holds of the requests."""
        await asyncio.get_running_loop().run_in_executor(None, self._wait, holds)

    async def until_requests(self, count: int) -> None:
        """Wait until so many requests have arrived."""
        await self.until(lambda double: len(double.requests) >= count)

    def _wait(self, holds: Callable[[OpenAIDouble], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(lambda: holds(self), _PATIENCE), [each.status for each in self.requests]

    @property
    def answered(self) -> int:
        """The requests that were answered with 200."""
        return sum(each.status == 200 for each in self.requests)

    @property
    def tokens(self) -> tuple[int, int]:
        """The input and output tokens of the answered requests."""
        return INPUT_TOKENS * self.answered, OUTPUT_TOKENS * self.answered

    # --- the server ---

    async def serve(self, request: web.Request) -> web.StreamResponse:
        """Answer one request."""
        headers = {name.lower(): value for name, value in request.headers.items()}
        arrived = Request(headers, await request.json())
        with self._changed:
            self.requests.append(arrived)
            self._changed.notify_all()
        status = 499
        try:
            await self._go.wait()
            if self._refusals:
                status, extra = self._refusals.pop(0)
                error = {"error": {"message": "refused", "type": "requests", "code": "refused"}}
                return web.json_response(error, status=status, headers=extra)
            if self._rate is not None and (wait := self._rate.take(self._loop.time())):
                status = 429
                error = {"error": {"message": "Rate limit reached", "type": "requests", "code": "rate_limit_exceeded"}}
                headers = {**self._rate.headers(), "retry-after-ms": str(math.ceil(wait * 1000))}
                return web.json_response(error, status=status, headers=headers)
            is_chat = request.path.endswith("/chat/completions")
            response = await self._answer(request, arrived.body) if is_chat else self._respond(arrived.body)
            status = 200
            return response
        finally:
            with self._changed:
                arrived.status = status
                self._changed.notify_all()

    async def _answer(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        whole = completion(body, calls=self.calls)
        choice, usage = whole["choices"][0], whole["usage"]
        message, reason = choice["message"], choice["finish_reason"]
        if not body.get("stream"):
            told = {} if self._rate is None else self._rate.headers()
            return web.json_response(whole, headers=told)
        shape = {name: whole[name] for name in ("id", "created", "model")}
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)
        for chunk in _chunks(message, reason):
            await _send(response, shape | {"object": "chat.completion.chunk", "choices": [chunk]})
        if (body.get("stream_options") or {}).get("include_usage"):
            await _send(response, shape | {"object": "chat.completion.chunk", "choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response

    def _respond(self, body: dict[str, Any]) -> web.Response:
        """Answer a request of the Responses API, whole; its id tells how many tools have answered before it."""
        items = [item for item in body["input"] if isinstance(item, dict)]
        done = int((body.get("previous_response_id") or "resp_0").partition("_")[2])
        done += sum(item.get("type") == "function_call_output" for item in items)
        tools = body.get("tools") or []
        item: dict[str, Any] = {"status": "completed"}
        if tools and done < self.calls - 1:
            item |= {"type": "function_call", "id": f"fc_{done}", "call_id": f"call_{done}", "name": tools[0]["name"]}
            item["arguments"] = json.dumps({"text": f"note {done}"})
        else:
            content = [{"type": "output_text", "text": ANSWER, "annotations": []}]
            item |= {"type": "message", "id": f"msg_{done}", "role": "assistant", "content": content}
        usage: dict[str, Any] = {"input_tokens": INPUT_TOKENS, "output_tokens": OUTPUT_TOKENS}
        usage |= {"total_tokens": INPUT_TOKENS + OUTPUT_TOKENS, "input_tokens_details": {"cached_tokens": 0}}
        usage |= {"output_tokens_details": {"reasoning_tokens": 0}}
        whole = {"id": f"resp_{done}", "object": "response", "created_at": 1, "status": "completed"}
        whole |= {"model": body["model"], "output": [item], "usage": usage, "tools": [], "tool_choice": "auto"}
        return web.json_response(whole | {"parallel_tool_calls": True})


def completion(request: dict[str, Any], *, calls: int) -> dict[str, Any]:
    """Return the answer to a request of an agent that makes so many calls, with a call of its tool in all but one."""
    done = sum(message["role"] == "tool" for message in request["messages"])
    tools = request.get("tools") or []
    if tools and done < calls - 1:
        parameters = tools[0]["function"].get("parameters", {}).get("properties") or ["text"]
        arguments = json.dumps({next(iter(parameters)): f"note {done}"})
        function = {"name": tools[0]["function"]["name"], "arguments": arguments}
        call = {"id": f"call_{done}", "type": "function", "function": function}
        message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": [call]}
        reason = "tool_calls"
    else:
        message, reason = {"role": "assistant", "content": ANSWER}, "stop"
    usage = {"prompt_tokens": INPUT_TOKENS, "completion_tokens": OUTPUT_TOKENS}
    usage["total_tokens"] = INPUT_TOKENS + OUTPUT_TOKENS
    choice = {"index": 0, "message": message, "finish_reason": reason}
    shape = {"id": "c", "object": "chat.completion", "created": 1, "model": request["model"]}
    return shape | {"choices": [choice], "usage": usage}


def _chunks(message: dict[str, Any], reason: str) -> Iterator[dict[str, Any]]:
    """Yield the choices of the events of a streamed message."""
    deltas: list[dict[str, Any]] = [{"role": "assistant", "content": ""}]
    if message["content"] is None:
        deltas += [{"tool_calls": [{"index": number, **call}]} for number, call in enumerate(message["tool_calls"])]
    else:
        deltas += [{"content": word} for word in message["content"].replace(" ", " |").split("|")]
    for delta in deltas:
        yield {"index": 0, "delta": delta, "finish_reason": None}
    yield {"index": 0, "delta": {}, "finish_reason": reason}


async def _send(response: web.StreamResponse, event: dict[str, Any]) -> None:
    await response.write(b"data: " + json.dumps(event).encode() + b"\n\n")


@contextlib.contextmanager
def openai_double() -> Iterator[OpenAIDouble]:
    """Serve a double on the loopback interface, in a thread, while the block runs."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="openai-double")
    thread.start()

    def run(coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        double, runner = run(_start(loop))
        try:
            yield double
        finally:
            run(runner.cleanup())
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


async def _start(loop: asyncio.AbstractEventLoop) -> tuple[OpenAIDouble, web.AppRunner]:
    double = OpenAIDouble(loop)
    application = web.Application()
    application.router.add_post("/v1/chat/completions", double.serve)
    application.router.add_post("/v1/responses", double.serve)
    runner = web.AppRunner(application, handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    double.url = f"http://127.0.0.1:{runner.addresses[0][1]}/v1"
    return double, runner
