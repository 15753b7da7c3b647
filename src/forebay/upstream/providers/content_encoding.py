"""The content of an answer, out of what its Content-Encoding made of it."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

_PIECE: Final = 1 << 16  # bytes that are unpacked at a time, however well they were packed
_EITHER: Final = 32 + zlib.MAX_WBITS  # gzip or zlib, by its header
_PACKED: Final = frozenset({"gzip", "x-gzip", "deflate"})
_PLAIN: Final = frozenset({"", "identity"})


class Decompressor:
    """Unpacks a body piece by piece, in bounded memory.

    Knows gzip and deflate. Of anything else, and from where it is broken on, nothing comes out.

    Args:
        encoding: the header Content-Encoding, or nothing.
    """

    __slots__ = ("_plain", "_unpacker")

    def __init__(self, encoding: str = "") -> None:
        name = encoding.strip().lower()
        self._plain = name in _PLAIN
        self._unpacker = zlib.decompressobj(_EITHER) if name in _PACKED else None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """The content that `chunk` brings, in pieces."""
        if self._plain:
            yield chunk
        while self._unpacker is not None and chunk:
            try:
                piece = self._unpacker.decompress(chunk, _PIECE)
            except zlib.error:
                self._unpacker = None
                return
            chunk = self._unpacker.unconsumed_tail
            if piece:
                yield piece
