"""A task or a result as bytes: what goes in comes back equal and of the same types, or is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import msgspec

from forebay.errors import ForebayError, NotSerializable, PayloadTooLarge
from forebay.interfaces import path_segment
from forebay.task import Deadline, Estimate, Priority, Task

VERSION = 1  # raised when a reader of the one before would misread it; a field added at the end is not that

_DEEPEST = 100  # containers within containers; also what ends a payload that holds itself
_UNREADABLE = (msgspec.DecodeError, RecursionError, UnicodeDecodeError, TypeError)  # the last for a key that is a map
_LEAST, _MOST = -(2**63), 2**64 - 1  # the whole numbers that MessagePack can hold
_PLAIN = frozenset({type(None), bool, float})
_NAMES = ("task_type", "task_id", "key", "tenant", "thread_id")
_TUPLE = 1  # MessagePack's extension type that holds a tuple, as an array; lists are arrays as they are


class EnvelopeTooNew(ForebayError, ValueError):
    """A stored task or result has version {version} and this Forebay reads up to {known}: a newer one wrote it.

    Upgrade Forebay in every process that shares the overflow.
    """

    version: int
    known: int


class EnvelopeDamaged(ForebayError, ValueError):
    """A stored task or result cannot be read ({why}): it was damaged, or something other than Forebay wrote it."""


class _Versioned(msgspec.Struct, frozen=True, array_like=True):
    """What every version begins with."""

    version: int


class _Envelope(msgspec.Struct, frozen=True, array_like=True):
    """A task. An array, so that names cost nothing; readers pass over fields added at the end."""

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


class _Result(msgspec.Struct, frozen=True, array_like=True):
    """What a handler returned."""

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


def encode_task(task: Task, payload: Any, *, bound: int) -> bytes:
    """The task as bytes.

    What can travel is plain data: None, bool, int within 64 bits, float, str, bytes, and lists, tuples and dicts with
    str keys of them, of these very types and at most 100 deep.

    Args:
        task: what is to be stored.
        payload: its payload as plain data: what a codec made of it, or, without one, the payload itself.
        bound: bytes that the payload may take.

    Raises:
        NotPortable: the payload holds something else, at ``path``.
        PayloadTooLarge: it takes more than `bound` bytes; ``size`` is at least what it takes.
    """
    encoded = _encode_plain(payload, "payload", task.task_id, bound)
    estimate = task.estimate
    envelope = _Envelope(
        version=VERSION,
        task_type=_exact_str(task.task_type),
        payload=msgspec.Raw(encoded),
        task_id=_exact_str(task.task_id),
        priority=task.priority,
        timeout=None if task.timeout is None else float(task.timeout),
        deadline=None if task.deadline is None else float(task.deadline.at),
        spill=bool(task.spill),
        durable=bool(task.durable),
        key=None if task.key is None else _exact_str(task.key),
        tenant=_exact_str(task.tenant),
        thread_id=None if task.thread_id is None else _exact_str(task.thread_id),
        estimate=None if estimate is None else (estimate.calls, estimate.input_tokens, estimate.output_tokens),
    )
    try:
        return _encode(envelope)
    except (UnicodeEncodeError, OverflowError):
        raise _unencodable_field(task) from None


def decode_task(envelope: bytes) -> Task:
    """The task in an envelope, also if its deadline has passed meanwhile.

    Raises:
        EnvelopeTooNew: a newer Forebay wrote it.
        EnvelopeDamaged: it is no envelope.
    """
    stored = _open(_decode_envelope, envelope)
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
        )
        if stored.deadline is not None:  # a Task refuses to be made too late, but a stored one has to end as EXPIRED
            msgspec.structs.force_setattr(task, "deadline", Deadline(stored.deadline))
    except ValueError as error:
        raise EnvelopeDamaged(why=type(error).__name__) from None
    return task


def encode_result(value: Any, *, task_id: str, bound: int) -> bytes:
    """A handler's value, as plain data, as bytes.

    Raises:
        NotPortable, PayloadTooLarge: it cannot be, as with `encode_task`.
    """
    encoded = _encode_plain(value, "result", task_id, bound)
    return _encode(_Result(version=VERSION, value=msgspec.Raw(encoded)))


def decode_result(encoded: bytes) -> Any:
    """The value in an encoded result.

    Raises:
        EnvelopeTooNew: a newer Forebay wrote it.
        EnvelopeDamaged: it is no result.
    """
    return _open(_decode_result, encoded).value


def _open(decode: Callable[[bytes], _Stored], data: bytes) -> _Stored:
    try:
        stored = decode(data)
    except _UNREADABLE as error:
        why = type(error).__name__  # its text might quote the content
        try:
            version = _decode_version(data).version
        except _UNREADABLE:
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


def _encode_plain(value: Any, name: str, task_id: str, bound: int) -> bytes:
    """The encoded value, or why it cannot travel."""
    walk = _PlainDataCheck(bound)
    try:
        culprit = walk.find_unsupported(value, 0)
    except _BoundExceeded:
        raise PayloadTooLarge(task_id=task_id, size=bound - walk.left, bound=bound) from None
    if culprit is not None:
        path, kind = culprit
        raise NotSerializable(task_id=task_id, path=name + path, type=kind)
    encoded = _encode(_mark_tuples(value) if walk.tuples else value)
    if len(encoded) > bound:
        raise PayloadTooLarge(task_id=task_id, size=len(encoded), bound=bound)
    return encoded


def _mark_tuples(value: Any) -> Any:
    """The value with its tuples told from lists. It has been walked, so it ends."""
    kind = type(value)
    if kind is dict:
        return {name: _mark_tuples(item) for name, item in value.items()}
    if kind is list:
        return [_mark_tuples(item) for item in value]
    if kind is tuple:
        return msgspec.msgpack.Ext(_TUPLE, _encode([_mark_tuples(item) for item in value]))
    return value


class _BoundExceeded(Exception):
    """The walk has met more than the bound allows."""


class _PlainDataCheck:
    """A walk over a value, looking for what would not come back equal.

    Every item and every character takes at least a byte, so once more of them were met than the bound has bytes the
    value is too large, and one that fans out without end, by holding one list many times over, ends there too.
    """

    __slots__ = ("left", "tuples")

    def __init__(self, bound: int) -> None:
        self.left = bound
        self.tuples = False  # whether it met any

    def find_unsupported(self, value: Any, depth: int) -> tuple[str, str] | None:
        """Where in the value the first culprit is and what it is, or None."""
        kind = type(value)
        if kind is dict:
            items = value.items()
        elif kind is list or kind is tuple:
            self.tuples |= kind is tuple
            items = enumerate(value)
        else:
            return self._check_scalar(value, kind)
        if depth == _DEEPEST:
            return "", f"{kind.__name__} more than {_DEEPEST} deep, or within itself"
        self._spend(len(value))
        for name, item in items:
            if kind is dict:
                if type(name) is not str:
                    return "", f"dict with a key of type {type(name).__qualname__}"
                if self._check_scalar(name, str) is not None:
                    return "", "dict with a key that is not valid Unicode"
            if type(item) in _PLAIN:
                continue
            found = self.find_unsupported(item, depth + 1)
            if found is not None:
                return path_segment(name) + found[0], found[1]
        return None

    def _check_scalar(self, value: Any, kind: type) -> tuple[str, str] | None:
        if kind is str:
            self._spend(len(value))
            return None if value.isascii() or _is_unicode(value) else ("", "str that is not valid Unicode")
        if kind is int:
            return None if _LEAST <= value <= _MOST else ("", "int beyond 64 bits")
        if kind is bytes:
            self._spend(len(value))
            return None
        return None if kind in _PLAIN else ("", kind.__qualname__)

    def _spend(self, size: int) -> None:
        self.left -= size
        if self.left < 0:
            raise _BoundExceeded


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _exact_str(name: str) -> str:
    return str.__str__(name)  # of a subclass, such as an enum of strings, the text alone


def _unencodable_field(task: Task) -> NotSerializable:
    """Which of the task's own fields cannot travel."""
    for field in _NAMES:
        name = getattr(task, field)
        if name is not None and not _is_unicode(name):
            return NotSerializable(task_id=task.task_id, path=field, type="str that is not valid Unicode")
    return NotSerializable(task_id=task.task_id, path="estimate", type="int beyond 64 bits")
