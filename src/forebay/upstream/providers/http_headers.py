"""HTTP headers by lower-case name, decoded once for all readers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from operator import methodcaller
from typing import Final, Self

_MAX_CACHED_NAMES: Final = 1000
_MAX_CACHED_LENGTH: Final = 64  # characters of a name

# A signature covers the body and often the headers, so a signed request must not be changed. Sources: AWS "Signature
# Version 4"; RFC 9421 (HTTP message signatures); RFC 9530 (digest fields).
SIGNATURE_HEADERS: Final = frozenset(
    {"x-amz-content-sha256", "x-amz-date", "signature", "signature-input", "content-digest", "digest", "content-md5"}
)
RETRY_AFTER_HEADERS: Final = ("retry-after-ms", "retry-after", "llm_provider-retry-after")
"""The headers that say when to come back, the first that is there counts. litellm's proxy renames its provider's."""
RELEVANT: Final = SIGNATURE_HEADERS | {
    *("authorization", "x-api-key", "api-key", "x-goog-api-key", "ocp-apim-subscription-key"),
    *("content-type", "content-encoding", "upgrade", "sec-websocket-key"),
    *("x-http-method-override", "x-http-method", "x-method-override"),
    *("user-agent", "x-stainless-lang"),
    *(*RETRY_AFTER_HEADERS, "x-should-retry", "date"),
}
"""The headers that an upstream reads, apart from rate limits, whose names all contain `RATE_LIMIT_MARK`."""
RATE_LIMIT_MARK: Final = "ratelimit"


class _LowerCaseNames(dict[bytes, str]):
    """A cache of header names in lower case, by name on the wire: they are the same from call to call."""

    def __missing__(self, name: bytes) -> str:
        lower = self.select(name.decode("latin-1").lower())
        if len(self) < _MAX_CACHED_NAMES and len(name) <= _MAX_CACHED_LENGTH:
            self[name] = lower
        return lower

    def select(self, lower: str) -> str:
        return lower


class _RelevantNames(_LowerCaseNames):
    """The same for relevant headers; the name of any other is empty."""

    def select(self, lower: str) -> str:
        return lower if lower in RELEVANT or RATE_LIMIT_MARK in lower else ""


_lower: Final = _LowerCaseNames().__getitem__
_relevant: Final = _RelevantNames().__getitem__
_text: Final = methodcaller("decode", "latin-1")


class Headers(dict[str, str]):
    """Headers of one message, by lower-case name."""

    __slots__ = ()

    @classmethod
    def from_wire(cls, pairs: Sequence[tuple[bytes, bytes]]) -> Self:
        """Return all headers of a message as it was received."""
        if not pairs:
            return cls()
        names, values = zip(*pairs, strict=True)
        return cls(zip(map(_lower, names), map(str.strip, map(_text, values)), strict=True))  # without a Python step

    @classmethod
    def relevant(cls, pairs: Iterable[tuple[bytes, bytes]]) -> Self:
        """Return the headers that an upstream reads; decoding all of them would add 10 us to a call."""
        return cls([(lower, value.decode("latin-1").strip()) for name, value in pairs if (lower := _relevant(name))])


def normalize_headers(headers: Mapping[str, str]) -> Mapping[str, str]:
    """Return headers by lower-case name, as strings."""
    if isinstance(headers, Headers):
        return headers
    return {str(name).lower(): str(value).strip() for name, value in headers.items()}
