"""A compiled LangGraph graph, registered as it is."""

from __future__ import annotations

import asyncio
import contextvars
import operator
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core import messages
from langchain_core.documents import Document
from langchain_core.messages import AIMessage, AnyMessage, HumanMessage, SystemMessage, ToolMessage
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.config import get_stream_writer
from langgraph.errors import GraphRecursionError
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.graph.message import add_messages
from langgraph.runtime import Runtime
from langgraph.types import Command, Interrupt, Send, interrupt
from tests.support.task_plane import find_ticket

from forebay import BackpressureSupervisor, Verdict, context
from forebay.adapters import as_handler
from forebay.errors import InvalidHandler, InvalidSetting, InvalidTask, NotSerializable, UnusableTask
from forebay.overflow import decode_task, encode_task
from forebay.task import Deadline, Priority, Task


class State(TypedDict, total=False):
    topic: str
    notes: Annotated[list[str], operator.add]
    text: str


class Question(TypedDict):
    topic: str


class Answer(TypedDict):
    text: str


class Listening:
    """Stands in for the run under way: keeps what is reported."""

    deadline: Deadline | None = None
    attempt = 1
    submission = 0.0
    tenant_weight = 1.0

    def __init__(self) -> None:
        self.task = Task("listening")
        self.reported: list[Any] = []

    def report(self, value: Any) -> None:
        self.reported.append(value)


@pytest.fixture
def listening() -> Iterator[Listening]:
    run = Listening()
    token = context.set_running_task(run)
    yield run
    context._current.reset(token)


def graph_of(*nodes: Any, schema: Any = State, **schemas: Any) -> StateGraph[Any, Any, Any, Any]:
    """A graph that runs `nodes` in a row."""
    graph = StateGraph(schema, **schemas)
    for node in nodes:
        graph.add_node(node.__name__, node)
    for before, after in zip((START, *(n.__name__ for n in nodes)), (*(n.__name__ for n in nodes), END), strict=True):
        graph.add_edge(before, after)
    return graph


async def research(state: State) -> dict[str, Any]:
    return {"notes": [f"about {state['topic']}"]}


def write(state: State) -> dict[str, Any]:  # a plain node: LangGraph gives it a thread
    return {"text": f"{len(state['notes'])} notes"}


async def run(graph: Any, payload: Any, *, config: Any = None, **options: Any) -> Any:
    return await as_handler(graph, worker="writer", config=config).call(Task("write", payload, **options))


async def configured(*, config: Any = None, **options: Any) -> Any:
    """The config that a node sees."""
    seen: list[Any] = []

    async def look(state: State, config: RunnableConfig) -> dict[str, Any]:
        seen.append(config)
        return {"text": state["topic"]}

    await run(graph_of(look).compile(), {"topic": "rivers"}, config=config, **options)
    return seen[0]


# --- the result is what `ainvoke` returns --------------------------------------------------------------------------


@task
async def double(number: int) -> int:
    return 2 * number


@entrypoint()
async def doubled(number: int) -> int:
    return await double(number)


async def fan_out(state: State) -> Command[Any]:
    return Command(goto=[Send("research", {"topic": topic}) for topic in (state["topic"], "lakes")])


def with_a_subgraph() -> Any:
    async def inner(state: State) -> dict[str, Any]:
        return {"notes": [f"deep {state['topic']}"]}

    graph = StateGraph(State)
    graph.add_node("research", research)
    graph.add_node("deep", graph_of(inner).compile())
    graph.add_edge(START, "research")
    graph.add_edge("research", "deep")
    return graph.compile()


def with_sends() -> Any:
    graph = StateGraph(State)
    graph.add_node("fan_out", fan_out)
    graph.add_node("research", research)
    graph.add_edge(START, "fan_out")
    return graph.compile()


def with_schemas() -> Any:
    return graph_of(research, write, input_schema=Question, output_schema=Answer).compile()


