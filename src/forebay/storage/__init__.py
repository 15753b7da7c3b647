"""The URL that names a store, and what stores in a SQLite file share.

`url` is for every store. `sqlite_file` opens and migrates a file, `sqlite_writer` is its single writer, and
`batch_statement` a statement for many rows.
"""

from forebay.storage.batch_statement import BatchStatement
from forebay.storage.sqlite_file import Schema
from forebay.storage.sqlite_writer import SqliteWriter
from forebay.storage.url import DEFAULT_BOUND, SqsUrl, StoreUrl, Synchronous, parse_url

__all__ = [
    "DEFAULT_BOUND",
    "BatchStatement",
    "Schema",
    "SqliteWriter",
    "SqsUrl",
    "StoreUrl",
    "Synchronous",
    "parse_url",
]
