"""The running task of the current context, the observer of its calls, and `progress`."""

from __future__ import annotations

import os
from contextvars import Context, ContextVar
from typing import TYPE_CHECKING, Any, Final, Protocol, cast

import msgspec

from forebay.task import Deadline, Priority, Task

if TYPE_CHECKING:
    from forebay.call_usage import CallUsage
    from forebay.errors import Overloaded
    from forebay.interfaces import LoadSource


# The context of all tasks whose submitters have no variables: one object less for each task that waits. Nothing runs in
# it, only in copies of it.
NO_VARIABLES: Final = Context()


class EventReceiver(Protocol):
    """A supervisor, as a receiver of the events of upstreams."""

    def receive(self, event: Any) -> None:
        """Deliver an `Event` to the sinks and subscriptions. Callable from any thread; it calls no user code."""


class CallObserver(Protocol):
    """A run that reports its calls to its supervisor, which learns from them which load sources it depends on."""

    def rejection_by(self, by: object) -> Overloaded | None:
        """Return the error with which a call fails at once, because `by` rejected an earlier call of the run for good.

        None if it rejected none, or once the time has passed after which that call could come back.
        """

    def record_call(self, source: LoadSource) -> None:
        """Note that the run calls `source`; the other runs of its worker depend on it too. Callable from any thread."""

    def record_rejection(self, by: object, error: Overloaded) -> None:
        """Note that `by` rejected a call for good: if the run fails after that, it ends as Overloaded."""

    @property
    def event_receiver(self) -> EventReceiver:
        """The receiver of the events of the upstreams that it calls: its supervisor."""

    def record_upstream_fault(self) -> None:
        """Note a failure of the upstream: if the run fails after that, it does not count against its worker."""


class UsageObserver(Protocol):
    """A running task that adds up what its calls use."""

    def record_usage(self, usage: CallUsage, *, usd: float | None = None) -> None:
        """Add `usage` to that of the task. Callable from any thread.

        Args:
            usage: of a call that has ended; or a correction, or the note that a call begins.
            usd: dollars that an upstream with budgets has charged for the call; None if it has none.
        """


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
        """The number of this start of the handler, from 1."""

    @property
    def submission(self) -> float:
        """Epoch seconds that tell this submission of the task from others of its id, in every attempt at it."""

    @property
    def tenant_weight(self) -> float:
        """The share of turns that its supervisor gives its tenant."""

    def report(self, value: Any) -> None:
        """Pass `value` to the listeners of the task's events. Callable from any thread."""


_current: ContextVar[RunningTask | None] = ContextVar("forebay_running_task", default=None)
running_task = _current.get
set_running_task = _current.set


class _InheritedTask:
    """The task that was running when this process was forked from its parent, which goes on with it.

    Calls have its priority, deadline and tenant, but nobody observes them here, or listens to its progress.
    """

    def __init__(self, running: RunningTask) -> None:
        self.task = running.task
        self.deadline = running.deadline
        self.attempt = running.attempt
        self.submission = running.submission
        self.tenant_weight = running.tenant_weight

    def report(self, value: Any) -> None:
        """See `RunningTask`."""


class DetachedTask:
    """The running task of work that must be done whatever has become of the task that began it: a compensation.

    It has no deadline and no observer, and what it submits or calls is CRITICAL. Supervisors admit what it submits
    however loaded they are, and while they drain.

    Args:
        task: the task that began it.
        submission: of that task.
        tenant_weight: of its tenant.
        awaited_by: the run that waits for it, and lends its slot to what it submits; None: nobody does.
    """

    attempt: int = 1
    deadline: Deadline | None = None

    def __init__(
        self, task: Task, *, submission: float, tenant_weight: float, awaited_by: RunningTask | None = None
    ) -> None:
        self.task = msgspec.structs.replace(task, priority=Priority.CRITICAL, deadline=None, timeout=None)
        self.submission = submission
        self.tenant_weight = tenant_weight
        self.awaited_by = awaited_by

    def report(self, value: Any) -> None:
        """See `RunningTask`: nobody listens any more."""

    def record_usage(self, usage: CallUsage, *, usd: float | None = None) -> None:
        """See `UsageObserver`. The calls of a compensation are those of the run that waits for it."""
        if hasattr(self.awaited_by, "record_usage"):
            cast("UsageObserver", self.awaited_by).record_usage(usage, usd=usd)


# Calls made inside a saga that has begun are of this priority at least.
_least_priority: ContextVar[Priority] = ContextVar("forebay_least_priority", default=Priority.LOW)
raise_priority = _least_priority.set


def call_priority(running: RunningTask | None) -> Priority:
    """Return the priority of a call of `running`, or of one outside a task."""
    return Priority.NORMAL if running is None else min(running.task.priority, _least_priority.get())


def _inherit_task() -> None:
    running = _current.get()
    if running is not None:
        _current.set(_InheritedTask(running))


os.register_at_fork(after_in_child=_inherit_task)


def call_observer() -> CallObserver | None:
    """Return the running task if it observes calls, otherwise None. In a worker process it does not."""
    running = _current.get()
    if running is None or not hasattr(running, "record_call"):
        return None
    return cast("CallObserver", running)


def usage_observer() -> UsageObserver | None:
    """Return the running task if it adds up what its calls use, otherwise None."""
    running = _current.get()
    return cast("UsageObserver", running) if hasattr(running, "record_usage") else None


def progress(value: Any) -> None:
    """Report progress of the running task; listeners get it from ``ticket.events()``.

    It works in threads too. Outside a task it does nothing, so that a handler can be called by itself.
    """
    running = _current.get()
    if running is not None:
        running.report(value)
