"""Promises 1 and 2 of the design, as whoever stands outside can check them; and that a closed house is empty."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.sim.ledgers import Score

from forebay import BackpressureSupervisor, TaskStatus, Ticket, Verdict
from forebay.errors import LedgerUnusable
from forebay.events import Event, Finished, Refilled, Started, Submitted

FINAL = {TaskStatus.SUCCEEDED, TaskStatus.FAILED, TaskStatus.TIMED_OUT, TaskStatus.CANCELLED, TaskStatus.EXPIRED}


class Broke(Exception):
    """A promise was broken."""


@dataclass
class Witness:
    """A sink: hears all that one house tells, and looks at its limits each time."""

    house: BackpressureSupervisor | None = None
    deaf: bool = False  # its process is dead: what the house still says, nobody hears
    verdicts: Counter[Verdict] = field(default_factory=Counter)
    taken: list[str] = field(default_factory=list)  # admitted or spilled
    started: list[tuple[str, int]] = field(default_factory=list)  # with the attempt
    refilled: list[str] = field(default_factory=list)
    ended: Counter[str] = field(default_factory=Counter)
    finished: dict[str, TaskStatus] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)

    def __call__(self, event: Event) -> None:
        if self.deaf:
            return
        match event:
            case Submitted():
                self.verdicts[event.verdict] += 1
                if event.verdict is not Verdict.REJECTED:
                    self.taken.append(event.task_id)
            case Started():
                self.started.append((event.task_id, event.attempt))
            case Refilled():
                self.refilled.append(event.task_id)
            case Finished():
                self.ended[event.task_id] += 1
                self.finished[event.task_id] = event.result.status
        for worker in self.house.workers.values() if self.house else ():
            if not 0 <= worker.current_tasks <= worker.max_concurrent:
                self.wrong.append(f"{worker} holds {worker.current_tasks} of {worker.max_concurrent}")


@contextmanager
def no_failure_is_only_logged() -> Iterator[None]:
    """What the house logs because it could not raise it, an injected error of a ledger apart, breaks the promises."""
    failures: list[str] = []

    class Catch(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and not isinstance(record.exc_info[1], LedgerUnusable):
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
        raise Broke("; ".join(failures))


def check_empty(house: BackpressureSupervisor) -> None:
    """Nothing is left in a closed house, but zombies in their slots."""
    zombies = sum(worker.zombies for worker in house.workers.values())
    statistics = house.statistics()
    if (statistics.running, statistics.waiting) != (zombies, 0):
        raise Broke(f"something is left in a closed house: {statistics}")
    inside = house._house
    if inside is None:  # it could not start
        return
    for pool in inside.pools.values():
        left = (len(pool.line), pool.parked, pool.reserved, sum(pool.arriving.values()))
        if any(left):
            raise Broke(f"pool {pool.task_type} of a closed house holds (line, parked, reserved, arriving) {left}")
    if inside.tickets or inside.chores or any(worker.returning for worker in house.workers.values()):
        raise Broke(f"tickets {list(inside.tickets)} and {len(inside.chores)} chores are left in a closed house")


def check_house(house: BackpressureSupervisor, witness: Witness) -> None:
    """What must be true of a house that has closed, seen by itself."""
    if witness.wrong:
        raise Broke("; ".join(witness.wrong))
    statistics = house.statistics()
    if statistics.submitted != statistics.admitted + statistics.spilled + statistics.rejected:
        raise Broke(f"the verdicts do not add up: {statistics}")
    ended = sum(getattr(statistics, status.value) for status in FINAL)
    if ended != witness.ended.total():
        raise Broke(f"{witness.ended.total()} were seen to end, and {ended} counted")
    if statistics.started != len(witness.started):
        raise Broke(f"{len(witness.started)} were seen to start, and {statistics.started} counted")
    check_empty(house)


def check_memory(house: BackpressureSupervisor, witness: Witness, tickets: list[Ticket]) -> None:
    """Without a store that survives: all that was let in has ended here, and was begun at most once."""
    for ticket in tickets:
        if ticket and ticket.status not in FINAL:
            raise Broke(f"{ticket} never ended")
    if Counter(witness.taken) != witness.ended:
        raise Broke(
            f"{len(witness.taken)} were let in and {witness.ended.total()} ended: {witness.ended.most_common(3)}"
        )
    again = [task_id for task_id, count in Counter(task_id for task_id, _ in witness.started).items() if count > 1]
    if again:
        raise Broke(f"started more than once: {again}")
    if house.statistics().outside:
        raise Broke(f"{house.statistics().outside} are left outside")


def check_store(score: Score, witnesses: list[Witness], tickets: list[Ticket]) -> None:
    """With a store that survives: what it acknowledged has ended once, whichever process ran it."""
    for ticket in tickets:
        if not ticket.done():
            raise Broke(f"{ticket} never ended")
        if ticket.status not in FINAL and not score.ended[ticket.task_id] and ticket.task_id not in score.unsure:
            raise Broke(f"{ticket} was left to the next process, and none has ended it")
    if endless := [task_id for task_id in score.stored - score.unsure if not score.ended[task_id]]:
        raise Broke(f"stored and never ended: {endless}")
    if again := [task_id for task_id, count in score.ended.items() if count > 1]:
        raise Broke(f"completed more than once: {again}")
    _check_endings(score, witnesses)
    _check_attempts(score, witnesses)


def _check_endings(score: Score, witnesses: list[Witness]) -> None:
    """A task ends once in each house that knows it, and the same in all."""
    statuses: dict[str, set[TaskStatus]] = {}
    for witness in witnesses:
        if twice := [task_id for task_id, count in witness.ended.items() if count > 1 and task_id not in score.unsure]:
            raise Broke(f"ended twice in one house: {twice}")
        for task_id in set(witness.taken) & set(witness.finished):  # one that was never taken is only a word to nobody
            statuses.setdefault(task_id, set()).add(witness.finished[task_id])
    for task_id, seen in statuses.items():
        if len(seen) > 1 and task_id not in score.unsure:
            raise Broke(f"{task_id} ended differently for different processes: {seen}")


def _check_attempts(score: Score, witnesses: list[Witness]) -> None:
    """A repeat shows its attempt number, never silently twice."""
    attempts: dict[str, list[int]] = {}
    for witness in witnesses:
        for task_id, attempt in witness.started:
            attempts.setdefault(task_id, []).append(attempt)
    for task_id, seen in attempts.items():
        if len(set(seen)) < len(seen) and task_id not in score.unsure:
            raise Broke(f"the attempts at {task_id} are numbered {seen}")
