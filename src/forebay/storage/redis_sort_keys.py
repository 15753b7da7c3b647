"""Numbers and texts as parts of the members of a sorted set, which Redis orders by their bytes."""

from __future__ import annotations

import struct
from functools import lru_cache
from urllib.parse import quote

SAFE = " :/@"  # besides letters, digits and _.-~

_SIGN = 1 << 63


@lru_cache(maxsize=1_000)
def quoted(text: str) -> str:
    """Return `text` without what separates it from the next part."""
    return quote(text, safe=SAFE)


def sortable(number: float) -> str:
    """Return 16 hexadecimal digits that sort as the numbers do."""
    (bits,) = struct.unpack(">Q", struct.pack(">d", number + 0.0))
    return f"{bits ^ (2 * _SIGN - 1) if bits & _SIGN else bits | _SIGN:016x}"


def from_sortable(digits: str) -> float:
    """Return the number that `sortable` was given."""
    bits = int(digits, 16)
    bits = bits ^ _SIGN if bits & _SIGN else bits ^ (2 * _SIGN - 1)
    (number,) = struct.unpack(">d", struct.pack(">Q", bits))
    return float(number)
