"""The LangGraph checkpointer on sharded state: graphs on it, crashes between its writes, and what it costs."""

from __future__ import annotations

import asyncio
import operator
import threading
from collections.abc import AsyncIterator, Sequence
from functools import partial
from typing import Annotated, Any, TypedDict

import pytest
from langchain_core.runnables import RunnableConfig
from langgraph.channels.delta import DeltaChannel
from langgraph.checkpoint.base import empty_checkpoint
from langgraph.checkpoint.base.id import uuid6
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT
from langgraph.func import entrypoint, task
from langgraph.graph import END, START, StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.types import Command, Send, interrupt
from tests.support.counting_shard import CountingShard

from forebay import BackpressureSupervisor, Task
from forebay.adapters.langgraph import ShardedSaver
from forebay.errors import (
    CheckpointDamaged,
    InvalidSetting,
    InvalidStateKey,
    NoRunningLoop,
    ShardUnavailable,
    WouldDeadlock,
)
from forebay.state import MemoryShard, ShardedState

THREAD: RunnableConfig = {"configurable": {"thread_id": "t-1"}}


def thread(thread_id: str, checkpoint_ns: str | None = None, checkpoint_id: str | None = None) -> RunnableConfig:
    names = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
    return {"configurable": {name: value for name, value in names.items() if value is not None}}


@pytest.fixture
def shard() -> CountingShard:
    return CountingShard()


@pytest.fixture
async def state(shard: CountingShard) -> AsyncIterator[ShardedState]:
    async with await ShardedState.connect(shard) as state:
        yield state


@pytest.fixture
async def saver(state: ShardedState) -> ShardedSaver:
    return ShardedSaver(state)


async def put(saver: Any, config: RunnableConfig, value: Any = None, **metadata: Any) -> RunnableConfig:
    """Write a checkpoint with one channel, after the one that `config` names."""
    checkpoint = empty_checkpoint()
    version = saver.get_next_version(None, None)
    checkpoint["channel_values"], checkpoint["channel_versions"] = {"value": value}, {"value": version}
    place: RunnableConfig = {"configurable": {"checkpoint_ns": "", **config["configurable"]}}
    return await saver.aput(place, checkpoint, metadata, {"value": version})  # type: ignore[no-any-return]


async def put_many(saver: Any, count: int, config: RunnableConfig = THREAD) -> list[RunnableConfig]:
    configs = list[RunnableConfig]()
    for number in range(count):
        config = await put(saver, config, number, step=number)
        configs.append(config)
    return configs


async def values(saver: Any, config: RunnableConfig | None = THREAD, **options: Any) -> list[Any]:
    return [each.checkpoint["channel_values"]["value"] async for each in saver.alist(config, **options)]


async def stored(state: ShardedState, thread_id: str = "t-1", prefix: str = "") -> list[str]:
    space = state.namespace("langgraph").namespace(f"thread={thread_id}")
    return [entry.key async for entry in space.scan(prefix)]


# --- graphs ----------------------------------------------------------------------------------------------------------


class Trip(TypedDict, total=False):
    log: Annotated[list[str], operator.add]
    approved: bool


class Sum(TypedDict, total=False):
    items: list[int]
    total: Annotated[int, operator.add]


class Total(TypedDict):
    total: int


def trip_graph(saver: Any, ran: list[str]) -> CompiledStateGraph[Any, Any, Any, Any]:
    """Return a graph with a plain node, parallel nodes, a question to a human and a last node."""

    async def plan(_: Trip) -> Trip:
        ran.append("plan")
        return {"log": ["plan"]}

    async def branch(_: Trip, name: str) -> Trip:
        ran.append(name)
        return {"log": [name]}

    async def left(state: Trip) -> Trip:
        return await branch(state, "left")

    async def right(state: Trip) -> Trip:
        return await branch(state, "right")

    async def ask(_: Trip) -> Trip:
        return {"approved": interrupt("go?")}

    async def book(_: Trip) -> Trip:
        ran.append("book")
        return {"log": ["book"]}

    graph = StateGraph(Trip)
    nodes: list[Any] = [plan, left, right, ask, book]
    for node in nodes:
        graph.add_node(node.__name__, node)
    graph.add_edge(START, "plan")
    for name in ("left", "right"):
        graph.add_edge("plan", name)
        graph.add_edge(name, "ask")
    graph.add_edge("ask", "book")
    graph.add_edge("book", END)
    return graph.compile(checkpointer=saver)


