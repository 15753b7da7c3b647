"""A task or a result as bytes: a value is decoded equal and of the same types, or it is not encoded at all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import msgspec

from forebay._text import is_unicode
from forebay.errors import ForebayError, NotSerializable, PayloadTooLarge
from forebay.interfaces import path_segment
from forebay.retry import Retry
from forebay.task import Deadline, Estimate, Priority, Task

VERSION = 1  # raised when an older reader would misread an envelope; a field added at the end does not raise it

_MAX_DEPTH = 100  # containers within containers; also what stops at a payload that contains itself
_DECODE_ERRORS = (msgspec.DecodeError, RecursionError, UnicodeDecodeError, TypeError)  # the last: a map as a key
_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1  # the whole numbers that MessagePack can hold
_FIXED_SIZE = frozenset({type(None), bool, float})
_NAMES = ("task_type", "task_id", "key", "tenant", "thread_id")
_TUPLE = 1  # MessagePack's extension type for a tuple, encoded as an array; lists are plain arrays


class EnvelopeTooNew(ForebayError, ValueError):
    """A stored task or result has version {version} and this Forebay reads up to {known}: a newer one wrote it.

    Upgrade Forebay in every process that shares the overflow.
    """

    version: int
    known: int


class EnvelopeDamaged(ForebayError, ValueError):
    """A stored task or result cannot be read ({why}): it was damaged, or something other than Forebay wrote it."""


class _Versioned(msgspec.Struct, frozen=True, array_like=True):
    """The first field of an envelope of any version."""

    version: int


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A task. An array, so that field names take no space; readers ignore fields added at the end."""

    version: int
    task_type: str
    payload: Any
    task_id: str
    priority: Priority
    timeout: float | None
    deadline: float | None
    spill: bool
    durable: bool
    key: str | None
    tenant: str
    thread_id: str | None
    estimate: tuple[int, int, int] | None
    context: dict[str, Any] | None = None  # see `forebay.carried_context`
    retry: tuple[int, float, float, float] | None = None
    not_before: float | None = None


class _Result(msgspec.Struct, frozen=True, array_like=True):
    """The value that a handler returned."""

    version: int
    value: Any


_Stored = TypeVar("_Stored", _Envelope, _Result)


def _extension(code: int, data: memoryview) -> Any:
    if code != _TUPLE:
        raise msgspec.DecodeError
    return tuple(_decode_items(data))


_encode = msgspec.msgpack.Encoder().encode
_decode_items = msgspec.msgpack.Decoder(list[Any], ext_hook=_extension).decode
_decode_version = msgspec.msgpack.Decoder(_Versioned).decode
_decode_envelope = msgspec.msgpack.Decoder(_Envelope, ext_hook=_extension).decode
_decode_result = msgspec.msgpack.Decoder(_Result, ext_hook=_extension).decode


def encode_task(task: Task, payload: Any, *, bound: int, context: Mapping[str, Any] | None = None) -> bytes:
    """Return the task as bytes.

    A payload may hold plain data: None, bool, int within 64 bits, float, str, bytes, and lists, tuples and dicts with
    str keys of these; of exactly these types, at most 100 deep.

    Args:
        task: the task to store.
        payload: its payload as plain data: the output of its codec, or, without a codec, the payload itself.
        bound: bytes that the encoded payload may take, and the encoded context.
        context: what `forebay.carried_context` has captured; as plain as a payload.

    Raises:
        NotSerializable: the payload holds something else, at ``path``; or the context does, or its policy of retries
            has ``on``.
        PayloadTooLarge: the payload takes more than `bound` bytes; ``size`` is a lower bound of what it takes.
    """
    encoded = _encode_plain(payload, "payload", task.task_id, bound)
    carried: Any = None
    if context is not None:
        carried = msgspec.Raw(_encode_plain(dict(context), "context", task.task_id, bound))
    estimate, retry = task.estimate, task.retry
    if retry is not None and retry.on is not Exception:  # in another process the task would be retried after any error
        raise NotSerializable(task_id=task.task_id, path="retry.on", type=type(retry.on).__name__)
    envelope = _Envelope(
        version=VERSION,
        task_type=_exact_str(task.task_type),
        payload=msgspec.Raw(encoded),
        task_id=_exact_str(task.task_id),
        priority=task.priority,
        timeout=None if task.timeout is None else float(task.timeout),
        deadline=None if task.deadline is None else float(task.deadline.by_wall_clock()),
        spill=bool(task.spill),
        durable=bool(task.durable),
        key=None if task.key is None else _exact_str(task.key),
        tenant=_exact_str(task.tenant),
        thread_id=None if task.thread_id is None else _exact_str(task.thread_id),
        estimate=None if estimate is None else (estimate.calls, estimate.input_tokens, estimate.output_tokens),
        context=carried,
        retry=None if retry is None else _numbers(retry),
        not_before=None if task.not_before is None else float(task.not_before),
    )
    try:
        return _encode(envelope)
    except (UnicodeEncodeError, OverflowError):
        raise _unencodable_field(task) from None


