"""The interface of a saga log, and the log that a URL names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol
from urllib.parse import parse_qsl, urlsplit

from forebay.errors import InvalidOverflowUrl, InvalidSagaLogUrl, StoreNotInstalled
from forebay.saga.memory_log import MemorySagaLog
from forebay.saga.records import LogWrite, SagaHeader, SagaState, StoredSaga
from forebay.storage.redis_url import RedisUrl
from forebay.storage.shown_url import shown_url
from forebay.storage.url import StoreUrl, parse_url


class SagaLog(Protocol):
    """The log in which the entries of sagas are written ahead. All times are epoch seconds.

    A saga is driven under a lease, by whoever holds its fence. What another one writes is rejected.

    Attributes:
        durable: whether it survives its process.
    """

    durable: bool

    async def open(self) -> None:
        """Open it. Idempotent.

        Raises:
            StoreUnavailable: it cannot be opened. So does every other method if it cannot be asked.
        """

    async def close(self) -> None:
        """Finish what is pending, and close it. Idempotent."""

    async def begin(self, header: SagaHeader, restart: bytes, *, fence: str, until: float, now: float) -> StoredSaga:
        """Begin a saga, or take it, and return it as it is now: its `holder` is `fence` if the caller drives it.

        - There is none of that id: it begins, RUNNING, with no entry.
        - It is RUNNING or COMPENSATING: it is taken if its lease has expired, which counts a claim.
        - It is COMPENSATED or RESOLVED: it begins again, with `header` and one more entry, `restart`.
        - It is DONE or PARKED: it is only returned.

        Args:
            header: of the saga, RUNNING.
            restart: the entry of a new round, encoded.
            fence: of the new lease.
            until: when that expires.
            now: the time.
        """

    async def claim(
        self, names: Sequence[str], *, limit: int, fence: str, until: float, now: float
    ) -> Sequence[StoredSaga]:
        """Take at most `limit` unfinished sagas of these names whose lease has expired, the oldest first.

        Each of them counts a claim. A lease that lasts longer from now than any may was given before the wall clock was
        set back: it is shortened to the longest one, so that a holder that lives still renews it. A log whose leases
        end by the clock of its server need not do that.
        """

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        """Write entries; return False, and write nothing, if `fence` is not the holder of the saga.

        It may be repeated with the same arguments: if these entries stand there already, nothing is written, and it
        returns True, whoever the holder is now. The claims count from 0 again. With a state that is not unfinished, the
        lease ends.
        """

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        """Extend the leases of these fences, by saga id; return the ids of those that are lost."""

    async def release(self, saga_id: str, *, fence: str) -> None:
        """End a lease, if `fence` still has it: another process may take the saga at once. It counts no claim."""

    async def amend(self, saga_id: str, write: LogWrite, *, now: float) -> bool:
        """Write what a person decides about a saga that nobody drives; return whether it was written.

        It is not if the saga has other entries by now, or a lease that has not expired.
        """

    async def get(self, saga_id: str) -> StoredSaga | None:
        """Return a saga, or None."""

    async def list(
        self, *, states: Sequence[SagaState], limit: int, after: tuple[float, str] | None = None
    ) -> Sequence[SagaHeader]:
        """Return the sagas in any of these states, the oldest first.

        Args:
            states: which.
            limit: how many at most.
            after: the `created_at` and the id of the last one of the page before.
        """

    async def forget(self, *, before: float, limit: int) -> int:
        """Drop at most `limit` sagas that were DONE, COMPENSATED or RESOLVED before `before`; return how many."""


_FORMS = "sqlite:///saga.db, redis://host:6379/0 (with Sentinels: redis+sentinel://, in a cluster: redis+cluster://)"


def open_saga_log(log: str | SagaLog) -> SagaLog:
    """Return the saga log that a URL names, not opened yet; a saga log is returned as it is.

    Args:
        log: ``sqlite:///relative.db`` or ``sqlite:////absolute.db`` (with ``?fsync=yes|checkpoint|no``),
            ``redis://host:port/0``, ``redis+sentinel://...``, ``redis+cluster://...`` (with ``?name=NAME``,
            ``?replicas=N``, ``?fsync=yes``), ``memory://``.

    Raises:
        InvalidSagaLogUrl: it is neither a URL of these nor a saga log.
        StoreNotInstalled: the library that the log needs is not installed.
    """
    if not isinstance(log, str):
        if not hasattr(log, "amend"):
            why = f"it is a {type(log).__name__}, not a URL or a saga log"
            raise InvalidSagaLogUrl(url=log, why=why, forms=_FORMS)
        return log
    match _parse(log):
        case StoreUrl(scheme="memory"):
            return MemorySagaLog()
        case StoreUrl(scheme="sqlite", path=Path() as path, fsync=fsync):
            from forebay.saga.sqlite_log import SqliteSagaLog  # noqa: PLC0415 - as below

            return SqliteSagaLog(path, fsync=fsync)
        case StoreUrl(redis=RedisUrl() as redis):
            return _redis_log(redis)
        case store:
            why = f"no saga log is known for {store.scheme}://"
            raise InvalidSagaLogUrl(url=f"{store.scheme}://", why=why, forms=_FORMS)


def _parse(log: str) -> StoreUrl:
    try:
        store = parse_url(log)
    except InvalidOverflowUrl as error:  # whose forms are those of an overflow
        raise InvalidSagaLogUrl(url=shown_url(log), why=error.why, forms=_FORMS) from None
    if "bound" in dict(parse_qsl(urlsplit(log).query, keep_blank_values=True)):
        why = "bound is an option of an overflow, and a saga log has none: leave it out"
        raise InvalidSagaLogUrl(url=shown_url(log), why=why, forms=_FORMS)
    return store


def _redis_log(url: RedisUrl) -> SagaLog:
    try:
        from forebay.saga.redis_log import RedisSagaLog  # noqa: PLC0415 - it needs a library
    except ModuleNotFoundError as error:
        if error.name != "redis":
            raise
        raise StoreNotInstalled(where=str(url), library="redis", extra="redis") from None
    return RedisSagaLog(url)
