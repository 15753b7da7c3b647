"""Handler: what every agent is turned into before a worker runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from forebay.interfaces import Codec
from forebay.task import Task


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """What runs a task.

    Attributes:
        call: given the task, returns the value or an awaitable of it; the engine awaits what is awaitable.
        blocking: whether `call` is to run in a thread of the engine's, since it does not yield to the loop.
        on_cancel: how to stop a run that cancellation alone does not stop; called once, in the loop, just before the
            run is cancelled. None: there is nothing more to be done, and a thread runs on to its end.
        on_end: called in the loop once a run has really ended.
        inner: the nested supervisor that it stands for, if it does.
        load: for a handler with a gate of its own, such as a nested supervisor: its load for a task type, 1.0 is full.
        start: awaited when the supervisor that it is registered with starts, or on registration after that.
        stop: awaited when that supervisor closes.
        codec: how its payloads and results travel where no type is declared for them; None: as plain data.
    """

    call: Callable[[Task], Any]
    blocking: bool = False
    on_cancel: Callable[[Task], object] | None = None
    on_end: Callable[[Task], None] | None = None
    nested_supervisor: object | None = None
    load: Callable[[str], float] | None = None
    start: Callable[[], Awaitable[object]] | None = None
    stop: Callable[[], Awaitable[object]] | None = None
    codec: Codec | None = None

    def with_on_cancel(self, on_cancel: Callable[[Task], object]) -> Handler:
        """The same, stopped by `on_cancel`."""
        return replace(self, on_cancel=on_cancel)


class SupportsHandler(Protocol):
    """An object that knows how to be a worker's handler: a nested supervisor, a saga, or one of yours."""

    def __forebay_handler__(self) -> Handler:
        """The handler that runs tasks on this object."""
