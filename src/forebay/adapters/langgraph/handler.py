"""A compiled LangGraph graph as a handler: its input is the payload, its result what ``ainvoke`` returns.

LangGraph 1.2 treats a run as follows:

- Cancelling the run cancels its async nodes and waits for them to end. A *plain* node runs in the event loop's default
  executor; cancelling leaves its thread running, and the run ends without it.
- That executor is asyncio's own, of few threads (``min(32, cpus + 4)``), shared by all graphs, and no config selects
  another: a graph of plain nodes runs no wider than that, whatever ``max_concurrent`` says, unless the loop was given a
  larger one with ``loop.set_default_executor``.
- Context variables reach the nodes, plain ones too.
"""

from __future__ import annotations

import re
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, cast, get_args

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import EmptyInputError
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.types import Command, StreamMode

from forebay.adapters.handler import Config, Handler
from forebay.adapters.langchain import CODEC
from forebay.context import progress, running_task
from forebay.errors import InvalidHandler, InvalidSetting, UnusableTask
from forebay.task import INTERRUPTS, Resume

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import CheckpointTuple

    from forebay.task import Task

_ROOT = "__root__"  # the only channel of a graph whose state is one value of any type
# The channels of interrupts, answers and errors among the writes of a checkpoint. A task with others has ended.
_INTERRUPT, _RESUME, _ERROR = "__interrupt__", "__resume__", "__error__"
_ANSWERING = "__forebay_answering__"  # the channel in which it is written which interrupt a submission answers
_INTERRUPT_ID = re.compile("[0-9a-f]{32}")  # else LangGraph takes a mapping by it for an answer
_TASK_ID, _SUBMISSION = "forebay_task_id", "forebay_submission"  # in the metadata of checkpoints


def handler(graph: Any, *, worker: str, config: Config | None) -> Handler:
    """Return the handler that runs tasks on `graph`.

    `config` is a RunnableConfig, or a callable that makes one for a task; its key ``"context"``, if any, is the graph's
    static context. ``configurable.thread_id`` is the task's thread_id; it overrides that of a fixed config, and is
    overridden by that of a callable. The run's metadata has ``forebay_task_id``, ``forebay_task_type``,
    ``forebay_tenant``, ``forebay_priority``.

    A task that the graph cannot run (without a thread id that its checkpointer needs, or with a payload that is no
    input of a graph) is refused when it is submitted, as far as that can be known then.

    Raises:
        InvalidHandler: `graph` is not a compiled graph.
    """
    if isinstance(graph, StateGraph):
        raise InvalidHandler(worker=worker, type=type(graph).__name__, hint="compile it first: graph.compile()")
    if not isinstance(graph, Pregel):
        hint = "pass a compiled graph, or an async function that takes the Task and calls this object"
        raise InvalidHandler(worker=worker, type=type(graph).__name__, hint=hint)
    if isinstance(config, Mapping):
        _check_streaming(worker, config)
    call, check = partial(_run, graph, worker, config), partial(_check, graph, worker, config)
    return Handler(call=call, check=check, codec=CODEC)


def _check(graph: Pregel[Any, Any, Any, Any], worker: str, config: Config | None, task: Task) -> None:
    """Check that `graph` can run a task; a config that is made for the task may still give it a thread id.

    Raises:
        UnusableTask: it cannot, whatever its nodes do.
    """
    _check_payload(graph, worker, task)
    if callable(config) or task.thread_id is not None:
        return
    if "thread_id" not in ((config or {}).get("configurable") or {}):
        _check_thread_id(graph, worker)


async def _run(graph: Pregel[Any, Any, Any, Any], worker: str, config: Config | None, task: Task) -> Any:
    _check_payload(graph, worker, task)
    run = _configure(graph, worker, config, task)
    # Submitted from inside a node of another graph, this run would otherwise be treated as a subgraph of that one.
    outer = var_child_runnable_config.set(None)
    try:
        return await _stream(graph, await _input(graph, worker, task, run), run, durable=task.durable)
    except EmptyInputError:
        if task.payload is None:
            raise _no_input(worker) from None
        raise
    finally:
        var_child_runnable_config.reset(outer)


