"""Fallback with clients of the real SDKs: what the other provider receives, and what the caller gets."""

from __future__ import annotations

import json
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.unit.upstream.httpx_binding.wire import STREAM, Reply, Script

from forebay import Fallback, Overloaded, Quota, Retry, Upstream

MESSAGES: list[Any] = [{"role": "user", "content": "Tell me of rivers."}]
ONCE = [Quota(requests=1, per="day")]
MESSAGE = {
    "id": "msg_1",
    "type": "message",
    "role": "assistant",
    "model": "claude-haiku",
    "content": [{"type": "text", "text": "The Danube."}],
    "stop_reason": "end_turn",
    "stop_sequence": None,
    "usage": {"input_tokens": 3, "output_tokens": 2},
}


def script(*replies: Reply) -> Script:
    return Script(httpx2, *replies)


def requests_of(scripted: Script) -> list[tuple[str, str | None, str | None]]:
    """Return the URL, the key and the model of each request."""
    keys = ("authorization", "api-key", "x-api-key")
    return [
        (
            str(request.url),
            next((request.headers[name] for name in keys if name in request.headers), None),
            json.loads(request.content).get("model"),
        )
        for request in scripted.requests
    ]


async def test_a_stream_of_the_openai_sdk_falls_back_to_a_local_server() -> None:
    spare = Upstream("spare", provider="vllm")
    fallback = Fallback(to=spare, model="llama", base_url="http://spare.test:8000/v1")
    up = Upstream("openai", provider="openai", quotas=ONCE, fallback=fallback)
    scripted = script(Reply(), Reply.stream(*STREAM))
    async with openai.AsyncOpenAI(
        api_key="sk-1", organization="org", http_client=httpx2.AsyncClient(transport=scripted.asynchronous())
    ) as bare:
        client = up.bind(bare)
        whole = await client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        stream = await client.chat.completions.create(model="gpt-4o", messages=MESSAGES, stream=True)
        chunks = [chunk async for chunk in stream]
    assert whole.choices[0].message.content == "The Danube."
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The Danube."
    assert requests_of(scripted) == [
        ("https://api.openai.com/v1/chat/completions", "Bearer sk-1", "gpt-4o"),
        ("http://spare.test:8000/v1/chat/completions", None, "llama"),
    ]
    assert "openai-organization" not in scripted.requests[1].headers


def test_with_the_azure_client_the_path_names_the_other_deployment() -> None:
    up = Upstream(
        "azure", provider="azure", models={"gpt-4o": ONCE, "mini": ()}, fallback=Fallback(to="mini", models="gpt-4o")
    )
    scripted = script()
    with openai.AzureOpenAI(
        api_key="az-1",
        azure_endpoint="https://x.test",
        api_version="2024-10-21",
        http_client=httpx2.Client(transport=scripted.blocking()),
    ) as bare:
        client = up.bind(bare)
        for _ in range(2):
            client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    below = "https://x.test/openai/deployments"
    assert requests_of(scripted) == [
        (f"{below}/gpt-4o/chat/completions?api-version=2024-10-21", "az-1", "gpt-4o"),
        (f"{below}/mini/chat/completions?api-version=2024-10-21", "az-1", "mini"),
    ]


def test_a_call_of_the_anthropic_sdk_falls_back_with_the_other_key() -> None:
    spare = Upstream("spare", provider="anthropic")
    fallback = Fallback(to=spare, model="claude-haiku", api_key="sk-2")
    up = Upstream("anthropic", provider="anthropic", quotas=ONCE, fallback=fallback)
    scripted = script(Reply(body=[json.dumps(MESSAGE).encode()]))
    with anthropic.Anthropic(api_key="sk-1", http_client=httpx2.Client(transport=scripted.blocking())) as bare:
        client = up.bind(bare)
        for _ in range(2):
            client.messages.create(model="claude-opus", messages=MESSAGES, max_tokens=10)
    url = "https://api.anthropic.com/v1/messages"
    assert requests_of(scripted) == [(url, "Bearer sk-1", "claude-opus"), (url, "Bearer sk-2", "claude-haiku")]


def test_if_the_fallback_fails_too_the_sdk_gets_the_rejection_or_error_of_the_first() -> None:
    spare = Upstream("spare", provider="openai")
    fallback = Fallback(to=spare, base_url="https://spare.test/v1", api_key="sk-2")
    up = Upstream("openai", provider="openai", quotas=ONCE, fallback=fallback, retry=Retry(max_attempts=1))
    scripted = script(Reply.error(500, "mine"), Reply.error(404, "theirs"))
    with openai.OpenAI(api_key="sk-1", http_client=httpx2.Client(transport=scripted.blocking())) as bare:
        client = up.bind(bare)
        with pytest.raises(openai.InternalServerError, match="mine"):
            client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
        with pytest.raises(openai.OpenAIError) as rejection:
            client.chat.completions.create(model="gpt-4o", messages=MESSAGES)
    assert isinstance(rejection.value, Overloaded)
    assert "spare: its provider answered 404" in rejection.value.reason
    assert len(scripted.requests) == 3
