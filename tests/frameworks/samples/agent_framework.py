"""Microsoft Agent Framework: an agent with a tool, on chat completions, and a workflow of one."""

from __future__ import annotations

from functools import partial
from typing import Any

from agent_framework import Agent, Workflow, WorkflowBuilder
from agent_framework.openai import OpenAIChatCompletionClient
from openai import AsyncOpenAI
from tests.frameworks.sample import MODEL, Connect, Facts, Sample, Tool


def make_agent(connect: Connect, tool: Tool) -> Any:
    client = OpenAIChatCompletionClient(model=MODEL, async_client=connect(AsyncOpenAI))
    return Agent(client=client, name="sample", instructions="Take notes.", tools=[tool])


def make(connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    return {"handler": make_agent(connect, tool), "config": config or None}


def make_workflow(connect: Connect, tool: Tool) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    agent = make_agent(connect, tool)

    def build() -> Workflow:
        return WorkflowBuilder(start_executor=agent).build()

    return {"factory": build}


def _facts(progress: str, threads_left: int = 0) -> Facts:
    return Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=threads_left, progress=progress)


SAMPLES = [
    Sample(name="agent-framework", make=make, facts=_facts("steps")),
    Sample(name="agent-framework streamed", make=partial(make, stream=True), facts=_facts("text"), streams=True),
    Sample(name="agent-framework workflow", make=make_workflow, facts=_facts("no", threads_left=0)),
]
