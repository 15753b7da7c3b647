"""The messages between a supervisor and the processes of its workers: MessagePack in frames, and no code.

A frame is a length of four bytes and a message. Both ends run from one installation, but not always from one version of
it: an upgrade may happen between the start of a supervisor and the start of a process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from forebay.call_usage import CallUsage
from forebay.errors import ForebayError, NotSerializable, PayloadTooLarge

VERSION = 3
NOT_TRANSFERABLE = "forebay:not-transferable"  # the `type` of a failure: the result; no exception has such a name

_LENGTH = struct.Struct(">I")
_OVERHEAD = 100_000  # bytes that a message may take beyond its content, failures and their tracebacks included
_MAX_TEXT, _MAX_TRACEBACK = 10_000, 50_000  # characters sent of an exception's message, and of its traceback


class ImportState:
    """The state of a worker's process: `importing` is True while it imports its handler."""

    importing = False


class FrameTooLarge(ForebayError, ValueError):
    """A message of {size} bytes was announced, and the bound is {bound}."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """A message, tagged with its kind."""


# --- to the process ---


class LoadHandler(_Message, frozen=True, array_like=True, tag="load"):
    """The first message: the handler to load."""

    version: int
    worker: str
    handler: str | None
    factory: str | None
    config: bytes | None  # an encoded mapping
    config_path: str | None
    bound: int  # bytes of an encoded payload, result or progress value
    grace: float  # seconds between the end of its work and its end


class RunTask(_Message, frozen=True, array_like=True, tag="begin"):
    """The request to run a task; `number` identifies the run within the process."""

    number: int
    task: bytes
    deadline: float | None
    attempt: int
    submission: float


class CancelRun(_Message, frozen=True, array_like=True, tag="cancel"):
    """The request to cancel the run of that number, if it is still running."""

    number: int


# --- from the process ---


class RemoteFailure(msgspec.Struct, frozen=True, array_like=True):
    """An exception: the name of its type, its message, its traceback as text; and the facts of an Overloaded."""

    type: str
    message: str
    traceback: str
    cancelled: bool = False
    overloaded: tuple[str, str | None, float | None, float | None] | None = None

    @classmethod
    def truncated(cls, *, type: str, message: str, traceback: str, **rest: Any) -> RemoteFailure:  # noqa: A002 - the field's name
        """Return a failure whose texts are cut to the length that is sent; of a traceback, the end tells most."""
        clean = [text.encode(errors="replace").decode() for text in (type, message, traceback)]
        return cls(clean[0][:_MAX_TEXT], clean[1][:_MAX_TEXT], clean[2][-_MAX_TRACEBACK:], **rest)


class HandlerReady(_Message, frozen=True, array_like=True, tag="ready"):
    """The process has loaded its handler."""


class HandlerNotLoaded(_Message, frozen=True, array_like=True, tag="unready"):
    """The process has failed to load its handler, and ends."""

    failure: RemoteFailure


class ProgressMessage(_Message, frozen=True, array_like=True, tag="progress"):
    """A value that the handler passed to ``progress``, encoded."""

    number: int
    value: bytes


class RunFinished(_Message, frozen=True, array_like=True, tag="ended"):
    """The end of a run: an encoded value, or a failure."""

    number: int
    value: bytes | None
    failure: RemoteFailure | None
    usage: CallUsage | None = None  # of the calls that the handler has made there; None for none


def why_not_transferable(error: NotSerializable | PayloadTooLarge) -> str:
    """Return why a value cannot be sent to another process."""
    if isinstance(error, NotSerializable):
        return f"at {error.path} it holds a {error.type}"
    return f"it takes at least {error.size} bytes, and max_message_bytes is {error.bound}"


_encode = msgspec.msgpack.Encoder().encode
decode_for_child = msgspec.msgpack.Decoder(LoadHandler | RunTask | CancelRun).decode
decode_from_child = msgspec.msgpack.Decoder(HandlerReady | HandlerNotLoaded | ProgressMessage | RunFinished).decode


def encode_frame(message: _Message) -> bytes:
    """Return a message as a frame."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """A decoder that splits a stream of bytes into messages.

    Raises:
        FrameTooLarge: a message with more than `bound` bytes of content is announced; the rest cannot be read.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound + _OVERHEAD
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take `data`, and yield each message that it completes."""
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            (size,) = _LENGTH.unpack_from(self._buffer)
            if size > self._bound:
                raise FrameTooLarge(size=size, bound=self._bound)
            end = _LENGTH.size + size
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            yield body
