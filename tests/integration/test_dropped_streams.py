"""Streams of real SDKs that their readers leave by `break` and drop: their permits come back while calls wait."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import openai
import pytest
from tests.unit.upstream.httpx_binding.wire import REQUEST, URL, Reply, Script, words

from forebay import Upstream
from forebay.testing import now, virtual
from forebay.upstream.accounts import open_answers

pytestmark = pytest.mark.blocks  # a collection runs the finalizers of whatever an SDK has left
MESSAGE = b'data: {"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "The"}}\n\n'
EVENTS = [b"event: content_block_delta\n" + MESSAGE] * 3


def script_of(sdk: Any, *pieces: bytes) -> Script:
    """Return a provider for clients of an SDK, in the HTTP library that it uses."""
    base = sdk._base_client
    return Script(getattr(base, "httpx2", None) or base.httpx, Reply.stream(*pieces))


@pytest.fixture(autouse=True)
def no_automatic_collection() -> Iterator[None]:
    """Collect garbage only where the test, or Forebay, asks for it: otherwise it depends on all that runs before."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


async def leave_openai(client: Any) -> None:
    async for _ in await client.chat.completions.create(**REQUEST, stream=True):
        break


async def leave_anthropic(client: Any) -> None:
    async for _ in await client.messages.create(**REQUEST, stream=True):
        break


@virtual
async def test_a_stream_of_openai_that_is_left_by_break_returns_its_permit() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=2)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.AsyncOpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.client())
    bound = llm.bind(client)
    for _ in range(12):
        await leave_openai(bound)
    assert now() < 20.0
    assert len(script.requests) == 12


@virtual
async def test_a_stream_of_anthropic_that_is_left_by_break_returns_its_permit() -> None:
    llm = Upstream("llm", provider="anthropic", max_concurrent=2)
    script = script_of(anthropic, *EVENTS)
    client = anthropic.AsyncAnthropic(api_key="sk-1", base_url="https://provider.test", http_client=script.client())
    bound = llm.bind(client)
    for _ in range(6):
        await leave_anthropic(bound)
    assert now() < 10.0
    assert len(script.requests) == 6


def test_a_stream_that_is_left_by_break_in_a_plain_thread_returns_its_permit() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=1)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.OpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.blocking_client())
    bound = llm.bind(client)

    def leave() -> None:
        for _ in range(2):
            for _ in bound.chat.completions.create(**REQUEST, stream=True):  # type: ignore[call-overload]
                break

    thread = threading.Thread(target=leave, daemon=True)
    thread.start()
    thread.join(20.0)
    assert not thread.is_alive()
    assert len(script.requests) == 2


@virtual
async def test_a_stream_that_is_kept_and_not_read_is_closed_for_the_calls_that_wait() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=1, max_wait=20.0)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.AsyncOpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.client())
    bound = llm.bind(client)
    kept = await bound.chat.completions.create(**REQUEST, stream=True)  # type: ignore[call-overload]
    parts = aiter(kept)
    await anext(parts)
    began = now()
    await leave_openai(bound)
    assert now() - began == pytest.approx(10.0, abs=1.1)
    assert script.closed >= 1
    with pytest.raises(openai.APIConnectionError) as raised:
        await anext(parts)
    assert "nobody read it while calls waited" in str(raised.value.__cause__)


@virtual
async def test_a_stream_that_is_not_read_is_left_alone_while_no_call_waits() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=2)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.AsyncOpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.client())
    bound = llm.bind(client)
    kept = await bound.chat.completions.create(**REQUEST, stream=True)  # type: ignore[call-overload]
    parts = aiter(kept)
    await anext(parts)
    await asyncio.sleep(3600.0)
    await leave_openai(bound)
    assert (await anext(parts)).choices[0].delta.content == "Danube."


def test_threads_that_leave_each_stream_while_they_hold_the_one_before_go_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(open_answers, "_PATIENCE", 0.5)
    llm = Upstream("llm", provider="openai", max_concurrent=2)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.OpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.blocking_client())
    bound = llm.bind(client)

    def leave() -> None:
        for _ in range(3):
            stream: Any = bound.chat.completions.create(**REQUEST, stream=True)  # type: ignore[call-overload]
            for _ in stream:  # the variable holds it while the next call waits
                break

    threads = [threading.Thread(target=leave, daemon=True) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30.0)
    assert len(script.requests) == 6


@virtual
async def test_a_stream_that_is_dropped_unread_is_closed_before_its_permit_is_released() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=2)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.AsyncOpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.client())
    bound = llm.bind(client)
    for sent in range(12):
        await bound.chat.completions.create(**REQUEST, stream=True)  # type: ignore[call-overload]
        assert script.opened - script.closed <= 2, f"the provider generates more than 2 answers after {sent} calls"


def test_a_stream_that_is_dropped_unread_in_a_plain_thread_is_closed_before_its_permit_is_released() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=1)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.OpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.blocking_client())
    bound = llm.bind(client)
    most: list[int] = []

    def drop() -> None:
        for _ in range(3):
            bound.chat.completions.create(**REQUEST, stream=True)  # type: ignore[call-overload]
            most.append(script.opened - script.closed)

    thread = threading.Thread(target=drop, daemon=True)
    thread.start()
    thread.join(30.0)
    assert most == [1, 1, 1]


@virtual
async def test_an_answer_that_cannot_be_decoded_is_closed_before_its_permit_is_released() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=1)
    reply = Reply.stream(b"this is not gzip", *words("The ", "Danube."))
    reply.headers["content-encoding"] = "gzip"
    script = Script(httpx, reply)
    client = script.client(llm)
    for _ in range(2):
        response = await client.send(client.build_request("POST", URL, json=REQUEST | {"stream": True}), stream=True)
        with pytest.raises(httpx.DecodingError):
            await response.aread()
        assert script.closed == script.opened
