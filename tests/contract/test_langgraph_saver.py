"""The contract of LangGraph's checkpointers, on every place of state: LangGraph's own suite, and what it leaves out."""

from __future__ import annotations

import operator
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.conformance import checkpointer_test, validate
from langgraph.checkpoint.conformance.capabilities import Capability
from langgraph.graph import START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, interrupt
from tests.support.state_backends import BACKENDS, SHARED_BACKENDS, StateBackend

from forebay.adapters.langgraph import ShardedSaver
from forebay.state import ShardedState


@pytest.fixture(params=BACKENDS, ids=str)
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    backend: StateBackend = request.param
    return backend.urls(tmp_path)


@pytest.mark.parametrize("capability", Capability, ids=lambda each: each.value)
async def test_the_suite_of_langgraph_passes(urls: list[str], capability: Capability) -> None:
    async def saver() -> AsyncIterator[BaseCheckpointSaver[str]]:
        async with await ShardedState.connect(*urls) as state:
            yield ShardedSaver(state)

    report = await validate(checkpointer_test(name="sharded")(saver), capabilities={capability.value})
    result = report.results[capability.value]
    assert result.failures == []
    assert result.detected
    assert result.tests_passed > 3


class State(TypedDict, total=False):
    log: Annotated[list[str], operator.add]


THREAD: RunnableConfig = {"configurable": {"thread_id": "t-1"}}


def graph_on(state: ShardedState) -> CompiledStateGraph[Any, Any, Any, Any]:
    async def plan(_: State) -> State:
        return {"log": ["plan"]}

    async def ask(_: State) -> State:
        return {"log": [interrupt("go?")]}

    graph = StateGraph(State)
    nodes: list[Any] = [plan, ask]
    for node in nodes:
        graph.add_node(node)
    graph.add_edge(START, "plan").add_edge("plan", "ask")
    return graph.compile(checkpointer=ShardedSaver(state))


async def test_a_graph_is_interrupted_and_resumed(urls: list[str]) -> None:
    async with await ShardedState.connect(*urls) as state:
        graph = graph_on(state)
        assert (await graph.ainvoke({"log": ["start"]}, THREAD))["__interrupt__"][0].value == "go?"
        assert await graph.ainvoke(Command(resume="yes"), THREAD) == {"log": ["start", "plan", "yes"]}
        logs = [each.values.get("log") async for each in graph.aget_state_history(THREAD)]
        assert logs == [["start", "plan", "yes"], ["start", "plan"], ["start"], []]
        await ShardedSaver(state).aprune(["t-1"])
        assert (await graph.aget_state(THREAD)).values == {"log": ["start", "plan", "yes"]}


@pytest.mark.parametrize("urls", SHARED_BACKENDS, indirect=True, ids=str)
async def test_another_connection_goes_on(urls: list[str]) -> None:
    async with await ShardedState.connect(*urls) as one, await ShardedState.connect(*urls) as other:
        await graph_on(one).ainvoke({"log": ["start"]}, THREAD)
        assert await graph_on(other).ainvoke(Command(resume="yes"), THREAD) == {"log": ["start", "plan", "yes"]}
        assert (await graph_on(one).aget_state(THREAD)).values == {"log": ["start", "plan", "yes"]}
        await ShardedSaver(other).adelete_thread("t-1")
        assert await ShardedSaver(one).aget_tuple(THREAD) is None
