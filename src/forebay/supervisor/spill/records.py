"""Conversion between tickets and the records of the task store."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import msgspec

from forebay import clock
from forebay._hooks import raise_again_if_interrupt
from forebay._text import error_text
from forebay.call_usage import NO_USAGE
from forebay.errors import NotSerializable, PayloadTooLarge, ResultUnavailable
from forebay.events import log
from forebay.interfaces import Codec, Completion, TaskRecord, TypeMismatch
from forebay.overflow import EnvelopeDamaged, EnvelopeTooNew, decode_envelope, decode_result, encode_result
from forebay.task import Task, TaskResult, TaskStatus

if TYPE_CHECKING:
    from forebay.supervisor.codecs import TaskCodecs
    from forebay.supervisor.ticket import Ticket


def record_of_ticket(ticket: Ticket, envelope: bytes) -> TaskRecord:
    """Return the record of a task; its deadline is the ticket's, which may have been inherited."""
    task, retries = ticket.task, ticket.retries
    return TaskRecord(
        task_id=task.task_id,
        task_type=task.task_type,
        priority=task.priority,
        envelope=envelope,
        enqueued_at=clock.wall_time() if ticket.place_in_store is None else ticket.place_in_store,
        deadline=None if ticket.deadline is None else ticket.deadline.by_wall_clock(),
        key=task.key,
        thread_id=task.thread_id,
        attempts=ticket.attempts,
        failures=0 if retries is None else retries.state.failed,
        total_delay=0.0 if retries is None else retries.state.total_delay,
        last_error=None if retries is None or retries.result is None else retries.result.error,
        usage=ticket.usage or None,
        tenant=task.tenant,
        not_before=task.not_before,
    )


def read_record(record: TaskRecord, codecs: TaskCodecs) -> tuple[Task, Mapping[str, Any] | None]:
    """Return the task of a record, with the payload that its handler gets, and the context that it carries.

    Raises:
        EnvelopeTooNew: a newer version of Forebay stored it.
        EnvelopeDamaged, InvalidPayload: it cannot be read.
    """
    task, carried = decode_envelope(record.envelope)
    return codecs.load_payload(task), carried


def completion_of_result(result: TaskResult, codec: Codec | None, *, bound: int) -> tuple[TaskResult, Completion]:
    """Return the result for the ticket and the completion for the store.

    A value that cannot be stored within `bound` bytes is left out of the completion, and the error of both says so.
    """
    encoded, error = None, None if result.error is None else error_text(str(result.error))
    if result.success:
        try:
            plain = result.result if codec is None else codec.dump(result.result)
            encoded = encode_result(plain, task_id=result.task_id, bound=bound)
        except BaseException as exc:  # noqa: BLE001 - whatever a codec raises, the task succeeded
            raise_again_if_interrupt(exc)
            error = f"only the process that ran it has its value, which cannot be stored: {_why_unstorable(exc)}"
            log.warning("task %r succeeded, but %s", result.task_id, error)
            result = msgspec.structs.replace(result, error=error)
    return result, Completion(
        status=result.status.value,
        worker_id=result.worker_id,
        result=encoded,
        error=error,
        duration_ms=result.duration_ms,
        attempts=result.attempts,
        finished_at=clock.wall_time(),
        usage=result.usage or None,
    )


def _why_unstorable(error: BaseException) -> str:
    match error:
        case EnvelopeDamaged() | EnvelopeTooNew():
            return str(error)
        case NotSerializable():
            return f"at {error.path} it holds a {error.type}"
        case PayloadTooLarge():
            return f"it takes {error.size} bytes encoded and the bound is {error.bound}"
        case TypeMismatch():
            return f"at result{error.path}: {error.reason}"
    return f"its codec raised {type(error).__name__}"


def result_of_record(record: TaskRecord, stored: Completion, codecs: TaskCodecs) -> TaskResult:
    """Return the result of a stored completion. If its value is missing, the cause is ResultUnavailable."""
    status = TaskStatus(stored.status)
    value, error, cause = None, stored.error, None
    if status is TaskStatus.SUCCEEDED:
        try:
            value = _stored_value(record, stored, codecs)
        except BaseException as exc:  # noqa: BLE001 - whatever a codec raises, the ticket must end
            raise_again_if_interrupt(exc)
            error = stored.error or f"it cannot be read: {_why_unstorable(exc)}"
            cause = ResultUnavailable(task_id=record.task_id, error=error)
    return TaskResult(
        task_id=record.task_id,
        worker_id=stored.worker_id,
        success=status is TaskStatus.SUCCEEDED,
        status=status,
        result=value,
        error=error,
        duration_ms=stored.duration_ms,
        attempts=stored.attempts,
        usage=stored.usage or NO_USAGE,
        cause=cause,
    )


def _stored_value(record: TaskRecord, stored: Completion, codecs: TaskCodecs) -> Any:
    if stored.result is None:
        raise EnvelopeDamaged(why="it was left out")
    plain, codec = decode_result(stored.result), codecs.result_codec(record.task_type)
    return plain if codec is None else codec.load(plain)
