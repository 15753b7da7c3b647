"""How long a request's body may be, and what the bodies of all requests take together while they are held."""

from __future__ import annotations

from types import TracebackType
from typing import Self


class BodyTooLarge(Exception):
    """A body is longer than any may be."""


class BodyMemoryFull(Exception):
    """There is no room for a body beside all others."""


class BodyMemory:
    """The bounds, and what is held. Whoever holds a body holds it until its call has ended, for it may be sent again.

    Args:
        most: bytes of one.
        together: bytes of all.

    Attributes:
        held: bytes of all, now.
    """

    __slots__ = ("_most", "_together", "held_bytes")

    def __init__(self, max_body_bytes: int, max_held_bytes: int) -> None:
        self._most = max_body_bytes
        self._together = max_held_bytes
        self.held_bytes = 0

    def reserve(self) -> BodyReservation:
        """For one request, in whose block its body is held."""
        return BodyReservation(self)

    def check(self, size: int, *, more: int) -> None:
        """Whether one of so many bytes may be held, `more` of which would come to those that are.

        Raises:
            TooLong, NoRoom: it may not.
        """
        if size > self._most:
            raise BodyTooLarge
        if self.held_bytes + more > self._together:
            raise BodyMemoryFull


class BodyReservation:
    """What one request takes of it, given back at the end of its block.

    Of a body whose length is told no more is taken than has come: else few could lock everybody out by announcing much
    and sending nothing.
    """

    __slots__ = ("_bodies", "_size")

    def __init__(self, bodies: BodyMemory) -> None:
        self._bodies = bodies
        self._size = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bodies.held_bytes -= self._size
        self._size = 0

    def expect(self, size: int) -> None:
        """So many bytes are to come.

        Raises:
            TooLong, NoRoom: they need not.
        """
        self._bodies.check(size, more=size)

    def grow(self, by: int) -> None:
        """So many bytes have come.

        Raises:
            TooLong, NoRoom: they may not be held.
        """
        self._bodies.check(self._size + by, more=by)
        self._bodies.held_bytes += by
        self._size += by
