"""CrewAI: an agent with a tool, in a crew of one task, by itself and in a flow, on the LLM of CrewAI for OpenAI."""

from __future__ import annotations

import asyncio
import itertools
import re
from collections.abc import Awaitable, Callable
from contextvars import copy_context
from functools import partial
from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.events.types.llm_events import LLMCallType
from crewai.flow import Flow, start
from crewai.llms.base_llm import BaseLLM, llm_call_context
from crewai.tools import tool as as_tool
from tests.frameworks.sample import MODEL, Connect, Facts, InProcess, Sample, Tool


def make_agent(connect: Connect, tool: Tool) -> Any:
    """Return an agent on a connected LLM."""
    return _agent(connect(partial(LLM, f"openai/{MODEL}")), tool)


def _agent(llm: Any, tool: Tool) -> Any:
    return Agent(role="sample", goal="Take notes", backstory="You know rivers.", llm=llm, tools=[as_tool("note")(tool)])


def make(connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker` for a crew."""
    return {"handler": _crew(make_agent(connect, tool)), "config": config or None}


def _crew(agent: Any) -> Any:
    task = Task(description="{message}", expected_output="The name of a river", agent=agent)
    return Crew(agents=[agent], tasks=[task])


def make_alone(connect: Connect, tool: Tool) -> dict[str, Any]:
    """Return the arguments of `register_worker` for an agent by itself."""
    return {"handler": make_agent(connect, tool), "config": None}


def make_flow(connect: Connect, tool: Tool) -> dict[str, Any]:
    """Return the arguments of `register_worker` for a flow of one method, which asks an agent."""
    return {"factory": _flow_class(connect(partial(LLM, f"openai/{MODEL}")), tool), "config": None}


def _flow_class(llm: Any, tool: Tool) -> Any:
    """Return a class of flows of one method, which asks an agent."""

    class Notes(Flow):  # type: ignore[misc]  # without its package it has no type
        name = "sample"

        @start()  # type: ignore[untyped-decorator]
        def ask(self) -> Any:
            return _agent(llm, tool).kickoff(self.state.get("messages", "nothing"))

    return Notes


def in_process(tool: Tool) -> InProcess:
    """Return a crew whose model calls the tool twice and then answers, without HTTP; each run has a copy."""
    crew = _crew(_agent(_Model(model="sample"), tool))
    return InProcess(
        arguments={"handler": crew}, ready=lambda: _runs(crew.copy().kickoff, lambda text: {"message": text})
    )


def alone_in_process(tool: Tool) -> InProcess:
    """Return such an agent by itself; each run has a copy."""
    agent = _agent(_Model(model="sample"), tool)
    return InProcess(arguments={"handler": agent}, ready=lambda: _runs(agent.copy().kickoff, str))


def flow_in_process(tool: Tool) -> InProcess:
    """Return a flow of such an agent, made for each run."""
    kind = _flow_class(_Model(model="sample"), tool)
    return InProcess(arguments={"factory": kind}, ready=lambda: _runs(kind().kickoff, lambda text: {"messages": text}))


def _runs(kickoff: Any, inputs: Callable[[str], Any]) -> Callable[[str], Awaitable[Any]]:
    """Return what kicks off in a thread, in a copy of the context, as ``kickoff_async`` does."""

    def run(text: str) -> Awaitable[Any]:
        return asyncio.get_running_loop().run_in_executor(None, copy_context().run, kickoff, inputs(text))

    return run


class _Model(BaseLLM):  # type: ignore[misc]
    """An LLM that answers in process, as one that calls tools natively."""

    def call(self, messages: Any, *_: Any, **how: Any) -> Any:
        """Return a call of the tool, or the text after two of them."""
        usage = {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18}
        answer: Any = "The Danube."
        with llm_call_context():
            self._emit_call_started_event(messages, from_agent=how.get("from_agent"), from_task=how.get("from_task"))
            if sum(isinstance(each, dict) and each["role"] == "tool" for each in messages) < 2:
                function = {"name": "note", "arguments": '{"text": "n"}'}
                answer = [{"id": f"call_{next(_numbers)}", "type": "function", "function": function}]
            self._track_token_usage_internal(usage)
            kind = LLMCallType.LLM_CALL if isinstance(answer, str) else LLMCallType.TOOL_CALL
            self._emit_call_completed_event(answer, kind, messages=messages, usage=usage)
        return answer

    def get_input_tokens_count(self, *_: Any, **__: Any) -> int:
        """Return a count."""
        return 11

    def supports_function_calling(self) -> bool:
        """Return True."""
        return True


_numbers = itertools.count()


def asked(prompt: str) -> str:
    """Return what the submitter said, out of a prompt of CrewAI."""
    found = re.search("Current Task: (.*)", prompt)
    return prompt if found is None else found[1]


def _facts(calls_if_direct: int, *, progress: str = "steps", stops_at: str = "at once") -> Facts:
    return Facts(
        stops_at=stops_at, calls_if_direct=calls_if_direct, counts_usage=True, threads_left=0, progress=progress
    )


SAMPLES = [
    Sample(name="crewai", make=make, facts=_facts(9), asked=asked, payloads="inputs", in_process=in_process),
    Sample(
        name="crewai streamed",
        make=partial(make, stream=True),
        facts=_facts(9, progress="text"),
        streams=True,
        asked=asked,
        payloads="inputs",
    ),
    Sample(name="crewai agent", make=make_alone, facts=_facts(3), asked=asked, in_process=alone_in_process),
    Sample(
        name="crewai flow",
        make=make_flow,
        facts=_facts(3, stops_at="next call"),
        asked=asked,
        payloads="any inputs",
        in_process=flow_in_process,
    ),
]
