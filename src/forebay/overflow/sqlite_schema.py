"""The tables, indexes and triggers of a task store in a SQLite file.

Frequent queries are answered from the end of an index: the best waiting record of a type, the lease that expires first,
the oldest ended record, the oldest of a conversation. `put` counts the records that it inserts, being the only
statement that does; after that, triggers keep the counts right, whichever statement moves or deletes a record.
"""

from __future__ import annotations

from forebay.interfaces import RecordState
from forebay.storage.sqlite_file import Schema
from forebay.task import DEFAULT_TENANT

# By stored number. Those below 2 count towards the bound, the others have ended.
STATES = {
    -3: RecordState.DELAYED,  # until its `not_before`: it has not joined its conversation
    -2: RecordState.DELAYED,  # until its retry
    -1: RecordState.PARKED,
    0: RecordState.WAITING,
    1: RecordState.LEASED,
    2: RecordState.DONE,
    3: RecordState.DEAD,
}

_TASK = """
CREATE TABLE task (
    sequence    INTEGER PRIMARY KEY,  -- grows with each record stored
    task_id     TEXT NOT NULL UNIQUE,
    task_type   TEXT NOT NULL,
    state       INTEGER NOT NULL,     -- 0 waiting, 1 leased, 2 done, 3 dead
    priority    INTEGER NOT NULL,
    due         REAL NOT NULL,        -- the deadline; infinity if there is none, which sorts last
    key         TEXT,
    attempts    INTEGER NOT NULL,
    enqueued_at REAL NOT NULL,        -- orders records of the same priority and deadline
    fence       TEXT,                 -- while leased
    until       REAL,                 -- while leased
    finished_at REAL,                 -- once ended
    completion  BLOB,                 -- once ended, in MessagePack
    envelope    BLOB NOT NULL         -- last: a large one spills onto further pages; empty once done
)
"""

_INDEXES = (
    "CREATE UNIQUE INDEX task_key ON task (key) WHERE key IS NOT NULL",
    "CREATE INDEX task_waiting ON task (task_type, priority, due, enqueued_at, sequence) WHERE state = 0",
    "CREATE INDEX task_leased ON task (until) WHERE state = 1",
    "CREATE INDEX task_done ON task (finished_at, sequence) WHERE state = 2",
    "CREATE INDEX task_dead ON task (finished_at, task_id) WHERE state = 3",
)

