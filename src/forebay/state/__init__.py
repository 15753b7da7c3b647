"""State that agents share, sharded over Redis servers, a Redis Cluster, SQLite files or memory."""

from forebay.state.entry import Entry, Versioned
from forebay.state.memory import MemoryShard
from forebay.state.moving import Rebalanced
from forebay.state.near_cache import NearCacheStatistics
from forebay.state.shard import Shard
from forebay.state.sharded import Namespace, ShardedState

__all__ = [
    "Entry",
    "MemoryShard",
    "Namespace",
    "NearCacheStatistics",
    "Rebalanced",
    "Shard",
    "ShardedState",
    "Versioned",
]
