"""A parser of server-sent events (SSE), in bounded memory."""

from __future__ import annotations

from typing import Final

_MAX_EVENT: Final = 1 << 20  # bytes; longer events are dropped


def is_event_stream(content_type: str) -> bool:
    """Return whether a Content-Type is that of a stream of events."""
    return content_type.lower().startswith("text/event-stream")


class EventStreamParser:
    """An incremental parser that returns the ``data`` of each event of a stream.

    Lines end with LF, CRLF or CR, an event with an empty line; the ``data`` lines of an event are joined by LF. Events
    longer than a megabyte are dropped, so memory is bounded for any input.

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
        """Return the data of the events that end in `chunk`."""
        events: list[bytes] = []
        for piece in chunk.splitlines(keepends=True):
            if self._after_cr:
                self._after_cr = False
                if piece == b"\n":  # the rest of a CRLF
                    continue
            ended = piece.endswith((b"\n", b"\r"))
            self._keep(piece)
            if ended:
                self._after_cr = piece.endswith(b"\r")
                self._end_line(events)
        return events

    def end(self) -> list[bytes]:
        """Return the data of a last event without its empty line, which some servers leave out."""
        events: list[bytes] = []
        self._end_line(events)
        self._end_event(events)
        return events

    def _keep(self, piece: bytes) -> None:
        self._size += len(piece)
        if self._size > _MAX_EVENT:
            self._too_long = True
            self._data.clear()
            self._line[:] = self._line[:1] or piece[:1]  # enough to tell the empty line that ends the event
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
