"""The task store on Redis: tasks survive their process, and processes on any machines share them.

The records are in hashes and sorted sets, all under one hash tag, which one Lua script changes: `redis_script.lua` says
how they are laid out. A group of operations is one run of it, and so one round trip. Each group has a number, by which
Redis tells a group that is sent again, because its answer was lost, from a new one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import threading
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from contextlib import suppress
from functools import lru_cache, partial
from importlib.resources import files
from math import inf
from sys import float_info
from typing import Any, NamedTuple
from urllib.parse import quote, unquote

import msgspec

from forebay._text import is_unicode
from forebay.call_usage import CallUsage
from forebay.clock import is_virtual, new_id
from forebay.errors import StoreUnavailable
from forebay.interfaces import (
    Completion,
    DeadRecord,
    Lease,
    PutResult,
    RecordState,
    StoredRecord,
    TaskRecord,
    WakeResult,
)
from forebay.overflow.lease_expiry import completion_after_expiry
from forebay.storage.operation_queue import OperationError, OperationQueue, in_parts
from forebay.storage.redis_clock import RedisClock
from forebay.storage.redis_durability import wait_command, write_shortage
from forebay.storage.redis_format import other_format
from forebay.storage.redis_listener import RedisListener
from forebay.storage.redis_master import FULL, RedisMaster
from forebay.storage.redis_sort_keys import SAFE, from_sortable, quoted, sortable
from forebay.storage.redis_url import RedisUrl
from forebay.storage.url import DEFAULT_BOUND
from forebay.task import Priority, TaskStatus

_SCRIPT = files(__package__).joinpath("redis_script.lua").read_text()
_SHA = hashlib.sha1(_SCRIPT.encode()).hexdigest()  # noqa: S324 - the name that Redis gives it
_KEYS = (
    "ids", "keys", "tasks", "envelopes", "completions", "unfinished", "waiting", "parked", "leased", "delayed", "done",
    "dead", "heads", "threads", "depths", "sequence", "bound",
)  # fmt: skip

_FORMAT = b"1"  # how the records are laid out
_LOST = b"lost"  # the answer to a client that knows records which are gone

_MAX_GROUP = 500  # operations in one run of the script, in which Redis serves nobody else
_BATCH = 500  # records that reap, wake and prune take at once
_ACKNOWLEDGE_TIMEOUT_MS = 1_000  # how long replicas may take to have a write
# How long disks may take. With `appendfsync everysec`, its default, Redis lets a second pass from one fsync to the
# next, and two more while the disk is busy.
_DISKS_TIMEOUT_MS = 4_000
_MAX_UNCONFIRMED = 10_000  # ends whose answer was lost, and records to take back or to show
# How long a record stays hidden whose submitter has neither shown it nor taken it back: it may have crashed, or look
# for a master that Sentinels are about to promote.
_HIDDEN = 30.0  # seconds

_encode = msgspec.json.Encoder().encode
_encode_completion = msgspec.msgpack.Encoder().encode
_decode_completion = msgspec.msgpack.Decoder(Completion).decode
_decode_usage = msgspec.json.Decoder(CallUsage).decode


class _Stored(msgspec.Struct, array_like=True, frozen=True):
    """A record as the script has it; False stands for None. The envelope is elsewhere."""

    task_id: str
    queue: str
    rank: str
    enqueued_at: str
    key: str | bool
    thread: str | bool
    state: str
    fence: str | bool
    attempts: int
    failures: int
    total_delay: str
    last_error: str | bool
    not_before: str | bool
    origin: Any = None  # for the script alone
    usage: str | bool = False  # a record that an earlier version stored has none


_decode_stored = msgspec.json.Decoder(_Stored).decode


class _Operation(NamedTuple):
    """An operation of the script, or a command of its own.

    Attributes:
        name: as the script has it; of a command, the key that it reads.
        text: its array in JSON.
        decode: turns the reply of Redis into the value for the caller.
        blob: an envelope or a completion that goes with it.
        identity: the task id and fence of an operation whose answer matters if it was lost.
        showing: of a record that is put, what the script needs to show it.
    """

    name: str
    text: bytes
    decode: Callable[[Any], Any]
    blob: bytes | None = None
    identity: tuple[str, str | None] = ("", None)
    showing: tuple[str | bool, ...] = ()


_PUT, _REPLACE, _FINISH, _MARK_DEAD, _DELAY = "put", "replace", "finish", "mark_dead", "delay"
_PUTS = frozenset({_PUT, _REPLACE})
_ENDS_LEASE = frozenset({_FINISH, _MARK_DEAD, _DELAY})
# Operations that are answered once as many replicas, or disks, have them as the URL asks for.
_ACKNOWLEDGED = frozenset(
    {*_ENDS_LEASE, *_PUTS, "set_envelope", "requeue", "delete_dead", "expire", "find", "find_key"}
)
# Operations that are answered once as many replicas have them. A start is as late in the stream of writes as the lease
# that it needs: so a handler starts once a replica that takes over knows its lease, and lets nobody else take the
# record. It waits for no disk, because a slot would be empty for up to two seconds.
_REPLICATED = frozenset({"begin_attempt"})
_READS = frozenset({"expired", "envelope", "find", "find_key", "list", "leased", "depths", "threads"})
_ENDED = frozenset({RecordState.DONE, RecordState.DEAD})
_LEASED_AT_A_TIME = 2000  # SCANNED, in the script
_COUNTS = frozenset({"depths", "threads"})  # hashes that are read by a command of their own


class _Connections(NamedTuple):
    """The connections of an open store: renewals do not wait for a group that is on its way."""

    groups: RedisMaster
    renewals: RedisMaster


class RedisTaskStore:
    """A task store on a Redis master, which is named or found by Sentinels or a cluster's nodes.

    Args:
        url: where the master is, the name of the overflow there, and what an acknowledged write survives.
        bound: tasks that may wait or be leased when this process puts one. As many DONE and as many DEAD are kept, the
            oldest dropped first; of several processes, by the largest bound.
    """

    durable = True

    def __init__(self, url: RedisUrl, *, bound: int = DEFAULT_BOUND) -> None:
        self._url = url
        self._acknowledged = _ACKNOWLEDGED | (_REPLICATED if url.replicas else frozenset())
        self._bound = bound
        self._prefix = f"{{{url.name}}}:"
        self._channel = f"{self._prefix}news"
        self._callbacks: dict[str, Callable[[], None]] = {}  # by the letter that the script publishes
        self._listener: RedisListener | None = None  # while the store is open and somebody has subscribed
        self._on_lost: Callable[[], None] | None = None
        self._on_interrupted: Callable[[], None] | None = None
        self._store_id = ""  # of the records that were found or begun there: others have another
        self._store_id_lock = threading.Lock()  # held by the thread that changes it
        self._client_id = ""  # of this opening: a copy in a forked process has another
        self._numbers = itertools.count(1)
        self._queue: OperationQueue[_Connections, _Operation] = OperationQueue(
            where=str(url),
            thread_name=f"forebay-redis-{url.name}",
            max_group=_MAX_GROUP,
            connect=self._connect,
            run=self._run_group,
            disconnect=self._disconnect,
            diagnose=_same,
        )
        self._unconfirmed: dict[tuple[str, str, str | None], None] = {}  # ends of leases whose answer was lost
        # What is to be done before anything else: records that were put are taken back, or shown if they were
        # acknowledged.
        self._unsettled: deque[_Operation] = deque(maxlen=_MAX_UNCONFIRMED)
        self._clock = RedisClock()

    async def open(self) -> None:
        """Find the master and connect."""
        await self._queue.open()
        self._listen()

    async def close(self) -> None:
        """Finish the pending operations and disconnect."""
        self._stop_listening()
        await self._queue.close()

    def subscribe(
        self,
        *,
        on_waiting: Callable[[], None],
        on_ended: Callable[[], None],
        on_lost: Callable[[], None] | None = None,
        on_interrupted: Callable[[], None] | None = None,
    ) -> None:
        """Call back soon after another client has made records WAITING, or ended some, and once all are gone."""
        self._callbacks = {"w": on_waiting, "e": on_ended}
        self._on_lost, self._on_interrupted = on_lost, on_interrupted
        if self._queue.is_open:
            self._listen()

    def _listen(self) -> None:
        self._stop_listening()
        if self._callbacks:
            url, callbacks = self._url, self._callbacks
            self._listener = RedisListener(url, url.name, self._channel, own=self._client_id, callbacks=callbacks)

    def _stop_listening(self) -> None:
        if self._listener is not None:
            self._listener.stop()
            self._listener = None

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        """Store `record`, where another process finds it."""
        result: PutResult = await self._submit_put(_PUT, record, fence, until, now, _decode_put)
        return result

    def _submit_put(  # noqa: PLR0913, PLR0917 - what `put` takes
        self, name: str, record: TaskRecord, fence: str | None, until: float, now: float, decode: Callable[[Any], Any],
        *further: Any,
    ) -> asyncio.Future[Any]:  # fmt: skip
        ahead, not_before = self._clock.ahead(), record.not_before
        due = repr(not_before - ahead) if fence is None and not_before is not None and not_before > now else None
        lasts = repr(until - ahead)
        arguments = (
            record.task_id,
            _queue_of(record.task_type, record.priority, record.tenant),
            sortable(inf if record.deadline is None else record.deadline) + sortable(record.enqueued_at),
            repr(record.enqueued_at),
            _or_false(record.key),
            record.thread_id is not None and quote(record.thread_id, safe=SAFE),
            _or_false(fence),
            lasts,
            record.attempts,
            *_failures(record),
            not_before is not None and repr(not_before),
            _or_false(due),
            self._is_acknowledged and repr((now if fence is None else until) + _HIDDEN - ahead),
            *further,
        )
        return self._queue.submit(
            _Operation(
                name,
                _encode((name, *arguments)),
                decode,
                record.envelope,
                (record.task_id, fence),
                (_or_false(due), _or_false(fence), lasts),
            )
        )

    async def lease(
        self,
        task_type: str,
        limit: int,
        *,
        until: float,
        priority: Priority | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> Sequence[Lease]:
        """Lease the best waiting records of a task type. Cancelled, release what was leased after all."""
        if limit <= 0:
            self._queue.check_open()
            return []
        priorities = [int(each) for each in (Priority if priority is None else (priority,))]
        tenants = shares is not None and [(quoted(tenant), share) for tenant, share in shares.items()]
        arguments = (quoted(task_type), priorities, limit, self._by_server(until), new_id(), tenants)
        return await self._hold(self._submit("lease", arguments, partial(_decode_leases, until=until)))

    async def lease_ids(self, task_ids: Sequence[str], *, until: float) -> Sequence[Lease]:
        """Lease the waiting ones of given records. Cancelled, release what was leased after all."""
        known = [task_id for task_id in task_ids if is_unicode(task_id)]
        if not known:
            self._queue.check_open()
            return []
        arguments = (known, self._by_server(until), new_id())
        return await self._hold(self._submit("lease_ids", arguments, partial(_decode_leases, until=until)))

    async def _hold(self, leasing: asyncio.Future[Sequence[Lease]]) -> Sequence[Lease]:
        """Return the leases that are being made; if cancelled, release them once they are made."""
        try:
            leases: Sequence[Lease] = await asyncio.shield(leasing)
        except asyncio.CancelledError:
            leasing.add_done_callback(self._release_late_leases)
            raise
        return leases

    def _release_late_leases(self, leasing: asyncio.Future[Sequence[Lease]]) -> None:
        if leasing.cancelled() or leasing.exception() is not None:
            return
        with suppress(StoreUnavailable):  # closed in the meantime: the leases expire
            self._release(leasing.result())

    async def begin_attempt(self, lease: Lease) -> bool:
        """Count a start of the handler."""
        began: bool = await self._submit("begin_attempt", (lease.record.task_id, lease.fence), bool)
        return began

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        """Extend leases, and return the lost ones. Blocks; from any thread."""
        master = self._queue.check_open().renewals
        lost = list[Lease]()
        for first in range(0, len(leases), _MAX_GROUP):
            some = leases[first : first + _MAX_GROUP]
            self._measure_clock(master)
            by_server = self._by_server(until)
            ops = [_encode(("renew", lease.record.task_id, lease.fence, by_server)) for lease in some]
            (renewed,) = master.call(self._script_call(ops))
            if renewed == _LOST:
                raise self._lost(master)
            lost += [lease for lease, done in zip(some, renewed, strict=True) if not done]
        return lost

    async def release(self, leases: Sequence[Lease]) -> None:
        """Make leased records WAITING again, in their old order."""
        self._queue.check_open()
        await asyncio.gather(*self._release(leases))

    def _release(self, leases: Sequence[Lease]) -> Sequence[asyncio.Future[Any]]:
        return [
            self._submit(
                "release", (lease.record.task_id, lease.fence, lease.record.attempts, *_failures(lease.record)), bool
            )
            for lease in leases
        ]

    async def record_failures(self, lease: Lease) -> bool:
        """Give a leased record the failures of its lease."""
        arguments = (lease.record.task_id, lease.fence, *_failures(lease.record))
        recorded: bool = await self._submit("record_failures", arguments, bool)
        return recorded

    async def delay(self, lease: Lease, *, due: float) -> bool:
        """Make a leased record DELAYED until `due`."""
        failures = _failures(lease.record)
        return await self._end_lease(_DELAY, lease.record.task_id, lease.fence, self._by_server(due), *failures)

    async def wake(self, *, now: float) -> WakeResult:
        """Make the DELAYED records that are due WAITING again."""
        woken = 0
        while True:
            ahead = self._clock.ahead()
            decode = partial(_decode_wake, ahead=ahead)
            result: WakeResult = await self._submit("wake", (repr(now - ahead), _BATCH), decode)
            woken += result.woken
            if result.woken < _BATCH:
                return msgspec.structs.replace(result, woken=woken)

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a record DONE."""
        succeeded = completion.status == TaskStatus.SUCCEEDED.value
        at, blob = self._ending(completion)
        return await self._end_lease(_FINISH, task_id, fence, at, succeeded, blob=blob)

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        """Mark a record DEAD."""
        at, blob = self._ending(completion)
        return await self._end_lease(_MARK_DEAD, lease.record.task_id, lease.fence, at, blob=blob)

    def _ending(self, completion: Completion) -> tuple[str, bytes]:
        """Return when a record has ended, and its completion, by the clock of the server."""
        if ahead := self._clock.ahead():
            completion = msgspec.structs.replace(completion, finished_at=completion.finished_at - ahead)
        return repr(completion.finished_at), _encode_completion(completion)

    def _by_server(self, time: float) -> str:
        """Return a time of this process by the clock of the server."""
        return repr(time - self._clock.ahead())

    async def _end_lease(
        self, name: str, task_id: str, fence: str | None, *further: Any, blob: bytes | None = None
    ) -> bool:
        """Do an operation that ends a lease; if an earlier call did it whose answer was lost, it has succeeded."""
        identity = (name, task_id, fence)
        is_repeated = identity in self._unconfirmed
        arguments = (task_id, _or_false(fence), *further, is_repeated)
        done: bool = await self._submit(name, arguments, bool, blob, (task_id, fence))
        if is_repeated:
            self._unconfirmed.pop(identity, None)
        return done

    async def reap(self, *, now: float, max_attempts: int, latest: float = inf) -> Sequence[DeadRecord]:
        """Release expired leases, and return the records that became DEAD."""
        dead = list[DeadRecord]()
        ahead = self._clock.ahead()
        span = (repr(now - ahead), repr(min(latest - ahead, float_info.max)))
        while True:
            expired: Sequence[tuple[str, _Stored]] = await self._submit("expired", (*span, _BATCH), _decode_expired)
            expiring = [self._expire(sequence, stored, span, now, max_attempts) for sequence, stored in expired]
            dead += [each for each in await asyncio.gather(*expiring) if each is not None]
            if len(expired) < _BATCH:
                return dead

    async def _expire(
        self, sequence: str, stored: _Stored, span: tuple[str, str], now: float, max_attempts: int
    ) -> DeadRecord | None:
        """End an expired lease, unless it was renewed or ended meanwhile; return the record if it became DEAD."""
        completion = completion_after_expiry(_record(stored, b""), now=now, max_attempts=max_attempts)
        if completion is None:
            await self._submit("expire", (sequence, stored.fence, *span, False), bool, b"")
            return None
        at, blob = self._ending(completion)
        envelope: bytes = await self._submit("envelope", (sequence,), _same)
        if not await self._submit("expire", (sequence, stored.fence, *span, at), bool, blob):
            return None
        return DeadRecord(record=_record(stored, envelope), completion=completion)

    async def prune(self, *, before: float) -> int:
        """Drop DONE records that ended before `before`."""
        total = 0
        while True:
            count: int = await self._submit("prune", (self._by_server(before), _BATCH), int)
            total += count
            if count < _BATCH:
                return total

    async def list_records(
        self, state: RecordState, limit: int, *, after: tuple[float, str] | None = None
    ) -> Sequence[StoredRecord]:
        """Return a page of the records in `state`."""
        found = list[StoredRecord]()
        ahead = self._clock.ahead()
        time, task_id = (-inf, "") if after is None else after
        if state in _ENDED:
            time -= ahead
        decode = partial(_decode_list, ahead=ahead)
        while len(found) < limit:
            arguments = (state.value, limit - len(found), repr(max(time, -float_info.max)), task_id)
            more, end = await self._submit("list", arguments, decode)
            found += more
            if end is None:
                break
            time, task_id = end
        return found

    async def requeue(self, task_id: str) -> PutResult | None:
        """Make a DEAD record WAITING again."""
        if not is_unicode(task_id):
            return None
        result: PutResult | None = await self._submit("requeue", (task_id,), _decode_requeue)
        return result

    async def replace(
        self, lease: Lease, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult | None:
        """Put a record in place of a leased one."""
        result: PutResult | None = await self._submit_put(
            _REPLACE, record, fence, until, now, _decode_requeue, lease.fence
        )
        return result

    async def set_envelope(self, task_id: str, envelope: bytes) -> bool:
        """Replace the envelope of a record that is not DONE."""
        return is_unicode(task_id) and await self._submit("set_envelope", (task_id,), bool, envelope)

    async def delete_dead(self, task_id: str) -> bool:
        """Delete a DEAD record."""
        return is_unicode(task_id) and await self._submit("delete_dead", (task_id,), bool)

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        """Return a record by its task id."""
        if not is_unicode(task_id):
            return None
        found: tuple[RecordState, TaskRecord, Completion | None] | None = await self._submit(
            "find", (task_id,), partial(_decode_find, ahead=self._clock.ahead())
        )
        return found

    async def find_key(self, key: str) -> str | None:
        """Return the task id stored under a key."""
        if not is_unicode(key):
            return None
        found: str | None = await self._submit("find_key", (key,), _decode_text)
        return found

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        """Return how many records are WAITING."""
        counts: Mapping[str, int] = await self._read_counts("depths")
        return {_parse_queue(queue): count for queue, count in counts.items()}

    async def leased(self) -> Mapping[str, int]:
        """Return how many records are LEASED."""
        found, first = Counter[str](), 0
        while True:
            looked_at, counts = await self._submit("leased", (first,), _decode_leased)
            found += counts
            first += looked_at
            if looked_at < _LEASED_AT_A_TIME:
                return found

    async def conversations(self) -> Mapping[str, int]:
        """Return how many records have not ended, by thread id."""
        counts: Mapping[str, int] = await self._read_counts("threads")
        return {unquote(thread): count for thread, count in counts.items()}

    def _read_counts(self, key: str) -> asyncio.Future[Any]:
        """Read a hash that may have as many fields as there are tasks, without the script: it would take ten times."""
        return self._queue.submit(_Operation(key, b"", _decode_counts))

    # --- groups ---

    def _submit(
        self,
        name: str,
        arguments: Sequence[Any],
        decode: Callable[[Any], Any],
        blob: bytes | None = None,
        identity: tuple[str, str | None] = ("", None),
    ) -> asyncio.Future[Any]:
        return self._queue.submit(_Operation(name, _encode((name, *arguments)), decode, blob, identity))

    def _connect(self) -> _Connections:
        self._client_id, self._numbers = new_id(), itertools.count(1)
        load = [("SCRIPT", "LOAD", _SCRIPT)]
        groups, renewals = [
            RedisMaster(self._url, self._url.name, prepare=load, on_interrupted=self._notice_interruption)
            for _ in range(2)
        ]
        self._store_id = self._identify(groups)
        self._measure_clock(groups)
        return _Connections(groups, renewals)

    def _disconnect(self, connections: _Connections) -> None:
        with suppress(StoreUnavailable):  # otherwise they run, though their submitters were told otherwise
            self._settle(connections.groups)
        for master in connections:
            master.close()

    def _identify(self, master: RedisMaster) -> str:
        """Return the id of the records there; for a new overflow, write one, and how its records are laid out.

        Raises:
            StoreUnavailable: a newer release has written them, or another program.
        """
        keys = [f"{self._prefix}{name}" for name in ("format", "id")]
        found = master.call(*(("GET", key) for key in keys))
        if None in found:  # else nothing is written: its memory may be full, and what it has is to end
            new = zip(keys, (_FORMAT, new_id()), strict=True)
            found = master.call(*(("SET", key, value, "NX") for key, value in new), *(("GET", key) for key in keys))[2:]
        layout, store_id = found
        if layout != _FORMAT:
            raise other_format(self._url, self._prefix, layout, _FORMAT)
        return str(store_id.decode())

    def _measure_clock(self, master: RedisMaster) -> None:
        """Compare the clock with the server's, unless it was done a moment ago; virtual time is everybody's."""
        if not is_virtual(self._queue.loop) and self._clock.is_due():
            self._clock.measure(master.time)

    def _lost(self, master: RedisMaster) -> StoreUnavailable:
        """Go on with new records, and return the error of the operations that have met no others."""
        try:
            with self._store_id_lock:
                store_id, known = self._identify(master), self._store_id
                self._store_id = store_id
        except StoreUnavailable as error:
            return error
        if store_id != known:  # otherwise the other thread has noticed it first
            self._call_soon(self._on_lost)
        why = "its records are gone: it was emptied, or restarted without them"
        return StoreUnavailable(
            where=str(self._url), why=why, advice="Try again; let the server keep its data on disk."
        )

    def _notice_interruption(self) -> None:
        self._call_soon(self._on_interrupted)

    def _call_soon(self, callback: Callable[[], None] | None) -> None:
        """Call back in the event loop; from any thread."""
        if callback is not None:
            with suppress(RuntimeError):  # the loop is closed
                self._queue.loop.call_soon_threadsafe(callback)

    def _run_group(self, connections: _Connections, group: Sequence[_Operation]) -> Sequence[Any]:
        """Run a group of operations, in parts that are not too large, and return their values."""
        values = list[Any]()
        for part in in_parts(group, [len(op.blob or b"") for op in group]):
            values += self._run_part(connections.groups, part)
        return values

    def _run_part(self, master: RedisMaster, ops: Sequence[_Operation]) -> Sequence[Any]:
        names = {op.name for op in ops}
        acknowledgement = self._acknowledgement(names)
        try:
            self._measure_clock(master)
            self._settle(master)
        except StoreUnavailable as error:
            return [OperationError(error)] * len(ops)
        # Reads alone have no number, unless they are to be as durable: to wait for the replicas is to wait for a write.
        number = next(self._numbers) if acknowledgement or names - _READS else None
        scripted = [op for op in ops if op.name not in _COUNTS]
        commands = [("HGETALL", f"{self._prefix}{op.name}") for op in ops if op.name in _COUNTS]
        if scripted:
            blobs = [op.blob for op in scripted if op.blob is not None]
            commands.insert(0, self._script_call([op.text for op in scripted], blobs, number))
        if acknowledgement:
            commands.append(acknowledgement)
        try:
            answers = master.call(*commands)
        except StoreUnavailable as error:
            self._remember(ops, number)
            return [OperationError(error)] * len(ops)
        if scripted and answers[0] == _LOST:
            return [OperationError(self._lost(master))] * len(ops)
        shortage = self._shortage(acknowledgement, answers.pop()) if acknowledgement else None
        replies = iter(answers.pop(0) if scripted else ())
        counts = iter(answers)
        in_order = [next(counts if op.name in _COUNTS else replies) for op in ops]
        values = [self._value(op, reply, shortage) for op, reply in zip(ops, in_order, strict=True)]
        hidden = [index for index, reply in enumerate(in_order) if reply == b"hidden"]
        if shortage is not None:
            self._remember(ops, number)
        else:
            self._unsettled += [self._about(ops[index], "show", number, *ops[index].showing) for index in hidden]
        with suppress(StoreUnavailable):  # later then, before the next operations
            shown = self._settle(master)
            if shortage is None:
                for index, reply in zip(hidden, shown, strict=True):
                    values[index] = _result_of_showing(ops[index], reply)
        return values

    def _value(self, op: _Operation, reply: Any, shortage: StoreUnavailable | None) -> Any:
        if reply == b"oom":
            return OperationError(StoreUnavailable(where=str(self._url), why=FULL[0], advice=FULL[1]))
        if shortage is not None and op.name in self._acknowledged and not _is_refused_start(op, reply):
            return OperationError(shortage)
        return _result_of_showing(op, None) if reply == b"hidden" else _decode(op, reply)

    @property
    def _is_acknowledged(self) -> bool:
        """True if a write is to be on replicas or disks before its caller has the answer."""
        return self._url.fsync or self._url.replicas > 0

    def _acknowledgement(self, names: AbstractSet[str]) -> tuple[Any, ...]:
        """Return the command that waits until as many replicas and disks have operations as the URL asks for.

        It is empty if there is nothing to wait for.
        """
        if not names & self._acknowledged:
            return ()
        return wait_command(
            self._url,
            timeout_ms=_ACKNOWLEDGE_TIMEOUT_MS,
            disks_timeout_ms=_DISKS_TIMEOUT_MS,
            on_disks=bool(names & _ACKNOWLEDGED),
        )

    def _shortage(self, acknowledgement: tuple[Any, ...], had: Any) -> StoreUnavailable | None:
        """Return the error of operations that only so many replicas and disks have as the master has answered."""
        return write_shortage(self._url, acknowledgement, had)

    def _script_call(
        self, ops: Sequence[bytes], blobs: Sequence[bytes] = (), number: int | None = None
    ) -> tuple[Any, ...]:
        group = {"bound": self._bound, "client": self._client_id, "channel": self._channel, "store": self._store_id}
        if number is not None:
            group |= {"number": number, "id": f"{self._client_id}:{number}"}
        text = b'%s,"ops":[%s]}' % (_encode(group)[:-1], b",".join(ops))
        keys = [f"{self._prefix}{name}" for name in (*_KEYS, f"last:{self._client_id}", "id")]
        return ("EVALSHA", _SHA, len(keys), *keys, text, *blobs)

    def _remember(self, ops: Sequence[_Operation], number: int | None) -> None:
        """Remember what operations have perhaps done whose callers get an error."""
        for op in ops:
            if op.name in _PUTS:
                self._unsettled.append(self._about(op, "take_back", number, _or_false(op.identity[1])))
            elif op.name in _ENDS_LEASE:
                self._unconfirmed[op.name, *op.identity] = None
        while len(self._unconfirmed) > _MAX_UNCONFIRMED:
            del self._unconfirmed[next(iter(self._unconfirmed))]

    def _about(self, put: _Operation, name: str, number: int | None, *further: str | bool) -> _Operation:
        """Return an operation on the record that an operation of a group has put."""
        origin = f"{self._client_id}:{number}"
        return _Operation(name, _encode((name, put.identity[0], origin, *further)), _same)

    def _settle(self, master: RedisMaster) -> Sequence[Any]:
        """Remove the records whose submitters were told that they are not stored, and show those that are stored.

        That waits for no replica: a record whose showing is lost with its master wakes by itself.
        """
        replies = list[Any]()
        while self._unsettled:
            some = list(itertools.islice(self._unsettled, _MAX_GROUP))
            (settled,) = master.call(self._script_call([op.text for op in some], (), next(self._numbers)))
            if settled == _LOST:
                self._unsettled.clear()
                raise self._lost(master)
            replies += settled
            for _ in some:
                self._unsettled.popleft()
        return replies


def _is_refused_start(op: _Operation, reply: Any) -> bool:
    """Return whether a handler may not start, because its lease is lost: that needs no replica to be true."""
    return op.name in _REPLICATED and not reply


def _decode(op: _Operation, reply: Any) -> Any:
    try:
        return op.decode(reply)
    except Exception as error:  # noqa: BLE001 - a record that somebody else has changed must not fail other operations
        return OperationError(error)


def _same(value: Any) -> Any:
    return value


def _failures(record: TaskRecord) -> tuple[int, str, str | bool, str | bool]:
    """Return the failures of a record, its total delay, its last error and its usage, as the script takes them."""
    usage = record.usage is not None and _encode(record.usage).decode()
    return record.failures, repr(record.total_delay), _or_false(record.last_error), usage


def _or_false(value: str | None) -> str | bool:
    return False if value is None else value


def _or_none(value: str | bool) -> str | None:  # noqa: FBT001 - it stands for None
    return value if isinstance(value, str) else None


# --- what sorts, and what has a separator -----------------------------------------------------------------------------


@lru_cache(maxsize=1_000)
def _queue_of(task_type: str, priority: Priority, tenant: str) -> str:
    return f"{quoted(task_type)}|{int(priority)}|{quoted(tenant)}|"


@lru_cache(maxsize=1_000)
def _parse_queue(queue: str) -> tuple[str, Priority, str]:
    task_type, priority, tenant, _ = queue.split("|")
    return unquote(task_type), Priority(int(priority)), unquote(tenant)


# --- replies of the script -------------------------------------------------------------------------------------------


def _record(stored: _Stored, envelope: bytes) -> TaskRecord:
    task_type, priority, tenant = _parse_queue(stored.queue)
    deadline = from_sortable(stored.rank[:16])
    thread = _or_none(stored.thread)
    return TaskRecord(
        task_id=stored.task_id,
        task_type=task_type,
        priority=priority,
        envelope=envelope,
        enqueued_at=float(stored.enqueued_at),
        deadline=None if deadline == inf else deadline,
        key=_or_none(stored.key),
        attempts=stored.attempts,
        thread_id=None if thread is None else unquote(thread),
        failures=stored.failures,
        total_delay=float(stored.total_delay),
        last_error=_or_none(stored.last_error),
        usage=_decode_usage(stored.usage) if isinstance(stored.usage, str) else None,
        tenant=tenant,
        not_before=float(stored.not_before) if isinstance(stored.not_before, str) else None,
    )


def _decode_leases(reply: Sequence[bytes], *, until: float) -> Sequence[Lease]:
    leases = []
    for text, envelope in zip(reply[::2], reply[1::2], strict=True):
        stored = _decode_stored(text)
        leases.append(Lease(record=_record(stored, envelope), fence=str(stored.fence), until=until))
    return leases


def _decode_wake(reply: Sequence[Any], *, ahead: float) -> WakeResult:
    woken, delayed, next_due = reply
    return WakeResult(woken=woken, delayed=delayed, next_due=None if next_due is None else float(next_due) + ahead)


def _decode_expired(reply: Sequence[bytes]) -> Sequence[tuple[str, _Stored]]:
    return [(reply[index].decode(), _decode_stored(reply[index + 1])) for index in range(0, len(reply), 2)]


def _decode_completion_of(blob: bytes | None, ahead: float) -> Completion | None:
    """Return a completion by the clock of this process, which is `ahead` of the server's."""
    if blob is None:
        return None
    completion = _decode_completion(blob)
    return msgspec.structs.replace(completion, finished_at=completion.finished_at + ahead) if ahead else completion


def _decode_leased(reply: Sequence[Any]) -> tuple[int, Counter[str]]:
    """Return how many leased records were looked at, and how many of them there are of each task type."""
    looked_at, *counts = reply
    found = Counter[str]()
    for queue, count in zip(counts[::2], counts[1::2], strict=True):
        found[_parse_queue(queue.decode())[0]] += int(count)
    return int(looked_at), found


def _decode_list(reply: Sequence[Any], *, ahead: float) -> tuple[Sequence[StoredRecord], tuple[float, str] | None]:
    """Return the records of a part of a page, and where the next one goes on; None: there are no more."""
    items, time, task_id = reply
    found = [
        StoredRecord(
            record=_record(_decode_stored(text), b""),
            completion=_decode_completion_of(completion, ahead),
            until=None if until is None else float(until) + ahead,
        )
        for text, completion, until in zip(*[iter(items)] * 3, strict=True)
    ]
    return found, None if time is None else (float(time), task_id.decode())


def _decode_put(reply: bytes) -> PutResult:
    return PutResult(reply.decode())


def _result_of_showing(put: _Operation, reply: bytes | None) -> PutResult:
    """Return the result of `put` for a record that has been shown; None: it has woken, or was cancelled, before."""
    if reply is None:
        return PutResult.STORED if put.identity[1] is None else PutResult.PARKED  # it has no lease
    return PutResult(reply.decode())


def _decode_requeue(reply: bytes | None) -> PutResult | None:
    return None if reply is None else PutResult(reply.decode())


def _decode_find(
    reply: Sequence[bytes | None] | None, *, ahead: float
) -> tuple[RecordState, TaskRecord, Completion | None] | None:
    if not reply:
        return None
    text, envelope, completion = reply
    stored = _decode_stored(text or b"")
    return RecordState(stored.state), _record(stored, envelope or b""), _decode_completion_of(completion, ahead)


def _decode_text(reply: bytes | None) -> str | None:
    return None if reply is None else reply.decode()


def _decode_counts(reply: Mapping[bytes, bytes]) -> Mapping[str, int]:
    return {name.decode(): int(count) for name, count in reply.items()}