def decode_task(envelope: bytes) -> Task:
    """Return the task in an envelope: the first part of what `decode_envelope` returns, with the same errors."""
    return decode_envelope(envelope)[0]


def decode_envelope(envelope: bytes) -> tuple[Task, dict[str, Any] | None]:
    """Return the task in an envelope, even if its deadline has passed since; and the context that it carries, if any.

    Raises:
        EnvelopeTooNew: a newer Forebay wrote it.
        EnvelopeDamaged: it is not a valid envelope.
    """
    stored = _decode(_decode_envelope, envelope)
    try:
        task = Task(
            stored.task_type,
            stored.payload,
            task_id=stored.task_id,
            priority=stored.priority,
            timeout=stored.timeout,
            spill=stored.spill,
            durable=stored.durable,
            key=stored.key,
            tenant=stored.tenant,
            thread_id=stored.thread_id,
            estimate=stored.estimate and _estimate(stored.estimate),
            retry=stored.retry and _retry(stored.retry),
            not_before=stored.not_before,
        )
        if stored.deadline is not None:  # a Task rejects a deadline in the past, but a stored one has to end EXPIRED
            msgspec.structs.force_setattr(task, "deadline", Deadline(stored.deadline))
    except ValueError as error:
        raise EnvelopeDamaged(why=type(error).__name__) from None
    return task, stored.context


def encode_result(value: Any, *, task_id: str, bound: int) -> bytes:
    """Return a handler's value, which is plain data, as bytes.

    Raises:
        NotSerializable, PayloadTooLarge: as for `encode_task`.
    """
    encoded = _encode_plain(value, "result", task_id, bound)
    return _encode(_Result(version=VERSION, value=msgspec.Raw(encoded)))


def decode_result(encoded: bytes) -> Any:
    """Return the value in an encoded result.

    Raises:
        EnvelopeTooNew: a newer Forebay wrote it.
        EnvelopeDamaged: it is not a valid result.
    """
    return _decode(_decode_result, encoded).value


def _decode(decode: Callable[[bytes], _Stored], data: bytes) -> _Stored:
    try:
        stored = decode(data)
    except _DECODE_ERRORS as error:
        why = type(error).__name__  # its text might quote the content
        try:
            version = _decode_version(data).version
        except _DECODE_ERRORS:
            raise EnvelopeDamaged(why=why) from None
    else:
        version, why = stored.version, f"version {stored.version}"
        if version == VERSION:
            return stored
    if version > VERSION:
        raise EnvelopeTooNew(version=version, known=VERSION)
    raise EnvelopeDamaged(why=why)


def _estimate(figures: tuple[int, int, int]) -> Estimate:
    calls, input_tokens, output_tokens = figures
    return Estimate(calls=calls, input_tokens=input_tokens, output_tokens=output_tokens)


def _numbers(retry: Retry) -> tuple[int, float, float, float]:
    return retry.max_attempts, float(retry.base_delay), float(retry.max_delay), float(retry.max_total_delay)


