"""Inserts into the tables of the SQLite task store without the store."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

from forebay.interfaces import TaskRecord
from forebay.overflow.sqlite_schema import SCHEMA
from forebay.storage.sqlite_file import open_file
from forebay.storage.url import Fsync


def insert_seconds(path: Path, fsync: Fsync, records: Sequence[TaskRecord], *, batch: int) -> float:
    """Return the seconds to insert `records` by `executemany`, `batch` of them in each transaction."""
    connection = open_file(path, SCHEMA, fsync, 5.0)
    columns = "task_id, task_type, state, priority, due, key, attempts, enqueued_at, envelope"
    insert = f"INSERT INTO task ({columns}) VALUES (?, ?, 0, ?, ?, ?, 0, ?, ?)"  # noqa: S608
    started = time.perf_counter()
    for first in range(0, len(records), batch):
        connection.execute("BEGIN IMMEDIATE")
        connection.executemany(
            insert,
            [
                (
                    record.task_id,
                    record.task_type,
                    int(record.priority),
                    math.inf,
                    record.key,
                    record.enqueued_at,
                    record.envelope,
                )
                for record in records[first : first + batch]
            ],
        )
        connection.execute("COMMIT")
    seconds = time.perf_counter() - started
    connection.close()
    return seconds
