"""Dead letters: stored tasks that will not be tried again until a person requeues them."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING

from forebay._json import JsonStruct
from forebay._validate import check_whole
from forebay.errors import DuplicateKey, InvalidPayload, Overloaded, UnknownTask
from forebay.interfaces import PutResult, RecordState
from forebay.overflow import decode_task
from forebay.supervisor.spill import records
from forebay.task import Priority, Task

if TYPE_CHECKING:
    from forebay.interfaces import StoredRecord
    from forebay.supervisor.spill.spill import Spill

_MAX_PAGE = 1000


class DeadLetter(JsonStruct, frozen=True, kw_only=True):
    """A stored task that has failed for good.

    Attributes:
        task_id: the task's id; `DeadLetters.task` returns the task itself.
        task_type: the type of the task.
        priority: the priority of the task.
        key: its idempotency key, or None. Another task may use the key; then the letter cannot be requeued.
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

    A stored task dies if it has ended FAILED or TIMED_OUT, its retries included, if its process was lost in each of its
    `max_attempts` starts, or if its record cannot be read. A letter stays until it is requeued or dropped. As many are
    kept as the overflow's bound allows, the newest.

    Every method raises StoreUnavailable if the overflow fails, NotStarted before the supervisor has started, and
    WrongLoop on another event loop than the supervisor's.
    """

    def __init__(self, spill: Callable[[], Spill | None]) -> None:
        self._find_spill = spill

    async def page(self, *, limit: int = 100, after: DeadLetter | None = None) -> tuple[DeadLetter, ...]:
        """Return up to `limit` letters, from the oldest on, or those after `after`, the last letter of the page before.

        Raises:
            InvalidSetting: `limit` is not a whole number from 1 to 1000.
        """
        check_whole("DeadLetters.page", "limit", limit, maximum=_MAX_PAGE)
        spill = self._find_spill()
        if spill is None:
            return ()
        last = None if after is None else (after.died_at, after.task_id)
        return tuple(map(_letter, await spill.stored.store.list_records(RecordState.DEAD, limit, after=last)))

    async def __aiter__(self) -> AsyncIterator[DeadLetter]:
        """Yield every letter, read page by page."""
        page = await self.page()
        while page:
            for letter in page:
                yield letter
            page = await self.page(after=page[-1])

    async def task(self, task_id: str) -> Task:
        """Return the task of a letter. If the payload does not fit the type that is declared now, it is plain data.

        Raises:
            UnknownTask: there is no letter of that id.
            EnvelopeDamaged, EnvelopeTooNew: it cannot be read.
        """
        spill = self._spill(task_id)
        found = await spill.stored.store.find(task_id)
        if found is None or found[0] is not RecordState.DEAD:
            raise UnknownTask(task_id=task_id)
        try:
            return records.read_record(found[1], spill.codecs)[0]
        except InvalidPayload:
            return decode_task(found[1].envelope)

    async def requeue(self, task_id: str) -> None:
        """Put the task of a letter back into the overflow, in its old order and with no attempts or retries counted.

        Its old tickets have ended; ``await supervisor.find(task_id)`` returns a new one. A task whose deadline has
        passed expires.

        Raises:
            UnknownTask: there is no letter of that id.
            DuplicateKey: another task has taken its key, and has not ended or has succeeded.
            Overloaded: the overflow is full.
        """
        spill = self._spill(task_id)
        put = await spill.stored.store.requeue(task_id)
        if put is None:
            raise UnknownTask(task_id=task_id)
        if put is PutResult.DUPLICATE:
            raise DuplicateKey(task_id=task_id)
        if put is PutResult.FULL:
            raise Overloaded("the overflow is full", limited_by="overflow", load=1.0, retry_after=None)
        await spill.refiller.refresh()

    async def drop(self, task_id: str) -> None:
        """Delete a letter with its task; its id may be used again.

        Raises:
            UnknownTask: there is no letter of that id.
        """
        if not await self._spill(task_id).stored.store.delete_dead(task_id):
            raise UnknownTask(task_id=task_id)

    def _spill(self, task_id: str) -> Spill:
        spill = self._find_spill()
        if spill is None:
            raise UnknownTask(task_id=task_id)
        return spill


def _letter(dead: StoredRecord) -> DeadLetter:
    record, completion = dead.record, dead.completion
    assert completion is not None  # noqa: S101 - it is DEAD
    return DeadLetter(
        task_id=record.task_id,
        task_type=record.task_type,
        priority=record.priority,
        key=record.key,
        deadline=record.deadline,
        attempts=record.attempts,
        error=completion.error or "",
        submitted_at=record.enqueued_at,
        died_at=completion.finished_at,
    )
