"""AutoGen: an assistant with a tool, streamed or not, and a team of one."""

from __future__ import annotations

from functools import partial
from typing import Any, Self

from autogen_agentchat.agents import AssistantAgent
from autogen_agentchat.conditions import MaxMessageTermination, TextMentionTermination
from autogen_agentchat.teams import RoundRobinGroupChat
from autogen_ext.models.openai import OpenAIChatCompletionClient
from tests.frameworks.sample import Connect, Facts, Sample, Tool

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
    return AssistantAgent(
        "sample",
        connect(kind),
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
    ends = TextMentionTermination("Danube") | MaxMessageTermination(20)
    return {"handler": RoundRobinGroupChat([assistant(connect, tool)], termination_condition=ends), "config": None}


def _facts(progress: str) -> Facts:
    return Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=0, progress=progress)


SAMPLES = [
    Sample(name="autogen", make=make, facts=_facts("steps")),
    Sample(name="autogen streamed", make=partial(make, stream=True), facts=_facts("text"), streams=True),
    Sample(name="autogen team", make=make_team, facts=_facts("steps")),
]
