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

from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from langchain_core.runnables.config import var_child_runnable_config
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.errors import EmptyInputError
from langgraph.graph import StateGraph
from langgraph.graph.state import CompiledStateGraph
from langgraph.pregel import Pregel
from langgraph.types import Command

from forebay.adapters.handler import Config, Handler
from forebay.adapters.langchain import CODEC
from forebay.context import progress
from forebay.errors import InvalidHandler, InvalidSetting, UnusableTask

if TYPE_CHECKING:
    from forebay.task import Task

_ROOT = "__root__"  # the only channel of a graph whose state is one value of any type
_INTERRUPT = "__interrupt__"  # the key of interrupts, in updates and in results


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
    run_config, context = _configure(graph, worker, config, task)
    # Submitted from inside a node of another graph, this run would otherwise be treated as a subgraph of that one.
    outer = var_child_runnable_config.set(None)
    try:
        return await _stream(graph, task.payload, run_config, context)
    except EmptyInputError:
        if task.payload is None:
            raise _no_input(worker) from None
        raise
    finally:
        var_child_runnable_config.reset(outer)


async def _stream(graph: Pregel[Any, Any, Any, Any], payload: Any, config: Any, context: Any) -> Any:
    """Return what ``ainvoke`` returns, and pass the other chunks of the stream on as progress."""
    latest: Any = None
    interrupts: list[Any] = []
    stream = graph.astream(
        payload,
        config,
        context=context,
        stream_mode=["updates", "custom", "values"],
        output_keys=graph.output_channels,  # else a private part of the state would be in the result
    )
    async with aclosing(cast("AsyncGenerator[tuple[str, Any]]", stream)) as chunks:
        async for mode, chunk in chunks:
            if mode == "values":
                latest = chunk
                continue
            if mode == "updates" and isinstance(chunk, dict):
                interrupts.extend(chunk.get(_INTERRUPT, ()))
            progress(chunk)
    if not interrupts:
        return latest
    return {**(latest if isinstance(latest, dict) else {}), _INTERRUPT: interrupts}


def _configure(
    graph: Pregel[Any, Any, Any, Any], worker: str, config: Config | None, task: Task
) -> tuple[dict[str, Any], Any]:
    """Return the config and the static context of one run; a config made for the task overrides a fixed one."""
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
        "forebay_task_id": task.task_id,
        "forebay_task_type": task.task_type,
        "forebay_tenant": task.tenant,
        "forebay_priority": task.priority.name,
        **(given.get("metadata") or {}),
    }
    run_config = {**given, "configurable": configurable, "metadata": metadata}
    return run_config, run_config.pop("context", None)


def _check_thread_id(graph: Pregel[Any, Any, Any, Any], worker: str) -> None:
    """Check that LangGraph would run `graph` without a thread id."""
    bound = (graph.config or {}).get("configurable") or {}
    if isinstance(graph.checkpointer, BaseCheckpointSaver) and "thread_id" not in bound:
        expected = f"set: the graph of worker {worker!r} keeps its memory by thread, in a checkpointer"
        raise UnusableTask(field="thread_id", value=None, expected=expected)


def _check_payload(graph: Pregel[Any, Any, Any, Any], worker: str, task: Task) -> None:
    """Check that a payload can be the input of a graph with a state: LangGraph fails on plain values."""
    payload = task.payload
    if payload is None and not graph.checkpointer:  # with a checkpointer, it resumes the thread
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