async def test_a_graph_is_interrupted_and_resumed_by_another_connection(shard: CountingShard) -> None:
    ran: list[str] = []
    async with await ShardedState.connect(shard) as state:
        result = await trip_graph(ShardedSaver(state), ran).ainvoke({"log": ["start"]}, THREAD)
        assert result["__interrupt__"][0].value == "go?"
    async with await ShardedState.connect(shard) as state:
        graph = trip_graph(ShardedSaver(state), ran)
        result = await graph.ainvoke(Command(resume=True), THREAD)
        history = [each.values.get("log", []) async for each in graph.aget_state_history(THREAD)]
    assert result == {"log": ["start", "plan", "left", "right", "book"], "approved": True}
    assert sorted(ran) == ["book", "left", "plan", "right"]
    assert [len(log) for log in history] == [5, 4, 4, 2, 1, 0]


async def test_a_run_that_is_killed_before_any_of_its_writes_goes_on_where_it_was() -> None:
    killed = 0
    for write in range(1, 200):
        shard, ran = CountingShard(), list[str]()
        try:
            async with await ShardedState.connect(shard) as state:
                graph = trip_graph(ShardedSaver(state), ran)
                with shard.killed_at(write):
                    await graph.ainvoke({"log": ["start"]}, THREAD, durability="sync")
                    await graph.ainvoke(Command(resume=True), THREAD, durability="sync")
        except ShardUnavailable:
            killed += 1
        else:
            break
        async with await ShardedState.connect(shard) as state:
            saver = ShardedSaver(state)
            found = [each async for each in saver.alist(THREAD)]  # none is damaged
            graph = trip_graph(saver, ran)
            waits = (await graph.aget_state(THREAD)).interrupts
            result = await graph.ainvoke(
                Command(resume=True) if waits else None if found else {"log": ["start"]}, THREAD
            )
            if "__interrupt__" in result:
                result = await graph.ainvoke(Command(resume=True), THREAD)
            assert result == {"log": ["start", "plan", "left", "right", "book"], "approved": True}, write
    assert killed > 20


async def test_the_writes_of_a_task_are_there_as_a_whole_or_not_at_all(
    saver: ShardedSaver, shard: CountingShard
) -> None:
    config = await put(saver, THREAD)
    writes = [("a", 1), ("b", "x" * (5 << 20)), ("c", 3)]
    for write in range(1, 10):
        try:
            with shard.killed_at(write):
                await saver.aput_writes(config, writes, "task")
        except ShardUnavailable:
            found = await saver.aget_tuple(THREAD)
            assert found is not None
            assert found.pending_writes == []
        else:
            break
    assert write > 2
    found = await saver.aget_tuple(THREAD)
    assert found is not None
    assert found.pending_writes == [("task", *each) for each in writes]


async def test_a_graph_with_subgraphs_and_sends_has_the_history_that_it_has_in_memory(saver: ShardedSaver) -> None:
    async def double(state: Sum) -> Sum:
        return {"total": 2 * state["items"][0]}

    def fan_out(state: Sum) -> list[Send]:
        return [Send("inner", {"items": [item]}) for item in state["items"]]

    async def history(checkpointer: Any) -> list[Any]:
        inner = StateGraph(Sum, output_schema=Total).add_node("double", double).add_edge(START, "double").compile()
        builder = StateGraph(Sum).add_node("inner", inner).add_conditional_edges(START, fan_out, ["inner"])
        graph = builder.compile(checkpointer=checkpointer)
        await graph.ainvoke({"items": [1, 2, 3]}, THREAD)
        await graph.ainvoke({"items": [4]}, THREAD)
        return [
            (each.values, each.next, each.metadata, [task.name for task in each.tasks])
            async for each in graph.aget_state_history(THREAD)
        ]

    assert await history(saver) == await history(InMemorySaver())


@pytest.mark.parametrize("durability", ["sync", "async", "exit"])
async def test_a_durability_of_langgraph_leaves_what_it_leaves_in_memory(saver: ShardedSaver, durability: Any) -> None:
    found = []
    for checkpointer in (saver, InMemorySaver()):
        graph, deltas = trip_graph(checkpointer, []), delta_graph(checkpointer, 3)
        await graph.ainvoke({"log": ["start"]}, THREAD, durability=durability)
        await graph.ainvoke(Command(resume=True), THREAD, durability=durability)
        await graph.aupdate_state(THREAD, {"log": ["update"]}, as_node="book")
        for number in range(5):
            await deltas.ainvoke({"messages": [f"{number}"]}, thread("t-2"), durability=durability)
        histories = [graph.aget_state_history(THREAD), deltas.aget_state_history(thread("t-2"))]
        found.append([[(each.values, each.next, each.metadata) async for each in history] for history in histories])
    assert found[0] == found[1]


async def test_a_function_with_a_memory_has_it(saver: ShardedSaver) -> None:
    @task
    async def double(number: int) -> int:
        return 2 * number

    @entrypoint(checkpointer=saver)
    async def total(number: int, *, previous: int | None) -> entrypoint.final[int, int]:
        new = (previous or 0) + await double(number)
        return entrypoint.final(value=new, save=new)

    assert [await total.ainvoke(number, THREAD) for number in (1, 2, 3)] == [2, 6, 12]


