"""A fresh agent for each task, for frameworks whose agents carry state from run to run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from forebay.adapters.detect import Config, as_handler
from forebay.adapters.handler import Handler
from forebay.errors import InvalidHandler
from forebay.task import Task


def handler_from_factory(
    factory: Callable[[], Any], *, worker: str = "handler", config: Config | None = None
) -> Handler:
    """A Handler that calls `factory` for each task and runs the task on what it makes.

    It is called once at registration too, to learn whether what it makes runs in a thread, and to find mistakes then.

    Raises:
        InvalidHandler: `factory` is not callable, or makes what cannot be run.
    """
    if not callable(factory):
        hint = "factory= takes a callable without arguments that makes an agent"
        raise InvalidHandler(worker=worker, type=type(factory).__name__, hint=hint)
    sample = as_handler(factory(), worker=worker, config=config)
    live: dict[str, Handler] = {}

    def call(task: Task) -> Any:
        handler = live[task.task_id] = as_handler(factory(), worker=worker, config=config)
        return handler.call(task)

    def on_cancel(task: Task) -> object:
        handler = live.get(task.task_id)
        return None if handler is None or handler.on_cancel is None else handler.on_cancel(task)

    def on_end(task: Task) -> None:
        live.pop(task.task_id, None)

    return Handler(
        call=call,
        blocking=sample.blocking,
        on_cancel=None if sample.on_cancel is None else on_cancel,
        on_end=on_end,
        codec=sample.codec,
    )
