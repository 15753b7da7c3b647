"""The running task in this context, as the calls made inside it see it, and `progress`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, cast

from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.errors import Overloaded
    from forebay.interfaces import LoadSource


class CallObserver(Protocol):
    """A run whose supervisor observes its calls."""

    rejections: dict[object, Overloaded] | None  # by source: further calls there fail at once

    def record_call(self, source: LoadSource) -> None:
        """Record that its calls use `source`, as do those of other runs of its worker. Callable from any thread."""

    def record_rejection(self, by: object, error: Overloaded) -> None:
        """Record that `by` rejected a call for good: unless the run still succeeds, it ends as Overloaded."""

    def record_upstream_fault(self) -> None:
        """Record that a call failed because of the upstream: if the run fails too, its worker is not to blame."""


class RunningTask(Protocol):
    """A task whose handler is running."""

    task: Task
    deadline: Deadline | None  # its own or its parent's, whichever is earlier

    @property
    def attempt(self) -> int:
        """Return the number of this start of the handler, from 1."""

    def report(self, value: Any) -> None:
        """Deliver `value` to the listeners of the task's events. Callable from any thread."""


_current: ContextVar[RunningTask | None] = ContextVar("forebay_running_task", default=None)
running_task = _current.get
set_running_task = _current.set


def call_observer() -> CallObserver | None:
    """Return the run in this context if its supervisor observes its calls; None in a worker's process, or outside."""
    running = _current.get()
    return cast("CallObserver", running) if hasattr(running, "record_call") else None


def progress(value: Any) -> None:
    """Report progress of the running task; listeners get it from ``ticket.events()``.

    Works in threads too. Outside of a task it does nothing, so that a handler can be called directly, as in a test.
    """
    running = _current.get()
    if running is not None:
        running.report(value)
