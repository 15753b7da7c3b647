"""JSON as clients write it: half a surrogate pair is allowed there, and refused by strict decoders."""

from __future__ import annotations

import re
from itertools import islice
from typing import Final

_SURROGATE: Final = re.compile(rb"\\u[dD](?:([89abAB])|[c-fC-F])[0-9a-fA-F]{2}")  # group 1: the first half of a pair
_MAX_REPLACED: Final = 100_000  # a text with more of them was not just cut within an emoji
_MAX_BACKSLASHES: Final = 1_000  # in a row, that are looked at
_REPLACEMENT: Final = rb"\ufffd"


def replace_lone_surrogates(text: bytes) -> bytes:
    """Return JSON with U+FFFD for each half of a surrogate pair, for reading; its length stays.

    Encoders of JavaScript and Python write such halves as escapes, for example where text was cut within an emoji.
    Servers differ in whether they accept them, so the bytes that are sent stay as they are.
    """
    if _SURROGATE.search(text) is None:
        return text
    changed = bytearray(text)
    first: int | None = None  # where a first half begins that waits for its second
    for found in islice(_SURROGATE.finditer(text), _MAX_REPLACED):
        start = found.start()
        if _is_escaped(text, start):  # the backslash is a character, and no escape
            continue
        if found[1] is None and first is not None and first + len(_REPLACEMENT) == start:
            changed[first:start] = text[first:start]
            first = None
        else:
            changed[start : found.end()] = _REPLACEMENT
            first = None if found[1] is None else start
    return bytes(changed)


def _is_escaped(text: bytes, start: int) -> bool:
    """Return whether an odd number of backslashes stands before the one at `start`."""
    before = text[max(0, start - _MAX_BACKSLASHES) : start]
    return (len(before) - len(before.rstrip(b"\\"))) % 2 == 1