@pytest.mark.parametrize(
    ("make", "payload"),
    [
        (lambda: graph_of(research, write).compile(), {"topic": "rivers"}),
        (lambda: graph_of(research, write).compile(), {"topic": "rivers", "notes": ["mine"]}),
        (lambda: graph_of(research, write).compile(interrupt_before=["write"]), {"topic": "rivers"}),
        (lambda: graph_of(research, write).compile().with_config(tags=["short"]), {"topic": "rivers"}),
        (lambda: graph_of(research).compile(), Command(update={"topic": "rivers"}, goto="research")),
        (with_a_subgraph, {"topic": "rivers"}),
        (with_sends, {"topic": "rivers"}),
        (with_schemas, {"topic": "rivers"}),
        (lambda: doubled, 21),
    ],
    ids=["plain", "given", "interrupt_before", "with_config", "command", "subgraph", "sends", "schemas", "functional"],
)
async def test_the_result_is_what_ainvoke_returns(make: Callable[[], Any], payload: Any) -> None:
    expected = await make().ainvoke(payload)
    assert await run(make(), payload) == expected
    assert expected


async def test_the_private_part_of_the_state_stays_private(listening: Listening) -> None:
    assert await run(with_schemas(), {"topic": "rivers"}) == {"text": "1 notes"}
    assert listening.reported == [{"research": None}, {"write": {"text": "1 notes"}}]


async def test_an_interrupt_comes_back_in_the_result_and_a_command_resumes_it() -> None:
    def approve(_state: State) -> dict[str, Any]:
        return {"text": interrupt("publish?")}

    graph = graph_of(approve).compile(checkpointer=InMemorySaver())
    asked = await run(graph, {"topic": "rivers"}, thread_id="t1")
    assert [question.value for question in asked["__interrupt__"]] == ["publish?"]
    assert asked["topic"] == "rivers"

    assert await run(graph, Command(resume="yes"), thread_id="t1") == {"topic": "rivers", "notes": [], "text": "yes"}


async def test_a_nodes_exception_comes_out_as_it_is() -> None:
    failure = ConnectionError("the model hung up")

    async def fail(_state: State) -> dict[str, Any]:
        raise failure

    with pytest.raises(ConnectionError) as caught:
        await run(graph_of(fail).compile(), {"topic": "rivers"})
    assert caught.value is failure


async def test_the_recursion_limit_of_the_config_holds() -> None:
    async def again(state: State) -> Command[Any]:
        return Command(goto="again" if state["topic"] else END)

    graph = StateGraph(State)
    graph.add_node("again", again)
    graph.add_edge(START, "again")
    with pytest.raises(GraphRecursionError):
        await run(graph.compile(), {"topic": "rivers"}, config={"recursion_limit": 3})


# --- progress ------------------------------------------------------------------------------------------------------


async def test_progress_comes_in_order_while_the_graph_runs(listening: Listening) -> None:
    async def draft(_state: State) -> dict[str, Any]:
        writer = get_stream_writer()
        writer({"percent": 40})
        await asyncio.sleep(0)
        writer({"percent": 80})
        return {"text": "a draft"}

    async def check(_state: State) -> dict[str, Any]:
        assert listening.reported == [{"percent": 40}, {"percent": 80}, {"draft": {"text": "a draft"}}]
        return {"notes": ["fine"]}

    await run(graph_of(draft, check).compile(), {"topic": "rivers"})
    assert listening.reported[-1] == {"check": {"notes": ["fine"]}}


async def test_nodes_report_progress_of_their_own_plain_ones_too(listening: Listening) -> None:
    async def first(_state: State) -> dict[str, Any]:
        context.progress("in the loop")
        return {"notes": ["1"]}

    def second(_state: State) -> dict[str, Any]:
        context.progress(("in a thread", threading.current_thread() is threading.main_thread()))
        return {"notes": ["2"]}

    await run(graph_of(first, second).compile(), {"topic": "rivers"})
    assert [value for value in listening.reported if not isinstance(value, dict)] == [
        "in the loop",
        ("in a thread", False),
    ]


async def test_outside_of_a_supervisor_there_is_nobody_to_report_to_and_it_runs() -> None:
    assert (await run(graph_of(research).compile(), {"topic": "rivers"}))["notes"] == ["about rivers"]


