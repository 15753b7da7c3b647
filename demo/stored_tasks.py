"""Counts of the tasks on disk, read from the file itself rather than from the supervisor that wrote it."""

from __future__ import annotations

import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Final

import msgspec

from forebay.interfaces import Completion

_COUNT: Final = "SELECT state, COUNT(*) FROM task WHERE state < 2 GROUP BY state"
_ENDED: Final = "SELECT completion FROM task WHERE state >= 2"
_BUSY: Final = 5.0  # seconds to wait for a writer

_completion = msgspec.msgpack.Decoder(Completion)


class StoredTasks(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers of tasks in a task store, by state."""

    waiting: int = 0
    leased: int = 0
    done: int = 0
    failed: int = 0

    @property
    def to_do(self) -> int:
        """Tasks that are not done yet."""
        return self.waiting + self.leased

    @property
    def total(self) -> int:
        """All tasks in the store."""
        return self.waiting + self.leased + self.done + self.failed


def count_stored_tasks(path: Path) -> StoredTasks:
    """Count the tasks in a task store; zero of each if the file does not exist.

    Raises:
        sqlite3.Error: the file is not a task store, or it was busy for longer than five seconds.
    """
    if not path.exists():
        return StoredTasks()
    with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY)) as connection:
        states = dict(connection.execute(_COUNT).fetchall())
        endings = [_completion.decode(blob).status for (blob,) in connection.execute(_ENDED)]
    done = endings.count("succeeded")
    return StoredTasks(
        waiting=states.get(0, 0) + states.get(-1, 0), leased=states.get(1, 0), done=done, failed=len(endings) - done
    )
