"""Calls to llmock from PyPI, an independent mock of OpenAI and Anthropic."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from llmock.pytest_plugin import LLMock
from tests.contract.sdks.sdk_harness import Sdk, SdkHarness

OPENAI: Final = [Sdk("openai", awaits=False), Sdk("openai", awaits=True)]
WEATHER: Final[dict[str, Any]] = {"type": "object", "properties": {"city": {"type": "string"}}}


def test_whole_and_streamed_responses_arrive(harness: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.reply("The Danube.", times=2)
    path = harness.open(mock_url)
    response = path.caller.create()
    assert (
        response.choices[0].message.content if harness.sdk.name == "openai" else response.content[0].text
    ) == "The Danube."
    assert harness.sdk.text(path.caller.parts()) == "The Danube."
    assert path.is_idle()
    assert {account.breaker.state(0.0).value for account in path.accounts} == {"closed"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tools_are_called(harness: SdkHarness, mock: LLMock, mock_url: str, stream: bool) -> None:  # noqa: FBT001
    mock.call_tool("weather", {"city": "Paris"})
    path = harness.open(mock_url)
    fields: Any = {"tools": [tool_of(harness.sdk)]}
    response = path.caller.parts(**fields) if stream else path.caller.create(**fields)
    assert tool_called(harness.sdk, response) == ("weather", {"city": "Paris"})
    assert path.is_idle()


def tool_of(sdk: Sdk) -> dict[str, Any]:
    """Return a tool, as it is offered to a model."""
    if sdk.name == "openai":
        return {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    return {"name": "weather", "input_schema": WEATHER}


def tool_called(sdk: Sdk, response: Any) -> tuple[str, Any]:
    """Return the tool that a response, or its parts, calls, with its arguments."""
    if sdk.name == "openai":
        if isinstance(response, list):
            calls = [call for part in response if part.choices for call in part.choices[0].delta.tool_calls or []]
        else:
            calls = response.choices[0].message.tool_calls
        functions = [call.function for call in calls]
        return functions[0].name, json.loads("".join(function.arguments or "" for function in functions))
    if isinstance(response, list):
        starts = [part.content_block for part in response if part.type == "content_block_start"]
        deltas = [
            part.delta.partial_json for part in response if getattr(getattr(part, "delta", None), "partial_json", 0)
        ]
        return next(block.name for block in starts if block.type == "tool_use"), json.loads("".join(deltas))
    block = next(block for block in response.content if block.type == "tool_use")
    return block.name, block.input


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
def test_whole_and_streamed_responses_of_the_responses_api_arrive(
    harness: SdkHarness, mock: LLMock, mock_url: str
) -> None:
    mock.reply("The Danube.", times=2)
    path = harness.open(mock_url)
    fields: dict[str, Any] = {"model": "gpt-4o", "input": "Rivers?"}
    response = path.caller.do(lambda client: client.responses.create(**fields))
    assert response.output_text == "The Danube."
    parts = path.caller.read(lambda client: client.responses.create(stream=True, **fields))
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == "The Danube."
    assert parts[-1].type == "response.completed"
    assert path.is_idle()


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
def test_embeddings_arrive(harness: SdkHarness, mock: LLMock, mock_url: str) -> None:
    path, bare = harness.open(mock_url), harness.bare(mock_url)
    fields: dict[str, Any] = {"model": "text-embedding-3-small", "input": ["Rivers?", "Lakes?"]}
    responses = [caller.do(lambda client: client.embeddings.create(**fields)) for caller in (path.caller, bare)]
    vectors = [[thing.embedding for thing in response.data] for response in responses]
    assert vectors[0] == vectors[1]
    assert len(vectors[0]) == len(mock.requests) == 2
    assert responses[0].usage.prompt_tokens > 0
    assert path.is_idle()
