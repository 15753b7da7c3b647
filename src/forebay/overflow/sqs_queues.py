"""The SQS queues of an overflow, one for each priority: messages are sent, received, hidden and deleted.

The limits below are those of the Amazon SQS Developer Guide, chapter "Amazon SQS quotas".
"""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import botocore.exceptions
import msgspec

from forebay._threads import DaemonThreadExecutor
from forebay.clock import now
from forebay.errors import StoreUnavailable
from forebay.events import log
from forebay.interfaces import TaskRecord
from forebay.storage import aws
from forebay.storage.url import SqsUrl
from forebay.task import Priority

MAX_WAIT = 20  # seconds of a long poll
MAX_DELAY = 900  # seconds for which a message may be delayed when it is sent; a message of a FIFO queue may not
RETENTION = 14 * 86400  # seconds for which a message is kept at most
_MAX_VISIBILITY = 12 * 3600  # seconds from when a message is received to when it has to be seen again
_MAX_BATCH = 10  # messages of a request
_DEFAULT_MAX_BYTES = 256 << 10  # of a message, where the queue does not say; 1 MiB where the service allows it
_HEADER_BYTES = 4096  # of a message, for all but the envelope
_MAX_REQUESTS = 8  # at a time, of one operation
_THREADS = 32
_READ_TIMEOUT, _ATTEMPTS = 8, 2  # a call that is not answered ends, so that nothing hangs

_VERSION = 1
_UNREADABLE = 900  # seconds for which a message that cannot be read is left alone

_T = TypeVar("_T")

_ADVICE = {
    "AccessDenied": "Allow sqs:SendMessage, ReceiveMessage, DeleteMessage, ChangeMessageVisibility, GetQueueUrl,"
    " GetQueueAttributes, and CreateQueue unless create=no.",
    "NonExistentQueue": "Make the queues, one for each priority, or leave create=no out.",
    "OverLimit": "Too many messages are in flight: let the tasks that run end, or raise the quota of the queue.",
}


class _Body(msgspec.Struct, frozen=True, kw_only=True):
    """A task in a message.

    Attributes:
        version: raised when an older reader would misread it.
        nonce: differs in every message, also of one task.
        record: with its envelope.
    """

    version: int
    nonce: bytes
    record: TaskRecord


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(_Body).decode


@dataclass(frozen=True, slots=True, kw_only=True)
class OutgoingMessage:
    """A message to send.

    Attributes:
        record: the task, with its envelope.
        nonce: differs in every message.
        delay: seconds until it may be received; not in a FIFO queue.
        body: the text of the message.
    """

    record: TaskRecord
    nonce: bytes
    delay: float
    body: str


@dataclass(slots=True, eq=False, kw_only=True)
class Message:
    """A message that was received, and is hidden from other receivers for some time.

    Attributes:
        record: the task as it was sent, with its envelope.
        nonce: of the message.
        handle: the right to hide or delete it.
        received_at: seconds by `clock.now`.
        sent_at: epoch seconds, by the clock of the service.
        receives: how many times it was received, this one included.
    """

    record: TaskRecord
    nonce: bytes
    handle: str
    received_at: float
    sent_at: float
    receives: int

    @property
    def priority(self) -> Priority:
        """The priority by which its queue is known."""
        return self.record.priority


def encode_message(record: TaskRecord, nonce: bytes, delay: float = 0.0) -> OutgoingMessage:
    """Return the message of a task. Its text is base64, because a message may hold no arbitrary characters."""
    body = base64.b64encode(_encode(_Body(version=_VERSION, nonce=nonce, record=record))).decode()
    return OutgoingMessage(record=record, nonce=nonce, delay=delay, body=body)