async def _input(graph: Pregel[Any, Any, Any, Any], worker: str, task: Task, run: _RunConfig) -> Any:
    """Return the input of one attempt: none, if an earlier one has left a checkpoint to go on from.

    Its metadata say of which submission it is. What that submission has put into the graph is in it, and what its nodes
    have returned. With the input once more, the user's message would stand there twice, and nodes be paid twice.
    """
    saver, running = graph.checkpointer, running_task()
    configurable = run.config["configurable"]
    if not isinstance(saver, BaseCheckpointSaver) or running is None:
        return _command(task.payload, task.payload.interrupt_id) if isinstance(task.payload, Resume) else task.payload
    # The newest one: an attempt that began at an older `checkpoint_id` has left its own behind it.
    newest = {name: value for name, value in configurable.items() if name != "checkpoint_id"}
    found = await saver.aget_tuple({"configurable": {"checkpoint_ns": "", **newest}})
    metadata: Mapping[str, Any] = {} if found is None else found.metadata
    run.config["metadata"][_SUBMISSION] = running.submission
    if (metadata.get(_TASK_ID), metadata.get(_SUBMISSION)) == (task.task_id, running.submission):
        run.config["configurable"] = newest
        return None
    if not isinstance(task.payload, Resume):
        return task.payload
    if "checkpoint_id" in configurable:
        asking = await saver.aget_tuple({"configurable": {"checkpoint_ns": "", **configurable}})
        if asking is not None and any(channel == _INTERRUPT for _, channel, _ in asking.pending_writes or ()):
            return _command(task.payload, task.payload.interrupt_id)
    elif found is not None:
        thread, waiting = _Thread(graph, saver, newest), _waiting(found)
        submission = f"{task.task_id}/{running.submission}"
        if (begun := _begun_answer(found, submission)) is not None:
            return await _repeated_answer(thread, found, task.payload, begun)
        if waiting and task.payload.interrupt_id in {None, *waiting}:
            return await _answer(thread, found, waiting, task.payload, submission)
    expected = f"the input of the graph of worker {worker!r}: its thread {task.thread_id!r} waits for no answer"
    if task.payload.interrupt_id is not None:
        expected += f" to interrupt {task.payload.interrupt_id!r}"
    raise UnusableTask(field="payload", value="Resume", expected=expected)


def _waiting(found: CheckpointTuple) -> dict[str, str]:
    """Return what the graph has asked, and waits for: the task of the graph that asks, by the id of the interrupt."""
    writes = found.pending_writes or ()
    ended = {task for task, channel, _ in writes if channel not in {_INTERRUPT, _RESUME, _ERROR}}
    return {
        each.id: task
        for task, channel, interrupts in writes
        if channel == _INTERRUPT and task not in ended
        for each in interrupts
    }


class _Thread(NamedTuple):
    """A thread of a graph, or of a subgraph of it.

    Attributes:
        graph: the graph.
        saver: has its checkpoints.
        configurable: names the thread.
    """

    graph: Pregel[Any, Any, Any, Any]
    saver: BaseCheckpointSaver[Any]
    configurable: Mapping[str, Any]

    async def answers(self, found: CheckpointTuple, asking: str) -> int:
        """Return how many answers a task of the graph has got, or the tasks that ask in the subgraph that it runs."""
        count = 0
        for task, channel, answers in found.pending_writes or ():
            if (task, channel) == (asking, _RESUME):
                count += len(answers) if isinstance(answers, list) else 1
        path = found.config["configurable"].get("checkpoint_ns") or ""
        for name, node in self.graph.nodes.items():
            for subgraph in node.subgraphs or ():
                if isinstance(subgraph, Pregel):
                    inner = f"{path}|{name}:{asking}" if path else f"{name}:{asking}"
                    below = await self.saver.aget_tuple({"configurable": {**self.configurable, "checkpoint_ns": inner}})
                    if below is None:
                        continue
                    for each in set(_waiting(below).values()):
                        count += await self._replace(graph=subgraph).answers(below, each)
        return count


