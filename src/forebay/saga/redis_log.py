"""The saga log on Redis: sagas survive their process, and processes on any machines go on with each other's.

`redis_log.lua` says how they are laid out, and changes them: one run of it is one operation on one saga. Operations
that arrive while others are on their way share the next round trip.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from importlib.resources import files
from math import inf
from typing import Any, NamedTuple
from urllib.parse import unquote

import msgspec

from forebay.clock import is_virtual, monotonic, new_id
from forebay.errors import StoreAnswerLost, StoreUnavailable
from forebay.saga.records import LogWrite, SagaHeader, SagaState, StoredSaga
from forebay.storage.operation_queue import OperationError, OperationQueue, in_parts
from forebay.storage.redis_clock import RedisClock
from forebay.storage.redis_durability import wait_command, write_shortage
from forebay.storage.redis_format import check_format
from forebay.storage.redis_master import RedisMaster
from forebay.storage.redis_sort_keys import from_sortable, quoted, sortable
from forebay.storage.redis_url import RedisUrl

_SCRIPT = files(__package__).joinpath("redis_log.lua").read_text()
_SHA = hashlib.sha1(_SCRIPT.encode()).hexdigest()  # noqa: S324 - the name that Redis gives it

_FORMAT = b"1"  # how the sagas are laid out

_MAX_GROUP = 500  # operations in one round trip
_CANDIDATES = 1_000  # sagas of a name that a claim looks at, whose leases have ended first: it takes the oldest of them
_PAGE = 500  # sagas that are listed, forgotten or renewed in one round trip
_ACKNOWLEDGE_TIMEOUT_MS = 1_000  # how long replicas may take to have a write
_DISKS_TIMEOUT_MS = 4_000  # how long disks may take: with `appendfsync everysec`, a second or three
# After Redis was away, the part of a lease in which nothing is claimed: those who drive sagas could not renew theirs.
_GRACE = 0.5

_HEADER = ("name", "version", "envelope", "submission", "state", "why", "created", "updated", "claims")


class _Operation(NamedTuple):
    """Commands that are sent together.

    Attributes:
        commands: to Redis.
        decode: turns their answers into the value for the caller.
        size: bytes of entries and envelopes in them.
        is_acknowledged: whether its caller is answered once it is as durable as the URL asks for.
    """

    commands: Sequence[Sequence[Any]]
    decode: Callable[[Sequence[Any]], Any]
    size: int = 0
    is_acknowledged: bool = False


class RedisSagaLog:
    """A saga log on a Redis master, which is named or found by Sentinels or a cluster's nodes.

    Args:
        url: where the master is, the name of the log there, and what an acknowledged write survives.

    Attributes:
        durable: True.
    """

    durable = True

    def __init__(self, url: RedisUrl) -> None:
        self._url = url
        self._wait = wait_command(url, timeout_ms=_ACKNOWLEDGE_TIMEOUT_MS, disks_timeout_ms=_DISKS_TIMEOUT_MS)
        self._prefix = f"{{{url.name}}}:saga:"
        self._unfinished, self._states, self._ended = (f"{self._prefix}{each}" for each in ("open", "states", "ended"))
        self._clock = RedisClock()
        self._client_id = ""  # of this opening
        self._numbers = itertools.count(1)
        self._interrupted = -inf  # monotonic: when Redis was away last
        self._queue: OperationQueue[RedisMaster, _Operation] = OperationQueue(
            where=str(url),
            thread_name=f"forebay-saga-{url.name}",
            max_group=_MAX_GROUP,
            connect=self._connect,
            run=self._run_group,
            disconnect=RedisMaster.close,
            diagnose=lambda error: error,
        )

    async def open(self) -> None:
        """Find the master and connect."""
        await self._queue.open()

    async def close(self) -> None:
        """Finish the pending operations and disconnect."""
        await self._queue.close()

    # --- driving a saga ---

    async def begin(self, header: SagaHeader, restart: bytes, *, fence: str, until: float, now: float) -> StoredSaga:
        """Begin a saga, or take it. If that is not acknowledged, or its caller cancelled, its lease ends."""
        ahead, saga_id, nonce = self._clock.ahead(), header.saga_id, self._nonce()
        new = msgspec.structs.replace(header, created_at=now, updated_at=now)
        command = self._script(
            "begin",
            saga_id,
            fence,
            sortable(until - ahead),
            sortable(now - ahead),
            nonce,
            quoted(header.name),
            _bytes(header.version),
            header.envelope,
            repr(header.submission),
            restart,
        )
        decode = partial(
            _decode_begun, begun=StoredSaga(header=new, entries=[], holder=fence, until=until), ahead=ahead
        )
        beginning = self._submit([command], decode, size=len(header.envelope), is_acknowledged=True)
        begun: StoredSaga = await self._hold(beginning, [self._script("release", saga_id, fence, nonce)])
        return begun

    async def claim(
        self, names: Sequence[str], *, limit: int, fence: str, until: float, now: float
    ) -> Sequence[StoredSaga]:
        """Take unfinished sagas whose lease has expired. If that is not acknowledged, or cancelled, their leases end.

        It takes none for half a lease after Redis was away, so that those who drive sagas can renew theirs.
        """
        self._queue.check_open()
        if limit <= 0 or not names:
            return []
        ahead = self._clock.ahead()
        span = sortable(until - ahead), sortable(now - ahead)
        ids = await self._submit([self._free(name, span[1]) for name in names], _decode_free)
        if monotonic() - self._interrupted < (until - now) * _GRACE:
            return []
        claimed = list[StoredSaga]()
        while ids and len(claimed) < limit:  # others may take the same ones
            count = limit - len(claimed)
            some, ids = ids[:count], ids[count:]
            nonce = self._nonce()
            claims = [self._script("claim", saga_id, fence, *span, nonce) for saga_id in some]
            releases = [self._script("release", saga_id, fence, nonce) for saga_id in some]
            decode = partial(_decode_claimed, some, ahead=ahead)
            claimed += await self._hold(self._submit(claims, decode, is_acknowledged=True), releases)
        return claimed

    def _free(self, name: str, now: str) -> Sequence[Any]:
        """Return the command for the members of the index of sagas of a name whose lease has expired."""
        prefix = f"{quoted(name)}|"
        return ("ZRANGEBYLEX", self._unfinished, f"[{prefix}", f"({prefix}{now}g", "LIMIT", 0, _CANDIDATES)

    async def _hold(self, taking: asyncio.Future[Any], releases: Sequence[Sequence[Any]]) -> Any:
        """Return what is being taken; release it, by these commands, if it cannot be given to the caller."""
        try:
            return await taking
        except (StoreUnavailable, asyncio.CancelledError):
            with suppress(StoreUnavailable):  # closed in the meantime: the leases expire
                self._submit(releases, _as_they_are).add_done_callback(_ignore)
            raise

    async def append(self, saga_id: str, write: LogWrite, *, fence: str, now: float) -> bool:
        """Write entries."""
        appended: bool = await self._write("append", saga_id, write, fence, now)
        return appended

    def _write(self, operation: str, saga_id: str, write: LogWrite, by: str, now: float) -> asyncio.Future[Any]:
        arguments = (by, sortable(now - self._clock.ahead()), write.number, write.state.value, _bytes(write.why))
        command = self._script(operation, saga_id, *arguments, *write.entries)
        return self._submit([command], _decode_done, size=sum(map(len, write.entries)), is_acknowledged=True)

    async def renew(self, holders: Mapping[str, str], *, until: float) -> Sequence[str]:
        """Extend leases; return the ids of those that are lost."""
        self._queue.check_open()
        by_server = sortable(until - self._clock.ahead())
        pages = _pages(list(holders.items()))
        commands = [[self._script("renew", saga_id, fence, by_server) for saga_id, fence in page] for page in pages]
        answers = await asyncio.gather(*(self._submit(each, _as_they_are) for each in commands))
        renewed = itertools.chain.from_iterable(answers)
        return [saga_id for saga_id, done in zip(holders, renewed, strict=True) if not done]

    async def release(self, saga_id: str, *, fence: str) -> None:
        """End a lease."""
        await self._submit([self._script("release", saga_id, fence)], _as_they_are)

    # --- for people ---

    async def amend(self, saga_id: str, write: LogWrite, *, now: float) -> bool:
        """Write what a person decides."""
        amended: bool = await self._write("amend", saga_id, write, self._nonce(), now)
        return amended

    async def get(self, saga_id: str) -> StoredSaga | None:
        """Return a saga as it is stored as durably as the URL asks for, or None."""
        command = self._script("get", saga_id, "durably" if self._wait else "")
        decode = partial(_decode_claimed, [saga_id], ahead=self._clock.ahead())
        found: Sequence[StoredSaga] = await self._submit([command], decode, is_acknowledged=True)
        return found[0] if found else None

    async def list(
        self, *, states: Sequence[SagaState], limit: int, after: tuple[float, str] | None = None
    ) -> Sequence[SagaHeader]:
        """Return the sagas in any of these states, the oldest first."""
        self._queue.check_open()
        ahead, found = self._clock.ahead(), list[SagaHeader]()
        last = None if after is None else sortable(after[0] - ahead).encode() + _bytes(after[1])
        while len(found) < limit and states:
            count = min(limit - len(found), _PAGE)
            places = await self._submit([self._in_state(state, last, count) for state in states], _decode_places)
            if not places:
                break
            last, ids = places[:count][-1], [_text(each[_DIGITS:]) for each in places[:count]]
            commands = [("HMGET", self._header(_bytes(saga_id)), *_HEADER) for saga_id in ids]
            headers = await self._submit(commands, partial(_decode_headers, ids, ahead=ahead))
            found += [header for header in headers if header.state in states]  # it may have moved since
        return found

    def _in_state(self, state: SagaState, last: bytes | None, limit: int) -> Sequence[Any]:
        """Return the command for the members of the index of a state behind a place."""
        first = f"[{state.value}|" if last is None else f"({state.value}|".encode() + last
        return ("ZRANGEBYLEX", self._states, first, f"({state.value}}}", "LIMIT", 0, limit)

    async def forget(self, *, before: float, limit: int) -> int:
        """Drop sagas that have ended."""
        self._queue.check_open()
        total, by_server = 0, sortable(before - self._clock.ahead())
        while total < limit:
            count = min(limit - total, _PAGE)
            oldest = ("ZRANGEBYLEX", self._ended, "-", f"({by_server}", "LIMIT", 0, count)
            ids = [_text(each[_DIGITS:]) for (each,) in zip(*await self._submit([oldest], _as_they_are), strict=True)]
            dropped = await self._submit([self._script("forget", saga_id, by_server) for saga_id in ids], sum)
            total += dropped
            if not dropped:
                break
        return total

    # --- groups ---

    def _submit(
        self,
        commands: Sequence[Sequence[Any]],
        decode: Callable[[Sequence[Any]], Any],
        *,
        size: int = 0,
        is_acknowledged: bool = False,
    ) -> asyncio.Future[Any]:
        return self._queue.submit(_Operation(commands, decode, size, is_acknowledged))

    def _script(self, operation: str, saga_id: str, *arguments: Any) -> Sequence[Any]:
        """Return the command for an operation of the script."""
        name = _bytes(saga_id)
        keys = (self._header(name), f"{self._prefix}+".encode() + name, self._unfinished, self._states, self._ended)
        return ("EVALSHA", _SHA, len(keys), *keys, operation, name, *arguments)

    def _header(self, saga_id: bytes) -> bytes:
        """Return the key of the header of a saga."""
        return f"{self._prefix}=".encode() + saga_id

    def _nonce(self) -> str:
        """Return what tells one call from another, and not from its repetition."""
        return f"{self._client_id}:{next(self._numbers)}"

    def _connect(self) -> RedisMaster:
        self._client_id = new_id()
        load = [("SCRIPT", "LOAD", _SCRIPT)]
        master = RedisMaster(self._url, self._url.name, prepare=load, on_interrupted=self._notice_interruption)
        check_format(master, self._url, self._prefix, _FORMAT)
        self._measure_clock(master)
        return master

    def _notice_interruption(self) -> None:
        self._interrupted = monotonic()

    def _measure_clock(self, master: RedisMaster) -> None:
        """Compare the clock with the server's, unless it was done a moment ago; virtual time is everybody's."""
        if not is_virtual(self._queue.loop) and self._clock.is_due():
            self._clock.measure(master.time)

    def _run_group(self, master: RedisMaster, group: Sequence[_Operation]) -> Sequence[Any]:
        """Run a group of operations, in parts that are not too large, and return their values.

        Once a part has failed, the others fail unsent: each would wait as long.
        """
        values, failure = list[Any](), None
        for part in in_parts(group, [op.size for op in group]):
            if failure is None:
                more, failure = self._run_part(master, part)
                values += more
            else:
                values += [OperationError(failure)] * len(part)
        return values

    def _run_part(
        self, master: RedisMaster, ops: Sequence[_Operation]
    ) -> tuple[Sequence[Any], StoreUnavailable | None]:
        """Run operations in one round trip, and return their values, and why the master or its replicas failed."""
        commands = [command for op in ops for command in op.commands]
        waits = bool(self._wait) and any(op.is_acknowledged for op in ops)
        if waits:
            commands.append(self._wait)
        try:
            self._measure_clock(master)
            answers = master.call_each(*commands)
        except StoreUnavailable as error:
            return [OperationError(error)] * len(ops), error
        shortage = self._shortage(answers.pop()) if waits else None
        values, rest = list[Any](), iter(answers)
        for op in ops:
            values.append(_value(op, list(itertools.islice(rest, len(op.commands))), shortage))
        return values, shortage

    def _shortage(self, had: Any) -> StoreUnavailable | None:
        """Return the error of operations that too few replicas and disks have; None: enough of them have them."""
        if isinstance(had, StoreUnavailable):
            return had
        return write_shortage(self._url, self._wait, had, kind=StoreAnswerLost)


def _value(op: _Operation, answers: Sequence[Any], shortage: StoreUnavailable | None) -> Any:
    """Return the value of an operation, or its error."""
    for answer in answers:
        if isinstance(answer, StoreUnavailable):
            return OperationError(answer)
    try:
        value = op.decode(answers)
    except Exception as error:  # noqa: BLE001 - a saga that somebody else has changed must not fail other operations
        return OperationError(error)
    # What was not done is true without replicas: a fence is lost, though those of the new master are missing.
    return OperationError(shortage) if shortage is not None and op.is_acknowledged and value else value


def _pages(items: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (items[first : first + _PAGE] for first in range(0, len(items), _PAGE))


def _ignore(releasing: asyncio.Future[Any]) -> None:
    """Take note of an error that nobody waits for."""
    if not releasing.cancelled():
        releasing.exception()


# --- texts and answers ------------------------------------------------------------------------------------------------

_DIGITS = 16  # of a time


def _bytes(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


def _as_they_are(answers: Sequence[Any]) -> Sequence[Any]:
    return answers


def _decode_done(answers: Sequence[Any]) -> bool:
    return bool(answers[0])


def _decode_free(answers: Sequence[Sequence[bytes]]) -> Sequence[str]:
    """Return the ids of sagas that may be claimed, the oldest first."""
    places = [member.partition(b"|")[2][_DIGITS:] for members in answers for member in members]
    return [_text(place[_DIGITS:]) for place in sorted(set(places))]


def _decode_places(answers: Sequence[Sequence[bytes]]) -> Sequence[bytes]:
    """Return where sagas stand in the order of their age: the times of their first entries, with their ids."""
    return sorted({member.partition(b"|")[2] for members in answers for member in members})


def _decode_header(saga_id: str, fields: Sequence[bytes], ahead: float) -> SagaHeader:
    name, version, envelope, submission, state, why, created, updated, claims = fields
    return SagaHeader(
        saga_id=saga_id,
        name=unquote(name.decode()),
        version=_text(version),
        envelope=envelope,
        submission=float(submission),
        state=SagaState(state.decode()),
        why=_text(why),
        created_at=from_sortable(created.decode()) + ahead,
        updated_at=from_sortable(updated.decode()) + ahead,
        claims=int(claims),
    )


def _decode_headers(ids: Sequence[str], answers: Sequence[Sequence[Any]], *, ahead: float) -> Sequence[SagaHeader]:
    """Return the headers of the sagas that are still there."""
    return [
        _decode_header(saga_id, fields, ahead)
        for saga_id, fields in zip(ids, answers, strict=True)
        if fields[0] is not None
    ]


def _decode_stored(saga_id: str, answer: Sequence[Any], ahead: float) -> StoredSaga:
    fields, holder, lease, entries = answer
    return StoredSaga(
        header=_decode_header(saga_id, fields, ahead),
        entries=entries,
        holder=_text(holder),
        until=from_sortable(lease.decode()) + ahead if holder else 0.0,
    )


def _decode_claimed(ids: Sequence[str], answers: Sequence[Any], *, ahead: float) -> Sequence[StoredSaga]:
    """Return the sagas of these ids that the script has returned."""
    return [_decode_stored(saga_id, answer, ahead) for saga_id, answer in zip(ids, answers, strict=True) if answer]


def _decode_begun(answers: Sequence[Any], *, begun: StoredSaga, ahead: float) -> StoredSaga:
    (answer,) = answers
    return begun if answer == 1 else _decode_stored(begun.header.saga_id, answer, ahead)
