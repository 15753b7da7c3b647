"""The OpenAI Agents SDK: an agent with a tool, on a chat completions model."""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

import agents
from agents.items import ModelResponse
from agents.usage import Usage
from openai import AsyncOpenAI
from openai.types.responses import ResponseFunctionToolCall, ResponseOutputMessage, ResponseOutputText
from tests.frameworks.sample import MODEL, Connect, Facts, InProcess, Sample, Tool

agents.set_tracing_disabled(True)  # it sends each run to OpenAI otherwise


def make(connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker`."""
    model = agents.OpenAIChatCompletionsModel(MODEL, connect(AsyncOpenAI))
    return {"handler": _agent(model, tool), "config": config or None}


def in_process(tool: Tool) -> InProcess:
    """Return an agent whose model calls the tool twice and then answers, without HTTP."""
    agent = _agent(_Model(), tool)
    return InProcess(arguments={"handler": agent}, ready=lambda: partial(agents.Runner.run, agent))


def _agent(model: Any, tool: Tool) -> Any:
    return agents.Agent(name="sample", instructions="Take notes.", model=model, tools=[agents.function_tool(tool)])


class _Model(agents.Model):  # type: ignore[misc]  # without its package it has no type
    """A model that answers in process."""

    _numbers = itertools.count()

    async def get_response(self, **request: Any) -> Any:
        """Return a call of the tool, or the text after two of them."""
        number = next(self._numbers)
        usage = Usage(requests=1, input_tokens=11, output_tokens=7, total_tokens=18)
        if sum(item.get("type") == "function_call_output" for item in request["input"]) < 2:
            item: Any = ResponseFunctionToolCall(
                type="function_call", call_id=f"call_{number}", name="note", arguments='{"text": "n"}'
            )
        else:
            text = ResponseOutputText(type="output_text", text="The Danube.", annotations=[])
            item = ResponseOutputMessage(
                id=f"m{number}", type="message", role="assistant", status="completed", content=[text]
            )
        return ModelResponse(output=[item], usage=usage, response_id=None)

    def stream_response(self, *_: Any, **__: Any) -> Any:
        """Stream nothing: it is not called."""
        raise NotImplementedError


FACTS = Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=0, progress="steps")
SAMPLES = [
    Sample(name="openai-agents", make=make, facts=FACTS, in_process=in_process),
    Sample(
        name="openai-agents streamed",
        make=partial(make, stream=True),
        facts=Facts(stops_at="at once", calls_if_direct=3, counts_usage=True, threads_left=0, progress="text"),
        streams=True,
    ),
]