async def test_the_tasks_of_a_supervised_graph_share_their_thread(saver: ShardedSaver) -> None:
    async def add(state: Trip) -> Trip:
        return {"log": [f"{len(state['log'])}"]}

    graph = StateGraph(Trip).add_node("add", add).add_edge(START, "add").compile(checkpointer=saver)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("chat", handler=graph, task_types=["chat"])
        tasks = [Task("chat", {"log": [name]}, thread_id="t-1") for name in "ab"]
        results = [await supervisor.run(each) for each in tasks]
    assert [each["log"] for each in results] == [["a", "1"], ["a", "1", "b", "3"]]


async def test_a_run_from_an_earlier_checkpoint_does_not_touch_the_later_ones(saver: ShardedSaver) -> None:
    async def add(state: Trip) -> Trip:
        return {"log": [f"{len(state['log'])}"]}

    graph = StateGraph(Trip).add_node("add", add).add_edge(START, "add").compile(checkpointer=saver)
    await graph.ainvoke({"log": ["a"]}, THREAD)
    earlier = (await graph.aget_state(THREAD)).config
    await graph.ainvoke({"log": ["b"]}, THREAD)
    later = (await graph.aget_state(THREAD)).config
    assert (await graph.ainvoke({"log": ["c"]}, earlier))["log"] == ["a", "1", "c", "3"]
    assert (await graph.aget_state(later)).values["log"] == ["a", "1", "b", "3"]
    assert (await graph.aget_state(earlier)).values["log"] == ["a", "1"]
    forked = await graph.aupdate_state(earlier, {"log": ["d"]})
    assert (await graph.aget_state(forked)).values["log"] == ["a", "1", "d"]


# --- channels whose values are made from writes ----------------------------------------------------------------------


def delta_graph(saver: Any, snapshot_frequency: int) -> CompiledStateGraph[Any, Any, Any, Any]:
    def extend(old: Any, new: Sequence[Any]) -> Any:
        return [*old, *(each for some in new for each in some)]

    channel: DeltaChannel[Any] = DeltaChannel(extend, snapshot_frequency=snapshot_frequency)
    messages = TypedDict("messages", {"messages": Annotated[list[str], channel]})  # noqa: UP013 - a local annotation

    async def reply(state: Any) -> Any:
        return {"messages": [f"reply {len(state['messages'])}"]}

    return StateGraph(messages).add_node("reply", reply).add_edge(START, "reply").compile(checkpointer=saver)


@pytest.mark.parametrize("snapshot_frequency", [3, 1_000])
async def test_a_delta_channel_is_made_from_its_writes(saver: ShardedSaver, snapshot_frequency: int) -> None:
    histories = []
    for checkpointer in (saver, InMemorySaver()):
        graph = delta_graph(checkpointer, snapshot_frequency)
        for number in range(130 if snapshot_frequency == 1_000 else 8):
            await graph.ainvoke({"messages": [f"{number}"]}, THREAD)
        histories.append([each.values async for each in graph.aget_state_history(THREAD, limit=4)])
    assert histories[0] == histories[1]
    assert len(histories[0][0]["messages"]) in {16, 260}


async def test_pruning_keeps_what_a_delta_channel_is_made_from(saver: ShardedSaver, state: ShardedState) -> None:
    graph = delta_graph(saver, 7)
    for number in range(9):
        await graph.ainvoke({"messages": [f"{number}"]}, THREAD)
    expected = (await graph.aget_state(THREAD)).values
    before = len(await stored(state, prefix="c/"))
    await saver.aprune(["t-1"])
    left = len(await stored(state, prefix="c/"))
    assert 1 < left < before / 2
    assert (await graph.aget_state(THREAD)).values == expected
    assert len((await graph.ainvoke({"messages": ["x"]}, THREAD))["messages"]) == 20


# --- what it costs ---------------------------------------------------------------------------------------------------


async def test_reading_the_latest_checkpoint_costs_the_same_however_many_there_are(
    saver: ShardedSaver, shard: CountingShard
) -> None:
    costs = []
    config = THREAD
    for count in (10, 990):
        config = (await put_many(saver, count, config))[-1]
        await saver.aput_writes(config, [("value", 1)], "task")
        shard.count_from_here()
        found = await saver.aget_tuple(THREAD)
        assert found is not None
        assert found.config == config
        costs.append((shard.reads, shard.entries_read))
    assert costs == [(3, 3), (3, 3)]  # the checkpoint, its only value, its writes


