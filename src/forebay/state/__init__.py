"""State that agents share, sharded over Redis servers, a Redis Cluster, SQLite files or memory."""

from forebay.state.entry import Entry, StoredEntry, Versioned
from forebay.state.memory import MemoryShard
from forebay.state.shard import OperationRejected, Page, Shard, WriteRefused
from forebay.state.sharded import Namespace, ShardedState

__all__ = [
    "Entry",
    "MemoryShard",
    "Namespace",
    "OperationRejected",
    "Page",
    "Shard",
    "ShardedState",
    "StoredEntry",
    "Versioned",
    "WriteRefused",
]
