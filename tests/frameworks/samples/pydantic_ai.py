"""pydantic-ai: an agent with a tool, on a chat completions model of OpenAI."""

from __future__ import annotations

from functools import partial
from typing import Any

from openai import AsyncOpenAI
from pydantic_ai import Agent
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tests.frameworks.sample import MODEL, Connect, Facts, Sample, Tool


def make(connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=connect(AsyncOpenAI)))
    agent = Agent(model, name="sample", instructions="Take notes.", tools=[tool])
    return {"handler": agent, "config": config or None}


def _facts(progress: str) -> Facts:
    return Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=0, progress=progress)


SAMPLES = [
    Sample(name="pydantic-ai", make=make, facts=_facts("steps")),
    Sample(name="pydantic-ai streamed", make=partial(make, stream=True), facts=_facts("text"), streams=True),
]
