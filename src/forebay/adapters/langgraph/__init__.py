"""LangGraph: compiled graphs as handlers, and a checkpointer and a store that keep their data in sharded state."""

from forebay.adapters.langgraph.handler import handler
from forebay.adapters.langgraph.saver import ShardedSaver
from forebay.adapters.langgraph.store import ShardedStore

__all__ = ["ShardedSaver", "ShardedStore", "handler"]
