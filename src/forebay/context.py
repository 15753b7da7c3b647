"""What a task hands to its calls: the run that is under way in this context, and `progress`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, cast

from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.errors import Overloaded
    from forebay.interfaces import LoadSource


class CallObserver(Protocol):
    """A run whose supervisor wants to know what its calls draw on."""

    rejections: dict[object, Overloaded] | None  # by what refused it for good: its further calls there fail at once

    def record_call(self, source: LoadSource) -> None:
        """Its calls draw on `source`: so do those of other runs of its worker. Callable from any thread."""

    def record_rejection(self, by: object, error: Overloaded) -> None:
        """A call of it was refused for good by `by`: unless it succeeds all the same, it ends as Overloaded."""

    def record_upstream_fault(self) -> None:
        """A call of it failed for a reason that is the upstream's: if it fails, its worker is not to blame."""


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
running_task = _current.get
set_running_task = _current.set


def call_observer() -> CallObserver | None:
    """The run that is under way here, if its supervisor wants to know what it draws on; not so in a process apart."""
    running = _current.get()
    return cast("CallObserver", running) if hasattr(running, "record_call") else None


def progress(value: Any) -> None:
    """Report progress of the task that is running here; its listeners get it from ``ticket.events()``.

    Works in threads too. Outside of a task it does nothing, so that a handler can be called by itself.
    """
    running = _current.get()
    if running is not None:
        running.report(value)
