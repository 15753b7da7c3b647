"""How the ledger lies in a SQLite file.

Whatever is asked of it often is found at the end of an index: the best waiting row of a type, the lease that lapses
first, the ended row that is oldest. Rows are counted as they go in, where they all go in (`put`); after that triggers
keep the counts true, whatever moves or drops a row.
"""

from __future__ import annotations

from forebay.storage.sqlite_file import Schema
from forebay.typing import RowState

# As stored. The first two are held against the bound, the last two have ended.
STATES = (RowState.WAITING, RowState.LEASED, RowState.DONE, RowState.DEAD)

_TASK = """
CREATE TABLE task (
    turn        INTEGER PRIMARY KEY,  -- grows with each row stored: its age, and its place for life
    task_id     TEXT NOT NULL UNIQUE,
    task_type   TEXT NOT NULL,
    state       INTEGER NOT NULL,     -- 0 waiting, 1 leased, 2 done, 3 dead
    priority    INTEGER NOT NULL,
    due         REAL NOT NULL,        -- the deadline; infinity if there is none, which sorts last
    key         TEXT,
    attempts    INTEGER NOT NULL,
    enqueued_at REAL NOT NULL,
    fence       TEXT,                 -- while leased
    until       REAL,                 -- while leased
    finished_at REAL,                 -- once ended
    completion  BLOB,                 -- once ended, in MessagePack
    envelope    BLOB NOT NULL         -- last: a large one spills onto further pages; empty once done
)
"""

_INDEXES = (
    "CREATE UNIQUE INDEX task_key ON task (key) WHERE key IS NOT NULL",
    "CREATE INDEX task_waiting ON task (task_type, priority, due, turn) WHERE state = 0",
    "CREATE INDEX task_leased ON task (until) WHERE state = 1",
    "CREATE INDEX task_ended ON task (finished_at, turn) WHERE state >= 2",
)

_COUNTS = (
    "CREATE TABLE size (ended INTEGER PRIMARY KEY, tasks INTEGER NOT NULL)",  # 0: held, 1: ended
    "INSERT INTO size VALUES (0, 0), (1, 0)",
    """
    CREATE TABLE depth (
        task_type TEXT NOT NULL, priority INTEGER NOT NULL, waiting INTEGER NOT NULL, PRIMARY KEY (task_type, priority)
    ) WITHOUT ROWID
    """,
)

_ENTERS_QUEUE = """
    INSERT INTO depth VALUES (new.task_type, new.priority, 1)
    ON CONFLICT DO UPDATE SET waiting = waiting + 1;
"""
_LEAVES_QUEUE = "UPDATE depth SET waiting = waiting - 1 WHERE task_type = old.task_type AND priority = old.priority;"

_ENDS = "UPDATE size SET tasks = tasks + CASE WHEN ended = (new.state >= 2) THEN 1 ELSE -1 END;"

_TRIGGERS = tuple(
    f"CREATE TRIGGER {name} AFTER {when} BEGIN {what} END"
    for name, when, what in (
        ("task_dropped", "DELETE ON task", "UPDATE size SET tasks = tasks - 1 WHERE ended = (old.state >= 2);"),
        ("task_ends", "UPDATE OF state ON task WHEN (old.state >= 2) <> (new.state >= 2)", _ENDS),
        ("task_dropped_waiting", "DELETE ON task WHEN old.state = 0", _LEAVES_QUEUE),
        ("task_waits", "UPDATE OF state ON task WHEN old.state <> 0 AND new.state = 0", _ENTERS_QUEUE),
        ("task_waited", "UPDATE OF state ON task WHEN old.state = 0 AND new.state <> 0", _LEAVES_QUEUE),
    )
)

SCHEMA = Schema(
    application=0x464F5242,  # "FORB"
    migrations=((_TASK, *_INDEXES, *_COUNTS, *_TRIGGERS),),
)
