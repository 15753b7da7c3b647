"""AutoGen: an assistant with a tool, streamed or not, and a team of one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any, Self

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_core import FunctionCall
from autogen_core.models import (
    ChatCompletionClient,
    CreateResult,
    FunctionExecutionResultMessage,
    ModelFamily,
    ModelInfo,
    RequestUsage,
)
from autogen_ext.models.openai import OpenAIChatCompletionClient
from tests.frameworks.sample import Connect, Facts, InProcess, Sample, Tool

MODEL = "gpt-4o-mini-2024-07-18"  # AutoGen warns of a name that stands for another


class ModelClient(OpenAIChatCompletionClient):  # type: ignore[misc]  # without its package it has no type
    """AutoGen's client, made and closed as OpenAI's."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(model=MODEL, **settings)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def assistant(connect: Connect, tool: Tool, *, stream: bool = False) -> Any:
    """Return an agent that calls its tool until its model answers in text."""
    kind: Any = partial(ModelClient, stream_options={"include_usage": True}) if stream else ModelClient
    return _assistant(connect(kind), tool, stream=stream)


def _assistant(client: Any, tool: Tool, *, stream: bool = False) -> Any:
    return AssistantAgent(
        "sample",
        client,
        tools=[tool],
        system_message="Take notes.",
        max_tool_iterations=10,
        model_client_stream=stream,
    )


def make(connect: Connect, tool: Tool, *, stream: bool = False) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    return {"handler": assistant(connect, tool, stream=stream), "config": None}


def make_team(connect: Connect, tool: Tool) -> dict[str, Any]:
    """Return the arguments of `register_worker`, for a team that ends when its member has answered."""
    return {"handler": _team(assistant(connect, tool)), "config": None}


def _team(member: Any) -> Any:
    ends = TextMentionTermination("Danube") | MaxMessageTermination(20)
    return RoundRobinGroupChat([member], termination_condition=ends)


def in_process(tool: Tool) -> InProcess:
    """Return an agent whose model calls the tool twice and then answers, without HTTP; made for each run."""
    client = _Client()
    return InProcess(arguments={"handler": _assistant(client, tool)}, ready=lambda: _runs(_assistant(client, tool)))


def team_in_process(tool: Tool) -> InProcess:
    """Return a team of such an agent, made for each run."""
    client = _Client()
    return InProcess(
        arguments={"handler": _team(_assistant(client, tool))}, ready=lambda: _runs(_team(_assistant(client, tool)))
    )


def _runs(agent: Any) -> Any:
    return lambda text: agent.run(task=text)


class _Client(ChatCompletionClient):  # type: ignore[misc]
    """A client whose model answers in process."""

    _numbers = itertools.count()
    _info = ModelInfo(
        vision=False,
        function_calling=True,
        json_output=False,
        family=ModelFamily.GPT_4O,
        structured_output=False,
        multiple_system_messages=True,
    )

    async def create(self, messages: Sequence[Any], **_: Any) -> CreateResult:
        """Return a call of the tool, or the text after two of them."""
        results = sum(isinstance(each, FunctionExecutionResultMessage) for each in messages)
        reason: Any = "stop"
        content: Any = "The Danube."
        if results < 2:
            call = FunctionCall(id=f"call_{next(self._numbers)}", name="note", arguments='{"text": "n"}')
            reason, content = "function_calls", [call]
        usage = RequestUsage(prompt_tokens=11, completion_tokens=7)
        return CreateResult(finish_reason=reason, content=content, usage=usage, cached=False)

    @property
    def model_info(self) -> Any:
        """What the model can do."""
        return self._info

    @property
    def capabilities(self) -> Any:
        """The same."""
        return self._info

    def _unused(self, *_: Any, **__: Any) -> Any:
        raise NotImplementedError

    create_stream = close = actual_usage = total_usage = count_tokens = remaining_tokens = _unused


def _facts(progress: str) -> Facts:
    return Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=0, progress=progress)


SAMPLES = [
    Sample(name="autogen", make=make, facts=_facts("steps"), in_process=in_process),
    Sample(name="autogen streamed", make=partial(make, stream=True), facts=_facts("text"), streams=True),
    Sample(name="autogen team", make=make_team, facts=_facts("steps"), in_process=team_in_process),
]