class _BegunAnswer(NamedTuple):
    """An answer that a submission has begun to give.

    Attributes:
        interrupt_id: what it answers.
        asking: the task of the graph that asks.
        answers: how many answers that had before.
    """

    interrupt_id: str
    asking: str
    answers: int


def _begun_answer(found: CheckpointTuple, submission: str) -> _BegunAnswer | None:
    """Return the answer that earlier attempts of a submission have begun to give at a checkpoint."""
    writes = found.pending_writes or ()
    begun = (value for task, channel, value in writes if (task, channel) == (submission, _ANSWERING))
    return next((_BegunAnswer(*value) for value in begun), None)


async def _answer(
    thread: _Thread, found: CheckpointTuple, waiting: Mapping[str, str], payload: Resume, submission: str
) -> Command[Any]:
    """Return the input of the first attempt to answer, once it is written beside the checkpoint what it answers."""
    interrupt_id = payload.interrupt_id or next(iter(waiting))
    if payload.interrupt_id is None and len(waiting) > 1:
        return Command(resume=payload.value)  # LangGraph says that an id is needed
    asking = waiting[interrupt_id]
    begun = _BegunAnswer(interrupt_id, asking, await thread.answers(found, asking))
    await thread.saver.aput_writes(found.config, [(_ANSWERING, list(begun))], submission)
    return _command(payload, interrupt_id)


async def _repeated_answer(
    thread: _Thread, found: CheckpointTuple, payload: Resume, begun: _BegunAnswer
) -> Command[Any] | None:
    """Return the input of a repeated attempt to answer: none, if the graph has got the answer.

    Given once more, it would be taken for that to the next question of the same node.
    """
    if await thread.answers(found, begun.asking) > begun.answers:
        return None
    return _command(payload, begun.interrupt_id)


def _command(payload: Resume, interrupt_id: str | None) -> Command[Any]:
    """Return the input that answers an interrupt; None: the one that the graph waits for."""
    by_id = interrupt_id is not None and _INTERRUPT_ID.fullmatch(interrupt_id)
    return Command(resume={interrupt_id: payload.value} if by_id else payload.value)


async def _stream(graph: Pregel[Any, Any, Any, Any], payload: Any, run: _RunConfig, *, durable: bool) -> Any:
    """Return what ``ainvoke`` returns, and pass the other chunks of the stream on as progress."""
    latest: Any = None
    interrupts: dict[str, Any] = {}
    stream = graph.astream(
        payload,
        cast("RunnableConfig", run.config),
        context=run.context,
        stream_mode=list(dict.fromkeys((*run.stream_modes, "updates", "values"))),
        subgraphs=run.subgraphs,
        output_keys=graph.output_channels,  # else a private part of the state would be in the result
        # What a node has returned is stored before the next one begins: a killed process repeats one node at most.
        durability="sync" if durable and isinstance(graph.checkpointer, BaseCheckpointSaver) else None,
    )
    async with aclosing(cast("AsyncGenerator[tuple[Any, ...]]", stream)) as chunks:
        async for *paths, mode, chunk in chunks:
            path = paths[0] if paths else ()  # of the subgraph; empty: the graph itself
            if not path and mode == "values":
                latest = chunk
            if not path and mode == "updates" and isinstance(chunk, dict):
                interrupts.update((each.id, each) for each in chunk.get(INTERRUPTS, ()))
            if mode in run.stream_modes:
                progress(run.shown(path, mode, chunk))
    if not interrupts:
        return latest
    return {**(latest if isinstance(latest, dict) else {}), INTERRUPTS: list(interrupts.values())}


class _RunConfig(NamedTuple):
    """The configuration of one run.

    Attributes:
        config: the RunnableConfig; its own, with "configurable" and "metadata".
        context: the static context of the graph.
        stream_modes: what of the graph's stream is progress.
        subgraphs: whether that of its subgraphs is.
        is_tagged: whether each chunk is shown with its mode, as ``astream`` does if it is given several.
    """

    config: dict[str, Any]
    context: Any
    stream_modes: Sequence[StreamMode]
    subgraphs: bool
    is_tagged: bool

    def shown(self, path: tuple[str, ...], mode: str, chunk: Any) -> Any:
        """Return a chunk as ``astream`` would yield it."""
        if not self.subgraphs:
            return (mode, chunk) if self.is_tagged else chunk
        return (path, mode, chunk) if self.is_tagged else (path, chunk)


