"""A repeated attempt at a graph goes on from its checkpoint, and a graph that has asked something holds no slot."""

from __future__ import annotations

import asyncio
import operator
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.language_models.fake_chat_models import FakeListChatModel
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.func import entrypoint
from langgraph.graph import END, START, StateGraph
from langgraph.types import interrupt

from forebay import BackpressureSupervisor, Resume, Retry, Task, TaskStatus
from forebay.errors import InvalidSetting, UnusableTask
from forebay.events import TaskProgress


class State(TypedDict, total=False):
    messages: Annotated[list[str], operator.add]


class Nodes:
    """The nodes of a graph, which count how often they run; the second fails as often as it is told."""

    def __init__(self, failures: int = 0) -> None:
        self.ran: list[str] = []
        self.failures = failures

    async def first(self, _: State) -> State:
        self.ran.append("first")
        return {"messages": ["first"]}

    async def second(self, _: State) -> State:
        self.ran.append("second")
        if self.failures:
            self.failures -= 1
            raise ConnectionError
        return {"messages": ["second"]}

    async def ask(self, _: State) -> State:
        self.ran.append("ask")
        return {"messages": [f"you said {interrupt('publish?')}"]}

    def graph(self, *names: str, saver: Any = None) -> Any:
        graph: Any = StateGraph(State)
        for name in names:
            graph.add_node(name, getattr(self, name))
        for before, after in zip((START, *names), (*names, END), strict=True):
            graph.add_edge(before, after)
        return graph.compile(checkpointer=saver or InMemorySaver())


def message(text: str = "user") -> State:
    return {"messages": [text]}


@pytest.mark.parametrize("overflow", [None, "memory://"])
async def test_a_retried_attempt_goes_on_from_the_node_that_failed(overflow: str | None) -> None:
    nodes = Nodes(failures=2)
    async with BackpressureSupervisor(overflow=overflow) as supervisor:
        retry = Retry(max_attempts=3, base_delay=0.001)
        graph = nodes.graph("first", "second")
        supervisor.register_worker("writer", handler=graph, task_types=["write"], retry=retry)
        result = await supervisor.run(Task("write", message(), thread_id="t"))
    assert result == {"messages": ["user", "first", "second"]}
    assert nodes.ran == ["first", "second", "second", "second"]


async def test_a_task_whose_id_is_used_again_is_another_one() -> None:
    nodes = Nodes()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("writer", handler=nodes.graph("first"), task_types=["write"])
        for _ in range(2):
            result = await supervisor.run(Task("write", message(), thread_id="t", task_id="daily"))
    assert result == {"messages": ["user", "first", "user", "first"]}


async def test_a_conversation_goes_on_with_each_message() -> None:
    nodes = Nodes()
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("writer", handler=nodes.graph("first"), task_types=["write"])
        await supervisor.run(Task("write", message("one"), thread_id="t"))
        result = await supervisor.run(Task("write", message("two"), thread_id="t"))
    assert result == {"messages": ["one", "first", "two", "first"]}


