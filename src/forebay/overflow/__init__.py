"""The task store (the overflow): spilled tasks wait in it, durable ones are recorded in it, results are kept in it."""

from __future__ import annotations

from forebay.errors import InvalidOverflowUrl
from forebay.interfaces import TaskStore
from forebay.overflow.envelope import (
    EnvelopeDamaged,
    EnvelopeTooNew,
    decode_result,
    decode_task,
    encode_result,
    encode_task,
)
from forebay.overflow.memory import MemoryTaskStore
from forebay.overflow.refill_policy import RefillPolicy
from forebay.overflow.sqlite import SqliteTaskStore
from forebay.storage.url import parse_url

__all__ = [
    "EnvelopeDamaged",
    "EnvelopeTooNew",
    "MemoryTaskStore",
    "RefillPolicy",
    "SqliteTaskStore",
    "decode_result",
    "decode_task",
    "encode_result",
    "encode_task",
    "open_task_store",
]


def open_task_store(overflow: str | TaskStore) -> TaskStore:
    """Return the task store that a URL names, not opened yet; a task store is returned as it is.

    Args:
        overflow: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` (with ``?synchronous=full|normal|off``) or
            ``memory://``, each with ``?bound=ROWS`` for how many tasks may wait or run in it (100,000 by default).

    Raises:
        InvalidOverflowUrl: it is neither a known URL nor a task store.
    """
    if not isinstance(overflow, str):
        if not hasattr(overflow, "lease"):
            why = f"it is a {type(overflow).__name__}, not a URL or a task store"
            raise InvalidOverflowUrl(url=overflow, why=why)
        return overflow
    store = parse_url(overflow)
    if store.path is None:
        return MemoryTaskStore(bound=store.bound)
    return SqliteTaskStore(store.path, bound=store.bound, synchronous=store.synchronous)
