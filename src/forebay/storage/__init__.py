"""Parts that all stores share: the URL that names a store, and the single writer of a SQLite file."""

from forebay.storage.batch_statement import BatchStatement
from forebay.storage.sqlite_file import Schema
from forebay.storage.sqlite_writer import SqliteWriter
from forebay.storage.url import DEFAULT_BOUND, StoreUrl, Synchronous, parse_url

__all__ = ["DEFAULT_BOUND", "BatchStatement", "Schema", "SqliteWriter", "StoreUrl", "Synchronous", "parse_url"]
