"""The open connections of each worker of a gateway, in memory that all of them see."""

from __future__ import annotations

import mmap
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from typing import Final

_TOLERANCE: Final = 8  # a worker may have an 8th more connections than another, so that they take turns less often
_OPEN, _TURNS, _IS_WAITING, _FIELDS = 0, 1, 2, 3  # numbers of a worker
_ABSENT: Final = -1  # of a worker that accepts no connections
_BYTES: Final = 8  # of a number


def most_to_accept(counts: Iterable[int]) -> int:
    """Return with how many open connections a worker accepts another one: the least and an 8th, or the least and one.

    Args:
        counts: of the open connections of each worker that accepts any; one at least.
    """
    least = min(counts)
    return least + max(1, least // _TOLERANCE)


class ConnectionCounts:
    """The open connections of each worker of a gateway, and which of them wait for others to accept.

    The parent process makes it before it forks. Each worker writes its own numbers only, so there is no lock: one that
    reads a number late accepts a connection too many, or is woken in vain.

    Args:
        count: of the workers.
    """

    def __init__(self, count: int) -> None:
        self._numbers = memoryview(mmap.mmap(-1, count * _FIELDS * _BYTES)).cast("q")
        self._pipes = [os.pipe() for _ in range(count)]
        for end in (end for pipe in self._pipes for end in pipe):
            os.set_blocking(end, False)
        self._workers = range(count)
        for number in self._workers:
            self.withdraw(number)

    def publish(self, number: int, connections: int) -> None:
        """Let the others know that a worker lives, accepts connections, and how many it has."""
        self._numbers[number * _FIELDS + _OPEN] = connections
        self._numbers[number * _FIELDS + _TURNS] += 1

    def withdraw(self, number: int) -> None:
        """Let the others know that a worker accepts no connections, since it drains or has died."""
        self.publish(number, _ABSENT)
        self._numbers[number * _FIELDS + _IS_WAITING] = 0

    def turns(self, number: int) -> int:
        """Return how often a worker has published: it lives if that changes."""
        return self._numbers[number * _FIELDS + _TURNS]

    def others(self, number: int) -> dict[int, int]:
        """Return the open connections of the other workers that accept any, by number."""
        counts = ((other, self._numbers[other * _FIELDS + _OPEN]) for other in self._workers if other != number)
        return {other: count for other, count in counts if count != _ABSENT}

    def close(self) -> None:
        """Give up what it has open, once no worker runs."""
        for end in (end for pipe in self._pipes for end in pipe):
            os.close(end)

    # --- workers that wait ---

    def wait(self, number: int) -> None:
        """Note that a worker leaves connections to others, and is to be woken when it is its turn."""
        self._numbers[number * _FIELDS + _IS_WAITING] = 1

    def end_wait(self, number: int) -> None:
        """Note that a worker accepts connections, and need not be woken."""
        self._numbers[number * _FIELDS + _IS_WAITING] = 0

    def wake(self, most: int, workers: Collection[int]) -> None:
        """Wake those of these workers that wait though they have at most so many connections."""
        for number in workers:
            open_, _, is_waiting = self._numbers[number * _FIELDS : (number + 1) * _FIELDS]
            if is_waiting and _ABSENT < open_ <= most:
                with suppress(BlockingIOError):  # it has been woken often enough
                    os.write(self._pipes[number][1], b"\0")

    def waker(self, number: int) -> int:
        """Return a file descriptor that can be read once a worker is woken."""
        return self._pipes[number][0]

    def clear_waker(self, number: int) -> None:
        """Take note that a worker has been woken."""
        with suppress(BlockingIOError):
            os.read(self._pipes[number][0], 4096)