async def test_writing_a_checkpoint_costs_the_same_however_many_there_are(
    saver: ShardedSaver, shard: CountingShard
) -> None:
    config, costs = THREAD, []
    for count in (10, 490):
        config = (await put_many(saver, count, config))[-1]
        shard.count_from_here()
        config = await put(saver, config, 0)
        costs.append((shard.reads, shard.writes))
    assert costs == [(1, 2), (1, 2)]  # is it in the index; its value, itself


async def test_a_list_with_a_limit_reads_no_more_than_it_yields(saver: ShardedSaver, shard: CountingShard) -> None:
    configs = await put_many(saver, 300)
    shard.count_from_here()
    assert await values(saver, thread("t-1", ""), limit=2, before=configs[200]) == [199, 198]
    assert shard.entries_read == 4


# --- listing ---------------------------------------------------------------------------------------------------------


async def test_a_list_of_a_thread_goes_through_its_namespaces(saver: ShardedSaver) -> None:
    for name in ("", "child:1", "child:1|deep:2", "!", "a/b"):
        for number in range(3):
            await put(saver, thread("t-1", name), f"{name} {number}")
    found = [
        (each.config["configurable"]["checkpoint_ns"], each.checkpoint["channel_values"]["value"])
        async for each in saver.alist(THREAD)
    ]
    assert len(found) == 15
    for name in ("", "child:1", "child:1|deep:2", "!", "a/b"):
        own = [value for place, value in found if place == name]
        assert own == await values(saver, thread("t-1", name)) == [f"{name} {number}" for number in (2, 1, 0)]
    assert await values(saver, THREAD, limit=4) == [value for _, value in found[:4]]


async def test_a_list_without_a_config_goes_through_all_threads(saver: ShardedSaver) -> None:
    for number in range(20):
        await put_many(saver, 2, thread(f"t-{number}"))
    found = [each.config["configurable"]["thread_id"] async for each in saver.alist(None)]
    assert sorted(found) == sorted(f"t-{number}" for number in range(20) for _ in range(2))
    assert await values(saver, None, filter={"step": 1}) == [1] * 20
    assert len(await values(saver, None, limit=3)) == 3
    assert await values(saver, None, limit=0) == []
    await saver.adelete_thread("t-7")
    assert len(await values(saver, None)) == 38


async def test_a_list_of_one_checkpoint_is_that_checkpoint(saver: ShardedSaver) -> None:
    configs = await put_many(saver, 3)
    assert await values(saver, configs[1]) == [1]
    assert await values(saver, configs[1], before=configs[1]) == []
    assert await values(saver, configs[1], before=configs[2], filter={"step": 1}) == [1]
    assert await values(saver, thread("t-1", "", str(uuid6()))) == []


# --- writes of tasks -------------------------------------------------------------------------------------------------


async def test_a_write_stays_and_one_of_a_special_kind_is_replaced(saver: ShardedSaver) -> None:
    reference = InMemorySaver()
    found = []
    for checkpointer in (saver, reference):
        config = await put(checkpointer, THREAD)
        await checkpointer.aput_writes(config, [("a", 1), ("b", 2)], "task-2", "path-1")
        await checkpointer.aput_writes(config, [(INTERRUPT, "first")], "task-2", "path-1")
        await checkpointer.aput_writes(config, [("a", 7), ("c", 8), ("d", 9)], "task-2", "path-1")
        await checkpointer.aput_writes(config, [(INTERRUPT, "second"), (ERROR, "e")], "task-2", "path-1")
        await checkpointer.aput_writes(config, [("z", 0)], "task-1", "path-2")
        await checkpointer.aput_writes(config, [("y", 0)], "task-3")
        await checkpointer.aput_writes(config, [], "task-4")
        latest = await checkpointer.aget_tuple(THREAD)
        assert latest is not None
        found.append(latest.pending_writes)
    assert found[0] == found[1]


async def test_concurrent_writes_of_one_task_are_all_kept(saver: ShardedSaver) -> None:
    config = await put(saver, THREAD)
    await asyncio.gather(
        saver.aput_writes(config, [("a", 1)], "task"),
        saver.aput_writes(config, [(ERROR, "e")], "task"),
        saver.aput_writes(config, [(INTERRUPT, "i")], "task"),
    )
    found = await saver.aget_tuple(THREAD)
    assert found is not None
    assert {channel for _, channel, _ in found.pending_writes or ()} == {"a", ERROR, INTERRUPT}


async def test_writes_may_come_before_their_checkpoint(saver: ShardedSaver) -> None:
    checkpoint = empty_checkpoint()
    await saver.aput_writes(thread("t-1", "", checkpoint["id"]), [("a", 1)], "task")
    assert await saver.aget_tuple(THREAD) is None
    await saver.aput(thread("t-1", ""), checkpoint, {}, {})
    found = await saver.aget_tuple(THREAD)
    assert found is not None
    assert found.pending_writes == [("task", "a", 1)]