def _configure(graph: Pregel[Any, Any, Any, Any], worker: str, config: Config | None, task: Task) -> _RunConfig:
    """Return the configuration of one run; a config made for the task overrides a fixed one."""
    made = callable(config)
    given = config(task) if callable(config) else config or {}
    if not isinstance(given, Mapping):
        expected = "a plain callable that returns a RunnableConfig, a mapping"
        raise InvalidSetting(owner=f"worker {worker!r}", name="config", value=type(given).__name__, expected=expected)

    thread = {} if task.thread_id is None else {"thread_id": task.thread_id}
    own = given.get("configurable") or {}
    configurable = {**thread, **own} if made else {**own, **thread}
    if "thread_id" not in configurable:
        _check_thread_id(graph, worker)

    metadata = {
        _TASK_ID: task.task_id,
        "forebay_task_type": task.task_type,
        "forebay_tenant": task.tenant,
        "forebay_priority": task.priority.name,
        **(given.get("metadata") or {}),
    }
    run_config = {**given, "configurable": configurable, "metadata": metadata}
    _check_streaming(worker, run_config)
    modes = run_config.pop("stream_mode", None)
    return _RunConfig(
        config=run_config,
        context=run_config.pop("context", None),
        stream_modes=("updates", "custom") if modes is None else _listed(modes),
        subgraphs=run_config.pop("subgraphs", False),
        is_tagged=isinstance(modes, list | tuple),
    )


def _check_streaming(worker: str, config: Mapping[str, Any]) -> None:
    """Check the part of a config that says what progress is.

    Raises:
        InvalidSetting: LangGraph has no such mode.
    """
    owner, known = f"the config of worker {worker!r}", get_args(StreamMode)
    modes, subgraphs = config.get("stream_mode"), config.get("subgraphs", False)
    if modes is not None and not (_listed(modes) and all(each in known for each in _listed(modes))):
        expected = f"one of LangGraph's stream modes, or a list of them: {', '.join(known)}"
        raise InvalidSetting(owner=owner, name="stream_mode", value=modes, expected=expected)
    if not isinstance(subgraphs, bool):
        raise InvalidSetting(owner=owner, name="subgraphs", value=subgraphs, expected="True or False")


def _listed(modes: Any) -> Sequence[StreamMode]:
    return tuple(modes) if isinstance(modes, list | tuple) else (modes,)


def _check_thread_id(graph: Pregel[Any, Any, Any, Any], worker: str) -> None:
    """Check that LangGraph would run `graph` without a thread id."""
    bound = (graph.config or {}).get("configurable") or {}
    if isinstance(graph.checkpointer, BaseCheckpointSaver) and "thread_id" not in bound:
        expected = f"set: the graph of worker {worker!r} keeps its memory by thread, in a checkpointer"
        raise UnusableTask(field="thread_id", value=None, expected=expected)


def _check_payload(graph: Pregel[Any, Any, Any, Any], worker: str, task: Task) -> None:
    """Check that a payload can be the input of a graph with a state: LangGraph fails on plain values."""
    payload = task.payload
    if (payload is None or isinstance(payload, Resume)) and not graph.checkpointer:  # with one, it resumes the thread
        raise _no_input(worker)
    if not isinstance(graph, CompiledStateGraph) or _ROOT in graph.channels:
        return
    if isinstance(payload, list | tuple) and any(isinstance(part, Command) for part in payload):
        return
    if isinstance(payload, str | bytes | int | float | list | tuple | set | frozenset):
        expected = f"a dict, or a Command, with the input of the graph of worker {worker!r}"
        raise UnusableTask(field="payload", value=type(payload).__name__, expected=expected)


def _no_input(worker: str) -> UnusableTask:
    expected = f"the input of the graph of worker {worker!r}, which has nothing to resume"
    return UnusableTask(field="payload", value=None, expected=expected)
