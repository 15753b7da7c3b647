"""The saga log in memory: it ends with its process. For tests, and sagas that need not survive."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from forebay.saga.records import (
    LONGEST_AHEAD,
    MAX_LEASE,
    REPEATABLE,
    UNFINISHED,
    LogWrite,
    SagaHeader,
    SagaState,
    StoredSaga,
)

_set = msgspec.structs.replace


class MemorySagaLog:
    """A saga log that several supervisors of one process may share.

    Attributes:
        durable: False.
    """

    durable = False

    def __init__(self) -> None:
        self._sagas: dict[str, StoredSaga] = {}

    async def open(self) -> None:
        """See `SagaLog`."""

    async def close(self) -> None:
        """See `SagaLog`."""

    async def begin(self, header: SagaHeader, restart: bytes, *, fence: str, until: float, now: float) -> StoredSaga:
        """See `SagaLog`."""
        saga_id, stored = header.saga_id, self._sagas.get(header.saga_id)
        header = _set(header, created_at=now, updated_at=now)
        if stored is None:
            stored = StoredSaga(header=header, holder=fence, until=until)
        elif stored.header.state in REPEATABLE:
            stored = StoredSaga(header=header, entries=[*stored.entries, restart], holder=fence, until=until)
        elif stored.header.state in UNFINISHED and stored.until <= now:
            stored = _claimed(stored, fence, until)
        self._sagas[saga_id] = stored
        return stored

    async def claim(
        self, names: Sequence[str], *, limit: int, fence: str, until: float, now: float
    ) -> Sequence[StoredSaga]:
        """See `SagaLog`."""
        open_sagas = [
            stored
            for stored in self._sagas.values()
            if stored.header.state in UNFINISHED and stored.header.name in names
        ]
        for stored in open_sagas:
            if stored.until > now + LONGEST_AHEAD:
                self._sagas[stored.header.saga_id] = _set(stored, until=now + MAX_LEASE)
        free = [stored for stored in open_sagas if stored.until <= now]
        claimed = [_claimed(each, fence, until) for each in sorted(free, key=_age)[:limit]]
        self._sagas |= {each.header.saga_id: each for each in claimed}
        return claimed

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        """See `SagaLog`."""
        stored = self._sagas.get(saga_id)
        if stored is None:
            return False
        if list(stored.entries[write.number : write.number + len(write.entries)]) == list(write.entries):
            return True  # written already
        if stored.holder != fence or len(stored.entries) != write.number:
            return False
        self._write(stored, write, now)
        return True

    def _write(self, stored: StoredSaga, write: LogWrite, now: float) -> None:
        header = _set(stored.header, state=write.state, why=write.why, updated_at=now, claims=0)
        stored = _set(stored, header=header, entries=[*stored.entries, *write.entries])
        self._sagas[header.saga_id] = stored if write.state in UNFINISHED else _set(stored, holder="", until=0.0)

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        """See `SagaLog`."""
        lost = []
        for saga_id, fence in holders.items():
            stored = self._sagas.get(saga_id)
            if stored is not None and stored.holder == fence:
                self._sagas[saga_id] = _set(stored, until=until)
            else:
                lost.append(saga_id)
        return lost

    async def release(self, saga_id: str, *, fence: str) -> None:
        """See `SagaLog`."""
        stored = self._sagas.get(saga_id)
        if stored is not None and stored.holder == fence:
            header = _set(stored.header, claims=0)
            self._sagas[saga_id] = _set(stored, header=header, holder="", until=0.0)

    async def amend(self, saga_id: str, write: LogWrite, *, now: float) -> bool:
        """See `SagaLog`."""
        stored = self._sagas.get(saga_id)
        if stored is None or stored.until > now or len(stored.entries) != write.number:
            return False
        self._write(_set(stored, holder="", until=0.0), write, now)
        return True

    async def get(self, saga_id: str) -> StoredSaga | None:
        """See `SagaLog`."""
        return self._sagas.get(saga_id)

    async def list(
        self, *, states: Sequence[SagaState], limit: int, after: tuple[float, str] | None = None
    ) -> Sequence[SagaHeader]:
        """See `SagaLog`."""
        found = sorted((each for each in self._sagas.values() if each.header.state in states), key=_age)
        return [each.header for each in found if after is None or _age(each) > after][:limit]

    async def forget(self, *, before: float, limit: int) -> int:
        """See `SagaLog`."""
        kept = (*UNFINISHED, SagaState.PARKED)
        old = [key for key, each in self._sagas.items() if each.header.state not in kept]
        old = [key for key in old if self._sagas[key].header.updated_at < before][:limit]
        for saga_id in old:
            del self._sagas[saga_id]
        return len(old)


def _age(stored: StoredSaga) -> tuple[float, str]:
    return stored.header.created_at, stored.header.saga_id


def _claimed(stored: StoredSaga, fence: str, until: float) -> StoredSaga:
    return _set(stored, header=_set(stored.header, claims=stored.header.claims + 1), holder=fence, until=until)