# --- hostile, large, damaged -----------------------------------------------------------------------------------------

HOSTILE = [
    "",
    " ",
    "/",
    "a/b",
    "a%2Fb",
    "%",
    "%~",
    "..",
    "*",
    "a\0b",
    "\n",
    "}{",
    "thread=a",
    "é",
    "\U0010ffff",
    "x" * 900,
]


async def test_hostile_names_stay_apart(saver: ShardedSaver) -> None:
    places = [(name, "") for name in HOSTILE] + [("t", name) for name in [*HOSTILE[1:], "x" * 5_000, "y" * 5_000]]
    for place in places:
        config = await put(saver, thread(*place), list(place))
        await saver.aput_writes(config, [(place[1] or "a", place)], place[1] or "task", "path")
    for place in places:
        assert await values(saver, thread(*place)) == [list(place)]
        found = await saver.aget_tuple(thread(*place))
        assert found is not None
        assert found.config["configurable"]["checkpoint_ns"] == place[1]
        assert [value for _, _, value in found.pending_writes or ()] == [list(place)]
    assert len(await values(saver, None)) == len(places)


async def test_hostile_channels_stay_apart(saver: ShardedSaver) -> None:
    checkpoint = empty_checkpoint()
    names = [*HOSTILE, "x" * 5_000, "y" * 5_000]
    checkpoint["channel_values"] = {name: [name] for name in names}
    versions: dict[str, str | int | float] = dict.fromkeys(names, 1)
    checkpoint["channel_versions"] = versions
    await saver.aput(thread("t-1", "z" * 5_000), checkpoint, {}, versions)
    found = await saver.aget_tuple(thread("t-1", "z" * 5_000))
    assert found is not None
    assert found.checkpoint == checkpoint


async def test_a_thread_id_that_is_no_key_is_rejected(saver: ShardedSaver) -> None:
    for thread_id in ("x" * 1_100, "\ud800"):
        with pytest.raises(InvalidStateKey, match="thread_id"):
            await put(saver, thread(thread_id))
        with pytest.raises(InvalidStateKey, match="thread_id"):
            await saver.aget_tuple(thread(thread_id))
    with pytest.raises(InvalidSetting, match="thread_id"):
        await saver.aget_tuple({"configurable": {}})


async def test_a_thread_id_that_is_no_text_is_taken_as_one(saver: ShardedSaver) -> None:
    config: RunnableConfig = {"configurable": {"thread_id": 7}}
    await put(saver, config, "seven")
    assert await values(saver, config) == await values(saver, thread("7")) == ["seven"]


async def test_values_larger_than_an_entry_are_kept_in_parts(saver: ShardedSaver, state: ShardedState) -> None:
    large = ["x" * (9 << 20), "y" * 100, "z" * (5 << 20)]
    config = await put(saver, THREAD, large)
    await saver.aput_writes(config, [("value", large), ("other", 1)], "task")
    await saver.aput_writes(config, [(ERROR, large)], "task")
    await saver.acopy_thread("t-1", "t-2")
    for each in ("t-1", "t-2"):
        found = await saver.aget_tuple(thread(each))
        assert found is not None
        assert found.checkpoint["channel_values"] == {"value": large}
        assert found.pending_writes == [("task", ERROR, large), ("task", "value", large), ("task", "other", 1)]
    await put(saver, config, "small")
    await saver.aprune(["t-1"])
    assert [len(await stored(state, prefix=prefix)) for prefix in ("c/", "b/", "w/")] == [1, 1, 0]
    await saver.adelete_thread("t-1")
    assert await stored(state) == []


async def test_a_checkpoint_whose_value_is_gone_is_an_error(saver: ShardedSaver, state: ShardedState) -> None:
    await put(saver, THREAD, 1)
    space = state.namespace("langgraph").namespace("thread=t-1")
    (key,) = await stored(state, prefix="b/")
    await space.delete(key)
    with pytest.raises(CheckpointDamaged, match="channel 'value'"):
        await saver.aget_tuple(THREAD)


# --- pruning and deleting --------------------------------------------------------------------------------------------


async def test_pruning_keeps_the_latest_ones_and_the_values_that_they_have(
    saver: ShardedSaver, state: ShardedState
) -> None:
    configs = await put_many(saver, 250)
    for config in configs[::50]:
        await saver.aput_writes(config, [("value", 1)], "task")
    await put_many(saver, 4, thread("t-1", "child:1"))
    await saver.aprune(["t-1", "none"], keep=3)
    assert await values(saver) == [249, 248, 247, 3, 2, 1]
    assert [len(await stored(state, prefix=prefix)) for prefix in ("c/", "b/", "w/")] == [6, 6, 0]
    await saver.aprune(["t-1"])
    assert await values(saver) == [249, 3]
    await saver.aprune(["t-1"], strategy="delete")
    assert await stored(state) == []
    assert await values(saver, None) == []


