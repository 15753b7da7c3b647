"""Between tickets and rows of the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING

from forebay import clock
from forebay.events import log
from forebay.overflow import decode_result, encode_result
from forebay.task import TaskResult, TaskStatus
from forebay.typing import Completion, Row

if TYPE_CHECKING:
    from forebay.supervisor.ticket import Ticket


def row(ticket: Ticket, envelope: bytes) -> Row:
    """The row of a task; its deadline is the ticket's, which may have been inherited."""
    task = ticket.task
    return Row(
        task_id=task.task_id,
        task_type=task.task_type,
        priority=task.priority,
        envelope=envelope,
        enqueued_at=clock.wall_time() if ticket.came_at is None else ticket.came_at,
        deadline=None if ticket.deadline is None else ticket.deadline.at,
        key=task.key,
    )


def completion(outcome: TaskResult, *, bound: int) -> Completion:
    """A result as it is stored; a value that cannot be encoded within `bound` bytes is left out."""
    encoded = encode_result(outcome.result, bound) if outcome.success else None
    error = outcome.error
    if outcome.success and encoded is None:
        error = "it succeeded, but its value cannot be stored: only the process that ran it has it"
        log.warning("task %r: %s", outcome.task_id, error)
    return Completion(
        status=outcome.status.value,
        worker_id=outcome.worker_id,
        result=encoded,
        error=error,
        duration_ms=outcome.duration_ms,
        attempts=outcome.attempts,
        finished_at=clock.wall_time(),
    )


def result(task_id: str, stored: Completion) -> TaskResult:
    """A stored completion as the result that its ticket gives."""
    status = TaskStatus(stored.status)
    return TaskResult(
        task_id=task_id,
        worker_id=stored.worker_id,
        success=status is TaskStatus.SUCCEEDED,
        status=status,
        result=None if stored.result is None else decode_result(stored.result),
        error=stored.error,
        duration_ms=stored.duration_ms,
        attempts=stored.attempts,
    )