PROGRAM = """
import asyncio, operator, os, signal, sys
from typing import Annotated, TypedDict
from langgraph.graph import END, START, StateGraph
from forebay import BackpressureSupervisor, Task
from forebay.adapters.langgraph import ShardedSaver
from forebay.state import ShardedState

directory, crash = sys.argv[1], sys.argv[2] == "crash"

class State(TypedDict, total=False):
    messages: Annotated[list[str], operator.add]

def log(text):
    with open(f"{directory}/log", "a") as file:
        print(text, file=file)

async def first(state):
    log("first")
    return {"messages": ["first"]}

async def second(state):
    log("second")
    if crash:
        os.kill(os.getpid(), signal.SIGKILL)
    return {"messages": ["second"]}

async def main():
    async with await ShardedState.connect(f"sqlite:///{directory}/state.db") as state:
        graph = StateGraph(State).add_node("first", first).add_node("second", second)
        graph = graph.add_edge(START, "first").add_edge("first", "second").compile(checkpointer=ShardedSaver(state))
        async with BackpressureSupervisor(overflow=f"sqlite:///{directory}/spill.db", lease=1.0) as supervisor:
            supervisor.register_worker("writer", handler=graph, task_types=["write"])
            if crash:
                task = Task("write", {"messages": ["user"]}, task_id="the task", thread_id="t", durable=True)
                ticket = await supervisor.submit(task)
            else:
                ticket = await supervisor.find("the task")
            print(await ticket.value())

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_graph_that_is_killed_in_its_second_node_goes_on_there(tmp_path: Path) -> None:
    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", PROGRAM, str(tmp_path), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert run("crash").returncode == -signal.SIGKILL
    resumed = run("go on")
    assert resumed.stderr == ""
    assert resumed.stdout == "{'messages': ['user', 'first', 'second']}\n"
    assert (tmp_path / "log").read_text().split() == ["first", "second", "second"]


async def test_a_durable_task_needs_no_checkpointer(tmp_path: Path) -> None:
    nodes = Nodes()
    async with BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db") as supervisor:
        graph = nodes.graph("first")
        graph.checkpointer = None
        supervisor.register_worker("writer", handler=graph, task_types=["write"])
        result = await supervisor.run(Task("write", message(), durable=True))
    assert result == {"messages": ["user", "first"]}


async def test_a_stop_that_cuts_a_run_off_repeats_no_node(tmp_path: Path) -> None:
    """An orderly stop gives the attempt back: the next one has the number of the first, and goes on all the same."""
    nodes, reached, saver = Nodes(), asyncio.Event(), InMemorySaver()

    async def second(_: State) -> State:
        reached.set()
        await asyncio.Event().wait()
        raise AssertionError

    class Stuck(Nodes):
        pass

    stuck = Stuck()
    stuck.second = second  # type: ignore[method-assign]
    url = f"sqlite:///{tmp_path}/spill.db"
    async with BackpressureSupervisor(overflow=url) as supervisor:
        supervisor.register_worker("writer", handler=stuck.graph("first", "second", saver=saver), task_types=["write"])
        ticket = await supervisor.submit(Task("write", message(), thread_id="t", durable=True))
        await reached.wait()
        await supervisor.drain(timeout=0.0)
    async with BackpressureSupervisor(overflow=url) as supervisor:
        supervisor.register_worker("writer", handler=nodes.graph("first", "second", saver=saver), task_types=["write"])
        found = await supervisor.find(ticket.task_id)
        assert found is not None
        assert await found.value() == {"messages": ["user", "first", "second"]}
    assert (stuck.ran, nodes.ran) == (["first"], ["second"])


async def test_a_graph_that_asks_ends_its_task_and_goes_on_with_the_answer_in_another_supervisor(
    tmp_path: Path,
) -> None:
    nodes, saver = Nodes(), InMemorySaver()

    def start() -> BackpressureSupervisor:
        supervisor = BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/spill.db")
        graph = nodes.graph("first", "ask", "second", saver=saver)
        supervisor.register_worker("chat", handler=graph, task_types=["chat"])
        return supervisor

    async with start() as supervisor:
        asked = await (await supervisor.submit(Task("chat", message(), thread_id="t", durable=True)))
        assert asked.status is TaskStatus.SUCCEEDED
        assert [each.value for each in asked.interrupts] == ["publish?"]
        assert supervisor.utilization() == 0.0
    async with start() as supervisor:
        answered = await (await supervisor.submit(Task("chat", Resume("yes"), thread_id="t", durable=True)))
    assert answered.interrupts == ()
    assert answered.result == {"messages": ["user", "first", "you said yes", "second"]}
    assert nodes.ran == ["first", "ask", "ask", "second"]


async def test_an_answer_is_given_once_though_its_attempt_is_repeated() -> None:
    nodes = Nodes(failures=1)
    async with BackpressureSupervisor() as supervisor:
        graph = nodes.graph("ask", "second")
        retry = Retry(max_attempts=2, base_delay=0.001)
        supervisor.register_worker("chat", handler=graph, task_types=["chat"], retry=retry)
        asked = await supervisor.run(Task("chat", message(), thread_id="t"))
        (question,) = asked["__interrupt__"]
        result = await supervisor.run(Task("chat", Resume("yes", question.id), thread_id="t"))
    assert result == {"messages": ["user", "you said yes", "second"]}
    assert nodes.ran == ["ask", "ask", "second", "second"]


@pytest.mark.parametrize("by", ["order", "id"])
@pytest.mark.parametrize("failing", ["one", "two", "three"])
@pytest.mark.parametrize("kind", ["node", "entrypoint", "subgraph", "subgraph of a subgraph"])
async def test_an_answer_is_not_taken_for_that_to_the_next_question(kind: str, failing: str, by: str) -> None:
    failures = [failing]

    async def ask_three(_: Any) -> Any:
        answers = []
        for question in ("one", "two", "three"):
            answers.append(interrupt(question))
            if failures == [question]:
                failures.clear()
                raise ConnectionError
        return {"messages": answers}

    async with BackpressureSupervisor() as supervisor:
        saver = InMemorySaver()
        graph: Any = entrypoint(checkpointer=saver)(ask_three)
        if kind != "entrypoint":
            node: Any = ask_three
            for _ in range(kind.count("subgraph")):
                node = StateGraph(State).add_node("ask", node).add_edge(START, "ask").compile()
            graph = StateGraph(State).add_node("ask", node).add_edge(START, "ask").compile(checkpointer=saver)
        retry = Retry(max_attempts=2, base_delay=0.001)
        supervisor.register_worker("chat", handler=graph, task_types=["chat"], retry=retry)
        result = await (await supervisor.submit(Task("chat", {"messages": []}, thread_id="t")))
        asked = list[str]()
        while result.interrupts:
            (question,) = result.interrupts
            asked.append(question.value)
            answer = Resume(f"to {question.value}", question.id if by == "id" else None)
            result = await (await supervisor.submit(Task("chat", answer, thread_id="t")))
    assert asked == ["one", "two", "three"]
    assert result.result == {"messages": ["to one", "to two", "to three"]}
    assert not failures


async def test_an_answer_that_is_sent_twice_is_taken_once() -> None:
    async def ask_two(_: State) -> State:
        return {"messages": [interrupt("one"), interrupt("two")]}

    node: Any = ask_two
    graph = StateGraph(State).add_node("ask", node).add_edge(START, "ask").compile(checkpointer=InMemorySaver())
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("chat", handler=graph, task_types=["chat"])
        asked = await (await supervisor.submit(Task("chat", {"messages": []}, thread_id="t")))
        answer = Resume("to one", asked.interrupts[0].id)
        first, second = [await (await supervisor.submit(Task("chat", answer, thread_id="t"))) for _ in range(2)]
        assert [each.value for each in first.interrupts] == ["two"]
        assert isinstance(second.cause, UnusableTask)
        assert await supervisor.run(Task("chat", Resume("to two"), thread_id="t")) == {"messages": ["to one", "to two"]}


@pytest.mark.parametrize("by", ["order", "id"])
async def test_an_answer_has_arrived_though_a_node_beside_it_fails(by: str) -> None:
    nodes = Nodes(failures=3)
    graph: Any = StateGraph(State)
    for name in ("ask", "second"):
        graph.add_node(name, getattr(nodes, name))
        graph.add_edge(START, name)
    async with BackpressureSupervisor() as supervisor:
        retry = Retry(max_attempts=2, base_delay=0.001)
        handler = graph.compile(checkpointer=InMemorySaver())
        supervisor.register_worker("chat", handler=handler, task_types=["chat"], retry=retry)
        failed = await (await supervisor.submit(Task("chat", {"messages": []}, thread_id="t")))
        assert failed.status is TaskStatus.FAILED
        state = await handler.aget_state({"configurable": {"thread_id": "t"}})
        (question,) = [each for task in state.tasks for each in task.interrupts]
        answer = Resume("yes", question.id if by == "id" else None)
        result = await supervisor.run(Task("chat", answer, thread_id="t"))
    assert result == {"messages": ["you said yes", "second"]}


async def test_an_answer_can_be_given_at_an_earlier_checkpoint() -> None:
    nodes = Nodes()
    graph = nodes.graph("ask", "second")
    past: dict[str, Any] = {}
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("chat", handler=graph, task_types=["chat"], config=lambda _: {"configurable": past})
        await supervisor.run(Task("chat", message("one"), thread_id="t"))
        asking = await graph.aget_state({"configurable": {"thread_id": "t"}})
        await supervisor.run(Task("chat", message("two"), thread_id="t"))
        assert (await supervisor.run(Task("chat", Resume("no"), thread_id="t")))["messages"][-2:] == [
            "you said no",
            "second",
        ]
        past["checkpoint_id"] = asking.config["configurable"]["checkpoint_id"]
        result = await supervisor.run(Task("chat", Resume("yes"), thread_id="t"))
    assert result == {"messages": ["one", "you said yes", "second"]}


async def test_an_answer_that_nothing_has_asked_for_is_no_fault_of_the_worker() -> None:
    nodes = Nodes()
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("chat", handler=nodes.graph("first"), task_types=["chat"])
        await supervisor.run(Task("chat", message(), thread_id="t"))
        for thread in ("t", "new", "t", "t", "t"):  # five failures in a row make a worker FAILED
            result = await (await supervisor.submit(Task("chat", Resume("yes"), thread_id=thread)))
            assert isinstance(result.cause, UnusableTask)
            assert "waits for no answer" in str(result.error)
        assert not worker.failed
        with pytest.raises(UnusableTask, match="thread_id"):
            await supervisor.submit(Task("chat", Resume("yes")))


async def events_of(config: Any, graph: Any) -> list[Any]:
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("writer", handler=graph, task_types=["write"], config=config)
        ticket = await supervisor.submit(Task("write", message(), thread_id="t"))
        return [event.value async for event in ticket.events() if isinstance(event, TaskProgress)]


async def test_progress_is_what_the_graph_streams_in_the_modes_of_the_config() -> None:
    graph = Nodes().graph("first", "second")
    assert await events_of(None, graph) == [{"first": {"messages": ["first"]}}, {"second": {"messages": ["second"]}}]
    graph = Nodes().graph("first")
    assert await events_of({"stream_mode": "values"}, graph) == [message(), {"messages": ["user", "first"]}]
    graph = Nodes().graph("first")
    assert await events_of({"stream_mode": ["values", "updates"]}, graph) == [
        ("values", message()),
        ("updates", {"first": {"messages": ["first"]}}),
        ("values", {"messages": ["user", "first"]}),
    ]


async def test_tokens_of_a_model_in_a_subgraph_are_progress() -> None:
    model = FakeListChatModel(responses=["abc"])

    async def speak(_: State) -> State:
        return {"messages": [str((await model.ainvoke("hello")).content)]}

    inner: Any = StateGraph(State)
    inner = inner.add_node("speak", speak).add_edge(START, "speak").compile()
    graph: Any = StateGraph(State)
    graph = graph.add_node("inner", inner).add_edge(START, "inner").compile(checkpointer=InMemorySaver())
    values = await events_of({"stream_mode": ["messages"], "subgraphs": True}, graph)
    tokens = [(path[0].partition(":")[0], mode, chunk[0].content) for path, mode, chunk in values]
    assert tokens == [("inner", "messages", "a"), ("inner", "messages", "b"), ("inner", "messages", "c")]


@pytest.mark.parametrize("config", [{"stream_mode": "tokens"}, {"stream_mode": []}, {"subgraphs": "yes"}])
async def test_a_mode_that_there_is_not_is_rejected(config: Any) -> None:
    async with BackpressureSupervisor() as supervisor:
        with pytest.raises(InvalidSetting, match="worker 'writer'"):
            supervisor.register_worker("writer", handler=Nodes().graph("first"), task_types=["write"], config=config)

        def make(_: Task) -> Any:
            return config

        supervisor.register_worker("maker", handler=Nodes().graph("first"), task_types=["write"], config=make)
        result = await (await supervisor.submit(Task("write", message(), thread_id="t")))
        assert isinstance(result.cause, InvalidSetting)


SAGA = """
from forebay.saga import saga

