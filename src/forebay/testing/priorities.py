"""Priority inversions in a record: every line is followed event by event, knowing nothing of how it is kept."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import Final, NamedTuple

from forebay.events import Event, TaskFinished, TaskRefilled, TaskStarted, TaskSubmitted
from forebay.task import Priority, Verdict
from forebay.testing.event_record import EventRecord

PASSED_OVER_LIMIT: Final = 20
"""After so many that went before it, one of a lower priority has its turn."""


class PriorityInversion(NamedTuple):
    """A task that began while another, of better priority and the same type, waited inside."""

    at: float  # loop time
    began: str
    waited: str


class _QueueModel:
    """Who waits for one task type, as told; and how often each priority was passed over."""

    def __init__(self) -> None:
        self.waiting: dict[str, Priority] = {}
        self.passed_over = [0] * len(Priority)

    def removed(self, priority: Priority) -> None:
        """One of `priority` had its turn: who waits below was passed over."""
        for lower in Priority:
            if lower > priority:
                waits = any(other is lower for other in self.waiting.values())
                self.passed_over[lower] = self.passed_over[lower] + 1 if waits else 0


def priority_inversions(record: EventRecord, *, stored: bool) -> Iterator[PriorityInversion]:
    """Those that the floor for low priorities does not explain.

    Args:
        record: what was told.
        stored: there is an overflow, so that the end of a task is told later than it leaves its line: what never
            began is not compared, and may have had its turn.
    """
    apart = {task_id for task_id, task in record.tasks.items() if task.thread_id is not None}
    if stored:
        apart |= record.tasks.keys() - set(record.started)
    lines: dict[str, _QueueModel] = defaultdict(_QueueModel)
    kinds: dict[str, tuple[str, Priority]] = {}
    for event in record.events:
        if isinstance(event, TaskSubmitted):
            kinds[event.task_id] = (event.task_type, event.priority)
        if (entered := _queued_task(event)) is not None and entered in kinds:
            kind, priority = kinds[entered]
            lines[kind].waiting[entered] = priority
        elif isinstance(event, TaskStarted | TaskFinished) and event.task_id in kinds:
            kind, priority = kinds[event.task_id]
            line = lines[kind]
            if line.waiting.pop(event.task_id, None) is None:
                continue
            if isinstance(event, TaskStarted):
                better = [task_id for task_id, other in line.waiting.items() if other < priority]
                turns = line.passed_over[priority] + sum(task_id in apart for task_id in better)
                waited = [task_id for task_id in better if task_id in record.tasks and task_id not in apart]
                if waited and turns < PASSED_OVER_LIMIT:
                    yield PriorityInversion(event.at, event.task_id, min(waited, key=line.waiting.__getitem__))
                line.passed_over[priority] = 0
            line.removed(priority)  # one that ended in the line may have done so when its turn came


def _queued_task(event: Event) -> str | None:
    """The task that begins to wait inside."""
    if isinstance(event, TaskRefilled) or (isinstance(event, TaskSubmitted) and event.verdict is Verdict.ADMITTED):
        return event.task_id
    return None
