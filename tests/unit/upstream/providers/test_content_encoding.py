"""Decompression of responses: every form that servers send, in pieces of any size, and bombs."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forebay.upstream.providers.content_encoding import Decompressor, decompress_end

TEXT = b"".join(b'data: {"choices": [%d]}\n\n' % number for number in range(200))


def raw_deflate(data: bytes) -> bytes:
    packer = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return packer.compress(data) + packer.flush()


def flushed(data: bytes) -> bytes:
    """Compress as servers of streams do, which flush after each event."""
    packer = zlib.compressobj(wbits=16 + zlib.MAX_WBITS)
    packed = [packer.compress(line) + packer.flush(zlib.Z_SYNC_FLUSH) for line in data.splitlines(keepends=True)]
    return b"".join(packed) + packer.flush()


def members(data: bytes) -> bytes:
    return b"".join(gzip.compress(line) for line in data.splitlines(keepends=True))


FORMS: dict[str, tuple[str, Callable[[bytes], bytes]]] = {
    "gzip": ("gzip", gzip.compress),
    "gzip, flushed": ("gzip", flushed),
    "gzip, upper case": (" GZIP ", gzip.compress),
    "x-gzip": ("x-gzip", gzip.compress),
    "many members": ("gzip", members),
    "an empty member": ("gzip", lambda data: gzip.compress(b"") + gzip.compress(data)),
    "padding between members": ("gzip", lambda data: gzip.compress(data[:9]) + bytes(40) + gzip.compress(data[9:])),
    "garbage at the end": ("gzip", lambda data: gzip.compress(data) + b"garbage"),
    "deflate": ("deflate", zlib.compress),
    "deflate without zlib's header": ("deflate", raw_deflate),
    "gzip called deflate": ("deflate", gzip.compress),
    "twice": ("deflate, gzip", lambda data: gzip.compress(zlib.compress(data))),
    "identity": ("identity", bytes),
    "identity, too": ("gzip, identity", gzip.compress),
    "none": ("", bytes),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("size", [1, 2, 7, 1000, 100_000])
def test_every_form_is_read_in_pieces_of_any_size(form: str, size: int) -> None:
    encoding, pack = FORMS[form]
    packed = pack(TEXT)
    decompressor = Decompressor(encoding)
    pieces = [
        piece for begin in range(0, len(packed), size) for piece in decompressor.feed(packed[begin : begin + size])
    ]
    assert b"".join(pieces) == TEXT
    assert decompressor.readable
    assert decompressor.compressed == (form not in ("identity", "none"))


@pytest.mark.parametrize("encoding", ["br", "zstd", "compress", "gzip, br", "gzip, gzip, gzip"])
def test_an_unknown_encoding_is_not_readable(encoding: str) -> None:
    decompressor = Decompressor(encoding)
    assert not decompressor.readable
    assert list(decompressor.feed(b"x")) == []


@pytest.mark.parametrize(("encoding", "packed"), [("gzip", b"no gzip"), ("deflate", b"\x78\x9cno deflate")])
def test_after_a_corrupt_byte_nothing_is_readable(encoding: str, packed: bytes) -> None:
    decompressor = Decompressor(encoding)
    assert b"".join(decompressor.feed(packed)) == b""
    assert not decompressor.readable
    assert list(decompressor.feed(gzip.compress(TEXT))) == []


@pytest.mark.parametrize(
    ("encoding", "bomb"),
    [
        ("gzip", gzip.compress(bytes(64 << 20))),
        ("deflate", raw_deflate(bytes(64 << 20))),
        ("gzip, gzip", gzip.compress(gzip.compress(bytes(64 << 20)))),
    ],
    ids=["gzip", "raw deflate", "twice"],
)
def test_a_bomb_is_not_read_to_its_end(encoding: str, bomb: bytes) -> None:
    decompressor = Decompressor(encoding)
    pieces = [len(piece) for piece in decompressor.feed(bomb)]
    assert max(pieces) <= 1 << 16
    assert sum(pieces) < 10 << 20
    assert not decompressor.readable
    assert list(decompressor.feed(bomb)) == []
    assert decompress_end(encoding, bomb, least=100) == b""


def test_empty_members_count_too() -> None:
    decompressor = Decompressor("gzip, gzip")
    assert list(decompressor.feed(gzip.compress(gzip.compress(b"") * 1_000_000))) == []
    assert not decompressor.readable


def test_for_a_reader_of_lines_a_million_lines_are_a_bomb() -> None:
    lines = gzip.compress(b"\n" * 1_000_000)
    assert sum(map(len, Decompressor("gzip").feed(lines))) == 1_000_000
    decompressor = Decompressor("gzip", line_cost=64)
    assert sum(map(len, decompressor.feed(lines))) < 20_000
    assert not decompressor.readable


def test_of_a_long_body_the_end_is_read() -> None:
    text = b"".join(b"%d," % number for number in range(100_000))
    end = decompress_end("gzip", gzip.compress(text), least=1000)
    assert 1000 <= len(end) < 1000 + (1 << 16)
    assert text.endswith(end)
    assert decompress_end("gzip", gzip.compress(TEXT), least=1 << 20) == TEXT


@given(
    encoding=st.sampled_from(["gzip", "deflate", "deflate, gzip"]), chunks=st.lists(st.binary(max_size=40), max_size=8)
)
def test_no_bytes_raise(encoding: str, chunks: list[bytes]) -> None:
    decompressor = Decompressor(encoding)
    for begin in (b"", gzip.compress(b"x")[:11], b"\x78"):
        for chunk in (begin, *chunks):
            assert all(decompressor.feed(chunk))
