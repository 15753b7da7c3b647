"""The events of a supervisor, recorded for tests."""

from __future__ import annotations

from types import TracebackType
from typing import NamedTuple, Self, TypeVar

from forebay.events import Event, TaskFinished, TaskStarted, TaskSubmitted, WorkerResized
from forebay.supervisor import BackpressureSupervisor
from forebay.task import Task, TaskResult, TaskStatus

E = TypeVar("E", bound=Event)


class LimitExcess(NamedTuple):
    """A moment at which a worker held more slots than it has, or fewer than none."""

    at: float  # loop time
    worker_id: str
    current_tasks: int
    max_concurrent: int
    after: Event


class EventRecord:
    """A record of all events that a supervisor publishes from now on. The supervisor need not be started.

    Attributes:
        supervisor: the supervisor.
        events: all events, in order.
        tasks: the submitted and refilled tasks, by id.
        nested: the ids of those that runs of this supervisor submitted.
        excesses: moments at which a worker took more tasks than its limit.
        baseline: the supervisor's statistics at the start of the record.
    """

    def __init__(self, supervisor: BackpressureSupervisor) -> None:
        self.supervisor = supervisor
        self.events: list[Event] = []
        self.tasks: dict[str, Task] = {}
        self.nested: set[str] = set()
        self.excesses: list[LimitExcess] = []
        self.baseline = supervisor.statistics()
        self._held: dict[str, int] = {}  # slots taken at the last event, by worker
        self._unseen_ids: list[str] = []  # ids in events, of tasks that are not in `tasks` yet
        # The public subscription is bounded and asynchronous; a record must not miss an event.
        supervisor._bus.add_observer(self._on_event)  # noqa: SLF001 - see above

    def stop(self) -> None:
        """Stop recording."""
        self.supervisor._bus.remove_observer(self._on_event)  # noqa: SLF001 - see __init__

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def of_type(self, kind: type[E]) -> list[E]:
        """Return the events of one type, in order."""
        return [event for event in self.events if isinstance(event, kind)]

    def for_task(self, task_id: str) -> list[Event]:
        """Return the events of one task, in order."""
        return [event for event in self.events if getattr(event, "task_id", None) == task_id]

    @property
    def submitted(self) -> list[TaskSubmitted]:
        """All admission decisions, in order."""
        return self.of_type(TaskSubmitted)

    @property
    def started(self) -> list[str]:
        """The ids of tasks, in the order in which their handlers started."""
        return [event.task_id for event in self.of_type(TaskStarted)]

    @property
    def results(self) -> dict[str, TaskResult]:
        """The results of finished tasks, by id."""
        return {event.task_id: event.result for event in self.of_type(TaskFinished)}

    @property
    def statuses(self) -> dict[str, TaskStatus]:
        """The statuses of finished tasks, by id."""
        return {task_id: result.status for task_id, result in self.results.items()}

    def _on_event(self, event: Event) -> None:
        self._collect_tasks()
        self.events.append(event)
        task_id = getattr(event, "task_id", None)
        if task_id is not None and task_id not in self.tasks:
            self._unseen_ids.append(task_id)
        resized = event.worker_id if isinstance(event, WorkerResized) else None
        for worker in self.supervisor.workers.values():
            before, held = self._held.get(worker.name, 0), worker.current_tasks
            self._held[worker.name] = held
            # A worker that was made smaller goes on with what runs on it, but begins nothing before that has ended.
            if held < 0 or (held > worker.max_concurrent and held > before and worker.name != resized):
                excess = LimitExcess(event.at, worker.name, worker.current_tasks, worker.max_concurrent, event)
                self.excesses.append(excess)

    def _collect_tasks(self) -> None:
        """Look up the tasks of earlier events: the supervisor registers a task only after its first event."""
        dispatcher = self.supervisor._dispatcher  # noqa: SLF001 - the public `ticket` raises for an id that is not known yet
        if dispatcher is None:
            return
        for task_id in self._unseen_ids:
            ticket = dispatcher.core.registry.get(task_id)
            if ticket is not None:
                self.tasks[task_id] = ticket.task
                if ticket.nested:
                    self.nested.add(task_id)
        self._unseen_ids.clear()
