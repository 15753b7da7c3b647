"""Handler: the form that every agent is given before a worker runs it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

from forebay.interfaces import Codec
from forebay.task import Task

#: The configuration that a framework's agent is registered with: the framework's own, or a callable that makes one for
#: each task.
Config: TypeAlias = Mapping[str, Any] | Callable[[Task], Mapping[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Handler:
    """The callables and properties by which a worker runs tasks.

    What they raise costs no slot and no ticket, and they may call the supervisor. Only `call` decides about its task.

    Attributes:
        call: takes the task and returns its value or an awaitable of it; the engine awaits an awaitable.
        blocking: True if `call` needs a thread, because it does not yield to the event loop.
        on_cancel: stops a run that cancellation alone does not stop; called once, in the loop, just before the run is
            cancelled. None: nothing more can be done, and a thread runs on to its end.
        check: called with each task that is submitted, and raises UnusableTask for one that `call` can only fail on.
        on_end: called in the loop once a run has really ended.
        nested_supervisor: the supervisor behind this handler, if there is one.
        load: for a handler with admission of its own, such as a nested supervisor: its load for a task type, where 1.0
            is full.
        start: awaited when the supervisor that it is registered with starts, or on registration after that.
        stop: awaited when that supervisor closes.
        resize: called with the new number of slots when its worker is resized.
        saga: the saga behind this handler, if there is one. Its supervisor drives it, and does not use `call`.
        codec: converts its payloads and results where no type is declared for them; None: they are plain data.
        single_use: True if the agent keeps state from run to run, or can run one task at a time: a worker takes it from
            a factory only.
    """

    call: Callable[[Task], Any]
    blocking: bool = False
    on_cancel: Callable[[Task], object] | None = None
    check: Callable[[Task], None] | None = None
    on_end: Callable[[Task], None] | None = None
    nested_supervisor: object | None = None
    load: Callable[[str], float] | None = None
    start: Callable[[], Awaitable[object]] | None = None
    stop: Callable[[], Awaitable[object]] | None = None
    codec: Codec | None = None
    resize: Callable[[int], None] | None = None
    saga: object | None = None
    single_use: bool = False


class SupportsHandler(Protocol):
    """An object that can be registered as a worker's handler: a nested supervisor, a saga, or one of yours."""

    def __forebay_handler__(self) -> Handler:
        """Return the handler that runs tasks on this object."""