async def test_context_variables_reach_every_node() -> None:
    account = contextvars.ContextVar("account", default="nobody's")

    async def in_the_loop(_state: State) -> dict[str, Any]:
        return {"notes": [account.get()]}

    def in_a_thread(_state: State) -> dict[str, Any]:
        return {"notes": [account.get()]}

    account.set("acme's")
    done = await run(graph_of(in_the_loop, in_a_thread).compile(), {"topic": "rivers"})
    assert done["notes"] == ["acme's", "acme's"]


# --- thread and config ---------------------------------------------------------------------------------------------


async def test_two_tasks_of_one_thread_share_memory_and_another_thread_does_not() -> None:
    graph = graph_of(research).compile(checkpointer=InMemorySaver())
    await run(graph, {"topic": "rivers"}, thread_id="t1")
    assert (await run(graph, {"topic": "lakes"}, thread_id="t1"))["notes"] == ["about rivers", "about lakes"]
    assert (await run(graph, {"topic": "seas"}, thread_id="t2"))["notes"] == ["about seas"]


async def test_a_graph_with_memory_needs_a_thread_and_says_so() -> None:
    graph = graph_of(research).compile(checkpointer=InMemorySaver())
    with pytest.raises(InvalidTask, match="Task thread_id is None; it must be set: the graph of worker 'writer'"):
        await run(graph, {"topic": "rivers"})


@pytest.mark.parametrize(
    ("bind", "config"),
    [
        (True, None),
        (False, {"configurable": {"thread_id": "t1"}}),
        (False, lambda _task: {"configurable": {"thread_id": "t1"}}),
    ],
)
async def test_the_thread_may_come_from_a_config_instead(*, bind: bool, config: Any) -> None:
    saver = InMemorySaver()
    graph = graph_of(research).compile(checkpointer=saver)
    bound = graph.with_config(configurable={"thread_id": "t1"}) if bind else graph
    await run(bound, {"topic": "rivers"}, config=config)
    assert saver.get({"configurable": {"thread_id": "t1"}}) is not None


async def test_the_tasks_thread_outranks_a_fixed_one() -> None:
    seen = await configured(config={"configurable": {"thread_id": "fixed", "model": "small"}}, thread_id="t1")
    assert seen["configurable"]["thread_id"] == "t1"
    assert seen["configurable"]["model"] == "small"


async def test_a_config_made_for_the_task_has_the_last_word() -> None:
    def config(task: Task) -> Mapping[str, Any]:
        return {"configurable": {"thread_id": f"{task.tenant}:{task.thread_id}"}}

    seen = await configured(config=config, thread_id="t1", tenant="acme")
    assert seen["configurable"]["thread_id"] == "acme:t1"


async def test_metadata_tells_the_task_and_keeps_the_users_own() -> None:
    config = {"metadata": {"team": "blue", "forebay_tenant": "mine"}, "tags": ["nightly"]}
    seen = await configured(config=config, task_id="a-1", priority=Priority.HIGH)
    assert {
        "forebay_task_id": "a-1",
        "forebay_task_type": "write",
        "forebay_priority": "HIGH",
        "forebay_tenant": "mine",
        "team": "blue",
    }.items() <= dict(seen["metadata"]).items()
    assert "nightly" in seen["tags"]
    assert config == {"metadata": {"team": "blue", "forebay_tenant": "mine"}, "tags": ["nightly"]}, "left as it was"


async def test_static_context_goes_in_by_the_config() -> None:
    class Who(TypedDict):
        name: str

    async def greet(_state: State, runtime: Runtime[Who]) -> dict[str, Any]:
        return {"text": runtime.context["name"]}

    graph = graph_of(greet, context_schema=Who).compile()
    done = await run(graph, {"topic": "x"}, config=lambda task: {"context": {"name": task.tenant}}, tenant="acme")
    assert done["text"] == "acme"


async def test_a_callable_that_makes_no_config_is_told_so() -> None:
    with pytest.raises(InvalidSetting, match="config='NoneType'"):
        await configured(config=lambda _task: None)


# --- runs within runs ----------------------------------------------------------------------------------------------


