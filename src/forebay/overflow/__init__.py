"""The task store (the overflow): spilled tasks wait in it, durable ones are recorded in it, results are kept in it."""

from __future__ import annotations

from pathlib import Path, PurePath
from typing import TYPE_CHECKING

from forebay.errors import InvalidOverflowUrl, StoreNotInstalled
from forebay.interfaces import TaskIndex, TaskStore
from forebay.overflow.envelope import (
    EnvelopeDamaged,
    EnvelopeTooNew,
    decode_envelope,
    decode_result,
    decode_task,
    encode_result,
    encode_task,
)
from forebay.overflow.memory import MemoryTaskStore
from forebay.overflow.refill_policy import RefillPolicy
from forebay.overflow.sqlite import SqliteTaskStore
from forebay.storage.redis_url import RedisUrl
from forebay.storage.url import SqsUrl, StoreUrl, known_forms, parse_url

if TYPE_CHECKING:
    from forebay.overflow.redis import RedisTaskStore

__all__ = [
    "EnvelopeDamaged",
    "EnvelopeTooNew",
    "MemoryTaskStore",
    "RefillPolicy",
    "SqliteTaskStore",
    "decode_envelope",
    "decode_result",
    "decode_task",
    "encode_result",
    "encode_task",
    "open_task_store",
]


def open_task_store(overflow: str | TaskStore) -> TaskStore:
    """Return the task store that a URL names, not opened yet; a task store is returned as it is.

    Args:
        overflow: ``sqlite:///relative.db``, ``sqlite:////absolute.db`` (with ``?fsync=yes|checkpoint|no``),
            ``redis://host:port/0``, ``redis+sentinel://host:port,.../service/0``, ``redis+cluster://host:port,...``
            (with ``?name=NAME``, ``?replicas=N``, ``?fsync=yes``), ``sqs://queue`` (with ``?endpoint=``, ``region=``,
            ``create=yes|no``, ``results=URL``) or ``memory://``, each with ``?bound=TASKS`` for how many tasks may wait
            or run in it (100,000 by default).

    Raises:
        InvalidOverflowUrl: it is neither a known URL nor a task store.
        StoreNotInstalled: the library that the store needs is not installed.
    """
    if not isinstance(overflow, str):
        if not hasattr(overflow, "lease"):
            why = f"it is a {type(overflow).__name__}, not a URL or a task store"
            if isinstance(overflow, PurePath):
                why += '; for a SQLite file, write "sqlite:///" + str(path)'
            raise InvalidOverflowUrl(url=overflow, why=why, forms=known_forms())
        return overflow
    match parse_url(overflow):
        case StoreUrl(scheme="memory", bound=bound):
            return MemoryTaskStore(bound=bound)
        case StoreUrl(scheme="sqlite", path=Path() as path, bound=bound, fsync=fsync):
            return SqliteTaskStore(path, bound=bound, fsync=fsync)
        case StoreUrl(scheme="sqs", sqs=SqsUrl() as sqs, bound=bound):
            return _sqs_store(sqs, bound)
        case StoreUrl(redis=RedisUrl() as redis, bound=bound):
            return _redis_store_class(redis)(redis, bound=bound)
        case store:
            why = f"no task store is known for {store.scheme}://"
            raise InvalidOverflowUrl(url=f"{store.scheme}://", why=why, forms=known_forms())


def _redis_store_class(url: RedisUrl) -> type[RedisTaskStore]:
    try:
        from forebay.overflow.redis import RedisTaskStore  # noqa: PLC0415 - it needs a library
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise StoreNotInstalled(where=str(url), library="redis", extra="redis") from None
    return RedisTaskStore


def _sqs_store(sqs: SqsUrl, bound: int) -> TaskStore:
    try:
        from forebay.overflow.sqs import SqsTaskStore  # noqa: PLC0415 - its libraries are an extra
        from forebay.overflow.sqs_queues import SqsQueues  # noqa: PLC0415
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "botocore":
            raise
        raise StoreNotInstalled(where=f"sqs://{sqs.queue}", library="botocore", extra="sqs") from None
    return SqsTaskStore(SqsQueues(sqs), _index(sqs.results, bound))


def _index(results: StoreUrl | None, bound: int) -> TaskIndex:
    match results:
        case None | StoreUrl(scheme="memory"):
            return MemoryTaskStore(bound=bound)
        case StoreUrl(scheme="sqlite", path=Path() as path, fsync=fsync):
            return SqliteTaskStore(path, bound=bound, fsync=fsync)
        case StoreUrl(redis=RedisUrl() as redis):
            return _redis_store_class(redis)(redis, bound=bound)
        case _:
            why = f"{results.scheme}:// cannot hold the results of a queue"
            raise InvalidOverflowUrl(url=f"results={results.scheme}://", why=why, forms=known_forms())
