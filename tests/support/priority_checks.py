"""Priority inversions in a record, found by following every queue event by event."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final, NamedTuple

from forebay.events import Event, TaskFinished, TaskRefilled, TaskRetried, TaskStarted, TaskSubmitted
from forebay.task import Priority, Verdict
from forebay.testing import EventRecord

PASSED_OVER_LIMIT: Final = 20
"""After a waiting task was passed over that often, it starts before tasks of better priority."""


class PriorityInversion(NamedTuple):
    """A task that started while another one, of better priority and the same type, was queued."""

    at: float  # loop time
    started: str
    waited: str


class _QueueModel:
    """The queue of one task type as its events describe it, and how often each priority was passed over.

    Tasks that are to be retried join it at a time that no event tells. They are not compared, and may make a priority
    starve.
    """

    def __init__(self) -> None:
        self.waiting: dict[str, Priority] = {}
        self.retried: dict[str, Priority] = {}
        self.passed_over = [0] * len(Priority)

    def add(self, event: Event, task_id: str, priority: Priority) -> None:
        """Add the task of an event that puts it into the queue, or makes it wait for its retry."""
        if isinstance(event, TaskRetried):
            self.retried[task_id] = priority
        elif _is_queued(event) and task_id not in self.retried:  # one that comes back may wait for the retry budget
            self.waiting[task_id] = priority

    def retried_left(self, event: TaskStarted | TaskFinished, priority: Priority) -> bool:
        """Return whether a task to be retried has started or ended; count that if so."""
        if self.retried.pop(event.task_id, None) is None:
            return False
        if isinstance(event, TaskStarted):
            self.passed_over[priority] = 0
        self.removed(priority)
        return True

    def removed(self, priority: Priority) -> None:
        """Count that a task of `priority` left the queue: waiting tasks of lower priorities were passed over."""
        for lower in Priority:
            if lower > priority:
                waits = any(other is lower for other in (*self.waiting.values(), *self.retried.values()))
                self.passed_over[lower] = self.passed_over[lower] + 1 if waits else 0


def priority_inversions(record: EventRecord, *, stored: bool) -> Iterator[PriorityInversion]:
    """Yield the inversions that the guaranteed share of low priorities does not explain.

    Args:
        record: of one supervisor.
        stored: the supervisor has an overflow. A task then leaves its queue before its end is published, so tasks that
            never started are not compared.
    """
    not_compared = {task_id for task_id, task in record.tasks.items() if task.thread_id is not None}
    not_compared |= {task_id for task_id, task in record.tasks.items() if task.tenant in _bounded_tenants(record)}
    if stored:
        not_compared |= record.tasks.keys() - set(record.started)
    queues: dict[str, _QueueModel] = defaultdict(_QueueModel)
    submitted: dict[str, tuple[str, Priority]] = {}
    for event in record.events:
        if isinstance(event, TaskSubmitted):
            submitted[event.task_id] = (event.task_type, event.priority)
        task_id = getattr(event, "task_id", None)
        if task_id not in submitted:
            continue
        task_type, priority = submitted[task_id]
        queue = queues[task_type]
        queue.add(event, task_id, priority)
        if isinstance(event, TaskStarted | TaskFinished):
            if queue.retried_left(event, priority) or queue.waiting.pop(event.task_id, None) is None:
                continue
            if isinstance(event, TaskStarted):
                better = [task_id for task_id, other in queue.waiting.items() if other < priority]
                passed_over = queue.passed_over[priority] + sum(task_id in not_compared for task_id in better)
                waited = [task_id for task_id in better if task_id in record.tasks and task_id not in not_compared]
                may_overtake = event.task_id in record.nested  # its worker may begin no new run, of any priority
                if waited and passed_over < PASSED_OVER_LIMIT and not may_overtake:
                    yield PriorityInversion(event.at, event.task_id, min(waited, key=queue.waiting.__getitem__))
                queue.passed_over[priority] = 0
            queue.removed(priority)  # a task that ended in the queue may have done so when it was taken to start


def _bounded_tenants(record: EventRecord) -> set[str]:
    """Return the tenants whose tasks may wait although a slot is free."""
    tenants = record.supervisor._settings.tenants
    return {name for name, tenant in tenants.items() if tenant.max_running is not None}


def _is_queued(event: Event) -> bool:
    """Return whether the event puts its task into a queue."""
    return isinstance(event, TaskRefilled) or (isinstance(event, TaskSubmitted) and event.verdict is Verdict.ADMITTED)
