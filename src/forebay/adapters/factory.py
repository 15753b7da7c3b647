"""A new agent for each task, for frameworks whose agents carry state from run to run."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from contextvars import copy_context
from typing import Any, Final

from forebay.adapters.detect import advice_on_name, as_handler
from forebay.adapters.handler import Config, Handler
from forebay.errors import InvalidHandler
from forebay.task import Task

_SAME_AGENT: Final = (
    "factory= has returned the same object twice, which keeps state from run to run: let it make a new one each time"
)


def check_factory(factory: Any, worker: str) -> None:
    """Check that `factory` can be called; `worker` is the worker's name, for the message.

    Raises:
        InvalidHandler: it is not callable.
    """
    if not callable(factory):
        hint = "factory= takes a callable without arguments that makes an agent"
        if isinstance(factory, str):
            hint = advice_on_name(factory)
        raise InvalidHandler(worker=worker, type=type(factory).__name__, hint=hint)


def handler_from_factory(
    factory: Callable[[], Any], *, worker: str = "handler", config: Config | None = None
) -> Handler:
    """Return a Handler that calls `factory` for each task and runs the task on the agent that it returns.

    The factory is also called once here, to find mistakes early, and to learn whether its agents need a thread. That
    agent runs no task; it checks the tasks that are submitted.

    Args:
        factory: makes an agent.
        worker: the worker's name, for messages.
        config: the framework's own configuration, or a callable that makes one for a task.

    Raises:
        InvalidHandler: `factory` is not callable, or its agent cannot be run. A task fails with it if `factory` returns
            an agent that keeps state a second time.
    """
    check_factory(factory, worker)
    live: dict[str, Handler] = {}
    made: weakref.WeakValueDictionary[int, Any] = weakref.WeakValueDictionary()

    def make() -> Handler:
        agent = factory()
        handler = as_handler(agent, worker=worker, config=config, from_factory=True)
        if handler.single_use:
            if made.get(id(agent)) is agent:
                raise InvalidHandler(worker=worker, type=type(agent).__name__, hint=_SAME_AGENT)
            with contextlib.suppress(TypeError):  # not all objects can be watched
                made[id(agent)] = agent
        return handler

    sample = copy_context().run(make)  # what it sets there, such as the run that CrewAI notes, is not for later tasks

    def call(task: Task) -> Any:
        handler = live[task.task_id] = make()
        return handler.call(task)

    def on_cancel(task: Task) -> object:
        handler = live.get(task.task_id)
        return None if handler is None or handler.on_cancel is None else handler.on_cancel(task)

    def on_end(task: Task) -> None:
        handler = live.pop(task.task_id, None)
        if handler is not None and handler.on_end is not None:
            handler.on_end(task)

    return Handler(
        call=call,
        blocking=sample.blocking,
        on_cancel=None if sample.on_cancel is None else on_cancel,
        check=sample.check,
        on_end=on_end,
        codec=sample.codec,
    )
