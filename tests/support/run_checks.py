"""Promises 1 and 2 of the design, as whoever stands outside can check them, where several houses share a store."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.unreliable_store import AcknowledgedWrites

from forebay import TaskStatus, Ticket, Verdict
from forebay.errors import StoreUnavailable
from forebay.events import TaskFinished, TaskStarted
from forebay.testing import (
    EventRecord,
    check_counts,
    check_limits,
    check_nothing_left,
    check_priorities,
    check_spills,
    check_task_ends,
)

FINAL = {TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED, TaskStatus.EXPIRED}


class InvariantViolation(Exception):
    """A promise was broken."""


@contextmanager
def fail_on_logged_errors() -> Iterator[None]:
    """What the house logs because it could not raise it, an injected error of a ledger apart, breaks the promises."""
    failures: list[str] = []

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and not isinstance(record.exc_info[1], StoreUnavailable):
                failures.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    log, catch = logging.getLogger("forebay"), Catch(logging.ERROR)
    propagate, log.propagate = log.propagate, False
    log.addHandler(catch)
    try:
        yield
    finally:
        log.removeHandler(catch)
        log.propagate = propagate
    if failures:
        raise InvariantViolation("; ".join(failures))


def check_closed_supervisor(record: EventRecord) -> None:
    """What must be true of a house that has closed, whatever it worked on."""
    check_counts(record)
    check_limits(record, nested=True)
    check_priorities(record)
    check_nothing_left(record.supervisor, zombies=True)


def check_in_memory_run(record: EventRecord, tickets: list[Ticket]) -> None:
    """Without a store that survives: all that was let in has ended here, and was begun at most once."""
    check_task_ends(record, tickets=tickets)
    check_spills(record)
    for ticket in tickets:
        if ticket and ticket.status not in FINAL:
            raise InvariantViolation(f"{ticket} never ended")
    if again := [start.task_id for start in record.of_type(TaskStarted) if start.attempt > 1]:
        raise InvariantViolation(f"started more than once: {again}")
    if outside := record.supervisor.statistics().outside:
        raise InvariantViolation(f"{outside} are left outside")


def check_shared_store(score: AcknowledgedWrites, records: list[EventRecord], tickets: list[Ticket]) -> None:
    """With a store that survives: what it acknowledged has ended once, whichever process ran it."""
    for ticket in tickets:
        if not ticket.done():
            raise InvariantViolation(f"{ticket} never ended")
        if ticket.status not in FINAL and not score.ended[ticket.task_id] and ticket.task_id not in score.uncertain:
            raise InvariantViolation(f"{ticket} was left to the next process, and none has ended it")
    if endless := [task_id for task_id in score.stored - score.uncertain if not score.ended[task_id]]:
        raise InvariantViolation(f"stored and never ended: {endless}")
    if again := [task_id for task_id, count in score.ended.items() if count > 1]:
        raise InvariantViolation(f"completed more than once: {again}")
    _check_endings(score, records)
    _check_attempts(score, records)


def _check_endings(score: AcknowledgedWrites, records: list[EventRecord]) -> None:
    """A task ends once in each house that knows it, and the same in all."""
    statuses: dict[str, set[TaskStatus]] = {}
    for record in records:
        ended = Counter(event.task_id for event in record.of_type(TaskFinished))
        if twice := [task_id for task_id, count in ended.items() if count > 1 and task_id not in score.uncertain]:
            raise InvariantViolation(f"ended twice in one house: {twice}")
        taken = {event.task_id for event in record.submitted if event.verdict is not Verdict.REJECTED}
        for task_id in taken & set(ended):  # one that was never taken is only a word to nobody
            statuses.setdefault(task_id, set()).add(record.statuses[task_id])
    for task_id, seen in statuses.items():
        if len(seen) > 1 and task_id not in score.uncertain:
            raise InvariantViolation(f"{task_id} ended differently for different processes: {seen}")


def _check_attempts(score: AcknowledgedWrites, records: list[EventRecord]) -> None:
    """A repeat shows its attempt number, never silently twice."""
    attempts: dict[str, list[int]] = {}
    for record in records:
        for start in record.of_type(TaskStarted):
            attempts.setdefault(start.task_id, []).append(start.attempt)
    for task_id, seen in attempts.items():
        if len(set(seen)) < len(seen) and task_id not in score.uncertain:
            raise InvariantViolation(f"the attempts at {task_id} are numbered {seen}")
