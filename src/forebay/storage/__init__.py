"""What stores share: the URL that names one, and the one writer of a SQLite file."""

from forebay.storage.rows import Rows
from forebay.storage.sqlite import SqliteWriter
from forebay.storage.sqlite_file import Schema
from forebay.storage.url import DEFAULT_BOUND, StoreUrl, Synchronous, parse_url

__all__ = ["DEFAULT_BOUND", "Rows", "Schema", "SqliteWriter", "StoreUrl", "Synchronous", "parse_url"]
