"""CrewAI: an agent with a tool, in a crew of one task, by itself and in a flow, on the LLM of CrewAI for OpenAI."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

from crewai import LLM, Agent, Crew, Task
from crewai.flow import Flow, start
from crewai.tools import tool as as_tool
from tests.frameworks.sample import MODEL, Connect, Facts, Sample, Tool


def make_agent(connect: Connect, tool: Tool) -> Any:
    """Return an agent on a connected LLM."""
    llm = connect(partial(LLM, f"openai/{MODEL}"))
    return Agent(role="sample", goal="Take notes", backstory="You know rivers.", llm=llm, tools=[as_tool("note")(tool)])


def make(connect: Connect, tool: Tool, **config: Any) -> dict[str, Any]:
    """Return the arguments of `register_worker` for a crew."""
    agent = make_agent(connect, tool)
    task = Task(description="{message}", expected_output="The name of a river", agent=agent)
    return {"handler": Crew(agents=[agent], tasks=[task]), "config": config or None}


def make_alone(connect: Connect, tool: Tool) -> dict[str, Any]:
    """Return the arguments of `register_worker` for an agent by itself."""
    return {"handler": make_agent(connect, tool), "config": None}


def make_flow(connect: Connect, tool: Tool) -> dict[str, Any]:
    """Return the arguments of `register_worker` for a flow of one method, which asks an agent."""
    llm = connect(partial(LLM, f"openai/{MODEL}"))

    class Notes(Flow):  # type: ignore[misc]  # without its package it has no type
        name = "sample"

        @start()  # type: ignore[untyped-decorator]
        def ask(self) -> Any:
            return make_agent(lambda _: llm, tool).kickoff(self.state.get("messages", "nothing"))

    return {"factory": Notes, "config": None}


def asked(prompt: str) -> str:
    """Return what the submitter said, out of a prompt of CrewAI."""
    found = re.search("Current Task: (.*)", prompt)
    return prompt if found is None else found[1]


def _facts(calls_if_direct: int, *, progress: str = "steps", stops_at: str = "at once") -> Facts:
    return Facts(
        stops_at=stops_at, calls_if_direct=calls_if_direct, counts_usage=True, threads_left=0, progress=progress
    )


SAMPLES = [
    Sample(name="crewai", make=make, facts=_facts(9), asked=asked, payloads="inputs"),
    Sample(
        name="crewai streamed",
        make=partial(make, stream=True),
        facts=_facts(9, progress="text"),
        streams=True,
        asked=asked,
        payloads="inputs",
    ),
    Sample(name="crewai agent", make=make_alone, facts=_facts(3), asked=asked),
    Sample(
        name="crewai flow", make=make_flow, facts=_facts(3, stops_at="next call"), asked=asked, payloads="any inputs"
    ),
]
