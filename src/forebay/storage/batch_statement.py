"""Many rows in one statement, so that its price is paid once.

Nor is the interpreter's lock given up and regained for every row, which beside a busy event loop can take milliseconds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any

_SIZES = [2**power for power in range(11)]  # rows in a statement: few, so that all stay prepared


class BatchStatement:
    """A statement that does for many rows what it does for one.

    Args:
        template: the statement, with ``{rows}`` where the rows go in as ``(?, ?), (?, ?)``. For each of them it must
            change one row of a table, or nothing; nothing for a row of NULLs, which fills a statement up.
        width: values in a row.
    """

    def __init__(self, template: str, width: int) -> None:
        row = f"({', '.join('?' * width)})"
        self._statements = {size: template.format(rows=", ".join([row] * size)) for size in _SIZES}
        self._width = width

    def run(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> list[bool]:
        """Do it for `rows`, as if one after the other; whether each changed something."""
        changed: list[bool] = []
        while len(changed) < len(rows):
            some = rows[len(changed) : len(changed) + _SIZES[-1]]
            changed += [True] * len(some) if self._run_together(connection, some) else self._run_each(connection, some)
        return changed

    def _run_together(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> bool:
        """Do it for all of them, or, if it changed nothing for one, for none: which one that was it does not say."""
        if len(rows) == 1:
            return False
        size = next(size for size in _SIZES if size >= len(rows))
        values = [*chain.from_iterable(rows), *[None] * (self._width * (size - len(rows)))]
        connection.execute("SAVEPOINT rows")
        done = connection.execute(self._statements[size], values).rowcount == len(rows)
        if not done:
            connection.execute("ROLLBACK TO rows")
        connection.execute("RELEASE rows")
        return done

    def _run_each(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> list[bool]:
        return [connection.execute(self._statements[1], row).rowcount > 0 for row in rows]
