"""Checkers for what a supervisor promises, from its record. Each failure says which task, when, and what.

They judge by what was told to the outside, not by how the supervisor decides, and are for a supervisor at rest: it has
closed, or everything that it was given has ended.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

from forebay.errors import ForebayError
from forebay.events import Event, TaskFinished, TaskRefilled, TaskStarted, TaskSubmitted
from forebay.supervisor import BackpressureSupervisor, Ticket
from forebay.task import TaskStatus, Verdict
from forebay.testing.event_record import EventRecord
from forebay.testing.priorities import priority_inversions

FINAL_STATUSES = (
    TaskStatus.SUCCEEDED,
    TaskStatus.FAILED,
    TaskStatus.TIMED_OUT,
    TaskStatus.CANCELLED,
    TaskStatus.EXPIRED,
)
_SHOWN = 10  # of what is wrong


class BrokenPromise(ForebayError, AssertionError):
    """{promise}, and yet:{listing}"""  # noqa: D415 - the listing ends it

    promise: str
    wrong: tuple[str, ...]


def check_promises(
    record: EventRecord, *, tickets: Iterable[Ticket] = (), nested: bool = False, zombies: bool = False
) -> None:
    """All of the checks below on one record.

    Args:
        record: of a supervisor at rest.
        tickets: those that callers hold: each must have been resolved.
        nested: whether handlers await tasks of the same supervisor, and so lend their slots.
        zombies: whether handlers that do not stop may still hold their slots.

    Raises:
        BrokenPromise: the first that was.
    """
    check_task_ends(record, tickets=tickets)
    check_counts(record)
    check_limits(record, nested=nested)
    check_priorities(record)
    check_spills(record)
    check_nothing_left(record.supervisor, zombies=zombies)


def check_task_ends(*records: EventRecord, tickets: Iterable[Ticket] = (), kept: int | None = None) -> None:
    """Every task that was not rejected ended exactly once; none began twice as the same attempt, or after its end.

    Args:
        records: of supervisors that worked on one overflow, one after the other; what one left, another may have ended.
        tickets: those that callers hold: each must have been resolved.
        kept: how many tasks may be left in the overflow; None: any number, if it outlives its process, else none.

    Raises:
        BrokenPromise: a task was lost, ended twice, or began when it must not.
    """
    wrong = [line for record in records for line in _wrong_ends(record)]
    ended = Counter(task_id for record in records for task_id in record.results)
    wrong += [f"task {task_id!r} ended under {times} supervisors" for task_id, times in ended.items() if times > 1]
    lost = [
        f"{_task_name(record, task_id)} was {_taken_text(lives)} and has not ended"
        for record in records
        for task_id, lives in _events_by_task(record).items()
        if task_id not in ended and _was_taken(lives)
    ]
    if kept is None:
        kept = len(lost) if any(_has_durable_overflow(record.supervisor) for record in records) else 0
    if len(lost) > kept:
        wrong += lost
    wrong += [f"{ticket!r} has not been resolved" for ticket in tickets if not ticket.done()]
    fail_if_wrong("Every task that is not rejected ends exactly once", wrong)


def check_counts(record: EventRecord) -> None:
    """What a supervisor has counted since the record began is what it told.

    Raises:
        BrokenPromise: a count is another.
    """
    fail_if_wrong("What is counted is what has happened", [*_miscounts(record)])


def check_limits(record: EventRecord, *, nested: bool = False) -> None:
    """No worker held more tasks than its limit, at any event; nor, without an overflow, were more begun than had ended.

    Args:
        record: of the supervisor.
        nested: handlers await tasks of the same supervisor, and so lend their slots: more may have begun than run.

    Raises:
        BrokenPromise: one did.
    """
    wrong = [
        f"at {excess.at:.3f} s, after {_event_name(record, excess.after)}, worker {excess.worker_id!r} held"
        f" {excess.current_tasks} of {excess.max_concurrent}"
        for excess in record.excesses
    ]
    if not nested and not _has_overflow(record.supervisor):  # else an end is told only once it is stored
        wrong += _over_limits(record)
    fail_if_wrong("Nothing runs above a limit", wrong)


def check_priorities(record: EventRecord) -> None:
    """No task was begun while one of a better priority of its type waited inside, but in its turn: one in twenty-one.

    Tasks of a thread (a conversation) wait for each other, and are not compared. Where the overflow outlives the
    process, tasks leave the line for it and for other processes without a word: nothing can be judged, and it passes.

    Raises:
        BrokenPromise: one was.
    """
    if _has_durable_overflow(record.supervisor):
        return
    wrong = [
        f"{_task_name(record, hasty.began)} began at {hasty.at:.3f} s, while {_task_name(record, hasty.waited)} waited"
        for hasty in priority_inversions(record, stored=_has_overflow(record.supervisor))
    ]
    fail_if_wrong("The most important work goes first", wrong)


def check_spills(record: EventRecord) -> None:
    """What was spilled came back, ended outside, or is still there; and nothing began without coming back.

    Raises:
        BrokenPromise: some was not found.
    """
    wrong: list[str] = []
    missing: list[str] = []
    for task_id, life in _events_by_task(record).items():
        spilled = next((event for event in life if _is_spill(event)), None)
        if spilled is None:
            continue
        back = next((event for event in life if isinstance(event, TaskRefilled)), None)
        began = next((event for event in life if isinstance(event, TaskStarted)), None)
        if began is not None and (back is None or life.index(back) > life.index(began)):
            wrong.append(
                f"{_task_name(record, task_id)} was SPILLED, and began at {began.at:.3f} s without coming back"
            )
        elif back is None and not any(isinstance(event, TaskFinished) for event in life):
            missing.append(f"{_task_name(record, task_id)} was SPILLED at {spilled.at:.3f} s, and is nowhere")
    outside = record.supervisor.statistics().outside
    if len(missing) > outside and not (_has_durable_overflow(record.supervisor) and record.supervisor.loop is None):
        wrong.append(f"{len(missing)} have neither come back nor ended, and {outside} are outside")
        wrong += missing
    fail_if_wrong("What is spilled comes back, or ends outside", wrong)


def check_nothing_left(supervisor: BackpressureSupervisor, *, zombies: bool = False) -> None:
    """A supervisor at rest holds nothing: no slot, place, ticket or chore, and once it has closed no timer.

    Args:
        supervisor: whose.
        zombies: whether handlers that do not stop may still hold their slots.

    Raises:
        BrokenPromise: it holds something.
    """
    wrong: list[str] = []
    house = supervisor._dispatcher  # noqa: SLF001 - what is left behind is inside
    for worker in supervisor.workers.values():
        runs = [] if house is None else house.runs.on(worker)
        held = [run.task.task_id for run in runs if not (zombies and run.abandoned_at is not None)]
        if held:
            wrong.append(f"worker {worker.name!r} still runs {held}")
        if worker.pending_claims:
            wrong.append(f"on worker {worker.name!r} {worker.pending_claims} runs wait for the slot that they lent")
        if worker.current_tasks != len(runs):
            wrong.append(f"worker {worker.name!r} holds {worker.current_tasks} slots for {len(runs)} runs")
    if house is not None:
        for pool in house.core.pools.by_type.values():
            waiting = [ticket.task_id for ticket in pool.queue]
            if waiting or pool.parked or pool.reserved or any(pool.spilling.values()):
                seats = f"{pool.parked} behind their thread, {pool.reserved} seats reserved"
                arriving = f"{sum(pool.spilling.values())} on their way out"
                wrong.append(f"in the line of {pool.task_type!r} are {waiting}, {seats}, {arriving}")
        inside = [ticket for ticket in house.core.registry.live.values() if ticket.status is not TaskStatus.SPILLED]
        wrong += [f"{ticket!r} has not been resolved" for ticket in inside]
        wrong += [
            f"{len(talk)} tasks hold thread {name!r}" for name, talk in house.conversations.items() if not zombies
        ]
        if house.core.background_tasks:
            wrong.append(
                f"{len(house.core.background_tasks)} chores are under way: {sorted(map(repr, house.core.background_tasks))}"
            )
        if supervisor.loop is None and house.core.timers.armed:
            wrong.append("timers are set, though it has closed")
    fail_if_wrong("A supervisor at rest holds nothing", wrong)


# --- what they look at -----------------------------------------------------------------------------------------------


def fail_if_wrong(promise: str, wrong: list[str]) -> None:
    """Raise BrokenPromise if anything is wrong."""
    if wrong:
        shown = [*wrong[:_SHOWN], f"and {len(wrong) - _SHOWN} more"] if len(wrong) > _SHOWN else wrong
        raise BrokenPromise(promise=promise, listing="".join(f"\n  {line}" for line in shown), wrong=tuple(wrong))


def _events_by_task(record: EventRecord) -> dict[str, list[Event]]:
    """The events of each task, in order."""
    lives: dict[str, list[Event]] = defaultdict(list)
    for event in record.events:
        if (task_id := getattr(event, "task_id", None)) is not None:
            lives[task_id].append(event)
    return lives


def _wrong_ends(record: EventRecord) -> Iterator[str]:
    for task_id, life in _events_by_task(record).items():
        name = _task_name(record, task_id)
        ends = [event for event in life if isinstance(event, TaskFinished)]
        if len(ends) > 1:
            told = ", ".join(f"{end.result.status.name} at {end.at:.3f} s" for end in ends)
            yield f"{name} ended {len(ends)} times: {told}"
        if any(end.result.task_id != task_id for end in ends):
            yield f"{name} ended with the result of another task"
        if not _was_taken(life) and (
            begun := [event for event in life if isinstance(event, TaskStarted | TaskFinished)]
        ):
            yield f"{name} was REJECTED, and yet {begun[0].kind} at {begun[0].at:.3f} s"
        starts = [event for event in life if isinstance(event, TaskStarted)]
        if ends:
            over = life.index(ends[0])
            yield from (
                f"{name} began at {start.at:.3f} s, after it had ended at {ends[0].at:.3f} s"
                for start in starts
                if life.index(start) > over
            )
        for attempt, count in Counter(start.attempt for start in starts).items():
            if count > 1:
                when = ", ".join(f"{start.at:.3f} s" for start in starts if start.attempt == attempt)
                yield f"{name} began {count} times as attempt {attempt}: at {when}"


def _miscounts(record: EventRecord) -> Iterator[str]:
    statistics = record.supervisor.statistics()
    verdicts = Counter(event.verdict for event in record.of_type(TaskSubmitted))
    statuses = Counter(event.result.status for event in record.of_type(TaskFinished))
    told = {
        "started": len(record.of_type(TaskStarted)),
        "refilled": len(record.of_type(TaskRefilled)),
        "submitted": verdicts.total(),
    }
    told |= {verdict.value: verdicts[verdict] for verdict in Verdict}
    told |= {status.value: statuses[status] for status in FINAL_STATUSES}
    for name, count in told.items():
        if (counted := getattr(statistics, name) - getattr(record.baseline, name)) != count:
            yield f"{count} were told as {name}, and {counted} counted"


def _over_limits(record: EventRecord) -> Iterator[str]:
    """Moments at which more had begun on a worker than it may run."""
    limits = {worker.name: worker.max_concurrent for worker in record.supervisor.workers.values()}
    where: dict[str, str] = {}
    inside: dict[str, set[str]] = defaultdict(set)
    for event in record.events:
        if isinstance(event, TaskFinished | TaskRefilled) and (left := where.pop(event.task_id, None)) is not None:
            inside[left].discard(event.task_id)
        elif isinstance(event, TaskStarted):
            where[event.task_id] = event.worker_id
            crowd = inside[event.worker_id]
            crowd.add(event.task_id)
            if len(crowd) > limits.get(event.worker_id, math.inf):
                name = _task_name(record, event.task_id)
                others = sorted(crowd - {event.task_id})
                yield (
                    f"{name} began at {event.at:.3f} s on worker {event.worker_id!r}, which runs"
                    f" {limits[event.worker_id]} at a time, while {others} ran there (pass nested=True if they await"
                    " tasks of their own supervisor)"
                )


def _was_taken(life: list[Event]) -> bool:
    """Whether it was let in, or came in from an earlier process; what was not announced here was so before."""
    verdicts = [event.verdict for event in life if isinstance(event, TaskSubmitted)]
    return not verdicts or any(verdict is not Verdict.REJECTED for verdict in verdicts)


def _taken_text(life: list[Event]) -> str:
    for event in life:
        if isinstance(event, TaskSubmitted) and event.verdict is not Verdict.REJECTED:
            return f"{event.verdict.name} at {event.at:.3f} s"
    return f"there at {life[0].at:.3f} s"


def _is_spill(event: Event) -> bool:
    return isinstance(event, TaskSubmitted) and event.verdict is Verdict.SPILLED


def _has_overflow(supervisor: BackpressureSupervisor) -> bool:
    """Whether it has an overflow."""
    return supervisor._store is not None  # noqa: SLF001 - nothing public says it


def _has_durable_overflow(supervisor: BackpressureSupervisor) -> bool:
    """Whether its overflow survives its process."""
    ledger = supervisor._store  # noqa: SLF001 - nothing public says it
    return ledger is not None and ledger.durable


def _event_name(record: EventRecord, event: Event) -> str:
    task_id = getattr(event, "task_id", None)
    return event.kind if task_id is None else f"{event.kind} of {_task_name(record, task_id)}"


def _task_name(record: EventRecord, task_id: str) -> str:
    for event in record.for_task(task_id):
        if isinstance(event, TaskSubmitted):
            return f"task {task_id!r} ({event.task_type}, {event.priority.name})"
    return f"task {task_id!r}"
