"""The rule that every store applies to a task whose lease has expired because its holder went silent."""

from __future__ import annotations

from forebay.interfaces import Completion, TaskRecord
from forebay.task import TaskStatus


def completion_after_expiry(record: TaskRecord, *, now: float, max_attempts: int) -> Completion | None:
    """Return the completion of a task whose attempts are used up; None if the task waits for another attempt.

    Args:
        record: the task whose lease has expired.
        now: epoch seconds.
        max_attempts: starts of the handler that may lose their process; those that ended with an error are not counted.
    """
    lost = record.attempts - record.failures
    if lost < max_attempts:
        return None
    return Completion(
        status=TaskStatus.FAILED.value,
        error=f"LeaseLost: it was started {lost} times and each time its process went silent",
        attempts=record.attempts,
        finished_at=now,
        usage=record.usage,
    )
