"""The OpenAI Agents SDK: an agent with a tool, on a chat completions model."""

from __future__ import annotations

from functools import partial
from typing import Any

import agents
from openai import AsyncOpenAI
from tests.frameworks.sample import MODEL, Connect, Facts, Sample, Tool

agents.set_tracing_disabled(True)  # it sends each run to OpenAI otherwise


def make(connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    model = agents.OpenAIChatCompletionsModel(MODEL, connect(AsyncOpenAI))
    agent = agents.Agent(name="sample", instructions="Take notes.", model=model, tools=[agents.function_tool(tool)])
    return {"handler": agent, "config": config or None}


FACTS = Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=1, progress="steps")
SAMPLES = [
    Sample(name="openai-agents", make=make, facts=FACTS),
    Sample(
        name="openai-agents streamed",
        make=partial(make, stream=True),
        facts=Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=1, progress="text"),
        streams=True,
    ),
]
