"""The access log: one line for each request, written by a thread of its own, so that a slow disk stops no call."""

from __future__ import annotations

import asyncio
import datetime as dt
import functools
import os
import re
import select
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor
from pathlib import Path
from types import MappingProxyType
from typing import Final, Literal

import msgspec

from forebay import clock
from forebay._threads import DaemonThreadExecutor
from forebay.errors import ForebayError
from forebay.events import log
from forebay.gateway.call_record import CallRecord, format_usd
from forebay.gateway.settings import STDERR, STDOUT

LogFormat = Literal["text", "json"]

_STREAMS: Final = MappingProxyType({STDOUT: 1, STDERR: 2})
_PLAIN: Final = re.compile(r'[^ "=]+').fullmatch
_MAX_HELD: Final = 10_000  # lines that wait to be written; further ones are dropped
_DELAY: Final = 0.1  # seconds for which lines are gathered: each write takes a thread
_REPORTED: Final = 60.0  # seconds between two reports of dropped lines
_MAX_TEXT: Final = 256  # characters of a name
# Without O_NONBLOCK, a named pipe that nobody reads would hold up the start.
_FLAGS: Final = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0)
_MODE: Final = 0o640  # who may read whose calls were made


class CannotWriteLog(ForebayError, OSError):
    """The access log {file} cannot be opened: {problem}. Give another file, or make this one writable."""


class AccessEntry(msgspec.Struct, frozen=True, kw_only=True):
    """One line of the access log. Without content, keys and queries.

    Attributes:
        time: when the request ended, in UTC.
        request_id: in the header ``x-request-id`` of the answer, unless the provider sent its own there.
        provider_request_id: of the provider.
        method: such as ``"POST"``.
        path: without the query.
        status: of the answer; 499: its caller left; 502: also a stream that its provider broke off.
        result: how it ended, see `CallResult`.
        tenant: whose call it was.
        key: the name of the issued key.
        target: that served it last.
        model: that served it last.
        account: that it used last.
        waited_seconds: in queues and between attempts.
        first_output_seconds: until the first output of a stream.
        duration_seconds: from its arrival to the end of its answer.
        attempts: that were sent.
        input_tokens: of all attempts.
        output_tokens: of all attempts.
        cost_usd: of all attempts, if a price is known.
        limited_by: what rejected it.
    """

    time: str
    request_id: str
    provider_request_id: str | None
    method: str
    path: str | None
    status: int
    result: str
    tenant: str | None
    key: str | None
    target: str | None
    model: str | None
    account: str | None
    waited_seconds: float
    first_output_seconds: float | None
    duration_seconds: float
    attempts: int
    input_tokens: int | None
    output_tokens: int | None
    cost_usd: float | None
    limited_by: str | None


def make_entry(record: CallRecord, status: int, *, wall: float) -> AccessEntry:
    """Return the line of a request that has ended, at `wall` epoch seconds."""
    usage, first = record.usage, record.first_output
    return AccessEntry(
        time=f"{_second(int(wall))}.{int(wall % 1.0 * 1000):03}Z",
        request_id=record.request_id,
        provider_request_id=_shown(record.provider_request_id),
        method=_name(record.method) or "",
        path=_name(record.path),
        status=status,
        result=record.result,
        tenant=_name(record.tenant),
        key=_name(record.key_name),
        target=_name(record.target),
        model=_name(record.model),
        account=_name(record.account),
        waited_seconds=round(record.waited, 3),
        first_output_seconds=None if first is None else round(first, 3),
        duration_seconds=round(record.duration, 3),
        attempts=record.attempts,
        input_tokens=None if usage is None else usage.input_tokens,
        output_tokens=None if usage is None else usage.output_tokens,
        cost_usd=None if record.usd is None else round(record.usd, 9),
        limited_by=_name(record.limited_by),
    )


@functools.lru_cache(maxsize=2)
def _second(epoch: int) -> str:
    """Return a second of UTC as text; many requests end in it."""
    return dt.datetime.fromtimestamp(epoch, dt.UTC).strftime("%Y-%m-%dT%H:%M:%S")


@functools.lru_cache(maxsize=4096)  # tenants, keys, targets, models and accounts recur from call to call
def _name(text: str) -> str | None:
    """Return a name as a line may hold it: bounded, with an escape for each character that is not printable."""
    return _shown(text)


def _shown(text: str) -> str | None:
    """See `_name`; for a text that does not recur."""
    if not text:
        return None
    if len(text) > _MAX_TEXT:
        text = text[:_MAX_TEXT] + "..."
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else each.encode("unicode_escape").decode() for each in text)


def format_text(entry: AccessEntry) -> bytes:
    """Return an entry as a line for people: the facts of HTTP, then ``name=value``, without those that are missing."""
    parts = [f"{entry.time} {entry.status} {entry.result} {entry.method} {entry.path or '-'}"]
    if names := _text_of_names(entry.tenant, entry.key, entry.target, entry.model, entry.account):
        parts.append(names)
    parts.append(f"waited={entry.waited_seconds:.3f}")
    if entry.first_output_seconds is not None:
        parts.append(f"first={entry.first_output_seconds:.3f}")
    parts.append(f"duration={entry.duration_seconds:.3f} attempts={entry.attempts}")
    if entry.input_tokens is not None:
        parts.append(f"tokens={entry.input_tokens}/{entry.output_tokens}")
    if entry.cost_usd is not None:
        parts.append(f"usd={format_usd(entry.cost_usd)}")
    ids = (("limited_by", entry.limited_by), ("id", entry.request_id), ("provider_id", entry.provider_request_id))
    parts += [f"{name}={_quoted(value)}" for name, value in ids if value is not None]
    return " ".join(parts).encode() + b"\n"


