"""Streams of real SDKs that their readers leave by `break` and drop: their permits come back while calls wait."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import Iterator
from typing import Any

import anthropic
import openai
import pytest
from tests.unit.upstream.httpx_binding.wire import REQUEST, Reply, Script, words

from forebay import Overloaded, Upstream
from forebay.testing import now, virtual

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
    for _ in range(40):
        await leave_openai(bound)
    assert now() < 40.0
    assert len(script.requests) == 40


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
async def test_a_stream_that_is_kept_and_not_read_rejects_the_calls_that_wait_for_it() -> None:
    llm = Upstream("llm", provider="openai", max_concurrent=1, max_wait=10.0)
    script = script_of(openai, *words("The ", "Danube."))
    client = openai.AsyncOpenAI(api_key="sk-1", base_url="https://provider.test/v1", http_client=script.client())
    bound = llm.bind(client)
    kept = await bound.chat.completions.create(**REQUEST, stream=True)  # type: ignore[call-overload]
    await anext(aiter(kept))
    began = now()
    with pytest.raises(Overloaded, match="nobody reads 1 streaming answers"):
        await bound.chat.completions.create(**REQUEST)  # type: ignore[call-overload]
    assert now() - began == pytest.approx(15.0, abs=0.01)
    await kept.close()
    await asyncio.sleep(0)