class SqsQueues:
    """The queues of one overflow, `<name>-critical` to `<name>-low`, and the client that uses them.

    The client blocks, and runs in threads: it may be used by a thread outside of the event loop as well, and making one
    reads many files. No error or log of it holds a credential: of an error of the service only its code is shown.
    """

    def __init__(self, url: SqsUrl) -> None:
        self._url = url
        self.where = f"sqs://{url.queue}{'.fifo' if url.fifo else ''}"
        self.max_bytes = _DEFAULT_MAX_BYTES  # of a message, and of all messages of a request
        self._client: Any = None
        self._executor: DaemonThreadExecutor | None = None
        self._queues: dict[Priority, str] = {}  # their URLs

    @property
    def max_envelope_bytes(self) -> int:
        """The most bytes that an envelope may have."""
        return self.max_bytes // 4 * 3 - _HEADER_BYTES

    async def open(self) -> None:
        """Connect, and find or make the queues.

        Raises:
            StoreUnavailable: it cannot be used; the message says why and what to do.
        """
        self._executor = DaemonThreadExecutor(f"forebay-{self._url.queue}", max_threads=_THREADS)
        try:
            self._client = await self._run(self._connect)
            for priority in Priority:
                self._queues[priority] = await self._find(priority)
        except BaseException:
            await self.close()
            raise

    def _connect(self) -> Any:
        return aws.create_client(
            "sqs",
            region=self._url.region,
            endpoint=self._url.endpoint,
            connections=_THREADS,
            read_timeout=_READ_TIMEOUT,
            attempts=_ATTEMPTS,
        )

    async def close(self) -> None:
        """Disconnect. Idempotent."""
        client, self._client = self._client, None
        executor, self._executor = self._executor, None
        if client is not None:
            client.close()
        if executor is not None:
            executor.shutdown()

    async def _run(self, work: Callable[..., _T], *args: Any) -> _T:
        """Run `work` in a thread."""
        if self._executor is None:
            advice = "Use it between open() and close()."
            raise StoreUnavailable(where=self.where, why="it is not open", advice=advice)
        try:
            return await asyncio.get_running_loop().run_in_executor(self._executor, partial(work, *args))
        except aws.FAILURES as error:
            raise self._unavailable(error) from None

    async def _call(self, operation: str, **parameters: Any) -> Any:
        """Return the answer of the service."""
        return await self._run(partial(getattr(self._client, operation), **parameters))

    async def _find(self, priority: Priority) -> str:
        """Return the URL of a queue, having checked what it does with messages."""
        name = f"{self._url.queue}-{priority.name.lower()}{'.fifo' if self._url.fifo else ''}"
        url: str = await self._run(self._find_or_create, name)
        names = ["RedrivePolicy", "MaximumMessageSize", "MessageRetentionPeriod"]
        answer = await self._call("get_queue_attributes", QueueUrl=url, AttributeNames=names)
        self._check(name, answer.get("Attributes", {}))
        return url

    def _find_or_create(self, name: str) -> str:
        try:
            found = self._client.get_queue_url(QueueName=name)
        except botocore.exceptions.ClientError as error:
            if _code(error) != "NonExistentQueue" or not self._url.create:
                raise
            attributes = {"MessageRetentionPeriod": str(RETENTION)}
            if self._url.fifo:
                attributes["FifoQueue"] = "true"
            found = self._client.create_queue(QueueName=name, Attributes=attributes)
        return str(found["QueueUrl"])

    def _check(self, name: str, attributes: Mapping[str, str]) -> None:
        if "RedrivePolicy" in attributes:
            # A message is received many times in its life: while its task runs long, or waits for its conversation.
            count = json.loads(attributes["RedrivePolicy"]).get("maxReceiveCount")
            why = (
                f"its queue {name} moves messages away that were received {count} times, and their tasks would be lost"
            )
            advice = "Remove its redrive policy: the overflow keeps dead letters itself."
            raise StoreUnavailable(where=self.where, why=why, advice=advice)
        kept = int(attributes.get("MessageRetentionPeriod", RETENTION))
        if kept < RETENTION:
            log.warning("%s: the queue %s loses tasks that wait longer than %d s", self.where, name, kept)
        self.max_bytes = min(int(attributes.get("MaximumMessageSize", _DEFAULT_MAX_BYTES)), 1 << 20)

    # --- messages ---

    async def send(self, messages: Sequence[OutgoingMessage]) -> Sequence[StoreUnavailable | None]:
        """Send messages, and return for each None, or why it may not have been sent."""
        failures: list[StoreUnavailable | None] = [None] * len(messages)

        async def send_batch(indexes: Sequence[int]) -> None:
            priority = messages[indexes[0]].record.priority
            entries = [self._entry(index, messages[index]) for index in indexes]
            try:
                answer = await self._call("send_message_batch", QueueUrl=self._queues[priority], Entries=entries)
            except StoreUnavailable as error:
                for index in indexes:
                    failures[index] = error
                return
            for failed in answer.get("Failed", ()):
                failures[int(failed["Id"])] = self._rejected(failed["Code"])

        batches = self._send_batches(messages)
        if self._url.fifo:  # in order
            for batch in batches:
                await send_batch(batch)
        else:
            await _run_all([_bind(send_batch, batch) for batch in batches])
        return failures

    def _send_batches(self, messages: Sequence[OutgoingMessage]) -> Sequence[Sequence[int]]:
        """Return the indexes of the messages that go into each request."""
        batches: list[list[int]] = []
        current: dict[Priority, tuple[list[int], int]] = {}
        for index, message in enumerate(messages):
            priority, size = message.record.priority, len(message.body)
            batch, total = current.get(priority, ([], 0))
            if not batch or len(batch) == _MAX_BATCH or total + size > self.max_bytes:
                batch, total = [], 0
                batches.append(batch)
            batch.append(index)
            current[priority] = batch, total + size
        return batches

    def _entry(self, index: int, message: OutgoingMessage) -> dict[str, Any]:
        entry: dict[str, Any] = {"Id": str(index), "MessageBody": message.body}
        if self._url.fifo:
            # A group for each task: the index orders a conversation by the time of submission, and a group by the time
            # of sending. A conversation in which both differ would stand still.
            entry["MessageGroupId"] = entry["MessageDeduplicationId"] = message.nonce.hex()
        elif message.delay >= 1.0:
            entry["DelaySeconds"] = min(int(message.delay), MAX_DELAY)
        return entry

    async def receive(self, priority: Priority, count: int, *, hidden: float, wait: int = 0) -> Sequence[Message]:
        """Return up to `count` messages of a priority, hidden from others for `hidden` seconds from now.

        Args:
            priority: that of their queue.
            count: how many at most.
            hidden: seconds.
            wait: seconds to wait for the first. Without a wait, messages may be missed that are there.
        """
        counts = [min(_MAX_BATCH, count - begin) for begin in range(0, count, _MAX_BATCH)]
        if wait:  # the first request waits for all
            del counts[1:]
        calls = [_bind(self._receive, priority, size, hidden, wait) for size in counts[:_MAX_REQUESTS]]
        return [message for batch in await _run_all(calls) for message in batch]

    async def _receive(self, priority: Priority, count: int, hidden: float, wait: int) -> Sequence[Message]:
        received_at = now()
        answer = await self._call(
            "receive_message",
            QueueUrl=self._queues[priority],
            MaxNumberOfMessages=count,
            VisibilityTimeout=_whole(hidden, _MAX_VISIBILITY),
            WaitTimeSeconds=wait,
            MessageSystemAttributeNames=["SentTimestamp", "ApproximateReceiveCount"],
        )
        messages, unreadable = [], []
        for each in answer.get("Messages", ()):
            system = each.get("Attributes", {})
            body = _read(each["Body"], priority)
            if body is None:
                unreadable.append(each["ReceiptHandle"])
                continue
            message = Message(
                record=body.record,
                nonce=body.nonce,
                handle=each["ReceiptHandle"],
                received_at=received_at,
                sent_at=int(system.get("SentTimestamp", 0)) / 1000,
                receives=int(system.get("ApproximateReceiveCount", 1)),
            )
            messages.append(message)
        if unreadable:
            log.warning("%s: %d messages cannot be read, and are left for whoever can", self.where, len(unreadable))
            await self._hide(priority, [(handle, _UNREADABLE) for handle in unreadable])
        return messages

    async def hide(self, messages: Iterable[tuple[Message, float]]) -> None:
        """Hide each message for so many seconds from now, as far as the service allows; 0 shows it again."""
        by_priority: dict[Priority, list[tuple[str, int]]] = {}
        for message, seconds in messages:
            by_priority.setdefault(message.priority, []).append((message.handle, self._allowed(message, seconds)))
        await asyncio.gather(*(self._hide(priority, items) for priority, items in by_priority.items()))

    @staticmethod
    def _allowed(message: Message, seconds: float) -> int:
        return _whole(seconds, _MAX_VISIBILITY - 5 - (now() - message.received_at))

    async def _hide(self, priority: Priority, items: Sequence[tuple[str, int]]) -> None:
        def hide(entries: Sequence[dict[str, Any]]) -> Awaitable[Any]:
            queue = self._queues[priority]
            return self._call("change_message_visibility_batch", QueueUrl=queue, Entries=entries)

        await _run_all([_bind(hide, entries) for entries in _visibility_entries(items)])

    def hide_blocking(self, messages: Iterable[tuple[Message, float]]) -> None:
        """Do as `hide` does; blocks, from any thread."""
        by_priority: dict[Priority, list[tuple[str, int]]] = {}
        for message, seconds in messages:
            by_priority.setdefault(message.priority, []).append((message.handle, self._allowed(message, seconds)))
        client = self._client
        try:
            for priority, items in by_priority.items():
                for entries in _visibility_entries(items):
                    if client is not None:  # closed meanwhile
                        client.change_message_visibility_batch(QueueUrl=self._queues[priority], Entries=entries)
        except aws.FAILURES as error:
            raise self._unavailable(error) from None

    async def delete(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Delete messages, and return those that may not have been deleted."""
        failed: list[Message] = []

        async def delete_batch(batch: Sequence[Message]) -> None:
            entries = [{"Id": str(index), "ReceiptHandle": each.handle} for index, each in enumerate(batch)]
            queue = self._queues[batch[0].priority]
            try:
                answer = await self._call("delete_message_batch", QueueUrl=queue, Entries=entries)
            except StoreUnavailable:
                failed.extend(batch)
                return
            failed.extend(batch[int(each["Id"])] for each in answer.get("Failed", ()))

        by_priority: dict[Priority, list[Message]] = {}
        for message in messages:
            by_priority.setdefault(message.priority, []).append(message)
        batches = [
            each[start : start + _MAX_BATCH]
            for each in by_priority.values()
            for start in range(0, len(each), _MAX_BATCH)
        ]
        await _run_all([_bind(delete_batch, batch) for batch in batches])
        return failed

    async def count(self, priority: Priority) -> tuple[int, int]:
        """Return about how many messages of a priority may be received now, and how many there are in all."""
        names = [f"ApproximateNumberOfMessages{kind}" for kind in ("", "NotVisible", "Delayed")]
        queue = self._queues[priority]
        answer = await self._call("get_queue_attributes", QueueUrl=queue, AttributeNames=names)
        counts = [int(answer["Attributes"][name]) for name in names]
        return counts[0], sum(counts)

    # --- errors ---

    def _rejected(self, code: str) -> StoreUnavailable:
        code = code.removeprefix("AWS.SimpleQueueService.")
        advice = _ADVICE.get(code, "Look the code up in the documentation of SQS.")
        return StoreUnavailable(where=self.where, why=f"the service answered {code}", advice=advice)

    def _unavailable(self, error: Exception) -> StoreUnavailable:
        """Return the error for a failed call. Its text is left out: it might quote what was sent."""
        if aws.error_code(error) is not None:
            return self._rejected(_code(error))
        why, advice = aws.failure_in_words(error, setting="the URL")
        return StoreUnavailable(where=self.where, why=why, advice=advice)


def _read(text: str, priority: Priority) -> _Body | None:
    """Return what is in a message of a queue; None if it was not sent there, or by a newer version."""
    try:
        body = _decode(base64.b64decode(text, validate=True))
    except (ValueError, msgspec.DecodeError):
        return None
    return body if body.version <= _VERSION and body.record.priority is priority else None


def _code(error: Exception) -> str:
    code = (aws.error_code(error) or "").removeprefix("AWS.SimpleQueueService.")
    return "NonExistentQueue" if code == "QueueDoesNotExist" else code


def _whole(seconds: float, most: float) -> int:
    """Return whole seconds of at least 0, rounded up: a message that is seen too early is only hidden again."""
    return max(0, math.ceil(min(seconds, most)))


def _visibility_entries(items: Sequence[tuple[str, int]]) -> Iterable[Sequence[dict[str, Any]]]:
    for start in range(0, len(items), _MAX_BATCH):
        batch = items[start : start + _MAX_BATCH]
        yield [
            {"Id": str(index), "ReceiptHandle": handle, "VisibilityTimeout": seconds}
            for index, (handle, seconds) in enumerate(batch)
        ]


def _bind(call: Callable[..., Awaitable[_T]], *args: Any) -> Callable[[], Awaitable[_T]]:
    return lambda: call(*args)


async def _run_all(calls: Sequence[Callable[[], Awaitable[_T]]]) -> Sequence[_T]:
    """Return what calls return, having made a few of them at a time."""
    if len(calls) == 1:
        return [await calls[0]()]
    free = asyncio.Semaphore(_MAX_REQUESTS)

    async def run(call: Callable[[], Awaitable[_T]]) -> _T:
        async with free:
            return await call()

    return await asyncio.gather(*(run(call) for call in calls))
