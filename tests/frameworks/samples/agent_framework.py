"""Microsoft Agent Framework: an agent with a tool, on chat completions, and a workflow of one."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

from agent_framework import (
    Agent,
    BaseChatClient,
    ChatMiddlewareLayer,
    ChatResponse,
    Content,
    FunctionInvocationLayer,
    Message,
    UsageDetails,
    Workflow,
    WorkflowBuilder,
)
from agent_framework.observability import ChatTelemetryLayer
from agent_framework.openai import OpenAIChatCompletionClient
from openai import AsyncOpenAI
from tests.frameworks.sample import MODEL, Connect, Facts, InProcess, Sample, Tool


def make_agent(connect: Connect, tool: Tool) -> Any:
    return _agent(OpenAIChatCompletionClient(model=MODEL, async_client=connect(AsyncOpenAI)), tool)


def _agent(client: Any, tool: Tool) -> Any:
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


def in_process(tool: Tool) -> InProcess:
    """Return an agent whose model calls the tool twice and then answers, without HTTP."""
    agent = _agent(_Client(), tool)
    return InProcess(arguments={"handler": agent}, ready=lambda: agent.run)


def workflow_in_process(tool: Tool) -> InProcess:
    """Return a workflow of one agent, built for each run, as it runs one thing at a time."""
    agent = _agent(_Client(), tool)

    def build() -> Workflow:
        return WorkflowBuilder(start_executor=agent).build()

    return InProcess(arguments={"factory": build}, ready=lambda: build().run)


class _Client(FunctionInvocationLayer, ChatMiddlewareLayer, ChatTelemetryLayer, BaseChatClient):  # type: ignore[misc]
    """A client whose model answers in process, in the layers of the framework's own clients."""

    _numbers = itertools.count()

    async def _inner_get_response(self, *, messages: Sequence[Message], **_: Any) -> ChatResponse:
        """Return a call of the tool, or the text after two of them."""
        results = sum(content.type == "function_result" for message in messages for content in message.contents)
        content = Content.from_text("The Danube.")
        if results < 2:
            call_id = f"call_{next(self._numbers)}"
            content = Content.from_function_call(call_id=call_id, name="note", arguments='{"text": "n"}')
        usage = UsageDetails(input_token_count=11, output_token_count=7, total_token_count=18)
        return ChatResponse(messages=[Message("assistant", [content])], usage_details=usage)


def _facts(progress: str, threads_left: int = 0) -> Facts:
    return Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=threads_left, progress=progress)


SAMPLES = [
    Sample(name="agent-framework", make=make, facts=_facts("steps"), in_process=in_process),
    Sample(name="agent-framework streamed", make=partial(make, stream=True), facts=_facts("text"), streams=True),
    Sample(
        name="agent-framework workflow",
        make=make_workflow,
        facts=_facts("no"),
        in_process=workflow_in_process,
    ),
]