async def test_pruning_keeps_a_value_that_several_checkpoints_have(saver: ShardedSaver) -> None:
    first = await put(saver, THREAD, "shared")
    found = await saver.aget_tuple(first)
    assert found is not None
    checkpoint = {**found.checkpoint, "id": str(uuid6())}
    await saver.aput(first, checkpoint, {}, {})  # type: ignore[arg-type]
    await saver.aprune(["t-1"])
    assert await values(saver) == ["shared"]


async def test_a_checkpoint_that_is_written_while_others_are_pruned_stays(
    saver: ShardedSaver, shard: CountingShard
) -> None:
    for operation in range(1, 100):
        config = (await put_many(saver, 4))[-1]
        shard.before_operation(operation, partial(put, saver, config, "new"))
        await saver.aprune(["t-1"])
        if shard.has_more:
            break
        assert await values(saver) in (["new", 3], ["new"])
        await saver.adelete_thread("t-1")
    assert operation > 10


async def test_a_checkpoint_that_is_deleted_while_it_is_read_is_gone_or_whole(
    saver: ShardedSaver, shard: CountingShard
) -> None:
    async def delete() -> None:
        await saver.adelete_thread("t-1")

    found, lists = list[Any](), list[list[Any]]()
    for operation in range(1, 10):
        shard.count_from_here()
        config = (await put_many(saver, 2))[0]
        shard.before_operation(operation, delete)
        found.append(await saver.aget_tuple(config))
        shard.count_from_here()
        await saver.adelete_thread("t-1")
        await put_many(saver, 2)
        shard.before_operation(operation, delete)
        lists.append(await values(saver))
    assert [each is None for each in found] == [True, True, True, *[False] * 6]
    assert lists[0] == lists[1] == []
    assert lists[-1] == [1, 0]


