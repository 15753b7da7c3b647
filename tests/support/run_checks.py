"""Checks of supervisors that may share a store, with what is visible from outside."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from tests.support.supervisor_checks import (
    FINAL_STATUSES,
    InvariantViolation,
    check_counts,
    check_limits,
    check_nothing_left,
    check_priorities,
    check_spills,
    check_task_ends,
)
from tests.support.unreliable_store import AcknowledgedWrites

from forebay import TaskStatus, Ticket, Verdict
from forebay.errors import StoreUnavailable
from forebay.events import TaskFinished, TaskRetried, TaskStarted
from forebay.testing import EventRecord


@contextmanager
def fail_on_logged_errors(*injected: type[Exception]) -> Iterator[None]:
    """Fail on errors that a supervisor only logged, except for `injected` ones and those of a store."""
    failures: list[str] = []

    class ErrorCollector(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and not isinstance(record.exc_info[1], (StoreUnavailable, *injected)):
                failures.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    log, collector = logging.getLogger("forebay"), ErrorCollector(logging.ERROR)
    propagate, log.propagate = log.propagate, False
    log.addHandler(collector)
    try:
        yield
    finally:
        log.removeHandler(collector)
        log.propagate = propagate
    if failures:
        raise InvariantViolation("; ".join(failures))


def check_closed_supervisor(record: EventRecord, *, began_again: bool = False) -> None:
    """Check the invariants of a closed supervisor with any overflow.

    If it `began_again`, its counters are those of its last run, and its events those of all.
    """
    if not began_again:
        check_counts(record)
    check_limits(record, nested=True)
    check_priorities(record)
    check_nothing_left(record.supervisor, zombies=True)


def check_in_memory_run(record: EventRecord, tickets: list[Ticket]) -> None:
    """Check that without a durable store every accepted task ended here, and started once and again for each retry."""
    check_task_ends(record, tickets=tickets)
    check_spills(record)
    for ticket in tickets:
        if ticket and ticket.status not in FINAL_STATUSES:
            raise InvariantViolation(f"{ticket} never ended")
    retried = Counter(event.task_id for event in record.of_type(TaskRetried))
    if repeated := [start for start in record.of_type(TaskStarted) if start.attempt > 1 + retried[start.task_id]]:
        raise InvariantViolation(f"started more often than retried: {repeated}")
    if left := record.supervisor.statistics().outside:
        raise InvariantViolation(f"{left} tasks are left in the overflow")


def check_shared_store(writes: AcknowledgedWrites, records: list[EventRecord], tickets: list[Ticket]) -> None:
    """Check that every task that a durable store acknowledged ended once, in any process."""
    for ticket in tickets:
        if not ticket.done():
            raise InvariantViolation(f"{ticket} never ended")
        if (
            ticket.status not in FINAL_STATUSES
            and not writes.ended[ticket.task_id]
            and ticket.task_id not in writes.uncertain
        ):
            raise InvariantViolation(f"{ticket} was left to the next process, and no process ended it")
    if never_ended := [task_id for task_id in writes.stored - writes.uncertain if not writes.ended[task_id]]:
        raise InvariantViolation(f"stored and never ended: {never_ended}")
    # A write whose answer was lost may be repeated, after the end of the task: by those who wait for room.
    ended = {task_id: count for task_id, count in writes.ended.items() if task_id not in writes.uncertain}
    if repeated := [task_id for task_id, count in ended.items() if count > 1]:
        raise InvariantViolation(f"completed more than once: {repeated}")
    _check_endings(writes, records)
    _check_attempts(writes, records)


def _check_endings(writes: AcknowledgedWrites, records: list[EventRecord]) -> None:
    """Check that a task ends once in each supervisor that has it, with the same status in all."""
    statuses: dict[str, set[TaskStatus]] = {}
    for record in records:
        ended = Counter(event.task_id for event in record.of_type(TaskFinished))
        if twice := [task_id for task_id, count in ended.items() if count > 1 and task_id not in writes.uncertain]:
            raise InvariantViolation(f"ended twice in one supervisor: {twice}")
        taken = {event.task_id for event in record.submitted if event.verdict is not Verdict.REJECTED}
        for task_id in taken & set(ended):  # a rejected task may end without a caller
            statuses.setdefault(task_id, set()).add(record.statuses[task_id])
    for task_id, seen in statuses.items():
        if len(seen) > 1 and task_id not in writes.uncertain:
            raise InvariantViolation(f"{task_id} ended differently for different processes: {seen}")


def _check_attempts(writes: AcknowledgedWrites, records: list[EventRecord]) -> None:
    """Check that each attempt at a task has a number of its own, apart from those that an orderly stop gave back."""
    attempts: dict[str, list[int]] = {}
    for record in records:
        for start in record.of_type(TaskStarted):
            attempts.setdefault(start.task_id, []).append(start.attempt)
    for task_id, seen in attempts.items():
        if len(seen) - len(set(seen)) > writes.given_back[task_id] and task_id not in writes.uncertain:
            raise InvariantViolation(f"the attempts at {task_id} are numbered {seen}")
