"""What becomes of a task whose holder let its lease lapse."""

from __future__ import annotations

from forebay.interfaces import Completion, TaskRecord
from forebay.task import TaskStatus


def completion_after_expiry(record: TaskRecord, *, now: float, max_attempts: int) -> Completion | None:
    """The end of a task that has been started often enough without one; None if it is to wait for another start."""
    if record.attempts < max_attempts:
        return None
    return Completion(
        status=TaskStatus.FAILED.value,
        error=f"LeaseLost: it was started {record.attempts} times and each time its process went silent",
        attempts=record.attempts,
        finished_at=now,
    )
