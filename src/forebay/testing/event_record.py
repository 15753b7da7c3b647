"""Record: what a supervisor did, event by event, as the checkers of its promises read it."""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from forebay.events import Event, TaskFinished, TaskStarted, TaskSubmitted
from forebay.supervisor import BackpressureSupervisor
from forebay.task import Task, TaskResult, TaskStatus

E = TypeVar("E", bound=Event)


class LimitExcess(NamedTuple):
    """A worker that held more slots than it has, or fewer than none."""

    at: float  # loop time
    worker_id: str
    current_tasks: int
    max_concurrent: int
    after: Event


class EventRecord:
    """Everything that a supervisor tells from now on. It may not have started yet.

    Attributes:
        supervisor: whose record it is.
        events: all events, in order.
        tasks: the tasks that came in, by id.
        excesses: moments at which a worker was seen to hold more than its limit.
        before: what had been counted when it began.
    """

    def __init__(self, supervisor: BackpressureSupervisor) -> None:
        self.supervisor = supervisor
        self.events: list[Event] = []
        self.tasks: dict[str, Task] = {}
        self.excesses: list[LimitExcess] = []
        self.baseline = supervisor.statistics()
        self._unseen_ids: list[str] = []  # ids of tasks that were announced, and have not been seen yet
        supervisor._bus.add_sink(self._on_event)  # noqa: SLF001 - the public subscription is bounded, and read by a coroutine

    def stop(self) -> None:
        """Hear no more."""
        self.supervisor._bus.remove_sink(self._on_event)  # noqa: SLF001 - as above

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def of_type(self, kind: type[E]) -> list[E]:
        """The events of one kind, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    def for_task(self, task_id: str) -> list[Event]:
        """The events of one task, in order."""
        return [event for event in self.events if getattr(event, "task_id", None) == task_id]

    @property
    def submitted(self) -> list[TaskSubmitted]:
        """Every decision of the gate."""
        return self.of_type(TaskSubmitted)

    @property
    def started(self) -> list[str]:
        """The ids of tasks in the order in which their handlers began."""
        return [event.task_id for event in self.of_type(TaskStarted)]

    @property
    def results(self) -> dict[str, TaskResult]:
        """How tasks ended, by id."""
        return {event.task_id: event.result for event in self.of_type(TaskFinished)}

    @property
    def statuses(self) -> dict[str, TaskStatus]:
        """How tasks ended in a word, by id."""
        return {task_id: result.status for task_id, result in self.results.items()}

    def _on_event(self, event: Event) -> None:
        self._collect_tasks()
        self.events.append(event)
        task_id = getattr(event, "task_id", None)
        if task_id is not None and task_id not in self.tasks:
            self._unseen_ids.append(task_id)
        for worker in self.supervisor.workers.values():
            if not 0 <= worker.current_tasks <= worker.max_concurrent:
                excess = LimitExcess(event.at, worker.name, worker.current_tasks, worker.max_concurrent, event)
                self.excesses.append(excess)

    def _collect_tasks(self) -> None:
        """Note the tasks of what was told before: an event comes before its task can be found."""
        house = self.supervisor._dispatcher  # noqa: SLF001 - to ask by `ticket` would make tickets of strangers
        if house is None:
            return
        for task_id in self._unseen_ids:
            ticket = house.core.registry.get(task_id)
            if ticket is not None:
                self.tasks[task_id] = ticket.task
        self._unseen_ids.clear()
