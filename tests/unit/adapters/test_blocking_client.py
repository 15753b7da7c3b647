"""A blocking client of an SDK whose requests are made in the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx2
import pytest
from openai import AsyncOpenAI, OpenAI

from forebay import Overloaded, Quota, Upstream
from forebay.adapters.agent_thread import AgentThread
from forebay.adapters.blocking_client import in_loop

ANSWER = {
    "id": "1",
    "object": "chat.completion",
    "created": 1,
    "model": "gpt-4o",
    "choices": [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "The Danube."}}],
    "usage": {"prompt_tokens": 12, "completion_tokens": 4, "total_tokens": 16},
}


class Body(httpx2.AsyncByteStream):
    """A body whose second part never comes."""

    def __init__(self) -> None:
        self.closed = False

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b'data: {"choices": [], "id": "1", "created": 1, "model": "m", "object": "chat.completion.chunk"}\n\n'
        await asyncio.Event().wait()

    async def aclose(self) -> None:
        await asyncio.sleep(0.1)  # a connection takes a while to close
        self.closed = True


def refuse(_: httpx2.Request) -> httpx2.Response:
    raise AssertionError("the blocking client has sent")


def clients(provider: Callable[[httpx2.Request], Any]) -> tuple[OpenAI, AsyncOpenAI]:
    """Return a blocking client that sends nothing, and an async one whose requests a function answers."""
    blocking = httpx2.Client(transport=httpx2.MockTransport(refuse))
    answering = httpx2.AsyncClient(transport=httpx2.MockTransport(provider))
    return OpenAI(api_key="k", http_client=blocking), AsyncOpenAI(api_key="k", http_client=answering)


def ask(client: OpenAI, **how: Any) -> Any:
    return client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "?"}], **how)


async def test_a_request_is_made_in_the_loop() -> None:
    made_in = list[int]()

    async def answer(_: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(0)
        made_in.append(threading.get_ident())
        return httpx2.Response(200, json=ANSWER)

    thread = AgentThread()
    client = in_loop(*clients(answer), thread)
    said = await thread.run(lambda: ask(client).choices[0].message.content)
    assert said == "The Danube."
    assert made_in == [threading.get_ident()]


async def test_a_stopped_run_stops_in_the_middle_of_a_request() -> None:
    entered, ended = asyncio.Event(), list[str]()

    async def hang(_: httpx2.Request) -> httpx2.Response:
        entered.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.append("call")
        raise AssertionError

    thread = AgentThread()
    client = in_loop(*clients(hang), thread)
    run = asyncio.create_task(thread.run(lambda: ask(client)))
    await entered.wait()
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert ended == ["call"]  # once: the SDK has not retried


async def test_a_stopped_run_closes_the_stream_that_it_reads() -> None:
    body, thread = Body(), AgentThread()
    client = in_loop(*clients(lambda _: httpx2.Response(200, stream=body)), thread)
    read: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def agent() -> None:
        for _ in ask(client, stream=True):
            thread.loop.call_soon_threadsafe(read.set_result, None)

    run = asyncio.create_task(thread.run(agent))
    await read
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    assert body.closed


async def test_a_request_is_metered_once_and_rejected_as_that_of_a_bound_client() -> None:
    upstream = Upstream("key", provider="openai", quotas=[Quota(requests=1, per="day")])
    blocking, answering = clients(lambda _: httpx2.Response(200, json=ANSWER))
    thread = AgentThread()
    client = in_loop(upstream.bind(blocking), upstream.bind(answering), thread)

    def agent() -> None:
        ask(client)
        ask(client)

    with pytest.raises(Overloaded, match="requests per day"):
        await thread.run(agent)
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.input_tokens, account.output_tokens) == (1, 12, 4)


async def test_other_clients_stay_as_they_are() -> None:
    thread = AgentThread()
    blocking, answering = clients(refuse)
    for client, async_client in ((blocking, None), (object(), answering), (blocking, object())):
        assert in_loop(client, async_client, thread) is client


def test_an_async_client_serves_one_event_loop() -> None:
    blocking, answering = clients(refuse)

    async def is_used() -> bool:
        return in_loop(blocking, answering, AgentThread()) is not blocking

    with asyncio.Runner() as first:
        assert first.run(is_used())
        assert first.run(is_used())
    assert not asyncio.run(is_used())


async def test_a_bound_async_client_in_a_loop_of_a_thread_sends_in_that_of_the_run() -> None:
    made_in, home = list[Any](), asyncio.get_running_loop()

    async def answer(request: httpx2.Request) -> httpx2.Response:
        made_in.append(asyncio.get_running_loop())
        if b"stream" in request.content:
            return httpx2.Response(200, headers={"content-type": "text/event-stream"}, content=b"data: [DONE]\n\n")
        return httpx2.Response(200, json=ANSWER)

    upstream = Upstream("key", provider="openai")
    bound = upstream.bind(httpx2.AsyncClient(transport=httpx2.MockTransport(answer), base_url="http://p/v1"))

    async def call(body: dict[str, Any]) -> bytes:
        async with bound.stream("POST", "/chat/completions", json={"model": "m", "messages": [], **body}) as response:
            return b"".join([chunk async for chunk in response.aiter_bytes()])

    def run() -> list[bytes]:
        return [asyncio.run(call(body)) for body in ({}, {"stream": True})]

    plain, streamed = await AgentThread().run(run)
    assert b"The Danube." in plain
    assert b"[DONE]" in streamed
    assert made_in == [home, home]
    (account,) = upstream.statistics().accounts
    assert (account.sent, account.in_flight) == (2, 0)
