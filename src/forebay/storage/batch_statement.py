"""One SQL statement for many rows, so that the cost of a statement is paid once.

It also avoids releasing and re-acquiring the interpreter lock for every row, which can take milliseconds next to a busy
event loop.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any

_SIZES = [2**power for power in range(11)]  # rows in a statement: few sizes, so that all of them stay prepared


class BatchStatement:
    """A SQL statement that is written for one row and run for many.

    Args:
        template: the statement, with ``{rows}`` where the rows are inserted as ``(?, ?), (?, ?)``. For each row it must
            change exactly one row of a table or none; a row of NULLs, which pads the statement, must change none.
        width: values in a row.
    """

    def __init__(self, template: str, width: int) -> None:
        row = f"({', '.join('?' * width)})"
        self._statements = {size: template.format(rows=", ".join([row] * size)) for size in _SIZES}
        self._width = width

    def run(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> list[bool]:
        """Run the statement for `rows` as if one after the other, and return for each whether it changed something."""
        changed: list[bool] = []
        while len(changed) < len(rows):
            batch = rows[len(changed) : len(changed) + _SIZES[-1]]
            if self._run_together(connection, batch):
                changed += [True] * len(batch)
            else:
                changed += self._run_each(connection, batch)
        return changed

    def _run_together(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> bool:
        """Run it for all `rows`; if a row changed nothing, undo all: the count alone does not tell which row it was."""
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
