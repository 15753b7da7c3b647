"""TypeCounts: what has become of the tasks of each type since the start of a supervisor."""

from __future__ import annotations

from typing import Final

import msgspec

from forebay.call_usage import NO_USAGE, CallUsage
from forebay.task import TaskStatus

OTHER: Final = "other"
"""Stands for the task types that found no place among the counts."""

_MAX_TYPES: Final = 1_000  # those of workers are few; but results of any type can be looked up in a store
_OTHER_ENDS: Final = {
    status: status.value
    for status in (TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED, TaskStatus.EXPIRED)
}


class TaskTypeCounts(msgspec.Struct):
    """The counts of one task type. See `TaskTypeStatistics`."""

    submitted: int = 0
    spilled: int = 0
    rejected: int = 0
    started: int = 0
    succeeded: int = 0
    failed: int = 0
    timed_out: int = 0
    cancelled: int = 0
    expired: int = 0
    usage: CallUsage = NO_USAGE

    def count_success(self, usage: CallUsage) -> None:
        """Count a task that has succeeded, and the usage of its calls."""
        self.succeeded += 1
        if usage is not NO_USAGE:
            self.usage += usage

    def count_other_end(self, status: TaskStatus, usage: CallUsage) -> None:
        """Count a task that has ended in another way, and the usage of its calls."""
        if (name := _OTHER_ENDS.get(status)) is not None:
            setattr(self, name, getattr(self, name) + 1)
        self.usage += usage


class TypeCounts:
    """The counts of each task type. It is bounded: the tasks of further types are counted together."""

    def __init__(self) -> None:
        self.by_type: dict[str, TaskTypeCounts] = {}

    def of(self, task_type: str) -> TaskTypeCounts:
        """Return the counts of a task type, to be changed."""
        try:  # this is on the hot path
            return self.by_type[task_type]
        except KeyError:
            name = task_type if len(self.by_type) < _MAX_TYPES else OTHER
            return self.by_type.setdefault(name, TaskTypeCounts())
