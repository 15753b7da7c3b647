"""A shard on Redis: a master, named or found by Sentinels, or a whole cluster. It needs core commands only.

Each entry is a string of its own; `redis_write.lua` says how entries and their indexes are laid out. Operations that
arrive while others are on their way share the next round trip: one MGET for what is read, and one run of the script for
what is written; `redis_copy.lua` reads entries that move to another shard. On a cluster, the keys of a namespace share
a hash tag and so a node; the keys outside of a namespace are spread over buckets, each with a tag.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import zlib
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import lru_cache
from heapq import merge
from importlib.resources import files
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgspec
from redis.crc import key_slot

from forebay._threads import DaemonThreadExecutor
from forebay.clock import monotonic, new_id
from forebay.errors import StoreAnswerLost, StoreUnavailable
from forebay.state.entry import StoredEntry
from forebay.state.near_cache import Address, CachedServer, NearCache
from forebay.state.redis_invalidations import InvalidationListener
from forebay.state.shard import ANY_VERSION, Copied, NamePage, OperationRejected, Page, WriteRefused
from forebay.storage.operation_queue import OperationError, OperationQueue, in_parts
from forebay.storage.redis_master import FULL, RedisMaster, masters_of_slots, may_pass
from forebay.storage.redis_url import RedisTopology, RedisUrl

_SCRIPTS = {name: files(__package__).joinpath(f"redis_{name}.lua").read_text() for name in ("write", "scan", "copy")}
_WRITE_SHA, _SCAN_SHA, _COPY_SHA = (
    hashlib.sha1(script.encode()).hexdigest()  # noqa: S324 - as Redis names it
    for script in _SCRIPTS.values()
)

_MAX_GROUP = 500  # operations in one round trip, in which Redis serves few others
_BUCKETS = 256  # of the keys outside of a namespace, on a cluster
_MIN_FROM_BUCKET = 4  # entries of each for a page: it ends where the first bucket might have more
_PATIENCE = 1.0  # seconds in which a master is looked for: longer than a node of a cluster is on the move
_RETRY_INTERVAL = 0.5  # seconds between two operations of a node of a cluster that is down
_ACKNOWLEDGE_TIMEOUT_MS = 1_000  # how long replicas and disks may take to have a write
_DELETED = -1  # in place of the milliseconds of a write, for the script
_KEYS_PER_SCAN = 1_000  # that Redis looks at for a page of names

_encode = msgspec.json.Encoder().encode


class _Get(msgspec.Struct, frozen=True):
    prefix: str
    key: bytes


class _Write(msgspec.Struct, frozen=True):
    prefix: str
    key: bytes
    data: bytes | None  # None: it is deleted
    milliseconds: int  # after which it expires; 0: it does not
    if_version: int
    floor: int | None = None  # its key moves, and its version is larger than that
    restored: int = 0  # the version with which it is restored; 0: it is an ordinary write


class _Copy(msgspec.Struct, frozen=True):
    prefix: str
    key: bytes


class _Names(msgspec.Struct, frozen=True):
    prefix: str
    pattern: str
    cursor: str


class _Scan(msgspec.Struct, frozen=True):
    prefix: str
    first: bytes  # as ZRANGEBYLEX takes them
    last: bytes
    limit: int
    reverse: bool


class _Ping(msgspec.Struct, frozen=True):
    prefix: str


_Operation = _Get | _Write | _Copy | _Scan | _Names | _Ping


class _Batch(NamedTuple):
    """The operations of a part that share a command."""

    kind: type
    ops: list[Any]
    indexes: list[int]  # in the part


class RedisShard:
    """A shard on Redis.

    Args:
        url: where it is, the name under which it keeps its keys, and what an acknowledged write survives.
        near_cache: keeps what is read; None: nothing is kept.
    """

    def __init__(self, url: RedisUrl, near_cache: NearCache | None = None) -> None:
        self.url = f"{url}?name={url.name}"
        self._redis_url = url
        self._near_cache = near_cache
        self._is_cluster = url.topology is RedisTopology.CLUSTER
        self._lanes: dict[RedisUrl, _Lane] = {}
        self._only_lane: _Lane | None = None  # unless it is a cluster
        self._slots: list[RedisUrl] = []  # on a cluster, the node of each slot
        self._refreshing: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Find the masters and connect to one of them."""
        if self._is_cluster:
            await self._refresh()
        await self._lane("").open()

    async def close(self) -> None:
        """Finish the pending operations and disconnect."""
        lanes = list(self._lanes.values())
        self._lanes.clear()
        self._only_lane = None
        await asyncio.gather(*(lane.close() for lane in lanes))

    async def get(self, namespace: str, key: bytes, *, cached: bool = False) -> StoredEntry | None:
        """Return an entry."""
        prefix = self._prefix(namespace, key)
        if cached and self._near_cache is not None and (lane := self._lane(prefix)).cached is not None:
            return await self._get_cached(_Copy(prefix, key), lane, lane.cached)
        found: StoredEntry | None = await self._run(_Get(prefix, key))
        return found

    async def _get_cached(self, copy: _Copy, lane: _Lane, server: CachedServer) -> StoredEntry | None:
        name = _entry(copy)
        if lane.is_up and (found := server.get(name, lane.address)) is not None:
            return found
        read = server.begin(name, lane.address)
        try:
            copied: Copied = await self._run(copy)
            if read is not None and copied.entry is not None:
                server.keep(read, copied.entry, copied.ttl, lane.address)
            return copied.entry
        finally:
            if read is not None:
                server.end(read)

    async def put(  # noqa: PLR0913 - what a write is made of
        self,
        namespace: str,
        key: bytes,
        data: bytes,
        ttl: float | None = None,
        if_version: int = ANY_VERSION,
        *,
        floor: int | None = None,
    ) -> int:
        """Write an entry."""
        write = _Write(self._prefix(namespace, key), key, data, _milliseconds(ttl), if_version, floor)
        return await self._write(write)

    async def delete(
        self, namespace: str, key: bytes, if_version: int = ANY_VERSION, *, floor: int | None = None
    ) -> bool:
        """Delete an entry."""
        write = _Write(self._prefix(namespace, key), key, None, _DELETED, if_version, floor)
        return await self._write(write) > 0

    async def copy(self, namespace: str, key: bytes) -> Copied:
        """Return an entry with its ttl."""
        copied: Copied = await self._run(_Copy(self._prefix(namespace, key), key))
        return copied

    async def restore(self, namespace: str, entry: StoredEntry, ttl: float | None) -> None:
        """Write an entry with its version."""
        key, data, version = entry
        prefix = self._prefix(namespace, key)
        await self._write(_Write(prefix, key, data, _milliseconds(ttl), ANY_VERSION, floor=0, restored=version))

    def _write(self, write: _Write) -> Awaitable[int]:
        return self._run(write) if self._near_cache is None else self._write_through(write)

    async def _write_through(self, write: _Write) -> int:
        """Write an entry, and keep it no longer in the near cache."""
        try:
            written: int = await self._run(write)
            return written
        finally:  # also if its answer was lost: it may be done
            for lane in self._lanes.values():
                lane.drop(_entry(write))

    async def namespaces(self, after: str | None = None) -> NamePage:
        """Look for the indexes of namespaces among all keys, on one node after the other."""
        slot, _, cursor = (after or "0/0").partition("/")
        pattern = f"{{{self._redis_url.name}:state*}}k"
        next_cursor, keys = await self._run(_Names(self._prefixes("")[0], pattern, cursor), slot=int(slot))
        names = {name for key in keys if (name := _namespace_of(self._redis_url.name, key)) is not None}
        if next_cursor:
            return NamePage(list(names), f"{slot}/{next_cursor}")
        following = self._first_slot_after(int(slot))
        return NamePage(list(names), None if following is None else f"{following}/0")

    def _first_slot_after(self, slot: int) -> int | None:
        """Return the first slot behind `slot` whose node has no slot up to there."""
        seen = set(self._slots[: slot + 1])
        return next((each for each in range(slot + 1, len(self._slots)) if self._slots[each] not in seen), None)

    async def scan(
        self, namespace: str, prefix: bytes, after: bytes | None = None, limit: int = 100, *, reverse: bool = False
    ) -> Page:
        """Return entries by the order of their keys."""
        bounds = [b"[" + prefix, b"(" + prefix + b"\xff"]  # no key in UTF-8 has that byte
        if after is not None and reverse:
            bounds[1] = b"(" + min(after, prefix + b"\xff")
        elif after is not None and after >= prefix:
            bounds[0] = b"(" + after
        first, last = reversed(bounds) if reverse else bounds
        prefixes = self._prefixes(namespace)
        each = limit if len(prefixes) == 1 else max(_MIN_FROM_BUCKET, 4 * limit // len(prefixes))
        pages: list[Page] = await asyncio.gather(
            *(self._run(_Scan(name, first, last, each, reverse)) for name in prefixes)
        )
        return pages[0] if len(pages) == 1 else _merge(pages, limit, reverse=reverse)

    async def ping(self) -> None:
        """Ask for an answer: on a cluster, of any node."""
        if self._is_cluster:
            await self._refresh()
        else:
            await self._run(_Ping(self._prefixes("")[0]))

    def _prefix(self, namespace: str, key: bytes) -> str:
        if namespace or not self._is_cluster:
            return _prefix_of(self._redis_url.name, namespace)
        return _bucket_prefix(self._redis_url.name, zlib.crc32(key) % _BUCKETS)

    def _prefixes(self, namespace: str) -> Sequence[str]:
        if namespace or not self._is_cluster:
            return [_prefix_of(self._redis_url.name, namespace)]
        return [_bucket_prefix(self._redis_url.name, bucket) for bucket in range(_BUCKETS)]

    # --- lanes ---

    def _run(self, op: _Operation, slot: int | None = None) -> Awaitable[Any]:
        """Run an operation on the node that has its prefix, or a given slot."""
        if self._is_cluster:
            return self._run_on_cluster(op, slot)
        lane = self._lane(op.prefix)
        return lane.submit(op) if lane.is_open else self._run_when_open(op, lane)

    async def _run_when_open(self, op: _Operation, lane: _Lane) -> Any:
        await lane.open()
        return await lane.submit(op)

    async def _run_on_cluster(self, op: _Operation, slot: int | None) -> Any:
        """Run an operation on the node that has its keys, wherever they move.

        A node that is down rejects its operations at once but for one in half a second. The others go on, so the shard
        as a whole is not down.
        """
        give_up = monotonic() + _PATIENCE
        while True:
            lane = self._lane(op.prefix, slot)
            lane.check_up()
            try:
                await lane.open()
                value = await lane.submit(op)
            except StoreUnavailable as error:
                if isinstance(error, StoreAnswerLost) or monotonic() >= give_up:
                    lane.went_down(error)
                    raise OperationRejected(error) from error
                await self._refresh()
            else:
                lane.came_up()
                return value

    def _lane(self, prefix: str, slot: int | None = None) -> _Lane:
        if not self._is_cluster:
            if self._only_lane is None:
                self._only_lane = self._lane_to(self._redis_url)
            return self._only_lane
        return self._lane_to(self._slots[key_slot(prefix.encode()) if slot is None else slot])

    def _lane_to(self, url: RedisUrl) -> _Lane:
        lane = self._lanes.get(url)
        if lane is None:
            cached = None if self._near_cache is None else CachedServer(self._near_cache)
            lane = self._lanes[url] = _Lane(url, str(self._redis_url), tag_scripts=self._is_cluster, cached=cached)
        return lane

    async def _refresh(self) -> None:
        """Ask the nodes of the cluster which of them has which slots, once for all who want to know."""
        if self._refreshing is None or self._refreshing.done():
            self._refreshing = asyncio.ensure_future(self._ask_for_slots())
        await asyncio.shield(self._refreshing)

    async def _ask_for_slots(self) -> None:
        # Not in the loop's executor: that may be full of handlers, such as plain nodes of graphs.
        executor = DaemonThreadExecutor(f"forebay-state-{self._redis_url.name}-slots", max_threads=1)
        try:
            loop = asyncio.get_running_loop()
            self._slots = await loop.run_in_executor(executor, masters_of_slots, self._redis_url)
        finally:
            executor.shutdown(wait=False)
        for lane in self._lanes.values():  # an entry may be on another node
            lane.drop()
        gone = [url for url in self._lanes if url not in set(self._slots)]
        for url in gone:
            with suppress(StoreUnavailable):
                await self._lanes.pop(url).close()


class _Lane:
    """The connection to one master, its thread, and the operations that wait for it.

    Attributes:
        cached: what is kept of it; None: nothing.
        address: from which it was read last; None: from nowhere yet.
    """

    def __init__(self, url: RedisUrl, where: str, *, tag_scripts: bool, cached: CachedServer | None) -> None:
        self.cached = cached
        self.address: Address | None = None
        self._listener: InvalidationListener | None = None
        self._url = url
        self._where = where
        self._tag_scripts = tag_scripts  # the keys of one run of a script have one tag
        self._client_id = ""
        self._numbers = itertools.count(1)
        self._queue: OperationQueue[RedisMaster, _Operation] = OperationQueue(
            where=where,
            thread_name=f"forebay-state-{url.name}",
            max_group=_MAX_GROUP,
            connect=self._connect,
            run=self._run_group,
            disconnect=RedisMaster.close,
            diagnose=lambda error: error,
        )
        self._down: StoreUnavailable | None = None  # why it failed last, since it last answered
        self._next_try = 0.0  # monotonic; while it is down

    @property
    def is_open(self) -> bool:
        return self._queue.is_open

    @property
    def is_up(self) -> bool:
        return self._down is None

    def check_up(self) -> None:
        """Reject an operation of a master that is down, unless it is time to try it again."""
        if self._down is None:
            return
        if monotonic() < self._next_try:
            raise OperationRejected(StoreUnavailable(where=self._where, why=self._down.why, advice=self._down.advice))
        self._next_try = monotonic() + _RETRY_INTERVAL

    def went_down(self, error: StoreUnavailable) -> None:
        self._down, self._next_try = error, monotonic() + _RETRY_INTERVAL

    def came_up(self) -> None:
        self._down = None

    async def open(self) -> None:
        if not self._queue.is_open:
            await self._queue.open()
        if self.cached is not None and self._listener is None:
            prefix = f"{{{self._url.name}:state"
            self._listener = InvalidationListener(
                self._url, self._url.name, prefix, server=self.cached, read_from=lambda: self.address
            )

    async def close(self) -> None:
        if self._listener is not None:
            self._listener.stop()
            self._listener = None
        await self._queue.close()

    def drop(self, name: bytes | None = None) -> None:
        """Keep an entry, or all of them, no longer."""
        if self.cached is None:
            return
        if name is None:
            self.cached.drop_all()
        else:
            self.cached.drop([name])

    def submit(self, op: _Operation) -> asyncio.Future[Any]:
        return self._queue.submit(op)

    def _connect(self) -> RedisMaster:
        self._client_id, self._numbers = new_id(), itertools.count(1)
        patience = 0.0 if self._tag_scripts else _PATIENCE
        scripts = [("SCRIPT", "LOAD", script) for script in _SCRIPTS.values()]
        master = RedisMaster(self._url, self._url.name, prepare=scripts, patience=patience)
        master.call(("PING",))
        self.address = master.address
        return master

    def _run_group(self, master: RedisMaster, group: Sequence[_Operation]) -> Sequence[Any]:
        values = list[Any]()
        sizes = [len(op.data or b"") if isinstance(op, _Write) else 0 for op in group]
        for part in in_parts(group, sizes):
            values += self._run_part(master, part)
        return values

    def _run_part(self, master: RedisMaster, ops: Sequence[_Operation]) -> Sequence[Any]:
        """Run operations in one round trip, and return their values."""
        batches = self._batches(ops)
        number = next(self._numbers)
        commands = [self._command(batch.kind, batch.ops, number) for batch in batches]
        any_write = any(batch.kind is _Write for batch in batches)
        if any_write and (wait := self._acknowledgement()):
            commands.append(wait)
        try:
            answers = master.call_each(*commands)
        except StoreUnavailable as error:
            return [OperationError(error)] * len(ops)
        finally:
            self.address = master.address
        answers = [_rejection(each) if isinstance(each, StoreUnavailable) else each for each in answers]
        shortage = self._shortage(answers.pop()) if len(answers) > len(batches) else None
        values: list[Any] = [None] * len(ops)
        for batch, answer in zip(batches, answers, strict=True):
            failed = answer if isinstance(answer, BaseException) else shortage if batch.kind is _Write else None
            if failed is not None:
                replies: Sequence[Any] = [OperationError(failed)] * len(batch.ops)
            else:
                each = _SPLITTERS.get(batch.kind, _alone)(answer)
                decode = _DECODERS[batch.kind]
                replies = [self._value(decode, op, reply) for op, reply in zip(batch.ops, each, strict=True)]
            for index, value in zip(batch.indexes, replies, strict=True):
                values[index] = value
        return values

    def _batches(self, ops: Sequence[_Operation]) -> Sequence[_Batch]:
        batches = dict[Any, _Batch]()
        for index, op in enumerate(ops):
            kind = type(op)
            key = index if kind not in _SPLITTERS else (kind, op.prefix) if self._tag_scripts else kind
            if (batch := batches.get(key)) is None:
                batch = batches[key] = _Batch(kind, [], [])
            batch.ops.append(op)
            batch.indexes.append(index)
        return list(batches.values())

    def _command(self, kind: type, ops: Sequence[Any], number: int) -> Sequence[Any]:
        if kind is _Get:
            return ("MGET", *(_entry(op) for op in ops))
        if kind is _Write:
            return self._write_command(ops, number)
        if kind is _Copy:
            return ("EVALSHA", _COPY_SHA, len(ops) + 1, f"{self._own(ops[0])}v", *(_entry(op) for op in ops))
        (op,) = ops
        if kind is _Names:
            return ("SCAN", op.cursor, "MATCH", op.pattern, "COUNT", _KEYS_PER_SCAN, "TYPE", "zset")
        if kind is _Scan:
            arguments = (f"{op.prefix}=", op.first, op.last, op.limit, "REV" if op.reverse else "")
            return ("EVALSHA", _SCAN_SHA, 1, f"{op.prefix}k", *arguments)
        return ("PING",)

    def _write_command(self, ops: Sequence[_Write], number: int) -> Sequence[Any]:
        places = {prefix: place for place, prefix in enumerate(dict.fromkeys(op.prefix for op in ops), start=1)}
        own = self._own(ops[0])
        keys: list[Any] = [f"{own}v", f"{own}l:{self._client_id}"]
        for prefix in places:
            keys += (f"{prefix}k", f"{prefix}x")
        keys += (_entry(op) for op in ops)
        lengths = [len(prefix) + 1 for prefix in places]
        described = list[tuple[int, ...]]()
        for op in ops:
            each: tuple[int, ...] = (places[op.prefix], op.if_version, op.milliseconds)
            if op.floor is not None:
                keys.append(_tombstone(op))
                each += (len(keys), op.floor, op.restored)
            described.append(each)
        data = [op.data for op in ops if op.data is not None]
        return ("EVALSHA", _WRITE_SHA, len(keys), *keys, _encode((number, lengths, described)), *data)

    def _own(self, op: _Write | _Copy) -> str:
        """Return the prefix of the keys that a run of a script has for itself."""
        return op.prefix if self._tag_scripts else _prefix_of(self._url.name, "")

    def _value(self, decode: Callable[[Any, Any], Any], op: _Operation, reply: Any) -> Any:
        try:
            return decode(op, reply)
        except WriteRefused as refused:
            return OperationError(refused)
        except _Full:
            advice = "Delete entries, or raise its maxmemory."
            return self._rejected(FULL[0], advice)
        except (ValueError, TypeError):
            why = f"an entry under {op.prefix!r} is none of Forebay's"
            return self._rejected(why, "Another program has written it: choose another ?name= or another database.")

    def _rejected(self, why: str, advice: str) -> OperationError:
        return OperationError(OperationRejected(StoreUnavailable(where=self._where, why=why, advice=advice)))

    def _acknowledgement(self) -> Sequence[Any]:
        if self._url.fsync:
            return ("WAITAOF", 1, self._url.replicas, _ACKNOWLEDGE_TIMEOUT_MS)
        return ("WAIT", self._url.replicas, _ACKNOWLEDGE_TIMEOUT_MS) if self._url.replicas else ()

    def _shortage(self, had: Any) -> BaseException | None:
        if isinstance(had, BaseException):
            return had
        local, replicas = had if self._url.fsync else (1, had)
        if local and replicas >= self._url.replicas:
            return None
        who = f"{replicas} of {self._url.replicas} replicas" if local else "not even its own disk"
        why = f"{who} had the write within {_ACKNOWLEDGE_TIMEOUT_MS} ms"
        advice = "Look after the replicas and disks, or ask for less in the URL: ?replicas= and fsync="
        return OperationRejected(StoreAnswerLost(where=self._where, why=why, advice=advice))


def _rejection(error: StoreUnavailable) -> BaseException:
    """Return the error of an operation whose command was rejected: if that may pass, the shard cannot be used now."""
    return error if may_pass(error.__cause__) else OperationRejected(error)


class _Full(Exception):
    """The server has answered that its memory is full."""


def _milliseconds(ttl: float | None) -> int:
    return 0 if ttl is None else max(1, round(ttl * 1_000))


def _entry(op: _Get | _Write | _Copy) -> bytes:
    """Return the name of the string that holds an entry."""
    return op.prefix.encode() + b"=" + op.key


def _tombstone(op: _Write) -> bytes:
    """Return the name of the string that holds the tombstone of a key."""
    return op.prefix.encode() + b"~" + op.key


def _namespace_of(name: str, index: bytes) -> str | None:
    """Return the namespace whose index has a name; None if it is not Forebay's."""
    inner = index.removeprefix(f"{{{name}:state".encode()).removesuffix(b"}k")
    if not inner or inner.startswith(b"#"):
        return ""
    try:
        return unquote(inner.decode(), errors="strict").removeprefix("/")
    except ValueError:
        return None


@lru_cache(maxsize=10_000)
def _prefix_of(name: str, namespace: str) -> str:
    return f"{{{name}:state/{quote(namespace, safe=' :/@')}}}" if namespace else f"{{{name}:state}}"


@lru_cache(maxsize=_BUCKETS)
def _bucket_prefix(name: str, bucket: int) -> str:
    return f"{{{name}:state#{bucket}}}"


def _merge(pages: Sequence[Page], limit: int, *, reverse: bool) -> Page:
    """Return the first entries of several pages, which are each in order, as one page."""
    ends = [page.after for page in pages if page.after is not None]
    entries = list(merge(*(page.entries for page in pages), key=lambda each: each.key, reverse=reverse))
    if ends:
        end = max(ends) if reverse else min(ends)  # beyond it, a page may have more
        entries = [each for each in entries if (each.key >= end if reverse else each.key <= end)]
    if len(entries) > limit:
        return Page(entries[:limit], entries[limit - 1].key)
    return Page(entries, (max(ends) if reverse else min(ends)) if ends else None)


def _parse(key: bytes, text: bytes) -> StoredEntry:
    version, _, data = text.partition(b":")
    return StoredEntry(key, data, int(version))


def _decode_get(op: _Get, reply: bytes | None) -> StoredEntry | None:
    return None if reply is None else _parse(op.key, reply)


def _decode_write(_: _Write, reply: bytes) -> int:
    if reply == b"full":
        raise _Full
    number = int(reply)
    if number < 0:
        raise WriteRefused(-1 - number)
    return number


def _decode_copy(op: _Copy, reply: tuple[bytes, bytes | None, int]) -> Copied:
    latest, text, milliseconds = reply
    entry = None if text is None else _parse(op.key, text)
    return Copied(entry, milliseconds / 1_000 if milliseconds >= 0 else None, int(latest))


def _decode_page(_: _Scan, reply: Sequence[bytes]) -> Page:
    count = len(reply) // 2
    entries = [_parse(reply[2 * index], reply[2 * index + 1]) for index in range(count)]
    return Page(entries, reply[-1] if len(reply) % 2 else None)


def _alone(answer: Any) -> Sequence[Any]:
    return [answer]


def _together(answer: Sequence[Any]) -> Sequence[Any]:
    return answer


def _copies(answer: Sequence[Any]) -> Sequence[Any]:
    return [(answer[0], *answer[place : place + 2]) for place in range(1, len(answer), 2)]


# By the operations that share a command: the replies to them in its answer.
_SPLITTERS: dict[type, Callable[[Any], Sequence[Any]]] = {_Get: _together, _Write: _together, _Copy: _copies}

_DECODERS: dict[type, Callable[[Any, Any], Any]] = {
    _Get: _decode_get,
    _Write: _decode_write,
    _Copy: _decode_copy,
    _Names: lambda _op, reply: reply,
    _Scan: _decode_page,
    _Ping: lambda _op, _reply: None,
}
