"""What a supervisor and the processes of its workers say to each other: MessagePack in frames, and no code.

A frame is its length, four bytes, and a message. Both ends come from one installation, yet not always from one version
of it: an upgrade may lie between the start of a supervisor and that of a process.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import Any

import msgspec

from forebay.errors import ForebayError, NotSerializable, PayloadTooLarge

VERSION = 1
NOT_TRANSFERABLE = "forebay:cannot-cross"  # as the type of a failure: what was returned; no exception has such a name

_LENGTH = struct.Struct(">I")
_OVERHEAD = 100_000  # bytes that a message takes beside its content, failures and their tracebacks included
_TEXT, _TRACE = 10_000, 50_000  # characters of an exception's message and of its traceback that travel


class ImportState:
    """Whether this process is one of those that run a handler, and is still importing it."""

    importing = False


class FrameTooLarge(ForebayError, ValueError):
    """A message of {size} bytes was announced, and the bound is {bound}."""


class _Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """Names itself by its class."""


# --- to the process ---


class LoadHandler(_Message, frozen=True, array_like=True, tag="load"):
    """The first: what to run."""

    version: int
    worker: str
    handler: str | None
    factory: str | None
    config: bytes | None  # an encoded mapping
    config_path: str | None
    bound: int  # bytes of what travels
    grace: float  # seconds from the end of its work to its end


class RunTask(_Message, frozen=True, array_like=True, tag="begin"):
    """Run a task; `number` tells the runs of a process apart."""

    number: int
    task: bytes
    deadline: float | None
    attempt: int


class CancelRun(_Message, frozen=True, array_like=True, tag="cancel"):
    """Stop the run of that number, if it is under way."""

    number: int


# --- from the process ---


class RemoteFailure(msgspec.Struct, frozen=True, array_like=True):
    """An exception: its type's name, its message, its traceback as text; and the facts of an Overloaded."""

    type: str
    message: str
    traceback: str
    cancelled: bool = False
    overloaded: tuple[str, str | None, float | None, float | None] | None = None

    @classmethod
    def truncated(cls, *, type: str, message: str, traceback: str, **rest: Any) -> RemoteFailure:  # noqa: A002 - the field's name
        """One whose texts are no longer than may travel: of a traceback, its end tells most."""
        clean = [text.encode(errors="replace").decode() for text in (type, message, traceback)]
        return cls(clean[0][:_TEXT], clean[1][:_TEXT], clean[2][-_TRACE:], **rest)


class HandlerReady(_Message, frozen=True, array_like=True, tag="ready"):
    """It has loaded what it is to run."""


class HandlerNotLoaded(_Message, frozen=True, array_like=True, tag="unready"):
    """It has not, and ends."""

    failure: RemoteFailure


class ProgressMessage(_Message, frozen=True, array_like=True, tag="told"):
    """What the handler passed to ``progress``."""

    number: int
    value: bytes


class RunFinished(_Message, frozen=True, array_like=True, tag="ended"):
    """How a run ended: with an encoded value, or by a failure."""

    number: int
    value: bytes | None
    failure: RemoteFailure | None


def why_not_transferable(error: NotSerializable | PayloadTooLarge) -> str:
    """Why a value cannot go over the wire."""
    if isinstance(error, NotSerializable):
        return f"at {error.path} it holds a {error.type}"
    return f"it takes at least {error.size} bytes, and max_message_bytes is {error.bound}"


_encode = msgspec.msgpack.Encoder().encode
decode_for_child = msgspec.msgpack.Decoder(LoadHandler | RunTask | CancelRun).decode
decode_from_child = msgspec.msgpack.Decoder(HandlerReady | HandlerNotLoaded | ProgressMessage | RunFinished).decode


def encode_frame(message: _Message) -> bytes:
    """A message as it goes over the wire."""
    body = _encode(message)
    return _LENGTH.pack(len(body)) + body


class FrameDecoder:
    """Takes bytes as they come, and gives back the messages that are whole.

    Raises:
        FrameTooLarge: one is announced with more than `bound` bytes of content; there is no going on after that.
    """

    def __init__(self, bound: int) -> None:
        self._bound = bound + _OVERHEAD
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take `data`; yield each message that it completes."""
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
