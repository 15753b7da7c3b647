"""The context of a call: the task that is running here, what its supervisor learns from its calls, and `progress`."""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, Protocol, cast

from forebay.task import Deadline, Task

if TYPE_CHECKING:
    from forebay.errors import Overloaded
    from forebay.interfaces import LoadSource


class CallObserver(Protocol):
    """A run whose supervisor learns from its calls which load sources it depends on.

    Attributes:
        rejections: the rejections of its calls for good, by source; its further calls there fail at once.
    """

    rejections: dict[object, Overloaded] | None

    def record_call(self, source: LoadSource) -> None:
        """Note that the run calls `source`; the other runs of its worker depend on it too. Callable from any thread."""

    def record_rejection(self, by: object, error: Overloaded) -> None:
        """Note that `by` rejected a call for good: unless the run succeeds all the same, it ends as Overloaded."""

    def record_upstream_fault(self) -> None:
        """Note that a call failed by the upstream's fault: if the run fails, that does not count against its worker."""


class RunningTask(Protocol):
    """A task while its handler runs, as the calls made inside it see it.

    Attributes:
        task: the task.
        deadline: its own or its parent's, whichever is earlier.
    """

    task: Task
    deadline: Deadline | None

    @property
    def attempt(self) -> int:
        """Number of the handler's start, from 1."""

    def report(self, value: Any) -> None:
        """Pass `value` to the listeners of the task's events. Callable from any thread."""


_current: ContextVar[RunningTask | None] = ContextVar("forebay_running_task", default=None)
running_task = _current.get
set_running_task = _current.set


def call_observer() -> CallObserver | None:
    """Return the run that is under way here, if its supervisor learns from its calls; not so in a worker process."""
    running = _current.get()
    return cast("CallObserver", running) if hasattr(running, "record_call") else None


def progress(value: Any) -> None:
    """Report progress of the running task; listeners get it from ``ticket.events()``.

    It works in threads too. Outside a task it does nothing, so that a handler can be called by itself.
    """
    running = _current.get()
    if running is not None:
        running.report(value)
