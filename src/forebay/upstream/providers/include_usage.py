"""Usage asked for in streams of OpenAI's chat completions, and kept from a caller that had not asked for it."""

from __future__ import annotations

from typing import Any, Final

import msgspec

_LONGEST: Final = 1 << 16  # bytes; an event beyond that is not the one that brings usage
_KEY: Final = "stream_options"

_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_include_usage(body: bytes) -> bytes | None:
    """The body with ``stream_options.include_usage``; every other value keeps its bytes. None if it is no object."""
    try:
        fields: dict[str, Any] = dict(_decoder.decode(body))
        options = msgspec.json.decode(fields[_KEY]) if _KEY in fields else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not isinstance(options, dict | None):
        return None
    fields[_KEY] = {**(options or {}), "include_usage": True}
    return msgspec.json.encode(fields)


class UsageFilter:
    """Passes a stream of server-sent events on, but for the chunk that holds usage and no choices.

    Every other byte comes out as it went in. Only the event that has begun is held back, until it ends or is longer
    than such a chunk can be.

    Source: OpenAI's reference of ``stream_options``: one more chunk before ``data: [DONE]``, whose ``choices`` are
    always empty.
    """

    __slots__ = ("_after_cr", "_blank", "_dropped", "_held", "_passing")

    def __init__(self) -> None:
        self._held = bytearray()
        self._passing = False  # the event is too long to be the one
        self._blank = True  # the line that has begun is empty so far
        self._after_cr = False
        self._dropped = False  # what ended last was not passed on

    def feed(self, chunk: bytes) -> bytes:
        """What may be passed on, now that `chunk` has come."""
        out = bytearray()
        for piece in chunk.splitlines(keepends=True):
            if self._after_cr and piece == b"\n":  # the second half of a CRLF goes the way of the first
                self._after_cr = False
                if self._held:
                    self._held += piece
                elif not self._dropped:
                    out += piece
                continue
            self._line(piece, out)
        return bytes(out)

    def end(self) -> bytes:
        """What is still held back when the stream ends."""
        held = bytes(self._held)
        self._held.clear()
        return b"" if _is_usage(held) else held

    def _line(self, piece: bytes, out: bytearray) -> None:
        content = piece.rstrip(b"\r\n")
        ended = len(content) < len(piece)
        blank = self._blank and not content
        self._after_cr = piece.endswith(b"\r")
        self._blank = ended
        self._dropped = False
        if self._passing:
            out += piece
        else:
            self._held += piece
            if len(self._held) > _LONGEST:
                self._passing = True
                self._release(out)
        if ended and blank:
            if not self._passing and _is_usage(self._held):
                self._held.clear()
                self._dropped = True
            self._passing = False
            self._release(out)

    def _release(self, out: bytearray) -> None:
        out += self._held
        self._held.clear()


def _is_usage(event: bytes | bytearray) -> bool:
    if b'"usage"' not in event:
        return False
    lines = [line[5:].strip() for line in bytes(event).splitlines() if line.startswith(b"data:")]
    try:
        chunk = msgspec.json.decode(b"\n".join(lines))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return False
    return isinstance(chunk, dict) and chunk.get("choices") == [] and isinstance(chunk.get("usage"), dict)