@functools.lru_cache(maxsize=1024)  # they recur from call to call
def _text_of_names(*names: str | None) -> str:
    """Return what a line says of its tenant, key, target, model and account, in this order."""
    pairs = zip(("tenant", "key", "target", "model", "account"), names, strict=True)
    return " ".join([f"{name}={_quoted(value)}" for name, value in pairs if value is not None])


def format_json(entry: AccessEntry) -> bytes:
    """Return an entry as a line of JSON, with null for what is missing."""
    return msgspec.json.encode(entry) + b"\n"


def _quoted(value: str) -> str:
    """Return a value in quotes if it would not end at the next space otherwise."""
    if _PLAIN(value):
        return value
    return msgspec.json.encode(value).decode()


_FORMATS: Final[Mapping[str, Callable[[AccessEntry], bytes]]] = MappingProxyType(
    {"text": format_text, "json": format_json}
)


class AccessLog:
    """The access log of one gateway. Lines are formatted and written in a thread, in their order.

    At most 10,000 lines wait for that; what comes while as many wait is dropped, counted and reported in the program's
    log. So are lines that cannot be written.

    Args:
        kind: ``"text"`` or ``"json"``.
        to: ``"stdout"``, ``"stderr"`` or the path of a file, which is appended to.

    Attributes:
        dropped: lines that were not written.

    Raises:
        CannotWriteLog: the file cannot be opened.
    """

    def __init__(self, kind: LogFormat, to: str) -> None:
        self._format = _FORMATS[kind]
        self._to = to
        self._file = _open(to)
        self._executor: Executor = DaemonThreadExecutor("forebay-access-log", max_threads=1)
        self._entries: list[Callable[[], AccessEntry]] = []
        self._timer: asyncio.TimerHandle | None = None
        self._writing: asyncio.Future[int] | None = None
        self._writing_entries = 0
        self._reopens = False
        self._idle = asyncio.Event()
        self._idle.set()
        self._reported_at: float | None = None
        self._unreported = 0
        self._closing = False
        self.dropped = 0

    def add(self, entry: Callable[[], AccessEntry]) -> None:
        """Write an entry soon; or drop it, if too many wait.

        Args:
            entry: returns it. That is called in the thread, since hundreds of entries at once take a fraction of the
                time of as many single ones.
        """
        if len(self._entries) + self._writing_entries >= _MAX_HELD:
            self._drop(1, "they come faster than they can be written")
            return
        self._entries.append(entry)
        if self._writing is None and self._timer is None:
            self._idle.clear()
            self._timer = asyncio.get_running_loop().call_later(_DELAY, self._write_soon)

    def reopen(self) -> None:
        """Open the file again before the next line is written: it may have been moved, to be rotated."""
        self._reopens = self._to not in _STREAMS

    async def close(self, seconds: float = 1.0) -> None:
        """Write what waits, for at most `seconds`, and close the file."""
        self._closing = True
        self._drop(0, "they came faster than they could be written")  # reports those that were dropped of late
        if self._timer is not None:
            self._timer.cancel()
            self._write_soon()
        try:
            async with asyncio.timeout(seconds):
                await self._idle.wait()
        except TimeoutError:
            self._drop(len(self._entries) + self._writing_entries, "the gateway has stopped")
            return  # the thread uses the file still
        finally:
            self._executor.shutdown(wait=False)
        if self._to not in _STREAMS:
            os.close(self._file)

    def _write_soon(self) -> None:
        """Give the lines that wait to the thread."""
        self._timer = None
        entries, self._entries = self._entries, []
        self._writing_entries = len(entries)
        loop = asyncio.get_running_loop()
        self._writing = loop.run_in_executor(self._executor, self._write, entries)
        self._writing.add_done_callback(self._written)

    def _write(self, entries: Sequence[Callable[[], AccessEntry]]) -> int:
        """Write entries, in the thread; return how many."""
        if self._reopens:
            self._reopens = False
            self._reopen()
        data = memoryview(b"".join([self._format(entry()) for entry in entries]))
        while data:
            try:
                data = data[os.write(self._file, data) :]
            except BlockingIOError:  # a full pipe
                select.select((), (self._file,), ())
        return len(entries)

    def _reopen(self) -> None:
        try:
            file = _open(self._to)
        except CannotWriteLog as error:
            log.error("%s It goes on in the old file.", error)
            return
        os.close(self._file)
        self._file = file

    def _written(self, writing: asyncio.Future[int]) -> None:
        entries, self._writing, self._writing_entries = self._writing_entries, None, 0
        if writing.cancelled():
            self._drop(entries, "the gateway has stopped")
        elif (error := writing.exception()) is not None:
            self._drop(entries, f"{_reason(error)}")
        if self._entries:
            self._write_soon()
        else:
            self._idle.set()

    def _drop(self, lines: int, reason: str) -> None:
        """Count lines that are not written, and report that at most once a minute, and at the end."""
        self.dropped += lines
        self._unreported += lines
        now = clock.now()
        due = self._closing or self._reported_at is None or now - self._reported_at >= _REPORTED
        if self._unreported and due:
            log.warning("%d lines of the access log (%s) were not written: %s", self._unreported, self._to, reason)
            self._reported_at, self._unreported = now, 0


def _open(to: str) -> int:
    if (stream := _STREAMS.get(to)) is not None:
        return stream
    try:
        return os.open(Path(to), _FLAGS, _MODE)
    except (OSError, ValueError) as error:
        raise CannotWriteLog(file=to, problem=_reason(error)) from None


def _reason(error: BaseException) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error) or type(error).__name__
