"""Between tickets and rows of the ledger."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from forebay import clock
from forebay.errors import NotPortable, PayloadTooLarge, ResultNotKept
from forebay.events import log
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_result, decode_task, encode_result
from forebay.task import Task, TaskResult, TaskStatus
from forebay.typing import Codec, Completion, Misfit, Row

if TYPE_CHECKING:
    from forebay.supervisor.codecs import Codecs
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


def task(row: Row, codecs: Codecs) -> Task:
    """The task of a row, its payload as its handler gets it.

    Raises:
        EnvelopeTooNew: a newer version of Forebay stored it.
        EnvelopeDamaged, InvalidPayload: it cannot be read.
    """
    return codecs.loaded(decode_task(row.envelope))


def completion(outcome: TaskResult, codec: Codec | None, *, bound: int) -> tuple[TaskResult, Completion]:
    """A result as it is given here, and as it is stored.

    A value that cannot be stored within `bound` bytes is left out there, and marked in both.
    """
    encoded, error = None, outcome.error
    if outcome.success:
        try:
            plain = outcome.result if codec is None else codec.dump(outcome.result)
            encoded = encode_result(plain, task_id=outcome.task_id, bound=bound)
        except Exception as exc:  # noqa: BLE001 - whatever a codec may raise, the task succeeded
            error = f"only the process that ran it has its value, which cannot be stored: {_unstorable(exc)}"
            log.warning("task %r succeeded, but %s", outcome.task_id, error)
            outcome = msgspec.structs.replace(outcome, error=error)
    return outcome, Completion(
        status=outcome.status.value,
        worker_id=outcome.worker_id,
        result=encoded,
        error=error,
        duration_ms=outcome.duration_ms,
        attempts=outcome.attempts,
        finished_at=clock.wall_time(),
    )


def _unstorable(refusal: Exception) -> str:
    match refusal:
        case EnvelopeDamaged() | EnvelopeTooNew():
            return str(refusal)
        case NotPortable():
            return f"at {refusal.path} it holds a {refusal.type}"
        case PayloadTooLarge():
            return f"it takes {refusal.size} bytes encoded and the bound is {refusal.bound}"
        case Misfit():
            return f"at result{refusal.path}: {refusal.why}"
    return f"its codec raised {type(refusal).__name__}"


def result(row: Row, stored: Completion, codecs: Codecs) -> TaskResult:
    """A stored completion as the result that its ticket gives. A value that cannot be had is no silent None."""
    status = TaskStatus(stored.status)
    value, error, cause = None, stored.error, None
    if status is TaskStatus.SUCCEEDED:
        try:
            value = _value(row, stored, codecs)
        except Exception as exc:  # noqa: BLE001 - whatever a codec may raise, the ticket must end
            error = stored.error or f"it cannot be read: {_unstorable(exc)}"
            cause = ResultNotKept(task_id=row.task_id, error=error)
    return TaskResult(
        task_id=row.task_id,
        worker_id=stored.worker_id,
        success=status is TaskStatus.SUCCEEDED,
        status=status,
        result=value,
        error=error,
        duration_ms=stored.duration_ms,
        attempts=stored.attempts,
        cause=cause,
    )


def _value(row: Row, stored: Completion, codecs: Codecs) -> Any:
    if stored.result is None:
        raise EnvelopeDamaged(why="it was left out")
    plain, codec = decode_result(stored.result), codecs.result(row.task_type)
    return plain if codec is None else codec.load(plain)