async def test_a_task_submitted_by_a_node_is_a_run_of_its_own() -> None:
    async def inner(state: State, config: RunnableConfig) -> dict[str, Any]:
        seen.append(config)
        return {"text": interrupt(state["topic"])}

    async def outer(_state: State) -> dict[str, Any]:
        done = await run(graph_of(inner).compile(), {"topic": "lakes"})
        return {"text": done["__interrupt__"][0].value}

    seen: list[Any] = []
    config = {"tags": ["outer"], "configurable": {"model": "large"}}
    graph = graph_of(outer).compile(checkpointer=InMemorySaver())
    done = await run(graph, {"topic": "rivers"}, config=config, thread_id="t1")

    assert done["text"] == "lakes", "its interrupt ended it alone, and did not bubble up as a subgraph's would"
    assert "outer" not in seen[0].get("tags", ())
    assert "model" not in seen[0]["configurable"]


# --- cancellation --------------------------------------------------------------------------------------------------


async def test_cancelling_ends_the_async_nodes_before_the_run_ends() -> None:
    begun, cleaned = asyncio.Event(), []

    async def think(_state: State) -> dict[str, Any]:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            cleaned.append(True)
        return {}

    running = asyncio.ensure_future(run(graph_of(think, write).compile(), {"topic": "rivers"}))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert cleaned


async def test_cancelling_leaves_a_plain_nodes_thread_running() -> None:
    """What LangGraph does, written down: who counts slots must know that this thread outlives its run."""
    loop = asyncio.get_running_loop()
    begun, ended, go_on = asyncio.Event(), asyncio.Event(), threading.Event()

    def crunch(_state: State) -> dict[str, Any]:
        loop.call_soon_threadsafe(begun.set)
        go_on.wait(10)
        loop.call_soon_threadsafe(ended.set)
        return {}

    running = asyncio.ensure_future(run(graph_of(crunch).compile(), {"topic": "rivers"}))
    await begun.wait()
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert not ended.is_set()
    go_on.set()
    await ended.wait()


# --- the overflow ---------------------------------------------------------------------------------------------------


class Conversation(TypedDict, total=False):
    messages: Annotated[list[AnyMessage], add_messages]
    found: list[Document]


async def answer(state: Conversation) -> dict[str, Any]:
    asked = state["messages"][-1]
    call = {"name": "look", "args": {"at": [1, {"deep": None}]}, "id": "call-1", "type": "tool_call"}
    return {
        "messages": [
            AIMessage("", tool_calls=[call], usage_metadata={"input_tokens": 1, "output_tokens": 2, "total_tokens": 3}),
            ToolMessage("a river", tool_call_id="call-1", artifact={"raw": b"\xff"}),
            AIMessage([{"type": "text", "text": f"on {asked.content}"}], response_metadata={"model": "small"}),
        ],
        "found": [Document("the Elbe", metadata={"page": 7}, id="d1")],
    }


def in_bytes(value: Any) -> Any:
    """The value as another process gets it."""
    codec = as_handler(graph_of(research).compile()).codec
    assert codec is not None
    envelope = encode_task(Task("write"), codec.dump(value), bound=1 << 20)
    return codec.load(decode_task(envelope).payload)


def lines(state: Any) -> list[Any]:
    """The messages of a state, but for the ids that LangGraph makes."""
    return [message.model_copy(update={"id": None}) for message in state["messages"]]