async def test_what_a_crash_left_is_pruned_once_it_is_old(
    saver: ShardedSaver, state: ShardedState, shard: CountingShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = await put(saver, THREAD, "whole")
    with pytest.raises(ShardUnavailable), shard.killed_at(2):  # its value is written, and the checkpoint is not
        await put(saver, config, "x" * (9 << 20))
    await saver.aput_writes(thread("t-1", "", str(uuid6())), [("value", 1)], "task")
    before = await stored(state)
    await saver.aprune(["t-1"])
    assert await stored(state) == before
    now = await state.put("now", 0)
    monkeypatch.setattr("forebay.adapters.langgraph.large_value.wall_time", lambda: now / 1_000_000 + 3_700)
    await saver.aprune(["t-1"])
    assert [len(await stored(state, prefix=prefix)) for prefix in ("c/", "b/", "w/")] == [1, 1, 0]
    assert await values(saver) == ["whole"]


async def test_the_runs_of_which_nothing_is_left_are_not_kept(
    saver: ShardedSaver, state: ShardedState, shard: CountingShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = THREAD
    for number in range(9):
        config = await put(saver, config, number, run_id=f"run-{number}")
    await saver.aprune(["t-1"])
    assert len(await stored(state, prefix="i/")) == 9
    now = await state.put("now", 0)
    monkeypatch.setattr("forebay.adapters.langgraph.large_value.wall_time", lambda: now / 1_000_000 + 3_700)
    await saver.aprune(["t-1"])
    assert len(await stored(state, prefix="i/")) == 1
    assert sum(len(keys) for name, keys in shard._entries.items() if "index=" in name) == 2  # the thread, its run
    assert await values(saver, None) == [8]
    await saver.adelete_for_runs(["run-8"])
    assert await values(saver, None) == []


async def test_what_is_no_way_to_prune_is_rejected(saver: ShardedSaver) -> None:
    with pytest.raises(InvalidSetting, match="keep_latest"):
        await saver.aprune(["t-1"], strategy="all")
    with pytest.raises(InvalidSetting, match="keep"):
        await saver.aprune(["t-1"], keep=0)


async def test_a_deletion_that_is_killed_leaves_no_damaged_checkpoint(
    saver: ShardedSaver, shard: CountingShard
) -> None:
    async def prune() -> None:
        await saver.aprune(["t-1"], keep=2)

    async def delete_run() -> None:
        await saver.adelete_for_runs(["run-1"])

    async def delete() -> None:
        await saver.adelete_thread("t-1")

    for work, left in ((prune, 2), (delete_run, 3), (delete, 0)):
        for write in range(1, 100):
            await saver.adelete_thread("t-1")
            config = THREAD
            for number in range(6):
                config = await put(saver, config, number, run_id=f"run-{number % 2}")
                await saver.aput_writes(config, [("value", 1)], "task")
            try:
                with shard.killed_at(write):
                    await work()
            except ShardUnavailable:
                await values(saver)  # none is damaged
                await values(saver, None)
                await work()
                assert len(await values(saver)) == left
                assert len(await values(saver, None)) == left
            else:
                break
        assert write > 5


async def test_a_run_is_deleted_in_all_threads(saver: ShardedSaver, state: ShardedState) -> None:
    for each in ("t-1", "t-2", "t-3"):
        config = await put(saver, thread(each), "old", run_id="run-1")
        await saver.aput_writes(config, [("value", 1)], "task")
        if each != "t-3":
            config = await put(saver, config, "new", run_id="run-2")
            await put(saver, thread(each, "child"), "child", run_id="run-1")
    await saver.adelete_for_runs(["run-1", "run-1", "none"])
    assert await values(saver, None) == ["new", "new"]
    assert [len(await stored(state, prefix=prefix)) for prefix in ("c/", "b/", "w/", "i/")] == [1, 1, 0, 1]
    assert await stored(state, "t-3") == []
    await put(saver, thread("t-3"), "again", run_id="run-1")
    await saver.adelete_for_runs(["run-1"])
    assert await values(saver, None) == ["new", "new"]


async def test_a_run_goes_on_from_one_that_is_being_deleted(
    saver: ShardedSaver, shard: CountingShard, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = await put(saver, THREAD, "shared", run_id="run-1")
    found = await saver.aget_tuple(config)
    assert found is not None
    checkpoint: Any = {**found.checkpoint, "id": str(uuid6())}
    original, deletions = shard.delete, list[Any]()

    async def delete(*arguments: Any, **options: Any) -> bool:
        deletions.append(arguments)
        if len(deletions) == 1:
            await saver.aput(config, checkpoint, {"run_id": "run-2"}, {})
        return await original(*arguments, **options)

    monkeypatch.setattr(shard, "delete", delete)
    await saver.adelete_for_runs(["run-1"])
    assert deletions
    assert await values(saver) == ["shared"]
    assert await values(saver, None) == ["shared"]


async def test_a_thread_that_is_written_to_after_it_was_deleted_is_listed(
    saver: ShardedSaver, state: ShardedState
) -> None:
    config = await put(saver, THREAD, "old", run_id="run-1")
    await ShardedSaver(state).adelete_thread("t-1")
    await put(saver, config, "new", run_id="run-1")
    assert await values(saver, None) == ["new"]
    await saver.adelete_for_runs(["run-1"])
    assert await values(saver, None) == []


async def test_a_copy_goes_on_by_itself(saver: ShardedSaver) -> None:
    configs = await put_many(saver, 230)
    await saver.aput_writes(configs[-1], [("value", 1)], "task", "path")
    await put_many(saver, 2, thread("t-1", "child"))
    await saver.acopy_thread("t-1", "t-2")
    await saver.acopy_thread("t-1", "t-1")
    expected = [each._replace(config={}, parent_config={}) async for each in saver.alist(THREAD)]
    assert [each._replace(config={}, parent_config={}) async for each in saver.alist(thread("t-2"))] == expected
    await saver.adelete_thread("t-1")
    assert [each._replace(config={}, parent_config={}) async for each in saver.alist(thread("t-2"))] == expected
    assert len(await values(saver, None)) == 232


# --- threads, loops and shards ---------------------------------------------------------------------------------------


async def test_another_thread_uses_the_methods_that_block(saver: ShardedSaver) -> None:
    def use() -> Any:
        graph = StateGraph(Trip).add_node("add", lambda _: {"log": ["b"]}).add_edge(START, "add")
        compiled = graph.compile(checkpointer=saver)
        compiled.invoke({"log": ["a"]}, THREAD)
        saver.copy_thread("t-1", "t-2")
        saver.prune(["t-2"])
        saver.delete_for_runs(["none"])
        logs = [each.checkpoint["channel_values"]["log"] for each in saver.list(thread("t-2"))]
        first = next(saver.list(THREAD)).checkpoint["channel_values"]["log"]
        saver.delete_thread("t-2")
        deltas = saver.get_delta_channel_history(config=THREAD, channels=["log"])
        return logs, first, saver.get_tuple(thread("t-2")), compiled.get_state(THREAD).values, deltas["log"]["seed"]

    found = await asyncio.get_running_loop().run_in_executor(None, use)
    assert found == ([["a", "b"]], ["a", "b"], None, {"log": ["a", "b"]}, ["a"])


async def test_a_method_that_blocks_is_an_error_in_the_loop_of_the_state(saver: ShardedSaver) -> None:
    for call in (
        lambda: saver.get_tuple(THREAD),
        lambda: list(saver.list(THREAD)),
        lambda: saver.put(THREAD, empty_checkpoint(), {}, {}),
        lambda: saver.put_writes(THREAD, [], "task"),
        lambda: saver.delete_thread("t-1"),
        lambda: saver.prune(["t-1"]),
    ):
        with pytest.raises(WouldDeadlock, match="await a"):
            call()


async def test_another_event_loop_may_use_it(saver: ShardedSaver) -> None:
    async def use() -> Any:
        result = await trip_graph(saver, []).ainvoke({"log": ["a"]}, THREAD)
        return result["log"], [each async for each in saver.alist(THREAD, limit=1)]

    log, found = await asyncio.get_running_loop().run_in_executor(None, lambda: asyncio.run(use()))
    assert log == ["a", "plan", "left", "right"]
    assert found == [await saver.aget_tuple(THREAD)]


def test_a_thread_that_waits_for_a_loop_which_has_ended_is_told_so() -> None:
    """Its call is in the queue of the loop, and the loop ends before it is taken up."""
    loop = asyncio.new_event_loop()
    queued, errors, threads = threading.Event(), list[Exception](), list[threading.Thread]()
    original = loop.call_soon_threadsafe

    def call_soon_threadsafe(*args: Any, **options: Any) -> Any:
        handle = original(*args, **options)
        queued.set()
        return handle

    async def main() -> None:
        saver = ShardedSaver(await ShardedState.connect("memory://"))

        def read() -> None:
            try:
                saver.get_tuple(THREAD)
            except NoRunningLoop as error:
                errors.append(error)

        loop.call_soon_threadsafe = call_soon_threadsafe  # type: ignore[assignment, method-assign]
        threads.append(threading.Thread(target=read, daemon=True))
        threads[0].start()
        queued.wait()

    loop.run_until_complete(main())
    loop.close()
    threads[0].join(20.0)
    assert not threads[0].is_alive()
    assert [type(error) for error in errors] == [NoRunningLoop]


def test_a_saver_belongs_to_an_event_loop() -> None:
    async def connect() -> tuple[ShardedState, ShardedSaver]:
        async with await ShardedState.connect("memory://") as state:
            return state, ShardedSaver(state)

    state, saver = asyncio.run(connect())
    with pytest.raises(NoRunningLoop, match="outside of an event loop"):
        ShardedSaver(state)
    with pytest.raises(NoRunningLoop, match="runs no more"):
        saver.get_tuple(THREAD)
    with pytest.raises(NoRunningLoop, match="runs no more"):
        asyncio.run(saver.aget_tuple(THREAD))


async def test_a_thread_needs_no_shard_but_its_own() -> None:
    shards = [CountingShard(f"memory://{letter}") for letter in "abc"]
    async with await ShardedState.connect(*shards) as state:
        saver = ShardedSaver(state)
        places = {
            name: state.namespace("langgraph").namespace(f"thread={name}").shard_of("c/")
            for name in (f"t-{number}" for number in range(30))
        }
        shards[0].fail_at = 0
        for name, url in places.items():
            if url == shards[0].url:
                with pytest.raises(ShardUnavailable, match="memory://a"):
                    await put(saver, thread(name), name, run_id="run")
            else:
                await put(saver, thread(name), name, run_id="run")
        shards[0].fail_at = None
        expected = sorted(name for name, url in places.items() if url != shards[0].url)
        assert 10 < len(expected) < 30
        assert sorted(await values(saver, None)) == expected
        await saver.adelete_for_runs(["run"])
        assert await values(saver, None) == []


async def test_threads_of_different_namespaces_of_a_state_are_apart(state: ShardedState) -> None:
    one, other = ShardedSaver(state.namespace("a")), ShardedSaver(state.namespace("b"))
    await put(one, THREAD, 1)
    await put(other, THREAD, 2)
    assert [await values(each, None) for each in (one, other, ShardedSaver(state))] == [[1], [2], []]


async def test_threads_are_spread_over_shards() -> None:
    shards = [MemoryShard(f"memory://{letter}") for letter in "abc"]
    async with await ShardedState.connect(*shards) as state:
        saver = ShardedSaver(state)
        for number in range(60):
            await put(saver, thread(f"t-{number}"))
        spread = [sum("thread=" in name for name in shard._entries) for shard in shards]
    assert sum(spread) == 60
    assert min(spread) > 10


async def test_a_clone_with_another_allowlist_keeps_the_threads(saver: ShardedSaver) -> None:
    await put(saver, THREAD, 1)
    clone = saver.with_allowlist([("a", "B")])
    assert await values(clone) == [1]
