"""What a task hands to its calls: the run that is under way in this context, and `progress`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import Any, Protocol

from forebay.task import Deadline, Task


class RunningTask(Protocol):
    """A task while its handler runs, as the calls made inside it see it."""

    task: Task
    deadline: Deadline | None  # its own or its parent's, whichever is earlier

    @property
    def attempt(self) -> int:
        """Which start of its handler this is, from 1."""

    def report(self, value: Any) -> None:
        """Hand `value` to whoever listens to the task's events. Callable from any thread."""


_current: ContextVar[RunningTask | None] = ContextVar("forebay_running_task", default=None)
current = _current.get
enter = _current.set


def progress(value: Any) -> None:
    """Report progress of the task that is running here; its listeners get it from ``ticket.events()``.

    Works in threads too. Outside of a task it does nothing, so that a handler can be called by itself.
    """
    running = _current.get()
    if running is not None:
        running.report(value)
