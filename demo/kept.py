"""What is kept on disk, counted in the file itself, past the supervisor that wrote it."""

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


class Kept(msgspec.Struct, frozen=True, kw_only=True):
    """Tasks in the ledger by what has become of them."""

    waiting: int = 0
    leased: int = 0
    done: int = 0
    failed: int = 0

    @property
    def to_do(self) -> int:
        """Tasks still to be done."""
        return self.waiting + self.leased

    @property
    def total(self) -> int:
        """All tasks that it knows."""
        return self.waiting + self.leased + self.done + self.failed


def kept(ledger: Path) -> Kept:
    """Count the tasks in a ledger; nothing where there is none.

    Raises:
        sqlite3.Error: it is not a ledger, or busy for longer than five seconds.
    """
    if not ledger.exists():
        return Kept()
    with closing(sqlite3.connect(f"{ledger.absolute().as_uri()}?mode=ro", uri=True, timeout=_BUSY)) as connection:
        states = dict(connection.execute(_COUNT).fetchall())
        endings = [_completion.decode(blob).status for (blob,) in connection.execute(_ENDED)]
    done = endings.count("succeeded")
    return Kept(waiting=states.get(0, 0), leased=states.get(1, 0), done=done, failed=len(endings) - done)
