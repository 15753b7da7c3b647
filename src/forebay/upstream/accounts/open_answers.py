"""The streaming answers that hold permits of an account, to find those that their readers have dropped."""

from __future__ import annotations

import math
from typing import Final, Protocol
from weakref import WeakSet

_UNREAD: Final = 1.0  # seconds after which an answer that nobody reads may have been dropped
_PATIENCE: Final = 30.0  # seconds after which an answer that nobody reads is taken back
_PAUSE: Final = 1.0  # seconds between two looks, while calls wait
_MAX_PAUSE: Final = 60.0  # seconds between two collections, if they release nothing


class OpenAnswer(Protocol):
    """A streaming answer that holds a permit.

    Attributes:
        unread_since: when its reader got the latest part; infinity while it waits for the next one.
    """

    unread_since: float

    @property
    def settled(self) -> bool:
        """True once the permit is released."""

    def take_back(self) -> None:
        """Close the answer, and release its permit. Callable from any thread."""


class OpenAnswers:
    """The streaming answers that hold permits of one account.

    A reader that leaves a stream by ``break`` and drops it has not closed it, and Python may not notice for minutes: an
    SDK's stream refers to itself, so that it stays until the next full garbage collection. While calls wait for a slot,
    and an answer has not been read for a second, that collection is made. If it releases nothing, the next one comes
    after twice the time: slow readers have answers unread for a second, too. Its methods are called under the account's
    lock, the collection is not: the finalizers of others run in it.

    An answer that is kept and not read for half a minute, or for `patience` if that is less, is taken back: it is
    closed, and reading on raises an error.

    Args:
        patience: seconds for which an answer may be unread at most, while calls wait for its slot.
    """

    __slots__ = ("_answers", "_dropped", "_next_collection", "_patience", "_pause")

    def __init__(self, *, patience: float = _PATIENCE) -> None:
        self._patience = min(patience, _PATIENCE)
        self._answers: WeakSet[OpenAnswer] = WeakSet()
        self._pause = _PAUSE
        self._next_collection = -math.inf
        self._dropped = False  # since the latest collection

    def add(self, answer: OpenAnswer) -> None:
        """Note that an answer has begun."""
        self._answers.add(answer)

    def record_abandoned(self, unread: float) -> None:
        """Note that an answer was closed before its end, `unread` seconds after it was read: it may have been dropped.

        It may be called from any thread, without the lock.
        """
        if unread >= _UNREAD:
            self._dropped = True

    def next_look(self, now: float) -> float | None:
        """Return when to look for dropped answers again, while calls wait for a slot; None if there are none."""
        if all(answer.settled for answer in self._answers):
            return None
        return now + _PAUSE

    def unread(self, now: float) -> int:
        """Return how many answers have not been read for a second."""
        return sum(now - answer.unread_since >= _UNREAD for answer in self._answers if not answer.settled)

    def overdue(self, now: float) -> list[OpenAnswer]:
        """Return the answers to take back, because nobody has read them for too long."""
        return [
            answer for answer in self._answers if not answer.settled and now - answer.unread_since >= self._patience
        ]

    def begin_collection(self, now: float) -> bool:
        """Return whether to collect garbage now, because answers may have been dropped."""
        if now < self._next_collection or not self.unread(now):
            return False
        self._pause = _PAUSE if self._dropped else min(_MAX_PAUSE, 2 * self._pause)
        self._dropped = False
        self._next_collection = now + self._pause
        return True