def _retry(numbers: tuple[int, float, float, float]) -> Retry:
    max_attempts, base_delay, max_delay, max_total_delay = numbers
    return Retry(max_attempts=max_attempts, base_delay=base_delay, max_delay=max_delay, max_total_delay=max_total_delay)


def _encode_plain(value: Any, name: str, task_id: str, bound: int) -> bytes:
    """Return plain data encoded; raise NotSerializable or PayloadTooLarge, where `name` is the root of the path."""
    check = _PlainDataCheck(bound)
    try:
        unsupported = check.find_unsupported(value, 0)
    except _BoundExceeded:
        raise PayloadTooLarge(task_id=task_id, size=bound - check.left, bound=bound) from None
    if unsupported is not None:
        path, kind = unsupported
        raise NotSerializable(task_id=task_id, path=name + path, type=kind)
    encoded = _encode(_mark_tuples(value) if check.tuples else value)
    if len(encoded) > bound:
        raise PayloadTooLarge(task_id=task_id, size=len(encoded), bound=bound)
    return encoded


def _mark_tuples(value: Any) -> Any:
    """Return the value with its tuples encoded as such, unlike lists. It was checked before, so it is finite."""
    kind = type(value)
    if kind is dict:
        return {name: _mark_tuples(item) for name, item in value.items()}
    if kind is list:
        return [_mark_tuples(item) for item in value]
    if kind is tuple:
        return msgspec.msgpack.Ext(_TUPLE, _encode([_mark_tuples(item) for item in value]))
    return value


class _BoundExceeded(Exception):
    """The value takes more bytes than the bound allows."""


class _PlainDataCheck:
    """A depth-first search for the first part of a value that would not be decoded equal.

    Every item and every character takes at least one byte. So once more of them were seen than the bound has bytes, the
    value is too large; this also stops at a value that grows without end because it holds one list many times over.
    """

    __slots__ = ("left", "tuples")

    def __init__(self, bound: int) -> None:
        self.left = bound
        self.tuples = False  # whether it has seen a tuple

    def find_unsupported(self, value: Any, depth: int) -> tuple[str, str] | None:
        """Return the path and the kind of the first unsupported part, or None."""
        kind = type(value)
        if kind is dict:
            items = value.items()
        elif kind is list or kind is tuple:
            self.tuples |= kind is tuple
            items = enumerate(value)
        else:
            return self._check_scalar(value, kind)
        if depth == _MAX_DEPTH:
            return "", f"{kind.__name__} more than {_MAX_DEPTH} deep, or within itself"
        self._count_bytes(len(value))
        for name, item in items:
            if kind is dict:
                if type(name) is not str:
                    return "", f"dict with a key of type {type(name).__qualname__}"
                if self._check_scalar(name, str) is not None:
                    return "", "dict with a key that is not valid Unicode"
            if type(item) in _FIXED_SIZE:
                continue
            found = self.find_unsupported(item, depth + 1)
            if found is not None:
                return path_segment(name) + found[0], found[1]
        return None

    def _check_scalar(self, value: Any, kind: type) -> tuple[str, str] | None:
        if kind is str:
            self._count_bytes(len(value))
            return None if value.isascii() or is_unicode(value) else ("", "str that is not valid Unicode")
        if kind is int:
            return None if _MIN_INT <= value <= _MAX_INT else ("", "int beyond 64 bits")
        if kind is bytes:
            self._count_bytes(len(value))
            return None
        return None if kind in _FIXED_SIZE else ("", kind.__qualname__)

    def _count_bytes(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise _BoundExceeded


def _exact_str(name: str) -> str:
    return str.__str__(name)  # of a subclass, such as an enum of strings, the text alone


def _unencodable_field(task: Task) -> NotSerializable:
    """Return the error that names the field of the task, other than its payload, that cannot be encoded."""
    for field in _NAMES:
        name = getattr(task, field)
        if name is not None and not is_unicode(name):
            return NotSerializable(task_id=task.task_id, path=field, type="str that is not valid Unicode")
    return NotSerializable(task_id=task.task_id, path="estimate", type="int beyond 64 bits")
