"""Server-sent events out of bytes that come in arbitrary pieces, in bounded memory."""

from __future__ import annotations

from typing import Final

_LONGEST: Final = 1 << 20  # bytes of one event that are kept; of a longer one nothing is


class EventStreamParser:
    """Splits a stream into the data of its events.

    Lines end with LF, CRLF or CR, an event with an empty line; ``data`` lines of one event are joined by LF. What is
    longer than a megabyte is skipped, and memory stays bounded whatever is fed.

    Source: WHATWG HTML, "Server-sent events", 9.2.6.
    """

    __slots__ = ("_after_cr", "_data", "_line", "_size", "_too_long")

    def __init__(self) -> None:
        self._line = bytearray()
        self._data: list[bytes] = []
        self._size = 0  # of the event so far
        self._too_long = False
        self._after_cr = False

    def feed(self, chunk: bytes) -> list[bytes]:
        """The data of the events that end in `chunk`."""
        events: list[bytes] = []
        for piece in chunk.splitlines(keepends=True):
            if self._after_cr:
                self._after_cr = False
                if piece == b"\n":  # the second half of a CRLF
                    continue
            ended = piece.endswith((b"\n", b"\r"))
            self._keep(piece)
            if ended:
                self._after_cr = piece.endswith(b"\r")
                self._end_line(events)
        return events

    def end(self) -> list[bytes]:
        """The data of an event that was not closed by an empty line; some servers leave the last one out."""
        events: list[bytes] = []
        self._end_line(events)
        self._end_event(events)
        return events

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > _LONGEST:
            self._too_long = True
            self._data.clear()
            self._line[:] = self._line[:1] or piece[:1]  # enough to know an empty line, which ends it, from a long one
        else:
            self._line += piece

    def _end_line(self, events: list[bytes]) -> None:
        line = bytes(self._line).rstrip(b"\r\n")
        self._line.clear()
        if not line:
            self._end_event(events)
        elif line.startswith(b"data:") and not self._too_long:
            self._data.append(line[6:] if line[5:6] == b" " else line[5:])

    def _end_event(self, events: list[bytes]) -> None:
        if self._data and not self._too_long:
            events.append(b"\n".join(self._data))
        self._data.clear()
        self._size = 0
        self._too_long = False
