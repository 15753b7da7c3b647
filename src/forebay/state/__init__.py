"""State that agents share, sharded over Redis servers, a Redis Cluster, SQLite files or memory."""

from forebay.state.entry import Entry, StoredEntry, Versioned
from forebay.state.memory import MemoryShard
from forebay.state.moving import Rebalanced
from forebay.state.near_cache import NearCacheStatistics
from forebay.state.shard import Copied, NamePage, OperationRejected, Page, Shard, WriteRefused
from forebay.state.sharded import Namespace, ShardedState

__all__ = [
    "Copied",
    "Entry",
    "MemoryShard",
    "NamePage",
    "Namespace",
    "NearCacheStatistics",
    "OperationRejected",
    "Page",
    "Rebalanced",
    "Shard",
    "ShardedState",
    "StoredEntry",
    "Versioned",
    "WriteRefused",
]
