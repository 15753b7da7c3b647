"""Decompression of a response body (Content-Encoding), in bounded memory and time."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

_MAX_PIECE: Final = 1 << 16  # bytes decompressed at a time, whatever the compression ratio
_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS  # detected by its header
_RAW_DEFLATE: Final = -zlib.MAX_WBITS
_GZIP: Final = frozenset({"gzip", "x-gzip"})
_UNCOMPRESSED: Final = frozenset({"", "identity"})
_MAX_LAYERS: Final = 2  # of "gzip, gzip"

# A body that grows beyond these is a decompression bomb: answers of models shrink to a tenth, not to a hundredth.
_FREE_BYTES: Final = 1 << 20
_MAX_RATIO: Final = 100
_MAX_BYTES: Final = 1 << 28
_MEMBER_COST: Final = 1 << 10  # bytes for which a member counts, however short it is


class Decompressor:
    """An incremental decompressor for gzip and deflate, with any number of members, split anywhere.

    Of any other encoding, after the first corrupt byte, and of a decompression bomb it returns nothing more.

    Args:
        encoding: the Content-Encoding header, or an empty string.
        line_cost: bytes for which each line counts, besides its own: for a reader of lines, a million empty ones are a
            bomb, too.

    Attributes:
        readable: whether all bytes so far could be decompressed.
    """

    __slots__ = ("_allowed", "_inflaters", "_line_cost", "readable")

    def __init__(self, encoding: str = "", *, line_cost: int = 0) -> None:
        names = [name.strip().lower() for name in encoding.split(",")]
        layers = [name for name in reversed(names) if name not in _UNCOMPRESSED]  # the last was applied last
        self.readable = len(layers) <= _MAX_LAYERS and all(name in _GZIP or name == "deflate" for name in layers)
        self._inflaters = [_Inflater(deflate=name == "deflate") for name in layers] if self.readable else []
        self._allowed = _FREE_BYTES
        self._line_cost = line_cost

    @property
    def compressed(self) -> bool:
        """True if what it returns differs from what it takes."""
        return bool(self._inflaters)

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the decompressed content of `chunk` in pieces of at most 64 KiB."""
        if not self._inflaters:
            if self.readable:
                yield chunk
            return
        self._allowed = min(self._allowed + _MAX_RATIO * len(chunk), _MAX_BYTES)
        pieces: Iterable[bytes] = (chunk,)
        for inflater in self._inflaters:
            pieces = self._inflate(inflater, pieces)
        try:
            for piece in pieces:
                if self.readable and piece:
                    yield piece
        except zlib.error:
            self.readable = False

    def _inflate(self, inflater: _Inflater, pieces: Iterable[bytes]) -> Iterator[bytes]:
        for packed in pieces:
            for piece in inflater.feed(packed):
                self._allowed -= len(piece) or _MEMBER_COST
                if self._line_cost:
                    self._allowed -= self._line_cost * (piece.count(b"\n") + piece.count(b"\r"))
                if self._allowed < 0:
                    self.readable = False
                if not self.readable:
                    return
                yield piece


class _Inflater:
    """A decompressor of one layer.

    Args:
        deflate: whether the encoding is ``deflate``, which some servers send without the header of zlib.
    """

    __slots__ = ("_deflate", "_ended", "_head", "_member", "_members", "_started")

    def __init__(self, *, deflate: bool) -> None:
        self._deflate = deflate
        self._head = b""  # the first byte, until the second is there
        self._member = zlib.decompressobj(_GZIP_OR_ZLIB)
        self._started = False
        self._members = 0  # complete ones
        self._ended = False  # what follows is not a member

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the content of `chunk`, and an empty piece for the end of each member.

        Raises:
            zlib.error: it is corrupt. Garbage after a complete member is ignored, as by browsers.
        """
        while chunk and not self._ended:
            if not self._started:
                chunk = self._begin(chunk)
                continue
            try:
                piece = self._member.decompress(chunk, _MAX_PIECE)
            except zlib.error:
                if not self._members:
                    raise
                self._ended = True
                return
            if piece:
                yield piece
            chunk = self._member.unconsumed_tail
            if self._member.eof:
                chunk = self._member.unused_data
                self._started = False
                self._members += 1
                yield b""

    def _begin(self, chunk: bytes) -> bytes:
        """Begin a member, and return its bytes as far as they are known to be of one."""
        chunk = self._head + (chunk if self._head else chunk.lstrip(b"\0"))  # padding between members
        self._head = b""
        if self._deflate and len(chunk) == 1:
            self._head = chunk
            return b""
        if chunk:
            raw = self._deflate and not _has_zlib_header(chunk)
            self._member = zlib.decompressobj(_RAW_DEFLATE if raw else _GZIP_OR_ZLIB)
            self._started = True
        return chunk


def _has_zlib_header(data: bytes) -> bool:
    """Return whether data begins with a header of zlib or, mislabelled, of gzip. Source: RFC 1950, 2.2; RFC 1952."""
    return (data[0] & 0x0F == zlib.DEFLATED and (data[0] << 8 | data[1]) % 31 == 0) or data[:2] == b"\x1f\x8b"


class BodyEnd:
    """The last bytes of a body that is fed in pieces.

    Args:
        least: bytes to keep, if there are as many; it keeps less than a piece more.
    """

    __slots__ = ("_least", "_pieces", "_size")

    def __init__(self, least: int) -> None:
        self._least = least
        self._pieces: deque[bytes] = deque()
        self._size = 0

    def feed(self, piece: bytes) -> None:
        """Add the next piece."""
        self._pieces.append(piece)
        self._size += len(piece)
        while self._size - len(self._pieces[0]) >= self._least:
            self._size -= len(self._pieces.popleft())

    def read(self) -> bytes:
        """Return the bytes."""
        return b"".join(self._pieces)


def decompress_end(encoding: str, body: bytes, *, least: int) -> bytes:
    """Return a body without its Content-Encoding, of a long one only the end; nothing if it cannot be decompressed."""
    decompressor, end = Decompressor(encoding), BodyEnd(least)
    for piece in decompressor.feed(body):
        end.feed(piece)
    return end.read() if decompressor.readable else b""
