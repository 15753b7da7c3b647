"""What stores share: the URL that names one, and the one writer of a SQLite file."""

from forebay.storage.sqlite import Schema, SqliteWriter
from forebay.storage.url import DEFAULT_BOUND, StoreUrl, Synchronous, parse_url

__all__ = ["DEFAULT_BOUND", "Schema", "SqliteWriter", "StoreUrl", "Synchronous", "parse_url"]
