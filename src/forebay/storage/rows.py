"""Many rows in one statement, so that its price is paid once.

Nor is the interpreter's lock given up and regained for every row, which beside a busy event loop can take milliseconds.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence
from itertools import chain
from typing import Any

_SIZES = (128, 32, 8, 1)  # rows in a statement: few, so that all stay prepared


class Rows:
    """A statement that does for many rows what it does for one.

    Args:
        template: the statement, with ``{rows}`` where the rows go in as ``(?, ?), (?, ?)``. For each of them it must
            change one row of a table, or nothing.
        width: values in a row.
    """

    def __init__(self, template: str, width: int) -> None:
        row = f"({', '.join('?' * width)})"
        self._statements = {size: template.format(rows=", ".join([row] * size)) for size in _SIZES}

    def run(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> list[bool]:
        """Do it for `rows`, as if one after the other; whether each changed something."""
        changed: list[bool] = []
        for size in _SIZES:
            while len(rows) - len(changed) >= size:
                changed += self._together(connection, rows[len(changed) : len(changed) + size])
        return changed

    def _together(self, connection: sqlite3.Connection, rows: Sequence[Sequence[Any]]) -> list[bool]:
        statement = self._statements[len(rows)]
        if len(rows) == 1:
            return [connection.execute(statement, rows[0]).rowcount > 0]
        connection.execute("SAVEPOINT together")
        done = connection.execute(statement, list(chain.from_iterable(rows))).rowcount == len(rows)
        if not done:  # which of them did nothing it does not say
            connection.execute("ROLLBACK TO together")
        connection.execute("RELEASE together")
        return (
            [True] * len(rows) if done else [changed for row in rows for changed in self._together(connection, [row])]
        )
