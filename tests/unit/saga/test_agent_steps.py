"""A step that calls a LangGraph agent: what goes on after a loss of its process is the graph, from its checkpoint."""

from __future__ import annotations

import asyncio
import operator
from collections.abc import AsyncIterator
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from forebay import BackpressureSupervisor, Retry, Task
from forebay.adapters.langgraph import ShardedSaver
from forebay.saga import MemorySagaLog, Saga, SagaRun, saga
from forebay.saga.records import StoredSaga
from forebay.state import ShardedState


class State(TypedDict, total=False):
    messages: Annotated[list[str], operator.add]


class SlowSaver(InMemorySaver):
    """A saver whose writes take some turns of the loop."""

    async def aput(self, *args: Any, **kwargs: Any) -> Any:
        for _ in range(20):
            await asyncio.sleep(0)
        return await super().aput(*args, **kwargs)


class UnscannedLog(MemorySagaLog):
    """A log whose sagas nobody finds by a scan: they go on once their task is submitted again."""

    async def claim(self, *_: object, **__: object) -> list[StoredSaga]:
        return []


@pytest.fixture(params=["memory", "sharded"])
async def saver(request: pytest.FixtureRequest) -> AsyncIterator[Any]:
    if request.param == "memory":
        yield SlowSaver()
        return
    async with await ShardedState.connect("memory://") as state:
        yield ShardedSaver(state)


class Agent:
    """A graph of two nodes, which count how often they run. The second waits for `goes_on`."""

    def __init__(self, saver: Any) -> None:
        self.ran: list[str] = []
        self.failures = 0
        self.in_second = asyncio.Event()
        self.goes_on = asyncio.Event()
        self.found: list[Any] = []  # what the newest checkpoint has whenever the second node begins
        self._saver = saver
        graph: Any = StateGraph(State)
        graph.add_node("first", self.first).add_node("second", self.second)
        graph.add_edge(START, "first").add_edge("first", "second").add_edge("second", END)
        self.graph = graph.compile(checkpointer=saver)

    async def first(self, _: State) -> State:
        self.ran.append("first")
        return {"messages": ["first"]}

    async def second(self, _: State, config: RunnableConfig) -> State:
        self.ran.append("second")
        thread = {"thread_id": config["configurable"]["thread_id"], "checkpoint_ns": ""}
        newest = await self._saver.aget_tuple({"configurable": thread})
        self.found.append(None if newest is None else newest.checkpoint["channel_values"]["messages"])
        self.in_second.set()
        await self.goes_on.wait()
        if self.failures:
            self.failures -= 1
            raise ConnectionError
        return {"messages": ["second"]}

    def saga(self, **options: Any) -> Saga:
        @saga("brief")
        async def brief(run: SagaRun, payload: str) -> Any:
            return await run.step("research", self.graph, {"messages": [payload]}, **options)

        return brief


def supervisor_of(agent: Agent, log: MemorySagaLog, **options: Any) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(saga_log=log)
    supervisor.register_worker("writer", handler=agent.saga(**options), task_types=["brief"])
    return supervisor


ENDED = {"messages": ["user", "first", "second"]}


async def test_a_node_begins_once_the_checkpoint_before_it_is_written(saver: Any) -> None:
    agent = Agent(saver)
    agent.goes_on.set()
    async with supervisor_of(agent, MemorySagaLog()) as supervisor:
        await supervisor.run(Task("brief", "user", key="k"))
    assert agent.found == [["user", "first"]]


async def test_an_attempt_of_a_step_goes_on_from_the_node_that_failed(saver: Any) -> None:
    agent = Agent(saver)
    agent.goes_on.set()
    agent.failures = 2
    retry = Retry(max_attempts=3, base_delay=0.001)
    async with supervisor_of(agent, MemorySagaLog(), retry=retry) as supervisor:
        assert await supervisor.run(Task("brief", "user", key="k")) == ENDED
    assert agent.ran == ["first", "second", "second", "second"]


async def test_a_step_that_was_left_goes_on_from_its_checkpoint(saver: Any) -> None:
    agent, log = Agent(saver), MemorySagaLog()
    async with supervisor_of(agent, log, idempotent=True) as supervisor:
        await supervisor.submit(Task("brief", "user", key="k"))
        await agent.in_second.wait()
        await supervisor.close()
    agent.in_second.clear()
    async with supervisor_of(agent, log, idempotent=True) as supervisor:
        await agent.in_second.wait()  # it goes on by itself
        agent.goes_on.set()
        await supervisor.drain()
    async with supervisor_of(agent, log) as supervisor:
        assert await supervisor.run(Task("brief", "user", key="k")) == ENDED
    assert agent.ran == ["first", "second", "second"]


async def test_a_step_goes_on_from_its_checkpoint_if_its_saga_is_submitted_again(saver: Any) -> None:
    agent, log = Agent(saver), UnscannedLog()
    async with supervisor_of(agent, log, idempotent=True) as supervisor:
        await supervisor.submit(Task("brief", "user", key="k"))
        await agent.in_second.wait()
        await supervisor.close()
    agent.goes_on.set()
    async with supervisor_of(agent, log, idempotent=True) as supervisor:
        assert await supervisor.run(Task("brief", "user", key="k")) == ENDED
    assert agent.ran == ["first", "second", "second"]


async def test_the_same_step_of_another_saga_begins_with_its_first_node(saver: Any) -> None:
    agent, log = Agent(saver), MemorySagaLog()
    agent.goes_on.set()
    async with supervisor_of(agent, log) as supervisor:
        for key in ("a", "b"):
            assert await supervisor.run(Task("brief", "user", key=key)) == ENDED
    assert agent.ran == ["first", "second"] * 2
