"""Decompression of a response body (Content-Encoding), in bounded memory."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Final

_MAX_PIECE: Final = 1 << 16  # bytes decompressed at a time, whatever the compression ratio
_GZIP_OR_ZLIB: Final = 32 + zlib.MAX_WBITS  # detected by its header
_COMPRESSED: Final = frozenset({"gzip", "x-gzip", "deflate"})
_UNCOMPRESSED: Final = frozenset({"", "identity"})


class Decompressor:
    """An incremental decompressor for gzip and deflate.

    Of any other encoding, and after the first corrupt byte, it returns nothing.

    Args:
        encoding: the Content-Encoding header, or an empty string.
    """

    __slots__ = ("_decompressor", "_uncompressed")

    def __init__(self, encoding: str = "") -> None:
        name = encoding.strip().lower()
        self._uncompressed = name in _UNCOMPRESSED
        self._decompressor = zlib.decompressobj(_GZIP_OR_ZLIB) if name in _COMPRESSED else None

    @property
    def readable(self) -> bool:
        """Return whether the content can be read: the encoding is known, and no byte was corrupt so far."""
        return self._uncompressed or self._decompressor is not None

    def feed(self, chunk: bytes) -> Iterator[bytes]:
        """Yield the decompressed content of `chunk` in pieces of at most 64 KiB."""
        if self._uncompressed:
            yield chunk
        while self._decompressor is not None and chunk:
            try:
                piece = self._decompressor.decompress(chunk, _MAX_PIECE)
            except zlib.error:
                self._decompressor = None
                return
            chunk = self._decompressor.unconsumed_tail
            if piece:
                yield piece