def test_messages_travel_through_the_overflow_and_come_back_as_messages(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"
    asked = {"messages": [SystemMessage("be brief"), HumanMessage("rivers", name="Ada", additional_kwargs={"n": 1})]}

    async def spill() -> list[str]:
        async with BackpressureSupervisor(overflow=url, max_queue_size=0) as supervisor:
            supervisor.register_worker(
                "writer", handler=graph_of(answer, schema=Conversation).compile(), task_types=["t"]
            )
            tickets = [await supervisor.submit(Task("t", asked)) for _ in range(3)]
            assert tickets[-1].verdict is Verdict.SPILLED
            return [ticket.task_id for ticket in tickets[1:]]

    async def resume(ids: list[str]) -> list[Any]:
        async with BackpressureSupervisor(overflow=url) as supervisor:
            graph = graph_of(answer, schema=Conversation).compile()
            supervisor.register_worker("writer", factory=lambda: graph, task_types=["t"])
            return [await (await find_ticket(supervisor, task_id)).value() for task_id in ids]

    async def directly() -> Any:
        return await graph_of(answer, schema=Conversation).compile().ainvoke(asked)

    ids = asyncio.run(spill())
    expected = asyncio.run(directly())
    for _ in range(2):  # once run here, and once asked for on another day
        for result in asyncio.run(resume(ids)):
            assert lines(result) == lines(expected)
            assert [type(message) for message in result["messages"]] == [
                SystemMessage,
                HumanMessage,
                AIMessage,
                ToolMessage,
                AIMessage,
            ]
            assert result["found"] == expected["found"]


BAD_CALL: Any = "invalid_tool_call"
CHUNK = messages.AIMessageChunk(
    content="a", tool_call_chunks=[{"name": "f", "args": '{"x": 1', "id": "1", "index": 0, "type": "tool_call_chunk"}]
)


@pytest.mark.parametrize(
    "value",
    [
        HumanMessage("hi", id="1", more="of theirs"),
        HumanMessage([{"type": "text", "text": "hi"}, "there"]),
        AIMessage("", invalid_tool_calls=[{"name": "f", "args": "{", "id": "1", "error": "x", "type": BAD_CALL}]),
        CHUNK,
        messages.ToolMessage("x", tool_call_id="1", status="error", artifact=[HumanMessage("inside")]),
        messages.ChatMessage(content="x", role="critic"),
        messages.FunctionMessage(content="x", name="f"),
        messages.RemoveMessage("1"),
        messages.HumanMessageChunk(content="x"),
        messages.SystemMessageChunk(content="x"),
        messages.ToolMessageChunk(content="x", tool_call_id="1"),
        messages.ChatMessageChunk(content="x", role="critic"),
        messages.FunctionMessageChunk(content="x", name="f"),
        Document("x", metadata={"a": [1, (2,)]}),
        Command(
            update={"messages": [HumanMessage("hi")]},
            goto=[Send("write", HumanMessage("x"))],
        ),
        Command(resume={"id": "yes"}, graph=Command.PARENT),
        Interrupt({"ask": [HumanMessage("sure?")]}, id="i1"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_graphs_take_and_give_comes_back_equal(value: Any) -> None:
    for whole in (value, {"messages": [value, ("user", "hi")], "__forebay__": value}):
        back = in_bytes(whole)
        assert back == whole
        assert type(back) is type(whole)


class Mine(HumanMessage):
    pass


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        (Mine(content="hi"), "payload.messages[0]", "Mine"),
        (ToolMessage("x", tool_call_id="1", artifact=object()), "payload.messages[0].parts.artifact", "object"),
    ],
)
async def test_what_cannot_travel_is_told_at_submit(value: Any, path: str, kind: str) -> None:
    async with BackpressureSupervisor(overflow="memory://") as supervisor:
        supervisor.register_worker("writer", handler=graph_of(answer, schema=Conversation).compile(), task_types=["t"])
        with pytest.raises(NotSerializable) as caught:
            await supervisor.submit(Task("t", {"messages": [value]}))
        assert (caught.value.path, caught.value.type) == (path, kind)


def test_an_interrupt_is_asked_and_answered_by_way_of_the_overflow(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/spill.db"

    def approve(_state: State) -> dict[str, Any]:
        return {"text": interrupt("publish?")}

    graph = graph_of(approve).compile(checkpointer=InMemorySaver())

    async def ask(payload: Any) -> str:
        async with BackpressureSupervisor(overflow=url) as supervisor:
            supervisor.register_worker("writer", handler=graph, task_types=["t"])
            ticket = await supervisor.submit(Task("t", payload, thread_id="t1", durable=True))
            await ticket
            return ticket.task_id

    async def later(task_id: str) -> Any:
        async with BackpressureSupervisor(overflow=url) as supervisor:
            supervisor.register_worker("writer", handler=graph, task_types=["t"])
            return await (await find_ticket(supervisor, task_id)).value()

    (question,) = asyncio.run(later(asyncio.run(ask({"topic": "rivers"}))))["__interrupt__"]
    assert question.value == "publish?"
    assert asyncio.run(later(asyncio.run(ask(Command(resume="yes")))))["text"] == "yes"


async def test_a_graph_and_a_function_may_serve_one_type() -> None:
    seen: list[Any] = []

    async def fallback(task: Task) -> None:
        seen.append(task.payload)

    async with BackpressureSupervisor(overflow="memory://") as supervisor:
        supervisor.register_worker("function", handler=fallback, task_types=["t"])
        supervisor.register_worker("graph", handler=graph_of(research).compile(), task_types=["t"])
        await supervisor.run(Task("t", {"messages": [HumanMessage("hi")]}))
    assert seen == [{"messages": [HumanMessage("hi")]}]


# --- what is no compiled graph -------------------------------------------------------------------------------------


def test_an_uncompiled_graph_is_told_to_be_compiled() -> None:
    with pytest.raises(InvalidHandler, match=r"type StateGraph, which Forebay cannot run: .*graph.compile\(\)"):
        as_handler(graph_of(research), worker="writer")


@pytest.mark.parametrize("obj", [double, Command(resume=1)])
def test_other_things_of_langgraph_are_told_what_to_pass(obj: Any) -> None:
    with pytest.raises(InvalidHandler, match="a compiled graph"):
        as_handler(obj, worker="writer")


# --- the submitter's mistakes ----------------------------------------------------------------------------------------


async def submit_five(handler: Any, *, config: Any = None, payload: Any = None, **options: Any) -> list[Any]:
    """Submit five tasks of the same mistake to one worker, then a right one; return what the five gave."""
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("w", handler=handler, config=config, task_types=["t"], max_concurrent=5)
        gave: list[Any] = []
        for _ in range(5):
            try:
                gave.append(await (await supervisor.submit(Task("t", payload, **options))))
            except UnusableTask as error:
                gave.append(error)
        assert not worker.failed
        right = await (await supervisor.submit(Task("t", {"topic": "rivers"}, thread_id="right")))
        assert right.success
        return gave


async def test_callers_who_forget_the_thread_id_are_told_at_once_and_harm_nobody() -> None:
    graph = graph_of(research).compile(checkpointer=InMemorySaver())
    gave = await submit_five(graph, payload={"topic": "rivers"})
    assert all(isinstance(error, UnusableTask) and "thread_id is None" in str(error) for error in gave)


async def test_a_missing_thread_id_that_only_the_run_shows_is_no_fault_of_the_worker() -> None:
    def config(task: Task) -> Mapping[str, Any]:
        return {} if task.thread_id is None else {"configurable": {"thread_id": task.thread_id}}

    graph = graph_of(research).compile(checkpointer=InMemorySaver())
    gave = await submit_five(graph, payload={"topic": "rivers"}, config=config)
    assert all(isinstance(result.cause, UnusableTask) for result in gave)


@pytest.mark.parametrize("payload", ["rivers", b"rivers", 7, True, ["rivers"], (), None])
async def test_a_payload_that_is_no_input_of_a_graph_is_refused_at_once(payload: Any) -> None:
    gave = await submit_five(graph_of(research).compile(), payload=payload)
    assert all(isinstance(error, UnusableTask) and "Task payload is" in str(error) for error in gave)
    assert "rivers" not in str(gave[0])


async def test_nothing_to_resume_is_no_fault_of_the_worker() -> None:
    gave = await submit_five(graph_of(research).compile(checkpointer=InMemorySaver()), thread_id="new")
    assert all(isinstance(result.cause, UnusableTask) for result in gave)


async def test_a_slot_needs_no_input_for_the_graph() -> None:
    async with BackpressureSupervisor() as supervisor:
        graph = graph_of(research).compile(checkpointer=InMemorySaver())
        supervisor.register_worker("w", handler=graph, task_types=["t"])
        async with supervisor.slot("t") as slot:
            assert slot.worker.current_tasks == 1
