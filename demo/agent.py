"""The agent of all sides: a LangGraph graph of three calls through the openai SDK, unaware of its supervisor."""

from __future__ import annotations

import operator
import os
from typing import Annotated, Any, Final, TypedDict

from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from openai import AsyncOpenAI, DefaultAsyncHttpxClient

from demo.attempts import counted
from demo.meter import Meter
from demo.provider import KEY, Provider

_ROLE: Final = (
    "You are an operations analyst. Other systems act on what you write, so be exact: name sources, dates and amounts,"
    " say what is not known, and leave out what the reader cannot use. Never invent a figure. Write plain sentences."
)
_ASK: Final = (
    "Research this case and list the facts that matter, each with where it comes from: {}",
    "Summarize these findings for somebody who has one minute and must decide today:\n\n{}",
    "Write the message that has to be sent now, to the person who can act on this summary:\n\n{}",
)


class State(TypedDict, total=False):
    """The state of one task; the tokens add up over its calls."""

    task_id: str
    topic: str
    lengths: list[int]
    notes: str
    summary: str
    message: str
    input_tokens: Annotated[int, operator.add]
    output_tokens: Annotated[int, operator.add]


Graph = CompiledStateGraph[State, None, State, State]


def connect(provider: Provider, meter: Meter, *, retries: int) -> AsyncOpenAI:
    """Return the SDK's client for the one key that all agents share; `meter` counts its HTTP attempts."""
    http = counted(DefaultAsyncHttpxClient(), meter)
    return AsyncOpenAI(api_key=os.environ[KEY], base_url=provider.url, max_retries=retries, http_client=http)


def agent(client: AsyncOpenAI, provider: Provider, meter: Meter) -> Graph:
    """Return the compiled graph: research, summarize, act."""

    async def ask(state: State, step: int, about: str) -> tuple[str, int, int]:
        length = state["lengths"][step]
        headers = {"x-simulated-output-tokens": str(length), "x-simulated-run": state["task_id"]}
        completion = await client.chat.completions.create(
            model=provider.model,
            messages=[{"role": "system", "content": _ROLE}, {"role": "user", "content": _ASK[step].format(about)}],
            max_tokens=length,
            extra_headers=headers if provider.simulated else None,
        )
        usage = completion.usage
        spent = (usage.prompt_tokens, usage.completion_tokens) if usage else (0, 0)
        meter.answered(*spent)
        return completion.choices[0].message.content or "", *spent

    async def research(state: State) -> dict[str, Any]:
        notes, asked, answered = await ask(state, 0, state["topic"])
        return {"notes": notes, "input_tokens": asked, "output_tokens": answered}

    async def summarize(state: State) -> dict[str, Any]:
        summary, asked, answered = await ask(state, 1, state["notes"])
        return {"summary": summary, "input_tokens": asked, "output_tokens": answered}

    async def act(state: State) -> dict[str, Any]:
        message, asked, answered = await ask(state, 2, state["summary"])
        return {"message": message, "input_tokens": asked, "output_tokens": answered}

    graph = StateGraph(State)
    graph.add_node("research", research)
    graph.add_node("summarize", summarize)
    graph.add_node("act", act)
    graph.add_edge(START, "research")
    graph.add_edge("research", "summarize")
    graph.add_edge("summarize", "act")
    graph.add_edge("act", END)
    return graph.compile()
