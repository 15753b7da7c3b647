"""Dead letters: stored tasks that nobody will try again by itself, for a person to look at."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

import msgspec

from forebay.errors import InvalidPayload, InvalidSetting, Overloaded, UnknownTask
from forebay.interfaces import PutResult, RecordState
from forebay.overflow import decode_task
from forebay.supervisor.spill import records
from forebay.task import Priority, Task

if TYPE_CHECKING:
    from forebay.interfaces import DeadRecord
    from forebay.supervisor.dispatcher import Dispatcher
    from forebay.supervisor.spill.spill import Spill

_MAX_PAGE = 1000


class DeadLetter(msgspec.Struct, frozen=True, kw_only=True):
    """A stored task that died.

    Attributes:
        task_id: whose it is; `DeadLetters.task` has the task itself.
        task_type: which workers could run it.
        priority: its rung.
        key: its idempotency key, or None. The same key stays the same work while the letter is there.
        deadline: epoch seconds, or None.
        attempts: starts of its handler.
        error: why it died.
        submitted_at: epoch seconds.
        died_at: epoch seconds.
    """

    task_id: str
    task_type: str
    priority: Priority
    key: str | None
    deadline: float | None
    attempts: int
    error: str
    submitted_at: float
    died_at: float


class DeadLetters:
    """The dead letters of a supervisor's overflow, oldest first: ``async for letter in supervisor.dead_letters``.

    A task dies if its process went silent in each of its `max_attempts` starts, or if what is stored cannot be read. A
    letter stays until it is requeued or dropped; as many are kept as the overflow has bound, the youngest.

    Every method raises LedgerUnusable if the overflow fails, and NotStarted or WrongLoop where that is so.
    """

    def __init__(self, dispatcher: Callable[[], Dispatcher]) -> None:
        self._dispatcher = dispatcher

    async def page(self, *, limit: int = 100, after: DeadLetter | None = None) -> tuple[DeadLetter, ...]:
        """Up to `limit` letters; those behind `after`, the last of the page before, if it is given.

        Raises:
            InvalidSetting: `limit` is not a whole number from 1 to 1000.
        """
        if type(limit) is not int or not 1 <= limit <= _MAX_PAGE:
            expected = f"a whole number from 1 to {_MAX_PAGE}"
            raise InvalidSetting(owner="DeadLetters.page", name="limit", value=limit, expected=expected)
        overflow = self._dispatcher().spill
        if overflow is None:
            return ()
        place = None if after is None else (after.died_at, after.task_id)
        return tuple(map(_letter, await overflow.store.list_dead(limit, after=place)))

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Every letter, read page by page."""
        page = await self.page()
        while page:
            for letter in page:
                yield letter
            page = await self.page(after=page[-1])

    async def task(self, task_id: str) -> Task:
        """The task of a letter, with its payload; as plain data, if it is not of the type that is declared now.

        Raises:
            UnknownTask: there is no letter of that id.
            EnvelopeDamaged, EnvelopeTooNew: it cannot be read.
        """
        found = await self._spill(task_id).store.find(task_id)
        if found is None or found[0] is not RecordState.DEAD:
            raise UnknownTask(task_id=task_id)
        try:
            return records.task_of_record(found[1], self._dispatcher().codecs)
        except InvalidPayload:
            return decode_task(found[1].envelope)

    async def requeue(self, task_id: str) -> None:
        """Let the task of a letter wait in the overflow again: where it stood, and with all its attempts.

        Its tickets have ended; ``supervisor.ticket(task_id)`` gives a new one. One whose deadline has passed expires.

        Raises:
            UnknownTask: there is no letter of that id.
            Overloaded: the overflow is full.
        """
        overflow = self._spill(task_id)
        put = await overflow.store.requeue(task_id)
        if put is None:
            raise UnknownTask(task_id=task_id)
        if put is PutResult.FULL:
            raise Overloaded("the overflow is full", limited_by="overflow", load=1.0, retry_after=None)
        await overflow.refresh()

    async def drop(self, task_id: str) -> None:
        """Drop a letter for good, with its task; its id and its key are free then.

        Raises:
            UnknownTask: there is no letter of that id.
        """
        if not await self._spill(task_id).store.delete_dead(task_id):
            raise UnknownTask(task_id=task_id)

    def _spill(self, task_id: str) -> Spill:
        overflow = self._dispatcher().spill
        if overflow is None:
            raise UnknownTask(task_id=task_id)
        return overflow


def _letter(dead: DeadRecord) -> DeadLetter:
    row, completion = dead.record, dead.completion
    return DeadLetter(
        task_id=row.task_id,
        task_type=row.task_type,
        priority=row.priority,
        key=row.key,
        deadline=row.deadline,
        attempts=row.attempts,
        error=completion.error or "",
        submitted_at=row.enqueued_at,
        died_at=completion.finished_at,
    )