@saga("brief")
async def brief(run, payload):
    return await run.step("research", graph_here, payload, idempotent=True)

async def main():
    global graph_here
    async with await ShardedState.connect(f"sqlite:///{directory}/state.db") as state:
        graph = StateGraph(State).add_node("first", first).add_node("second", second)
        graph = graph.add_edge(START, "first").add_edge("first", "second")
        graph_here = graph.compile(checkpointer=ShardedSaver(state))
        async with BackpressureSupervisor(saga_log=f"sqlite:///{directory}/saga.db", lease=1.0) as supervisor:
            supervisor.register_worker("writer", handler=brief, task_types=["write"])
            print(await supervisor.run(Task("write", {"messages": ["user"]}, key="k")))

asyncio.run(main())
"""


@pytest.mark.slow
def test_a_graph_that_is_a_step_of_a_saga_goes_on_in_the_node_in_which_it_was_killed(tmp_path: Path) -> None:
    program = PROGRAM.partition("async def main():")[0] + SAGA

    def run(how: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", program, str(tmp_path), how]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)

    assert run("crash").returncode == -signal.SIGKILL
    resumed = run("go on")
    assert resumed.stderr == ""
    assert resumed.stdout == "{'messages': ['user', 'first', 'second']}\n"
    assert (tmp_path / "log").read_text().split() == ["first", "second", "second"]
