"""Usage of OpenAI's streams: asked for in the request, and filtered out for a caller who did not ask for it."""

from __future__ import annotations

import re
from typing import Any, Final

import msgspec

from forebay.upstream.providers.json_text import replace_lone_surrogates

_MAX_USAGE_EVENT: Final = 1 << 16  # bytes; a longer event is not the one with the usage
_KEY: Final = "stream_options"
_NULL_USAGE: Final = re.compile(rb',\s*"usage"\s*:\s*null(?=\s*[,}])|"usage"\s*:\s*null\s*,\s*')

_decoder: Final = msgspec.json.Decoder(dict[str, msgspec.Raw])


def with_include_usage(body: bytes) -> bytes | None:
    """Return the body with ``stream_options.include_usage``, all else byte by byte; None if that is not possible."""
    try:
        fields: dict[str, Any] = dict(_decoder.decode(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return _with_option_first(body)
    try:
        options = msgspec.json.decode(fields[_KEY]) if _KEY in fields else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not isinstance(options, dict | None):
        return None
    fields[_KEY] = {**(options or {}), "include_usage": True}
    return msgspec.json.encode(fields)


def _with_option_first(body: bytes) -> bytes | None:
    """Return a body that cannot be decoded for a lone surrogate, with the option as its first field."""
    try:
        fields = _decoder.decode(replace_lone_surrogates(body))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    if not fields or _KEY in fields:
        return None
    begin, brace, rest = body.partition(b"{")
    return begin + brace + b'"%b":{"include_usage":true},' % _KEY.encode() + rest


class UsageFilter:
    """A filter that removes the usage from a stream of server-sent events: a chunk, and nulls in all others.

    All other bytes pass unchanged. Only an unfinished event is held back, until it ends or is too long to be that
    chunk.

    Source: OpenAI's reference of ``stream_options``: one more chunk before ``data: [DONE]``, whose ``choices`` are
    always empty; "all other chunks will also include a usage field, but with a null value".
    """

    __slots__ = ("_after_cr", "_blank", "_dropped", "_held", "_too_long")

    def __init__(self) -> None:
        self._held = bytearray()
        self._too_long = False  # the current event is too long to be the usage chunk
        self._blank = True  # the current line is empty so far
        self._after_cr = False
        self._dropped = False  # the last event was removed

    def feed(self, chunk: bytes) -> bytes:
        """Return the bytes to pass on, after `chunk` has arrived."""
        out = bytearray()
        for piece in chunk.splitlines(keepends=True):
            if self._after_cr and piece == b"\n":  # the rest of a CRLF goes where its start went
                self._after_cr = False
                if self._held:
                    self._held += piece
                elif not self._dropped:
                    out += piece
                continue
            self._line(piece, out)
        return bytes(out)

    def end(self) -> bytes:
        """Return the bytes still held back, at the end of the stream."""
        held = b"" if self._too_long else _without_usage(self._held)
        self._held.clear()
        return held

    def _line(self, piece: bytes, out: bytearray) -> None:
        content = piece.rstrip(b"\r\n")
        ended = len(content) < len(piece)
        blank = self._blank and not content
        self._after_cr = piece.endswith(b"\r")
        self._blank = ended
        self._dropped = False
        if self._too_long:
            out += piece
        else:
            self._held += piece
            if len(self._held) > _MAX_USAGE_EVENT:
                self._too_long = True
                self._release(out)
        if ended and blank:
            if not self._too_long and b'"usage"' in self._held:
                self._held[:] = _without_usage(self._held)
                self._dropped = not self._held
            self._too_long = False
            self._release(out)

    def _release(self, out: bytearray) -> None:
        out += self._held
        self._held.clear()


def _without_usage(event: bytearray) -> bytes:
    """Return an event without the usage that was added: nothing of the chunk with it, and of others all but a null."""
    whole = bytes(event)
    if b'"usage"' not in whole:
        return whole
    lines = [line[5:].strip() for line in whole.splitlines() if line.startswith(b"data:")]
    try:
        chunk = msgspec.json.decode(replace_lone_surrogates(b"\n".join(lines)))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return whole
    if not isinstance(chunk, dict):
        return whole
    if isinstance(chunk.get("usage"), dict):
        return b"" if chunk.get("choices") == [] else whole
    found = list(_NULL_USAGE.finditer(whole)) if chunk.get("usage", ...) is None else []
    if len(found) != 1:  # one in another object, too: it cannot be told which is which
        return whole
    begin, end = found[0].span()
    return whole[:begin] + whole[end:]
