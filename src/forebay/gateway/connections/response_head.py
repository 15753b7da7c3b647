"""Heads of responses: told from what follows them, and cleaned of characters that would make them invalid."""

from __future__ import annotations

import re
from typing import Final

_END_OF_HEAD: Final = re.compile(rb"\n\r?\n")
_BARE: Final = re.compile(rb"\0|\r(?!\n|\Z)")


class HeadSplitter:
    """Finds the end of a response's head in bytes that are split anywhere."""

    __slots__ = ("_tail",)

    def __init__(self) -> None:
        self._tail = b""  # the last bytes of the head so far: its end may begin in them

    def reset(self) -> None:
        """Expect another response."""
        self._tail = b""

    def split(self, data: bytes) -> tuple[bytes, bytes]:
        """Return the bytes that belong to the head of a response, and those that follow it."""
        begun = self._tail
        end = _END_OF_HEAD.search(begun + data)
        if end is None:
            self._tail = (begun + data)[-2:]
            return data, b""
        self._tail = b""
        cut = end.end() - len(begun)
        return data[:cut], data[cut:]


def clean_head(head: bytes) -> bytes:
    """Return the head of a response with a space for each NUL and bare CR. Source: RFC 9110, 5.5.

    Such a head would be invalid, and a response lost that has been paid for.
    """
    if b"\0" not in head and head.count(b"\r") == head.count(b"\r\n"):
        return head
    return _BARE.sub(b" ", head)
