"""Requests of the real SDKs are read, and their streams work without the usage chunk."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from tests.unit.upstream.providers import streams

from forebay.upstream.providers import Endpoint, ProviderRequest, UsageFilter, profile_for

SAY: list[Any] = [{"role": "user", "content": "Tell me of rivers. " * 50}]
TOOLS: list[Any] = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]


class Recorder:
    """A transport that reads each request by a provider's profile and answers with an empty response."""

    def __init__(self, provider: str) -> None:
        self._profile = profile_for(provider)
        self.request: ProviderRequest | None = None
        self.client = httpx2.Client(transport=httpx2.MockTransport(self._answer))

    def _answer(self, sent: httpx2.Request) -> httpx2.Response:
        path = sent.url.raw_path.decode()
        self.request = self._profile.read_request(sent.method, path, sent.headers, sent.content)
        return httpx2.Response(400, json={"error": {"message": "enough"}})

    def of(self, call: Callable[[], object]) -> ProviderRequest:
        with pytest.raises((openai.BadRequestError, anthropic.BadRequestError)):
            call()
        assert self.request is not None
        return self.request


def test_openai() -> None:
    recorder = Recorder("openai")
    client = openai.OpenAI(api_key="sk-x", http_client=recorder.client, max_retries=0)
    chat = recorder.of(
        lambda: client.chat.completions.create(
            model="gpt-4o", messages=SAY, stream=True, max_completion_tokens=40, tools=TOOLS
        )
    )
    assert (chat.endpoint, chat.model, chat.stream, chat.max_output_tokens) == (Endpoint.CHAT, "gpt-4o", True, 40)
    assert 240 < chat.input_tokens < 300
    assert not chat.websocket
    assert not chat.signed
    answer = recorder.of(lambda: client.responses.create(model="gpt-5", input="Rivers. " * 100, max_output_tokens=9))
    assert (answer.endpoint, answer.model, answer.max_output_tokens) == (Endpoint.RESPONSES, "gpt-5", 9)
    assert 200 <= answer.input_tokens < 210
    embedding = recorder.of(lambda: client.embeddings.create(model="e", input=["one river", "two rivers"]))
    assert (embedding.endpoint, embedding.model) == (Endpoint.EMBEDDINGS, "e")
    assert 5 <= embedding.input_tokens < 10
    assert recorder.of(client.models.list).endpoint is Endpoint.MODELS


def test_azure() -> None:
    recorder = Recorder("azure")
    client = openai.AzureOpenAI(
        azure_endpoint="https://x.openai.azure.com",
        api_version="2024-10-21",
        api_key="k",
        http_client=recorder.client,
        max_retries=0,
    )
    chat = recorder.of(lambda: client.chat.completions.create(model="mine", messages=SAY))
    assert (chat.endpoint, chat.model, chat.api_version) == (Endpoint.CHAT, "mine", "2024-10-21")


def test_anthropic() -> None:
    recorder = Recorder("anthropic")
    client = anthropic.Anthropic(api_key="sk-x", http_client=recorder.client, max_retries=0)
    message = recorder.of(
        lambda: client.messages.create(model="claude-sonnet-5", max_tokens=30, messages=SAY, system="Be brief.")
    )
    assert (message.endpoint, message.model, message.max_output_tokens) == (Endpoint.MESSAGES, "claude-sonnet-5", 30)
    assert 270 < message.input_tokens < 310
    beta = recorder.of(lambda: client.beta.messages.create(model="claude-sonnet-5", max_tokens=30, messages=SAY))
    assert beta.endpoint is Endpoint.MESSAGES
    counted = recorder.of(lambda: client.messages.count_tokens(model="claude-sonnet-5", messages=SAY))
    assert counted.endpoint is Endpoint.COUNT_TOKENS


def test_the_sdk_reads_a_filtered_stream_like_a_plain_one() -> None:
    def chunks(data: bytes) -> list[Any]:
        transport = httpx2.MockTransport(
            lambda _: httpx2.Response(200, content=data, headers={"content-type": "text/event-stream"})
        )
        with openai.OpenAI(api_key="sk-x", http_client=httpx2.Client(transport=transport)) as client:
            stream = client.chat.completions.create(model="m", messages=SAY, stream=True)
            return [json.loads(chunk.model_dump_json(exclude_none=True)) for chunk in stream]

    usage_filter = UsageFilter()
    passed = usage_filter.feed(streams.CHAT_WITH_USAGE) + usage_filter.end()
    assert chunks(passed) == chunks(streams.CHAT)
    assert len(chunks(streams.CHAT_WITH_USAGE)) == len(chunks(streams.CHAT)) + 1