_COUNTS = (
    "CREATE TABLE size (kind INTEGER PRIMARY KEY, tasks INTEGER NOT NULL)",  # 0: waiting or leased, 1: done, 2: dead
    "INSERT INTO size VALUES (0, 0), (1, 0), (2, 0)",
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

_OLD, _NEW = "max(old.state - 1, 0)", "max(new.state - 1, 0)"  # the `kind` in table `size`, before and after
_CHANGES = f"UPDATE size SET tasks = tasks + iif(kind = {_NEW}, 1, -1) WHERE kind IN ({_OLD}, {_NEW});"  # noqa: S608

_TRIGGERS = tuple(
    f"CREATE TRIGGER {name} AFTER {when} BEGIN {what} END"
    for name, when, what in (
        ("task_dropped", "DELETE ON task", f"UPDATE size SET tasks = tasks - 1 WHERE kind = {_OLD};"),  # noqa: S608
        ("task_changes", f"UPDATE OF state ON task WHEN {_OLD} <> {_NEW}", _CHANGES),
        ("task_dropped_waiting", "DELETE ON task WHEN old.state = 0", _LEAVES_QUEUE),
        ("task_waits", "UPDATE OF state ON task WHEN old.state <> 0 AND new.state = 0", _ENTERS_QUEUE),
        ("task_waited", "UPDATE OF state ON task WHEN old.state = 0 AND new.state <> 0", _LEAVES_QUEUE),
    )
)

# Records that were stored without their thread id belong to no conversation here; a process that leases them reads it
# from the envelope.
_CONVERSATIONS = (
    "ALTER TABLE task ADD COLUMN thread_id TEXT",
    # Of each conversation one record is waiting or leased; the others are parked, which is state -1.
    "CREATE UNIQUE INDEX task_head ON task (thread_id) WHERE thread_id IS NOT NULL AND state IN (0, 1)",
    "CREATE INDEX task_parked ON task (thread_id, enqueued_at, sequence) WHERE state = -1",
    """
    CREATE TRIGGER task_makes_way AFTER UPDATE OF state ON task
    WHEN old.thread_id IS NOT NULL AND old.state IN (0, 1) AND new.state > 1
    BEGIN
        UPDATE task SET state = 0 WHERE sequence = (
            SELECT sequence FROM task WHERE thread_id = old.thread_id AND state = -1
            ORDER BY enqueued_at, sequence LIMIT 1
        );
    END
    """,
)

# How a completion in MessagePack goes on after its first byte if its status, the first field, is "succeeded".
_SUCCEEDED = "x'A6737461747573A9737563636565646564'"

_RETRIES = (
    "ALTER TABLE task ADD COLUMN failures INTEGER NOT NULL DEFAULT 0",
    "ALTER TABLE task ADD COLUMN total_delay REAL NOT NULL DEFAULT 0",
    "ALTER TABLE task ADD COLUMN last_error TEXT",
    # Of each conversation one record is waiting, leased or delayed, which is state -2; `until` is then when it is due.
    "DROP INDEX task_head",
    "CREATE UNIQUE INDEX task_head ON task (thread_id) WHERE thread_id IS NOT NULL AND state IN (-2, 0, 1)",
    "CREATE INDEX task_delayed ON task (until) WHERE state = -2",
    "DROP TRIGGER task_makes_way",
    """
    CREATE TRIGGER task_makes_way AFTER UPDATE OF state ON task
    WHEN old.thread_id IS NOT NULL AND old.state IN (-2, 0, 1) AND new.state > 1
    BEGIN
        UPDATE task SET state = 0 WHERE sequence = (
            SELECT sequence FROM task WHERE thread_id = old.thread_id AND state = -1
            ORDER BY enqueued_at, sequence LIMIT 1
        );
    END
    """,
    # A key is taken by records that have not ended or have succeeded. A dead one keeps its key for its requeue.
    "DROP INDEX task_key",
    f"UPDATE task SET key = NULL WHERE state = 2 AND key IS NOT NULL AND substr(completion, 2, 17) <> {_SUCCEEDED}",  # noqa: S608
    "CREATE UNIQUE INDEX task_key ON task (key) WHERE key IS NOT NULL AND state < 3",
)

_PUT_DEPTH = """
    INSERT INTO depth VALUES (new.task_type, new.priority, new.tenant, 1)
    ON CONFLICT DO UPDATE SET waiting = waiting + 1;
"""
_TAKE_DEPTH = """
    UPDATE depth SET waiting = waiting - 1
    WHERE task_type = old.task_type AND priority = old.priority AND tenant = old.tenant;
"""

# Records that were stored without their tenant take turns as those of the default one.
_TENANTS = (
    f"ALTER TABLE task ADD COLUMN tenant TEXT NOT NULL DEFAULT '{DEFAULT_TENANT}'",
    "DROP INDEX task_waiting",
    "CREATE INDEX task_waiting ON task (task_type, priority, tenant, due, enqueued_at, sequence) WHERE state = 0",
    "DROP TRIGGER task_dropped_waiting",
    "DROP TRIGGER task_waits",
    "DROP TRIGGER task_waited",
    "DROP TABLE depth",
    """
    CREATE TABLE depth (
        task_type TEXT NOT NULL, priority INTEGER NOT NULL, tenant TEXT NOT NULL, waiting INTEGER NOT NULL,
        PRIMARY KEY (task_type, priority, tenant)
    ) WITHOUT ROWID
    """,
    "INSERT INTO depth SELECT task_type, priority, tenant, count(*) FROM task WHERE state = 0 GROUP BY 1, 2, 3",
    *(
        f"CREATE TRIGGER {name} AFTER {when} BEGIN {what} END"
        for name, when, what in (
            ("task_dropped_waiting", "DELETE ON task WHEN old.state = 0", _TAKE_DEPTH),
            ("task_waits", "UPDATE OF state ON task WHEN old.state <> 0 AND new.state = 0", _PUT_DEPTH),
            ("task_waited", "UPDATE OF state ON task WHEN old.state = 0 AND new.state <> 0", _TAKE_DEPTH),
        )
    ),
)

_SCHEDULED = (
    "ALTER TABLE task ADD COLUMN not_before REAL",
    "DROP INDEX task_delayed",
    "CREATE INDEX task_delayed ON task (until) WHERE state < -1",
    "CREATE INDEX task_scheduled ON task (thread_id) WHERE thread_id IS NOT NULL AND state = -3",
)

# The largest bound of the processes that have stored tasks.
_BOUND = (
    "CREATE TABLE bound (id INTEGER PRIMARY KEY, tasks INTEGER NOT NULL)",
    "INSERT INTO bound VALUES (0, 0)",
)

_USAGE = ("ALTER TABLE task ADD COLUMN usage BLOB",)  # of the calls of attempts that failed, in MessagePack

SCHEMA = Schema(
    application_id=0x464F5242,  # "FORB"
    migrations=(
        (_TASK, *_INDEXES, *_COUNTS, *_TRIGGERS),
        _CONVERSATIONS,
        _RETRIES,
        _TENANTS,
        _SCHEDULED,
        _BOUND,
        _USAGE,
    ),
)
