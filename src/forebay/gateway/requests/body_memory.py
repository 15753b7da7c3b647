"""The memory of bodies: bounded for each body, and for all together."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class BodyTooLarge(Exception):
    """A body is longer than any may be."""


class BodyMemoryFull(Exception):
    """The bodies of all calls in progress would take too much memory together."""


class BodyMemory:
    """The memory that the bodies of requests, or those of responses, take together.

    The body of a request is held until its call has ended, since it may be sent again; that of a response until its
    caller has taken it.

    Args:
        max_body_bytes: of one body.
        max_held_bytes: of all bodies together.

    Attributes:
        held_bytes: held now, of all bodies.
    """

    __slots__ = ("_max_body_bytes", "_max_held_bytes", "held_bytes")

    def __init__(self, max_body_bytes: int, max_held_bytes: int) -> None:
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes
        self.held_bytes = 0

    def change(self, max_body_bytes: int, max_held_bytes: int) -> None:
        """Set other bounds; what is held beyond them is released as it is."""
        self._max_body_bytes = max_body_bytes
        self._max_held_bytes = max_held_bytes

    def check(self, size: int, *, more: int) -> None:
        """Check that a body of `size` bytes may be held, `more` of which are not held yet.

        Raises:
            BodyTooLarge: no body may be so long.
            BodyMemoryFull: all bodies together would take too much.
        """
        if size > self._max_body_bytes:
            raise BodyTooLarge
        if self.held_bytes + more > self._max_held_bytes:
            raise BodyMemoryFull

    def add(self, size: int) -> None:
        """Add received bytes to those held."""
        self.held_bytes += size

    def release(self, size: int) -> None:
        """Remove bytes that are not held any more."""
        self.held_bytes -= size


class BodyReservation:
    """The memory that one body takes; leaving its block releases it.

    A body counts as its bytes arrive, not when its length is announced: otherwise a few callers could lock all others
    out by announcing much and sending nothing.
    """

    __slots__ = ("_memory", "_size")

    def __init__(self, memory: BodyMemory) -> None:
        self._memory = memory
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def release(self) -> None:
        """Release what is counted so far."""
        if self._size:
            self._memory.release(self._size)
            self._size = 0

    def expect(self, size: int) -> None:
        """Check that an announced body of `size` bytes may come. It is not counted yet.

        Raises:
            BodyTooLarge, BodyMemoryFull: it may not.
        """
        self._memory.check(size, more=size)

    def grow(self, by: int) -> None:
        """Count `by` bytes that have arrived.

        Raises:
            BodyTooLarge, BodyMemoryFull: they may not be held.
        """
        self._memory.check(self._size + by, more=by)
        self._memory.add(by)
        self._size += by
