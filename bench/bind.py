"""What bind adds to a call, beside the bare SDK over a transport that answers at once."""

from __future__ import annotations

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import openai

from forebay.upstream import Upstream

CALLS = 50  # in a round: a twentieth of a second, so that what else the machine does falls on both sides alike
WARM_UP = 10  # calls before them: the interpreter adapts its code to the client that is called
ROUNDS = 41
QUESTION: Any = [{"role": "user", "content": "Which rivers flow into the Black Sea? " * 20}]
CHAT = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "The Danube, for one. " * 20}}
    ],
    "usage": {"prompt_tokens": 160, "completion_tokens": 100, "total_tokens": 260},
}
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku-4-5",
    "content": [{"type": "text", "text": "The Danube, for one. " * 20}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 160, "output_tokens": 100},
}
LIMITS = {
    "x-request-id": "req_1",
    "x-ratelimit-limit-requests": "10000000",
    "x-ratelimit-remaining-requests": "9999999",
    "x-ratelimit-reset-requests": "6ms",
    "x-ratelimit-limit-tokens": "2000000000",
    "x-ratelimit-remaining-tokens": "1999999000",
    "x-ratelimit-reset-tokens": "9ms",
}


def answering(answer: Any) -> httpx2.MockTransport:
    """A provider without a network."""
    body = httpx2.Response(200, json=answer).content
    headers = {"content-type": "application/json", **LIMITS}
    return httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers, stream=httpx2.ByteStream(body)))


def asynchronous(
    answer: Any, make: Callable[[Any], Any], call: Callable[[Any], Any], upstream: Upstream | None
) -> float:
    """Processor seconds of a call on an event loop."""

    async def calls() -> float:
        client = make(httpx2.AsyncClient(transport=answering(answer)))
        if upstream is not None:
            client = upstream.bind(client)
        for _ in range(WARM_UP):
            await call(client)
        began = time.process_time()
        for _ in range(CALLS):
            await call(client)
        return (time.process_time() - began) / CALLS

    return asyncio.run(calls())


def blocking(answer: Any, make: Callable[[Any], Any], call: Callable[[Any], Any], upstream: Upstream | None) -> float:
    """Processor seconds of a call in a plain thread."""
    client = make(httpx2.Client(transport=answering(answer)))
    if upstream is not None:
        client = upstream.bind(client)
    for _ in range(WARM_UP):
        call(client)
    began = time.process_time()
    for _ in range(CALLS):
        call(client)
    return (time.process_time() - began) / CALLS


def ask(client: Any) -> Any:
    """A chat completion."""
    return client.chat.completions.create(model="gpt-4o", messages=QUESTION, max_tokens=200)


def message(client: Any) -> Any:
    """A message."""
    return client.messages.create(model="claude-haiku-4-5", messages=QUESTION, max_tokens=200)


WAYS: dict[str, tuple[Any, ...]] = {
    "openai_async": (asynchronous, CHAT, lambda http: openai.AsyncOpenAI(api_key="k", http_client=http), ask),
    "openai": (blocking, CHAT, lambda http: openai.OpenAI(api_key="k", http_client=http), ask),
    "anthropic_async": (
        asynchronous,
        MESSAGE,
        lambda http: anthropic.AsyncAnthropic(api_key="k", http_client=http),
        message,
    ),
    "anthropic": (blocking, MESSAGE, lambda http: anthropic.Anthropic(api_key="k", http_client=http), message),
}


def run() -> dict[str, float]:
    """Interleaved rounds: microseconds of a bare call, and what bind adds to it.

    The median of what a round with bind took longer than the one without it just before; and the lower quartile, which
    is nearer to what a quiet machine would tell.
    """
    figures: dict[str, float] = {}
    for name, (way, answer, make, call) in WAYS.items():
        upstream = Upstream("key", provider=name.split("_", maxsplit=1)[0], max_wait=600.0)
        bare: list[float] = []
        added: list[float] = []
        for _ in range(ROUNDS):
            alone = way(answer, make, call, None)
            bare.append(1e6 * alone)
            added.append(1e6 * (way(answer, make, call, upstream) - alone))
        figures[f"{name}_bare_us"] = statistics.median(bare)
        figures[f"{name}_added_us"] = statistics.median(added)
        figures[f"{name}_added_low_us"] = statistics.quantiles(added, n=4)[0]
    return figures
