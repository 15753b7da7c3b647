"""Headers as plain strings, made once for all who read them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import methodcaller
from typing import Final, Self

_KNOWN: Final = 1000  # names of headers that are remembered
_LONGEST: Final = 64  # characters of a name worth remembering

# What AWS and others sign covers the body, and often the headers: nothing of it may be changed. Sources: AWS "Signature
# Version 4"; RFC 9421 (HTTP message signatures); RFC 9530 (digest fields).
SIGNATURE_HEADERS: Final = frozenset(
    {"x-amz-content-sha256", "x-amz-date", "signature", "signature-input", "content-digest", "digest", "content-md5"}
)
RELEVANT: Final = SIGNATURE_HEADERS | {
    *("authorization", "x-api-key", "api-key"),
    *("content-type", "content-encoding", "upgrade", "sec-websocket-key"),
    *("user-agent", "x-stainless-lang"),
    *("retry-after", "retry-after-ms", "x-should-retry", "date"),
}
"""All that an upstream reads of requests and answers, beside the limits, whose names all have `LIMITS` in them."""
RATE_LIMIT_MARK: Final = "ratelimit"


class _LowerCaseNames(dict[bytes, str]):
    """Names as they stand on the wire, and in lower case: they are the same from call to call."""

    def __missing__(self, name: bytes) -> str:
        low = self.found(name.decode("latin-1").lower())
        if len(self) < _KNOWN and len(name) <= _LONGEST:
            self[name] = low
        return low

    def found(self, low: str) -> str:
        return low


class _RelevantNames(_LowerCaseNames):
    """The same of those that are heeded; the others have none."""

    def found(self, low: str) -> str:
        return low if low in RELEVANT or RATE_LIMIT_MARK in low else ""


_lower: Final = _LowerCaseNames().__getitem__
_heeded: Final = _RelevantNames().__getitem__
_text: Final = methodcaller("decode", "latin-1")


class Headers(dict[str, str]):
    """Headers by lower-case name, as plain strings."""

    __slots__ = ()

    @classmethod
    def from_wire(cls, pairs: Sequence[tuple[bytes, bytes]]) -> Self:
        """Those that stand on the wire."""
        if not pairs:
            return cls()
        names, values = zip(*pairs, strict=True)
        return cls(zip(map(_lower, names), map(str.strip, map(_text, values)), strict=True))  # no step of it in Python

    @classmethod
    def relevant(cls, pairs: Iterable[tuple[bytes, bytes]]) -> Self:
        """The few of them that an upstream reads: to make all took 10 us of a call more."""
        return cls([(low, value.decode("latin-1").strip()) for name, value in pairs if (low := _heeded(name))])


def normalize_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Headers by lower-case name, as plain strings."""
    if isinstance(headers, Headers):
        return headers
    return {str(name).lower(): str(value).strip() for name, value in headers.items()}
