"""A new agent for each task, for frameworks whose agents carry state from run to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forebay.adapters.detect import advice_on_name, as_handler
from forebay.adapters.handler import Config, Handler
from forebay.errors import InvalidHandler
from forebay.task import Task


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

    The factory is also called once here, to learn whether its agents need a thread, and to find mistakes early.

    Args:
        factory: makes an agent.
        worker: the worker's name, for messages.
        config: the framework's own configuration, or a callable that makes one for a task.

    Raises:
        InvalidHandler: `factory` is not callable, or its agent cannot be run.
    """
    check_factory(factory, worker)
    sample = as_handler(factory(), worker=worker, config=config, for_one_task=True)
    live: dict[str, Handler] = {}

    def call(task: Task) -> Any:
        handler = live[task.task_id] = as_handler(factory(), worker=worker, config=config, for_one_task=True)
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
        on_end=on_end,
        check=sample.check,
        codec=sample.codec,
    )
