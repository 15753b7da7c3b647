"""The URL that names a store, and what stores share.

`url` and `operation_queue` are for every store. `sqlite_file` opens and migrates a file, `sqlite_writer` is its single
writer, `commit_watch` notices the commits of other processes, and `batch_statement` is a statement for many rows.
`redis_master` finds a Redis master and talks to it; its module is for those who have installed its library. On Redis,
`redis_durability` waits for replicas and disks, and `redis_sort_keys` makes texts that Redis sorts.
"""

from forebay.storage.batch_statement import BatchStatement
from forebay.storage.operation_queue import OperationError, OperationQueue
from forebay.storage.sqlite_file import Schema
from forebay.storage.sqlite_writer import SqliteWriter
from forebay.storage.url import DEFAULT_BOUND, Fsync, SqsUrl, StoreUrl, parse_url

__all__ = [
    "DEFAULT_BOUND",
    "BatchStatement",
    "Fsync",
    "OperationError",
    "OperationQueue",
    "Schema",
    "SqliteWriter",
    "SqsUrl",
    "StoreUrl",
    "parse_url",
]
