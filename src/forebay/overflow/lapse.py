"""What becomes of a task whose holder let its lease lapse."""

from __future__ import annotations

from forebay.task import TaskStatus
from forebay.typing import Completion, Row


def lapsed(row: Row, *, now: float, max_attempts: int) -> Completion | None:
    """The end of a task that has been started often enough without one; None if it is to wait for another start."""
    if row.attempts < max_attempts:
        return None
    return Completion(
        status=TaskStatus.FAILED.value,
        error=f"LeaseLost: it was started {row.attempts} times and each time its process went silent",
        attempts=row.attempts,
        finished_at=now,
    )
