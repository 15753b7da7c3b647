"""llmock from PyPI, a provider that nobody here wrote, in the shapes of OpenAI and of Anthropic."""

from __future__ import annotations

import json
from typing import Any, Final

import pytest
from llmock.pytest_plugin import LLMock
from tests.contract.sdks.sdk_harness import Sdk, SdkHarness

OPENAI: Final = [Sdk("openai", awaits=False), Sdk("openai", awaits=True)]
WEATHER: Final[dict[str, Any]] = {"type": "object", "properties": {"city": {"type": "string"}}}


def test_answers_come_whole_and_in_pieces(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.reply("The Danube.", times=2)
    way = house.open(mock_url)
    answer = way.caller.create()
    assert (
        answer.choices[0].message.content if house.sdk.name == "openai" else answer.content[0].text
    ) == "The Danube."
    assert house.sdk.text(way.caller.parts()) == "The Danube."
    assert way.is_idle()
    assert {account.breaker.state(0.0).value for account in way.accounts} == {"closed"}


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "stream"])
def test_tools_are_called(house: SdkHarness, mock: LLMock, mock_url: str, stream: bool) -> None:  # noqa: FBT001
    mock.call_tool("weather", {"city": "Paris"})
    way = house.open(mock_url)
    ask: Any = {"tools": [tool_of(house.sdk)]}
    answer = way.caller.parts(**ask) if stream else way.caller.create(**ask)
    assert tool_called(house.sdk, answer) == ("weather", {"city": "Paris"})
    assert way.is_idle()


def tool_of(sdk: Sdk) -> dict[str, Any]:
    """A tool, as it is offered to a model."""
    if sdk.name == "openai":
        return {"type": "function", "function": {"name": "weather", "parameters": WEATHER}}
    return {"name": "weather", "input_schema": WEATHER}


def tool_called(sdk: Sdk, answer: Any) -> tuple[str, Any]:
    """The tool that an answer, or the parts of one, calls, and with what."""
    if sdk.name == "openai":
        if isinstance(answer, list):
            calls = [call for part in answer if part.choices for call in part.choices[0].delta.tool_calls or []]
        else:
            calls = answer.choices[0].message.tool_calls
        told = [call.function for call in calls]
        return told[0].name, json.loads("".join(function.arguments or "" for function in told))
    if isinstance(answer, list):
        starts = [part.content_block for part in answer if part.type == "content_block_start"]
        deltas = [
            part.delta.partial_json for part in answer if getattr(getattr(part, "delta", None), "partial_json", 0)
        ]
        return next(block.name for block in starts if block.type == "tool_use"), json.loads("".join(deltas))
    block = next(block for block in answer.content if block.type == "tool_use")
    return block.name, block.input


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
def test_responses_come_whole_and_in_pieces(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    mock.reply("The Danube.", times=2)
    way = house.open(mock_url)
    ask: dict[str, Any] = {"model": "gpt-4o", "input": "Rivers?"}
    answer = way.caller.do(lambda client: client.responses.create(**ask))
    assert answer.output_text == "The Danube."
    parts = way.caller.read(lambda client: client.responses.create(stream=True, **ask))
    assert "".join(part.delta for part in parts if part.type == "response.output_text.delta") == "The Danube."
    assert parts[-1].type == "response.completed"
    assert way.is_idle()


@pytest.mark.parametrize("sdk", OPENAI, ids=str)
def test_embeddings_come(house: SdkHarness, mock: LLMock, mock_url: str) -> None:
    way, bare = house.open(mock_url), house.bare(mock_url)
    ask: dict[str, Any] = {"model": "text-embedding-3-small", "input": ["Rivers?", "Lakes?"]}
    answers = [caller.do(lambda client: client.embeddings.create(**ask)) for caller in (way.caller, bare)]
    vectors = [[thing.embedding for thing in answer.data] for answer in answers]
    assert vectors[0] == vectors[1]
    assert len(vectors[0]) == len(mock.requests) == 2
    assert answers[0].usage.prompt_tokens > 0
    assert way.is_idle()
