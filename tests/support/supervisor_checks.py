"""Checks of what a supervisor promises, on the record of its events.

Each failure names the task, the time and the violation. The checks use only what the supervisor published, not how it
decides. They are for a supervisor at rest: it is closed, or all of its tasks have ended.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence

from tests.support.priority_checks import priority_inversions

from forebay.events import (
    Event,
    TaskFinished,
    TaskRefilled,
    TaskStarted,
    TaskSubmitted,
    WorkerFailed,
    WorkerRestarted,
    WorkerUnregistered,
)
from forebay.supervisor import BackpressureSupervisor, Ticket
from forebay.task import TaskStatus, Verdict
from forebay.testing import EventRecord

FINAL_STATUSES = (
    TaskStatus.SUCCEEDED,
    TaskStatus.FAILED,
    TaskStatus.TIMED_OUT,
    TaskStatus.CANCELLED,
    TaskStatus.EXPIRED,
)
_MAX_SHOWN = 10  # violations in a message


class InvariantViolation(AssertionError):
    """An invariant does not hold; `violations` has the details, one line each."""

    def __init__(self, message: str, violations: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.violations = tuple(violations)


def fail_if_any(invariant: str, violations: Sequence[str]) -> None:
    """Raise InvariantViolation if there are violations of `invariant`."""
    if violations:
        shown = list(violations[:_MAX_SHOWN])
        if len(violations) > _MAX_SHOWN:
            shown.append(f"and {len(violations) - _MAX_SHOWN} more")
        raise InvariantViolation("\n  ".join([f"not true: {invariant}:", *shown]), violations)


def check_supervisor(
    record: EventRecord, *, tickets: Iterable[Ticket] = (), nested: bool = False, zombies: bool = False
) -> None:
    """Run all of the checks below on one record.

    Args:
        record: of a supervisor at rest.
        tickets: tickets that callers hold: each must have been resolved.
        nested: handlers await tasks of the same supervisor, and so lend their slots.
        zombies: handlers that ignore their cancellation may still hold their slots.

    Raises:
        InvariantViolation: of the first check that fails.
    """
    check_task_ends(record, tickets=tickets)
    check_counts(record)
    check_limits(record, nested=nested)
    check_priorities(record)
    check_spills(record)
    check_nothing_left(record.supervisor, zombies=zombies)


def check_task_ends(*records: EventRecord, tickets: Iterable[Ticket] = (), left: int | None = None) -> None:
    """Check that every task that was not rejected ended exactly once, and no attempt started twice or after the end.

    Args:
        records: of supervisors that used one overflow, one after the other; a task left by one may end in another.
        tickets: tickets that callers hold: each must have been resolved.
        left: number of tasks that may be left in the overflow; None: any number if it is durable, otherwise none.

    Raises:
        InvariantViolation: a task was lost, ended twice, or started when it must not.
    """
    violations = [line for record in records for line in _wrong_ends(record)]
    ended = Counter(task_id for record in records for task_id in record.results)
    violations += [f"task {task_id!r} ended under {times} supervisors" for task_id, times in ended.items() if times > 1]
    lost = [
        f"{_task_name(record, task_id)} was {_taken_text(events)} and has not ended"
        for record in records
        for task_id, events in _events_by_task(record).items()
        if task_id not in ended and _was_taken(events)
    ]
    if left is None:
        left = len(lost) if any(_has_durable_overflow(record.supervisor) for record in records) else 0
    if len(lost) > left:
        violations += lost
    violations += [f"{ticket!r} has not been resolved" for ticket in tickets if not ticket.done()]
    fail_if_any("every task that is not rejected ends exactly once", violations)


def check_counts(record: EventRecord) -> None:
    """Check that the supervisor's statistics since the start of the record match its events.

    Raises:
        InvariantViolation: a count differs.
    """
    fail_if_any("statistics match the events", [*_wrong_counts(record)])


def check_limits(record: EventRecord, *, nested: bool = False) -> None:
    """Check that no worker held more tasks than its limit at any event.

    Without an overflow, also check that no more tasks had started than finished, up to the limit.

    Args:
        record: of the supervisor.
        nested: handlers await tasks of the same supervisor and so lend their slots: more may have started than run.

    Raises:
        InvariantViolation: a worker held too many.
    """
    violations = [
        f"at {excess.at:.3f} s, after {_event_name(record, excess.after)}, worker {excess.worker_id!r} held"
        f" {excess.current_tasks} of {excess.max_concurrent}"
        for excess in record.excesses
    ]
    if not nested and not _has_overflow(record.supervisor):  # with one, an end is published only once it is stored
        violations += _over_limits(record)
    fail_if_any("no worker runs more tasks than its limit", violations)


def check_priorities(record: EventRecord) -> None:
    """Check that no task started while one of better priority waited, except for one in twenty-one.

    Only tasks of one type are compared, and none of a thread (a conversation), which wait for each other. With a
    durable overflow, tasks can move between the queue and other processes without an event: the check passes.

    Raises:
        InvariantViolation: there was a priority inversion.
    """
    if _has_durable_overflow(record.supervisor):
        return
    violations = [
        f"{_task_name(record, inversion.started)} started at {inversion.at:.3f} s,"
        f" while {_task_name(record, inversion.waited)} waited"
        for inversion in priority_inversions(record, stored=_has_overflow(record.supervisor))
    ]
    fail_if_any("tasks of better priority start first", violations)


def check_spills(record: EventRecord) -> None:
    """Check that no spilled task is lost, and that each was refilled before it started.

    Raises:
        InvariantViolation: a spilled task is lost, or started without a refill.
    """
    violations: list[str] = []
    missing: list[str] = []
    for task_id, events in _events_by_task(record).items():
        spilled = next((event for event in events if _is_spill(event)), None)
        if spilled is None:
            continue
        refill = next((event for event in events if isinstance(event, TaskRefilled)), None)
        start = next((event for event in events if isinstance(event, TaskStarted)), None)
        if start is not None and (refill is None or events.index(refill) > events.index(start)):
            name = _task_name(record, task_id)
            violations.append(f"{name} was SPILLED, and started at {start.at:.3f} s without a refill")
        elif refill is None and not any(isinstance(event, TaskFinished) for event in events):
            missing.append(f"{_task_name(record, task_id)} was SPILLED at {spilled.at:.3f} s, and is lost")
    in_overflow = record.supervisor.statistics().outside
    if len(missing) > in_overflow and not (_has_durable_overflow(record.supervisor) and record.supervisor.loop is None):
        violations.append(f"{len(missing)} were neither refilled nor ended, and {in_overflow} are in the overflow")
        violations += missing
    fail_if_any("spilled tasks are refilled, or end in the overflow", violations)


def check_nothing_left(supervisor: BackpressureSupervisor, *, zombies: bool = False) -> None:
    """Check that a supervisor at rest holds no slot, queue entry, ticket, background task and, once closed, no timer.

    Args:
        supervisor: the supervisor at rest.
        zombies: handlers that ignore their cancellation may still hold their slots.

    Raises:
        InvariantViolation: it holds something.
    """
    violations = [*_held_by_workers(supervisor, zombies=zombies), *_held_by_dispatcher(supervisor, zombies=zombies)]
    fail_if_any("a supervisor at rest holds nothing", violations)


def _held_by_workers(supervisor: BackpressureSupervisor, *, zombies: bool) -> Iterator[str]:
    dispatcher = supervisor._dispatcher
    for worker in supervisor.workers.values():
        runs = [] if dispatcher is None else dispatcher.runs.on(worker)
        held = [run.task.task_id for run in runs if not (zombies and run.abandoned_at is not None)]
        if held:
            yield f"worker {worker.name!r} still runs {held}"
        claims = () if dispatcher is None else dispatcher.slot_claims._claims.get(worker, ())
        # The claim of a run that has ended goes once there is a slot, and a zombie may hold the only one.
        if claiming := [run.task.task_id for run, _ in claims if not (zombies and worker.zombies and run.ended)]:
            yield f"on worker {worker.name!r} {claiming} wait for the slot that they lent"
        if not zombies and (worker.suspended or any(worker.suspended_open)):
            yield f"worker {worker.name!r} counts {worker.suspended} runs without a slot, {worker.suspended_open} open"
        if worker.current_tasks != len(runs):
            yield f"worker {worker.name!r} holds {worker.current_tasks} slots for {len(runs)} runs"


def _held_by_dispatcher(supervisor: BackpressureSupervisor, *, zombies: bool) -> Iterator[str]:
    dispatcher = supervisor._dispatcher
    if dispatcher is None:
        return
    for pool in dispatcher.core.pools.by_type.values():
        queued = [ticket.task_id for ticket in pool.queue]
        if pool.nested or pool.nested_spilled or (pool.suspended and not zombies):
            yield (
                f"the pool of {pool.task_type!r} counts {pool.nested} nested tasks, {pool.suspended} suspended runs,"
                f" {len(pool.nested_spilled)} nested tasks in the overflow"
            )
        if queued or pool.parked or pool.reserved or pool.delayed or any(pool.spilled.spilling.values()):
            yield (
                f"the queue of {pool.task_type!r} holds {queued}, {pool.parked} tasks behind their thread,"
                f" {pool.delayed} tasks to be retried, {pool.reserved} places for records,"
                f" {sum(pool.spilled.spilling.values())} tasks being spilled"
            )
    unresolved = [
        ticket for ticket in dispatcher.core.registry.live.values() if ticket.status is not TaskStatus.SPILLED
    ]
    yield from (f"{ticket!r} has not been resolved" for ticket in unresolved)
    if not zombies:
        yield from (f"{len(held.tickets)} tasks hold thread {name!r}" for name, held in dispatcher.conversations)
    if background := dispatcher.core.background_tasks:
        yield f"{len(background)} background tasks are running: {sorted(map(repr, background))}"
    if supervisor.loop is None and dispatcher.core.timers.armed:
        yield "timers are set, although it is closed"


# --- readings of a record --------------------------------------------------------------------------------------------


def _events_by_task(record: EventRecord) -> dict[str, list[Event]]:
    by_task: dict[str, list[Event]] = defaultdict(list)
    for event in record.events:
        if (task_id := getattr(event, "task_id", None)) is not None:
            by_task[task_id].append(event)
    return by_task


def _wrong_ends(record: EventRecord) -> Iterator[str]:
    for task_id, events in _events_by_task(record).items():
        name = _task_name(record, task_id)
        ends = [event for event in events if isinstance(event, TaskFinished)]
        if len(ends) > 1:
            listed = ", ".join(f"{end.result.status.name} at {end.at:.3f} s" for end in ends)
            yield f"{name} ended {len(ends)} times: {listed}"
        if any(end.result.task_id != task_id for end in ends):
            yield f"{name} ended with the result of another task"
        if not _was_taken(events):
            worked = [event for event in events if isinstance(event, TaskStarted | TaskFinished)]
            if worked:
                yield f"{name} was REJECTED, and yet {worked[0].kind} at {worked[0].at:.3f} s"
        starts = [event for event in events if isinstance(event, TaskStarted)]
        if ends:
            end = events.index(ends[0])
            yield from (
                f"{name} started at {start.at:.3f} s, after it had ended at {ends[0].at:.3f} s"
                for start in starts
                if events.index(start) > end
            )
        for attempt, count in Counter(start.attempt for start in starts).items():
            same = [start for start in starts if start.attempt == attempt]
            if count > 1 and not all(_was_given_back(record, start) for start in same[:-1]):
                times = ", ".join(f"{start.at:.3f} s" for start in same)
                yield f"{name} started {count} times as attempt {attempt}: at {times}"


def _was_given_back(record: EventRecord, start: TaskStarted) -> bool:
    """Return whether the worker of an attempt was stopped later: a stored task on it may take the attempt back."""
    stops = [(stop.worker_id, stop.at) for stop in record.of_type(WorkerRestarted)]
    stops += [(stop.worker_id, stop.at) for stop in record.of_type(WorkerFailed)]
    stops += [(stop.worker_id, stop.at) for stop in record.of_type(WorkerUnregistered)]
    return any(worker_id == start.worker_id and at >= start.at for worker_id, at in stops)


def _wrong_counts(record: EventRecord) -> Iterator[str]:
    statistics = record.supervisor.statistics()
    verdicts = Counter(event.verdict for event in record.of_type(TaskSubmitted))
    statuses = Counter(event.result.status for event in record.of_type(TaskFinished))
    published = {
        "started": len(record.of_type(TaskStarted)),
        "refilled": len(record.of_type(TaskRefilled)),
        "submitted": verdicts.total(),
    }
    published |= {verdict.value: verdicts[verdict] for verdict in Verdict}
    published |= {status.value: statuses[status] for status in FINAL_STATUSES}
    for name, count in published.items():
        if (counted := getattr(statistics, name) - getattr(record.baseline, name)) != count:
            yield f"events have {count} {name}, and statistics {counted}"


def _over_limits(record: EventRecord) -> Iterator[str]:
    """Yield the moments at which more tasks had started on a worker than it may run."""
    limits = {worker.name: worker.max_concurrent for worker in record.supervisor.workers.values()}
    worker_of: dict[str, str] = {}
    running: dict[str, set[str]] = defaultdict(set)
    for event in record.events:
        if (
            isinstance(event, TaskFinished | TaskRefilled)
            and (worker := worker_of.pop(event.task_id, None)) is not None
        ):
            running[worker].discard(event.task_id)
        elif isinstance(event, TaskStarted):
            worker_of[event.task_id] = event.worker_id
            tasks = running[event.worker_id]
            tasks.add(event.task_id)
            if len(tasks) > limits.get(event.worker_id, math.inf):
                name = _task_name(record, event.task_id)
                others = sorted(tasks - {event.task_id})
                yield (
                    f"{name} started at {event.at:.3f} s on worker {event.worker_id!r}, which runs"
                    f" {limits[event.worker_id]} at a time, while {others} ran there (pass nested=True if they await"
                    " tasks of their own supervisor)"
                )


def _was_taken(events: list[Event]) -> bool:
    """Return True if a task was admitted or spilled, here or (if it was not submitted here) in an earlier process."""
    verdicts = [event.verdict for event in events if isinstance(event, TaskSubmitted)]
    return not verdicts or any(verdict is not Verdict.REJECTED for verdict in verdicts)


def _taken_text(events: list[Event]) -> str:
    for event in events:
        if isinstance(event, TaskSubmitted) and event.verdict is not Verdict.REJECTED:
            return f"{event.verdict.name} at {event.at:.3f} s"
    return f"there at {events[0].at:.3f} s"


def _is_spill(event: Event) -> bool:
    return isinstance(event, TaskSubmitted) and event.verdict is Verdict.SPILLED


def _has_overflow(supervisor: BackpressureSupervisor) -> bool:
    return supervisor._store is not None


def _has_durable_overflow(supervisor: BackpressureSupervisor) -> bool:
    return supervisor._store is not None and supervisor._store.durable


def _event_name(record: EventRecord, event: Event) -> str:
    task_id = getattr(event, "task_id", None)
    return event.kind if task_id is None else f"{event.kind} of {_task_name(record, task_id)}"


def _task_name(record: EventRecord, task_id: str) -> str:
    for event in record.for_task(task_id):
        if isinstance(event, TaskSubmitted):
            return f"task {task_id!r} ({event.task_type}, {event.priority.name})"
    return f"task {task_id!r}"
