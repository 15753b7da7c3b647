"""pydantic-ai: an agent with a tool, on a chat completions model of OpenAI."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from openai import AsyncOpenAI
from pydantic_ai import Agent, ModelResponse, RequestUsage, TextPart, ToolCallPart, ToolReturnPart
from pydantic_ai.models.function import FunctionModel
from pydantic_ai.models.openai import OpenAIChatModel
from pydantic_ai.providers.openai import OpenAIProvider
from tests.frameworks.sample import MODEL, Connect, Facts, InProcess, Sample, Tool


def make(connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    model = OpenAIChatModel(MODEL, provider=OpenAIProvider(openai_client=connect(AsyncOpenAI)))
    return {"handler": _agent(model, tool), "config": config or None}


def in_process(tool: Tool) -> InProcess:
    """Return an agent whose model calls the tool twice and then answers, without HTTP."""
    agent = _agent(FunctionModel(_answer), tool)
    return InProcess(arguments={"handler": agent}, ready=lambda: agent.run)


def _agent(model: Any, tool: Tool) -> Any:
    return Agent(model, name="sample", instructions="Take notes.", tools=[tool])


_numbers = itertools.count()


async def _answer(messages: list[Any], _: Any) -> ModelResponse:
    """Return a call of the tool, or the text after two of them."""
    results = sum(isinstance(part, ToolReturnPart) for message in messages for part in message.parts)
    part: Any = TextPart("The Danube.")
    if results < 2:
        part = ToolCallPart("note", '{"text": "n"}', f"call_{next(_numbers)}")
    return ModelResponse([part], usage=RequestUsage(input_tokens=11, output_tokens=7))


def _facts(progress: str) -> Facts:
    return Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=0, progress=progress)


SAMPLES = [
    Sample(name="pydantic-ai", make=make, facts=_facts("steps"), in_process=in_process),
    Sample(name="pydantic-ai streamed", make=partial(make, stream=True), facts=_facts("text"), streams=True),
]
