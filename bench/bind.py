"""Time that `bind` adds to a call, compared with the bare SDK over a transport that answers at once."""

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

CALLS = 50  # in a round: a twentieth of a second, so that other load on the machine hits both sides alike
WARM_UP = 10  # calls before a round: the interpreter specializes its code for the client
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


def transport_of(answer: Any) -> httpx2.MockTransport:
    """Return a transport that answers every request at once."""
    body = httpx2.Response(200, json=answer).content
    headers = {"content-type": "application/json", **LIMITS}
    return httpx2.MockTransport(lambda _: httpx2.Response(200, headers=headers, stream=httpx2.ByteStream(body)))


def async_seconds(
    answer: Any, make: Callable[[Any], Any], call: Callable[[Any], Any], upstream: Upstream | None
) -> float:
    """Return the processor seconds of a call on an event loop."""

    async def calls() -> float:
        client = make(httpx2.AsyncClient(transport=transport_of(answer)))
        if upstream is not None:
            client = upstream.bind(client)
        for _ in range(WARM_UP):
            await call(client)
        started = time.process_time()
        for _ in range(CALLS):
            await call(client)
        return (time.process_time() - started) / CALLS

    return asyncio.run(calls())


def sync_seconds(
    answer: Any, make: Callable[[Any], Any], call: Callable[[Any], Any], upstream: Upstream | None
) -> float:
    """Return the processor seconds of a call in a plain thread."""
    client = make(httpx2.Client(transport=transport_of(answer)))
    if upstream is not None:
        client = upstream.bind(client)
    for _ in range(WARM_UP):
        call(client)
    started = time.process_time()
    for _ in range(CALLS):
        call(client)
    return (time.process_time() - started) / CALLS


def create_completion(client: Any) -> Any:
    """Call the chat completions of OpenAI."""
    return client.chat.completions.create(model="gpt-4o", messages=QUESTION, max_tokens=200)


def create_message(client: Any) -> Any:
    """Call the messages of Anthropic."""
    return client.messages.create(model="claude-haiku-4-5", messages=QUESTION, max_tokens=200)


CLIENTS: dict[str, tuple[Any, ...]] = {
    "openai_async": (
        async_seconds,
        CHAT,
        lambda http: openai.AsyncOpenAI(api_key="k", http_client=http),
        create_completion,
    ),
    "openai": (sync_seconds, CHAT, lambda http: openai.OpenAI(api_key="k", http_client=http), create_completion),
    "anthropic_async": (
        async_seconds,
        MESSAGE,
        lambda http: anthropic.AsyncAnthropic(api_key="k", http_client=http),
        create_message,
    ),
    "anthropic": (
        sync_seconds,
        MESSAGE,
        lambda http: anthropic.Anthropic(api_key="k", http_client=http),
        create_message,
    ),
}


def run() -> dict[str, float]:
    """Return the microseconds of a bare call, and those that bind adds, over interleaved rounds.

    Each round with bind is compared with the one without it just before. The median is given, and the lower quartile,
    which is nearer to the value of a quiet machine.
    """
    results: dict[str, float] = {}
    for name, (measure, answer, make, call) in CLIENTS.items():
        upstream = Upstream("key", provider=name.split("_", maxsplit=1)[0], max_wait=600.0)
        bare: list[float] = []
        added: list[float] = []
        for _ in range(ROUNDS):
            alone = measure(answer, make, call, None)
            bare.append(1e6 * alone)
            added.append(1e6 * (measure(answer, make, call, upstream) - alone))
        results[f"{name}_bare_us"] = statistics.median(bare)
        results[f"{name}_added_us"] = statistics.median(added)
        results[f"{name}_added_low_us"] = statistics.quantiles(added, n=4)[0]
    return results
