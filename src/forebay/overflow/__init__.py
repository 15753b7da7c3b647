"""The ledger of tasks: where they wait outside, where durable ones are on record, and where results are kept."""

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
    """The ledger that a URL names, yet to be opened; a ledger as it is.

    Args:
        overflow: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` (with ``?synchronous=full|normal|off``) or ``memory://``,
            each with ``?bound=ROWS`` for how many tasks may wait and run in it, 100,000 unless told otherwise.

    Raises:
        InvalidOverflowUrl: it is neither.
    """
    if not isinstance(overflow, str):
        if not hasattr(overflow, "lease"):
            raise InvalidOverflowUrl(url=overflow, why=f"it is a {type(overflow).__name__}, not a URL or a ledger")
        return overflow
    store = parse_url(overflow)
    if store.path is None:
        return MemoryTaskStore(bound=store.bound)
    return SqliteTaskStore(store.path, bound=store.bound, synchronous=store.synchronous)
