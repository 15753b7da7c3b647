"""The task store on SQS: the tasks that wait are messages, and an index beside them has the rest."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from math import inf
from typing import Any, TypeVar

from msgspec.structs import replace

from forebay import clock
from forebay.errors import MessageTooLarge, StoreUnavailable
from forebay.events import log
from forebay.interfaces import (
    Completion,
    DeadRecord,
    Lease,
    PutResult,
    RecordState,
    StoredRecord,
    TaskIndex,
    TaskRecord,
    WakeResult,
)
from forebay.overflow.sqs_queues import Message, OutgoingMessage, SqsQueues, encode_message
from forebay.task import Priority, TaskStatus

_STUB = b"\xc1"  # begins the envelope of a record whose own is in the queue; no MessagePack begins with it
_RESERVED = "forebay.sqs: being sent"  # the task type of a record whose message is being sent
_SENDING = 120.0  # seconds until a process that reserved a record and has not sent its message is taken for dead
_YOUNG = 600.0  # seconds of the service's clock for which another process may be about to write a message's record
_MAX_AGE = (
    86400.0  # seconds after which a message without a record is a dead letter, for its record may have been pruned
)
_MAX_GROUP = 200  # puts that are sent together

_MIN_HIDDEN = 5.0  # seconds
_HIDDEN = 30.0  # seconds, if nothing is known about when the task may be leased
_PARKED = 1.0  # seconds after which the message of a parked task is looked at again, times how often it was received
_MAX_PARKED = 10.0  # seconds
_POLL = 1  # seconds for which a call of `lease` waits for a message of a record that waits
_IN_HAND = 2.0  # seconds for which a message is kept that was received and not leased
_MAX_IN_HAND = 200  # such messages of each priority
_MAX_HIDDEN = 200  # messages that are remembered while they are hidden
_CLEANUP_INTERVAL = 60.0  # seconds
_MAX_CLEANUP = 1000  # messages of each priority at once
_DISCOVERY_INTERVAL = 1.0  # seconds
_DISCOVERED = 10  # messages of each priority that are looked at to learn of others
_RECEIVES_AN_ATTEMPT = 10  # receives that count as one lost attempt, where no index has counted the attempts

_T = TypeVar("_T")


class _Action(Enum):
    """The next step for a message that was received, and whose record is not leased by its receiver."""

    LEASE = "lease"
    DELETE = "delete"


@dataclass(slots=True)
class _Held:
    """The message of a leased record, and the end of its lease."""

    message: Message
    until: float


@dataclass(slots=True)
class _Put:
    """A call of `put`."""

    message: OutgoingMessage
    fence: str | None
    until: float
    now: float
    done: asyncio.Future[PutResult]


class SqsTaskStore:
    """A task store on SQS, with an index beside it.

    A message holds the whole record. The index is another task store and holds the record without its envelope, and
    everything that SQS cannot do: states, keys, fences, attempts, delays, conversations, results, dead letters. The
    index decides. A message only says that a record may be leased, and is deleted once the record has ended. So a
    message that is delivered twice, early or late does no harm, and the visibility timeout is no lock: it keeps a
    message from being received in vain while its task runs, and `renew` extends it. After 12 hours, the most that SQS
    allows, a message is seen again, found LEASED, and hidden again.

    **Crash points.** Each call writes to the index and to the queue, and may stop between any two of its writes.

    ==========  =================================================  ===================================================
    call        writes, in order                                   if the later ones are missing
    ==========  =================================================  ===================================================
    put         1 index: reserve id, key and room                  Never acknowledged. The reservation lapses, and
                                                                   `reap` removes it.
                2 queue: send                                      Never acknowledged. The message has no record: it is
                                                                   adopted (it runs), or deleted as sent in vain.
                3 index: put the record in its place               (Acknowledged.)
    lease       1 queue: receive                                   The message is seen again after its timeout.
                2 index: lease by id                               The lease lapses, `reap` makes the record WAITING,
                                                                   and the message is seen again at about that time.
    release     1 index: release                                   WAITING; the message is seen after its timeout.
                2 queue: show the message                          (Complete.)
    delay       1 index: delay                                     DELAYED; the message is seen after its timeout, found
                                                                   DELAYED, and hidden until the first delay ends.
                2 queue: hide the message until it is due          (Complete.)
    wake        1 index: wake                                      (Complete: the message is seen when it is due.)
    finish      1 index: finish                                    DONE; the message is seen again, found DONE, deleted.
                2 queue: delete                                    (Complete.)
    mark_dead   1 index: mark dead                                 DEAD without its envelope, until the message is seen.
                2 index: add the envelope                          DEAD; the message is seen again and deleted.
                3 queue: delete                                    (Complete.)
    reap        1 index: reap                                      As for release, or as for mark_dead.
    requeue     1 queue: send                                      DEAD, not acknowledged. The message is hidden while
                                                                   it is young, then deleted.
                2 index: requeue                                   (Complete.)
    ==========  =================================================  ===================================================

    A record whose message is lost (the queue was purged, or the task has waited for longer than the 14 days for which
    SQS keeps a message) becomes a dead letter, without its envelope, once the queue has been empty for a minute.

    A message without a record is adopted: its index was lost, or replaced. If it is older than a day, its record may
    have ended and been pruned: it becomes a dead letter, so that it is neither lost nor run twice.

    **Without a shared index** (in memory) one process uses the queues at a time. The next one adopts every message. It
    knows no keys, results, delays or attempts of the one before, and tries its dead letters again.

    Args:
        queues: the queues.
        index: what is beside them. It is opened and closed with this store.
    """

    def __init__(self, queues: SqsQueues, index: TaskIndex) -> None:
        self._queues = queues
        self._index = index
        self._alone = not index.durable  # then the index knows nothing of other processes, present or past
        self._is_open = False
        self._loop: asyncio.AbstractEventLoop | None = None  # that opened it
        self._opening = asyncio.Lock()
        self._closing: asyncio.Future[None] | None = None
        self._puts: list[_Put] = []
        self._tasks: set[asyncio.Future[Any]] = set()  # that work on the queues; `close` waits for them
        self._late: set[asyncio.Future[Any]] = set()  # of them, those that release the leases of a cancelled call
        self._sending: asyncio.Future[None] | None = None
        self._in_hand: dict[Priority, dict[str, Message]] = {priority: {} for priority in Priority}  # by task id
        self._held: dict[str, _Held] = {}  # by task id
        self._hidden: dict[str, Message] = {}  # by task id: hidden, because their record does not wait
        self._dead_messages: dict[str, Message] = {}  # without a shared index: the messages of dead letters, by task id
        self._unwanted: list[Message] = []  # to delete
        self._deleting: asyncio.Future[None] | None = None
        self._cleaned_at = self._discovered_at = -inf
        self._was_empty = dict.fromkeys(Priority, False)  # the queue of each priority, when it was counted
        self._adopted = 0  # messages whose record the index did not have
        self._strangers: Counter[Priority] = Counter()  # without a shared index: messages that nobody here has seen

    @property
    def durable(self) -> bool:
        """True if the records survive the process. Without a shared index, that holds for those that have not ended."""
        return self._alone or self._index.durable

    @property
    def max_envelope_bytes(self) -> int:
        """The most bytes of an envelope that fit into a message with the rest of its record."""
        return self._queues.max_envelope_bytes

    # --- opening and closing ---

    async def open(self) -> None:
        """Open the index, connect, and find or make the queues."""
        loop = asyncio.get_running_loop()
        if self._loop is not loop and (self._loop is None or self._loop.is_closed()):
            await self._abandon(loop)
        if self._closing is not None and not self._closing.done():
            await asyncio.wait([self._closing])
        async with self._opening:
            if self._is_open:
                return
            await self._index.open()
            try:
                await self._queues.open()
            except BaseException:
                await self._index.close()
                raise
            self._closing = None
            self._is_open = True

    async def _abandon(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin again on another event loop: the one before ended, and nobody waits for what it left."""
        self._loop, self._opening, self._closing = loop, asyncio.Lock(), None
        if self._is_open:
            self._is_open = False
            self._tasks.clear()
            self._late.clear()
            self._puts.clear()
            self._sending = self._deleting = None
            self._forget_messages()
            await self._queues.close()

    async def close(self) -> None:
        """Finish the pending operations, return what was not leased, and disconnect."""
        if self._closing is None:
            if not self._is_open:
                return
            self._is_open = False
            self._closing = asyncio.ensure_future(self._close())
        await asyncio.shield(self._closing)

    async def _close(self) -> None:
        try:
            while self._tasks:
                await asyncio.wait(self._tasks)
            with suppress(StoreUnavailable):  # they are seen again after their timeout
                await self._queues.hide(
                    [(message, 0.0) for each in self._in_hand.values() for message in each.values()]
                )
            self._forget_messages()
            await self._queues.close()
        finally:
            await self._index.close()

    def _forget_messages(self) -> None:
        for messages in self._in_hand.values():
            messages.clear()
        self._held.clear()
        self._hidden.clear()

    def _check_open(self) -> None:
        if not self._is_open:
            advice = "Use it between open() and close()."
            raise StoreUnavailable(where=self._queues.where, why="it is not open", advice=advice)

    def _spawn(self, work: Any) -> asyncio.Future[Any]:
        """Run `work` in the background; `close` waits for it."""
        task: asyncio.Future[Any] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- putting ---

    def subscribe(
        self,
        *,
        on_waiting: Callable[[], None],
        on_ended: Callable[[], None],
        on_lost: Callable[[], None] | None = None,  # noqa: ARG002
        on_interrupted: Callable[[], None] | None = None,
    ) -> None:
        """Call back when another process has changed the index, if the index can hear of that."""
        self._index.subscribe(on_waiting=on_waiting, on_ended=on_ended, on_interrupted=on_interrupted)

    async def put(
        self, record: TaskRecord, *, fence: str | None = None, until: float = 0.0, now: float = 0.0
    ) -> PutResult:
        """Store `record`: reserve it in the index, send its message, and write it into the index.

        Raises:
            MessageTooLarge: it does not fit into a message.
        """
        self._check_open()
        # Before that, its message would be received in vain.
        delay = until - clock.wall_time() if fence is not None else (record.not_before or 0.0) - now
        message = self._encode(record, delay)
        put = _Put(message, fence, until, now, asyncio.get_running_loop().create_future())
        self._puts.append(put)
        if self._sending is None or self._sending.done():
            self._sending = self._spawn(self._send_puts())
        return await put.done

    def _encode(self, record: TaskRecord, delay: float = 0.0) -> OutgoingMessage:
        message = encode_message(record, clock.new_id().encode(), delay)
        size = len(message.body)
        if size > self._queues.max_bytes:
            raise MessageTooLarge(task_id=record.task_id, size=size, bound=self._queues.max_bytes)
        return message

    async def _send_puts(self) -> None:
        await asyncio.sleep(0)  # calls of this turn of the loop are sent together
        while self._puts:
            some, self._puts = self._puts[:_MAX_GROUP], self._puts[_MAX_GROUP:]
            puts = [put for put in some if not put.done.done()]
            try:
                outcomes = await self._put_all(puts)
            except Exception as error:  # noqa: BLE001 - its callers get it
                outcomes = [error] * len(puts)
            for put, outcome in zip(puts, outcomes, strict=True):
                _answer(put.done, outcome)

    async def _put_all(self, puts: Sequence[_Put]) -> Sequence[PutResult | BaseException]:
        """Put records, and return for each the result or the error."""
        fence, until = clock.new_id(), clock.wall_time() + _SENDING
        reserved = [Lease(record=_reservation(put.message), fence=fence, until=until) for put in puts]
        outcomes: list[PutResult | BaseException] = list(
            await _gather(self._index.put(lease.record, fence=fence, until=until) for lease in reserved)
        )
        sent = [index for index, outcome in enumerate(outcomes) if outcome is PutResult.STORED]
        failures = await self._queues.send([puts[index].message for index in sent])
        writes = (
            self._write_sent(puts[index], reserved[index], failure)
            for index, failure in zip(sent, failures, strict=True)
        )
        for index, outcome in zip(sent, await _gather(writes), strict=True):
            outcomes[index] = outcome
        return outcomes

    async def _write_sent(self, put: _Put, reserved: Lease, failure: StoreUnavailable | None) -> PutResult:
        """Put the record of a message that was sent in the place of its reservation, or end that."""
        if failure is not None:
            await self._index.finish(reserved.record.task_id, _not_sent(), fence=reserved.fence)
            raise failure
        stub = _stub(put.message)
        stored = await self._index.replace(reserved, stub, fence=put.fence, until=put.until, now=put.now)
        if stored is None:
            raise self._too_slow()
        return stored

    def _too_slow(self) -> StoreUnavailable:
        why = f"a message took more than {_SENDING:.0f} s to send"
        return StoreUnavailable(where=self._queues.where, why=why, advice="Check the network.")

    # --- leasing ---

    async def lease(
        self,
        task_type: str,
        limit: int,
        *,
        until: float,
        priority: Priority | None = None,
        shares: Mapping[str, int] | None = None,
    ) -> Sequence[Lease]:
        """Lease waiting records, in the order in which their messages are received.

        Those that are received together are leased in the order of the contract.
        """
        self._check_open()
        if self._late:
            await asyncio.wait(self._late)
        if limit <= 0:
            return []
        leasing = self._spawn(self._lease(task_type, limit, until, priority, shares))
        try:
            leases: Sequence[Lease] = await asyncio.shield(leasing)
        except asyncio.CancelledError:
            late = self._spawn(self._release_late(leasing))
            self._late.add(late)
            late.add_done_callback(self._late.discard)
            raise
        return leases

    async def _release_late(self, leasing: asyncio.Future[Sequence[Lease]]) -> None:
        with suppress(StoreUnavailable):  # the leases lapse
            await self._release(await leasing)

    async def _lease(
        self, task_type: str, limit: int, until: float, priority: Priority | None, shares: Mapping[str, int] | None
    ) -> Sequence[Lease]:
        depths = await self._index.depths()
        leases: list[Lease] = []
        for each in Priority if priority is None else (priority,):
            wanted = _Wanted(task_type, each, shares)
            known = sum(min(depth, wanted.share(*key)) for key, depth in depths.items())
            if known or self._alone:
                room = limit - len(leases) if self._alone else int(min(limit - len(leases), known))
                leases += await self._lease_wanted(wanted, room, until, wait=_POLL if known else 0)
        return leases

    async def _lease_wanted(self, wanted: _Wanted, room: int, until: float, *, wait: int) -> list[Lease]:
        """Lease up to `room` records.

        A poll waits for the first of them, for a second at most: it asks all servers of the queue, and returns as soon
        as a message is there. So a record whose message becomes visible meanwhile starts at once.
        """
        leases: list[Lease] = []
        await self._take_back(wanted)
        messages: dict[str, Message] = {}  # whose records may be leased by this call, by task id
        hidden, is_empty = max(until - clock.wall_time(), _MIN_HIDDEN), False
        try:
            while len(leases) < room:
                messages |= self._take_from_hand(wanted)
                chosen = wanted.choose(messages.values(), room - len(leases))
                missing = room - len(leases) - len(chosen)
                if missing and not is_empty and len(self._in_hand[wanted.priority]) < _MAX_IN_HAND:
                    poll = wait if not leases and not chosen else 0
                    received = await self._queues.receive(wanted.priority, missing, hidden=hidden, wait=poll)
                    is_empty = not received
                    for message in received:
                        self._take_in_hand(message)
                elif chosen:
                    for message in chosen:
                        del messages[message.record.task_id]
                    leased = await self._lease_messages(chosen, until)
                    wanted.count_leased(leased)
                    leases += leased
                else:
                    break
        finally:
            for message in messages.values():
                self._take_in_hand(message)
        return leases

    def _remember_hidden(self, message: Message) -> None:
        """Remember a message that is hidden until its record waits: this process need not wait to see it again."""
        self._hidden.pop(message.record.task_id, None)
        self._hidden[message.record.task_id] = message
        if len(self._hidden) > _MAX_HIDDEN:
            del self._hidden[next(iter(self._hidden))]

    async def _take_back(self, wanted: _Wanted) -> None:
        """Take hidden messages in hand whose records wait by now."""
        ids = [task_id for task_id, message in self._hidden.items() if wanted.fits(message)]
        for task_id, found in zip(ids, await asyncio.gather(*map(self._index.find, ids)), strict=True):
            if found is not None and found[0] in (RecordState.PARKED, RecordState.DELAYED, RecordState.LEASED):
                continue
            message = self._hidden.pop(task_id, None)
            if message is not None and found is not None and found[0] is RecordState.WAITING:
                self._take_in_hand(message)

    def _take_from_hand(self, wanted: _Wanted) -> Mapping[str, Message]:
        """Take the messages out of hand whose records may be leased."""
        in_hand = self._in_hand[wanted.priority]
        taken = {task_id: message for task_id, message in in_hand.items() if wanted.fits(message)}
        for task_id in taken:
            del in_hand[task_id]
        return taken

    def _take_in_hand(self, message: Message) -> None:
        """Keep a message for a moment: the next call may lease its record."""
        in_hand = self._in_hand[message.priority]
        in_hand[message.record.task_id] = message
        loop = asyncio.get_running_loop()
        loop.call_later(_IN_HAND, self._return_in_hand, message)

    def _return_in_hand(self, message: Message) -> None:
        """Show a message to other processes again that was not leased."""
        in_hand = self._in_hand[message.priority]
        if self._is_open and in_hand.get(message.record.task_id) is message:
            del in_hand[message.record.task_id]
            self._spawn(self._hide([(message, 0.0)]))

    async def _hide(self, messages: Sequence[tuple[Message, float]]) -> None:
        """Hide messages if the service answers; otherwise they are seen after their timeout, and looked at again."""
        if messages:
            with suppress(StoreUnavailable):
                await self._queues.hide(messages)

    async def _lease_messages(self, messages: Sequence[Message], until: float) -> list[Lease]:
        """Lease the records of messages; the messages of the others are dealt with."""
        given = await self._index.lease_ids([message.record.task_id for message in messages], until=until)
        leased = {lease.record.task_id: lease for lease in given}
        leases, others, wrong = list[Lease](), list[Message](), list[Lease]()
        for message in messages:
            lease = leased.get(message.record.task_id)
            if lease is None:
                others.append(message)
            elif _is_stale(message, lease.record):
                wrong.append(lease)
                self._delete(message)
            else:
                self._held[lease.record.task_id] = _Held(message, until)
                record = replace(lease.record, envelope=message.record.envelope)
                leases.append(Lease(record=record, fence=lease.fence, until=until))
        if wrong:
            await self._index.release(wrong)
        await self._settle(others)
        return leases

    async def _settle(self, messages: Sequence[Message]) -> None:
        """Do with each message what the state of its record says."""
        adopted = self._adopted
        actions = await asyncio.gather(*(self._action(message) for message in messages))
        if (count := self._adopted - adopted) > 0 and not self._alone:
            log.warning("%d tasks were in %s and not in its index: they are taken in", count, self._queues.where)
        hidden: list[tuple[Message, float]] = []
        for message, action in zip(messages, actions, strict=True):
            if action is _Action.LEASE:
                self._take_in_hand(message)
            elif action is _Action.DELETE:
                self._delete(message)
            else:
                hidden.append((message, action))
        await self._hide(hidden)

    async def _action(self, message: Message) -> _Action | float:  # noqa: PLR0911 - one for each state
        """Return what to do with a message; a number: hide it for so many seconds."""
        found = await self._index.find(message.record.task_id)
        if found is None:
            return await self._adopt(message)
        state, record, _ = found
        if _is_stale(message, record):
            return _Action.DELETE
        if state is RecordState.DEAD:
            return await self._action_of_dead(message, record)
        if state is RecordState.DELAYED:
            self._remember_hidden(message)
            return await self._until_next_due()
        if state is RecordState.LEASED:
            if (held := self._held.get(record.task_id)) is not None:
                held.message = message  # the newest handle is the one that counts
            else:  # its holder may have died
                self._remember_hidden(message)
            return _MIN_HIDDEN if record.task_type == _RESERVED else _HIDDEN
        if state is RecordState.PARKED:
            self._remember_hidden(message)
            return min(_PARKED * message.receives, _MAX_PARKED)
        return _Action.LEASE if state is RecordState.WAITING else _Action.DELETE

    async def _action_of_dead(self, message: Message, record: TaskRecord) -> _Action | float:
        if self._dead_messages.get(record.task_id) is not None:
            self._dead_messages[record.task_id] = message
            return inf
        if _is_stub(record):
            await self._index.set_envelope(record.task_id, message.record.envelope)
            return self._action_of_whole(message)
        # Its envelope is in the index: either it is being requeued, or a message of before has come back.
        return self._if_old(message)

    @staticmethod
    def _if_old(message: Message) -> _Action | float:
        """Return for how long to hide a message whose record another process may be writing now."""
        young = _YOUNG - (clock.wall_time() - message.sent_at)
        return min(max(young, _MIN_HIDDEN), _HIDDEN) if young > 0 else _Action.DELETE

    async def _until_next_due(self) -> float:
        next_due = (await self._index.wake(now=-inf)).next_due  # wakes none
        wait = _HIDDEN if next_due is None else next_due - clock.wall_time()
        return min(max(wait, 1.0), 3600.0)

    async def _adopt(self, message: Message) -> _Action | float:
        """Write the record of a message into the index, which does not know it."""
        record = replace(message.record, envelope=_stub_envelope(message.nonce))
        if self._alone:
            record = replace(record, attempts=(message.receives - 1) // _RECEIVES_AN_ATTEMPT)
        elif clock.wall_time() - message.sent_at > _MAX_AGE:
            return await self._adopt_dead(message, record)
        put = await self._index.put(record, now=clock.wall_time())
        if put.written:
            self._adopted += 1
        if put is PutResult.STORED:
            return _Action.LEASE
        if put is PutResult.PARKED:
            return _PARKED
        return _HIDDEN if put is PutResult.FULL else _Action.DELETE  # another task has its key: it is the same work

    async def _adopt_dead(self, message: Message, record: TaskRecord) -> _Action | float:
        record = replace(record, thread_id=None)  # its conversation may have gone on
        lease = Lease(record=record, fence=clock.new_id(), until=clock.wall_time() + _SENDING)
        put = await self._index.put(record, fence=lease.fence, until=lease.until)
        if put is not PutResult.STORED:
            return _HIDDEN if put is PutResult.FULL else _Action.DELETE
        error = "its record is missing: it may have ended long ago, or the index was lost; requeue it to run it"
        completion = Completion(status=TaskStatus.FAILED.value, error=error, finished_at=clock.wall_time())
        await self._index.mark_dead(lease, completion)
        await self._index.set_envelope(record.task_id, message.record.envelope)
        log.error("task %r is a dead letter: %s", record.task_id, error)
        return _Action.DELETE

    # --- holding ---

    async def begin_attempt(self, lease: Lease) -> bool:
        """Count a start of the handler, in the index."""
        self._check_open()
        return await self._index.begin_attempt(lease)

    def renew(self, leases: Sequence[Lease], *, until: float) -> Sequence[Lease]:
        """Extend leases in the index, and keep their messages hidden. Blocks; from any thread."""
        self._check_open()
        lost = self._index.renew(leases, until=until)
        fences = {lease.fence for lease in lost}
        held = [self._held.get(lease.record.task_id) for lease in leases if lease.fence not in fences]
        messages = []
        for each in held:
            if each is not None:
                each.until = until
                messages.append((each.message, max(until - clock.wall_time(), _MIN_HIDDEN)))
        if messages:
            with suppress(StoreUnavailable):  # a message that is seen early is found LEASED and hidden
                self._queues.hide_blocking(messages)
        return lost

    async def release(self, leases: Sequence[Lease]) -> None:
        """Make leased records WAITING again, and show their messages."""
        self._check_open()
        await self._release(leases)

    async def _release(self, leases: Sequence[Lease]) -> None:
        if not leases:
            return
        await self._index.release(leases)
        shown = [self._held.pop(lease.record.task_id, None) for lease in leases]
        await self._hide([(held.message, 0.0) for held in shown if held is not None])

    async def record_failures(self, lease: Lease) -> bool:
        """Give a leased record the failures of its lease, in the index."""
        self._check_open()
        return await self._index.record_failures(lease)

    async def delay(self, lease: Lease, *, due: float) -> bool:
        """Make a leased record DELAYED, and hide its message until `due`, or for as long as the service allows."""
        self._check_open()
        delayed = await self._index.delay(lease, due=due)
        held = self._held.pop(lease.record.task_id, None)
        if delayed and held is not None:
            self._remember_hidden(held.message)
            await self._hide([(held.message, max(0.0, due - clock.wall_time()))])
        return delayed

    async def wake(self, *, now: float) -> WakeResult:
        """Make the DELAYED records that are due WAITING again. Their messages are seen at about that time."""
        self._check_open()
        return await self._index.wake(now=now)

    # --- ending ---

    async def finish(self, task_id: str, completion: Completion, *, fence: str | None) -> bool:
        """Mark a record DONE in the index, and delete its message in the background.

        The message of a task that was cancelled while it waited is deleted when it is received.
        """
        self._check_open()
        finished = await self._index.finish(task_id, completion, fence=fence)
        held = self._held.pop(task_id, None) if finished or fence is not None else None
        if finished and held is not None:
            self._delete(held.message)
        return finished

    def _delete(self, message: Message) -> None:
        """Delete a message in the background. If that fails, it is seen again, and its record says it has ended."""
        self._unwanted.append(message)
        if self._deleting is None or self._deleting.done():
            self._deleting = self._spawn(self._delete_unwanted())

    async def _delete_unwanted(self) -> None:
        await asyncio.sleep(0)  # ends of this turn of the loop are deleted together
        while self._unwanted:
            messages, self._unwanted = self._unwanted, []
            with suppress(StoreUnavailable):
                await self._queues.delete(messages)

    async def reap(self, *, now: float, max_attempts: int, latest: float = inf) -> Sequence[DeadRecord]:
        """Release expired leases, and return the records that became DEAD: without an envelope that is in the queue."""
        self._check_open()
        reaped = await self._index.reap(now=now, max_attempts=max_attempts, latest=latest)
        dead = list(await asyncio.gather(*(self._complete_dead(each) for each in reaped)))
        lapsed = [task_id for task_id, held in self._held.items() if held.until < now or held.until > latest]
        await self._settle([self._held.pop(task_id).message for task_id in lapsed])
        await self._remove_reservations()
        if clock.now() - self._cleaned_at >= _CLEANUP_INTERVAL:
            self._cleaned_at = clock.now()
            await self._clean_up()
        return dead

    async def _complete_dead(self, dead: DeadRecord) -> DeadRecord:
        record = dead.record
        held = self._held.pop(record.task_id, None)
        if held is None or not _is_stub(record):
            shown = replace(record, envelope=b"") if _is_stub(record) else record
            return DeadRecord(record=shown, completion=dead.completion)
        await self._keep_dead(record.task_id, held.message)
        return DeadRecord(record=replace(record, envelope=held.message.record.envelope), completion=dead.completion)

    async def _keep_dead(self, task_id: str, message: Message) -> None:
        """Move the envelope of a dead letter from the queue into the index."""
        await self._index.set_envelope(task_id, message.record.envelope)
        action = self._action_of_whole(message)
        if action is _Action.DELETE:
            self._delete(message)
        else:
            await self._hide([(message, inf)])

    def _action_of_whole(self, message: Message) -> _Action | float:
        """Return what to do with the message of a dead letter whose envelope is in the index."""
        if not self._alone:
            return _Action.DELETE
        self._dead_messages[message.record.task_id] = (
            message  # the index ends with the process, and the message does not
        )
        return inf

    async def _remove_reservations(self) -> None:
        """End the reservations of processes that died while they sent."""
        leases = await self._index.lease(_RESERVED, _MAX_GROUP, until=clock.wall_time() + _SENDING)
        for lease in leases:
            await self._index.finish(lease.record.task_id, _not_sent(), fence=lease.fence)

    async def _clean_up(self) -> None:
        """Look at messages of queues that have more of them than records wait: they have ended, or have no record."""
        depths = await self._index.depths()
        for priority in Priority:
            waiting = sum(depth for (_, each, _), depth in depths.items() if each is priority)
            visible, total = await self._queues.count(priority)
            was_empty, self._was_empty[priority] = self._was_empty[priority], total == 0
            surplus = visible + len(self._in_hand[priority]) - waiting
            if surplus > 0:
                await self._look_through(priority, surplus)
            elif total == 0 and was_empty:  # the service may be a minute late with its counts
                await self._mark_lost_dead([key for key in depths if key[1] is priority])

    async def _look_through(self, priority: Priority, surplus: int) -> None:
        """Receive about as many messages as have no record that waits, and do what their records say."""
        if surplus > _MAX_CLEANUP:
            self._cleaned_at = -inf  # the rest when leases are reaped next
        left = min(surplus, _MAX_CLEANUP)
        while left > 0 and (messages := await self._queues.receive(priority, left, hidden=_HIDDEN)):
            await self._settle(messages)
            left -= len(messages)

    async def _mark_lost_dead(self, kinds: Iterable[tuple[str, Priority, str]]) -> None:
        """Mark records dead that wait although their queue is empty: it was purged, or kept them for too long.

        If their message is there after all, it brings the envelope, and the dead letter can be requeued.
        """
        for task_type, priority, tenant in kinds:
            until, shares = clock.wall_time() + _SENDING, {tenant: _MAX_GROUP}
            for lease in await self._index.lease(task_type, _MAX_GROUP, until=until, priority=priority, shares=shares):
                if clock.wall_time() - lease.record.enqueued_at < _YOUNG:
                    await self._index.release([lease])
                    continue
                error = "its message is not in the queue any more: it was purged, or waited for too long"
                completion = Completion(status=TaskStatus.FAILED.value, error=error, finished_at=clock.wall_time())
                if await self._index.mark_dead(lease, completion):
                    log.error("task %r is a dead letter: %s", lease.record.task_id, error)

    async def prune(self, *, before: float) -> int:
        """Drop DONE records that ended before `before`."""
        self._check_open()
        return await self._index.prune(before=before)

    # --- dead records ---

    async def mark_dead(self, lease: Lease, completion: Completion) -> bool:
        """Mark a leased record DEAD, and move its envelope from the queue into the index."""
        self._check_open()
        task_id = lease.record.task_id
        marked = await self._index.mark_dead(lease, completion)
        held = self._held.pop(task_id, None)
        if marked and held is not None:
            await self._keep_dead(task_id, held.message)
        elif marked:  # it was put leased, and its message has not been seen
            await self._index.set_envelope(task_id, lease.record.envelope)
        return marked

    async def list_records(
        self, state: RecordState, limit: int, *, after: tuple[float, str] | None = None
    ) -> Sequence[StoredRecord]:
        """Return a page of the records in `state`."""
        self._check_open()
        listed: list[StoredRecord] = []
        while len(listed) < limit:
            page = await self._index.list_records(state, limit - len(listed), after=after)
            listed += [each for each in page if each.record.task_type != _RESERVED]
            if not page:
                break
            after = page[-1].position
        return listed

    async def requeue(self, task_id: str) -> PutResult | None:
        """Send the message of a DEAD record again, and make the record WAITING, or PARKED.

        Raises:
            StoreUnavailable: also while its envelope is still in a message that is hidden.
        """
        self._check_open()
        found = await self._index.find(task_id)
        if found is None or found[0] is not RecordState.DEAD:
            return None
        record = found[1]
        if _is_stub(record):
            raise self._not_back()
        if record.key is not None and await self._index.find_key(record.key) is not None:
            return PutResult.DUPLICATE
        fresh = replace(record, attempts=0, failures=0, total_delay=0.0, last_error=None, usage=None)
        (failure,) = await self._queues.send([self._encode(fresh)])
        if failure is not None:
            raise failure
        requeued = await self._index.requeue(task_id)
        if requeued is PutResult.STORED and (message := self._dead_messages.pop(task_id, None)) is not None:
            self._delete(message)
        return requeued

    def _not_back(self) -> StoreUnavailable:
        why = "the message of that dead letter is still hidden from the process that had it"
        return StoreUnavailable(where=self._queues.where, why=why, advice="Try again in a minute.")

    async def delete_dead(self, task_id: str) -> bool:
        """Delete a DEAD record.

        Raises:
            StoreUnavailable: also while its message is still hidden: it would be taken for a task without a record.
        """
        self._check_open()
        found = await self._index.find(task_id)
        if found is not None and found[0] is RecordState.DEAD and _is_stub(found[1]):
            raise self._not_back()
        deleted = await self._index.delete_dead(task_id)
        if deleted and (message := self._dead_messages.pop(task_id, None)) is not None:
            self._delete(message)
        return deleted

    # --- asking ---

    async def find(self, task_id: str) -> tuple[RecordState, TaskRecord, Completion | None] | None:
        """Return a record by its task id; without an envelope that is in the queue."""
        self._check_open()
        found = await self._index.find(task_id)
        if found is None or found[1].task_type == _RESERVED:
            return None
        state, record, completion = found
        if state is not RecordState.DEAD or _is_stub(record):
            record = replace(record, envelope=b"")
        return state, record, completion

    async def find_key(self, key: str) -> str | None:
        """Return the task id stored under a key."""
        self._check_open()
        return await self._index.find_key(key)

    async def depths(self) -> Mapping[tuple[str, Priority, str], int]:
        """Return how many records are WAITING.

        Without a shared index, messages are looked at that an earlier process has left; the rest of them is counted
        with the type and tenant of most of what waits in their priority.
        """
        self._check_open()
        if self._alone and clock.now() - self._discovered_at >= _DISCOVERY_INTERVAL:
            self._discovered_at = clock.now()
            await self._discover()
        depths = {key: depth for key, depth in (await self._index.depths()).items() if key[0] != _RESERVED}
        for priority, count in self._strangers.items():
            if count and (of_priority := [key for key in depths if key[1] is priority]):
                depths[max(of_priority, key=depths.__getitem__)] += count
        return depths

    async def _discover(self) -> None:
        """Take in a few messages that the index does not know, and estimate how many more there are."""
        for priority in Priority:
            self._strangers[priority], adopted = 0, self._adopted
            if not self._in_hand[priority]:
                messages = await self._queues.receive(priority, _DISCOVERED, hidden=_HIDDEN)
                await self._settle(messages)
            if self._adopted > adopted:  # then there may be more
                known = await self._index.depths()
                waiting = sum(depth for (_, each, _), depth in known.items() if each is priority)
                visible, _ = await self._queues.count(priority)
                self._strangers[priority] = max(0, visible + len(self._in_hand[priority]) - waiting)

    async def leased(self) -> Mapping[str, int]:
        """Return how many records are LEASED. Without a shared index, those of this process."""
        self._check_open()
        return {name: count for name, count in (await self._index.leased()).items() if name != _RESERVED}

    async def conversations(self) -> Mapping[str, int]:
        """Return how many records have not ended, by thread id."""
        self._check_open()
        return await self._index.conversations()


class _Wanted:
    """The records that a call of `lease` asks for, of one priority."""

    def __init__(self, task_type: str, priority: Priority, shares: Mapping[str, int] | None) -> None:
        self._task_type = task_type
        self.priority = priority
        self._shares = None if shares is None else dict(shares)

    def share(self, task_type: str, priority: Priority, tenant: str) -> float:
        """Return how many records of that kind are wanted at most."""
        if task_type != self._task_type or priority is not self.priority:
            return 0
        return inf if self._shares is None else max(0, self._shares.get(tenant, 0))

    def fits(self, message: Message) -> bool:
        """Return whether the record of a message is wanted."""
        return self.share(message.record.task_type, message.record.priority, message.record.tenant) > 0

    def choose(self, messages: Iterable[Message], room: int) -> Sequence[Message]:
        """Return up to `room` of the messages that fit, in the order of the contract."""
        fitting = sorted(messages, key=_order)
        if self._shares is None:
            return fitting[:room]
        chosen: list[Message] = []
        for tenant, share in self._shares.items():
            chosen += [each for each in fitting if each.record.tenant == tenant][: max(0, share)]
        return chosen[:room]

    def count_leased(self, leases: Sequence[Lease]) -> None:
        """Reduce the shares by what was leased."""
        if self._shares is not None:
            for lease in leases:
                self._shares[lease.record.tenant] -= 1


def _order(message: Message) -> tuple[float, float, float]:
    record = message.record
    return inf if record.deadline is None else record.deadline, record.enqueued_at, message.sent_at


def _stub_envelope(nonce: bytes) -> bytes:
    return _STUB + nonce


def _stub(message: OutgoingMessage) -> TaskRecord:
    """Return the record of a message as the index has it."""
    return replace(message.record, envelope=_stub_envelope(message.nonce))


def _reservation(message: OutgoingMessage) -> TaskRecord:
    """Return the record that keeps id, key and room while a message is sent, and stands in no conversation."""
    return replace(_stub(message), task_type=_RESERVED, thread_id=None)


def _not_sent() -> Completion:
    # Kept like a result: if the message was sent after all, it is found to have ended.
    return Completion(status=TaskStatus.REJECTED.value, finished_at=clock.wall_time())


def _is_stub(record: TaskRecord) -> bool:
    return record.envelope.startswith(_STUB)


def _is_stale(message: Message, record: TaskRecord) -> bool:
    """Return whether a message was sent for an earlier record of its task id."""
    return _is_stub(record) and record.envelope != _stub_envelope(message.nonce)


def _answer(future: asyncio.Future[PutResult], outcome: PutResult | BaseException) -> None:
    if future.done():  # its caller was cancelled
        return
    if isinstance(outcome, BaseException):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


async def _gather(calls: Iterable[Awaitable[_T]]) -> Sequence[_T | BaseException]:
    return await asyncio.gather(*calls, return_exceptions=True)
