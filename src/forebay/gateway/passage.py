"""One call on its way through the gateway to a provider, over aiohttp."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeAlias

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from forebay import clock
from forebay.gateway.metrics import Counts
from forebay.gateway.outgoing import Outgoing
from forebay.gateway.sender import Patience
from forebay.gateway.shapes import Answer
from forebay.typing import Notice, Outcome
from forebay.upstream.ask import Ended, Permit
from forebay.upstream.attempt import Tried
from forebay.upstream.exchange import Exchange, Sender
from forebay.upstream.journey import Journey, journey_of
from forebay.upstream.reader import Reader
from forebay.upstream.rules import Plain, Usage
from forebay.upstream.rules.encoding import Unpacked

if TYPE_CHECKING:
    from forebay.upstream import Upstream
    from forebay.upstream.desk import Desk
    from forebay.upstream.stops import Stop

RawHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]

FAILURES: Final = (aiohttp.ClientError, OSError, asyncio.TimeoutError)  # of the way to a provider
_CONNECT: Final = 10.0  # seconds
_MOST: Final = 64 << 20  # bytes of an answer that is held until it is whole
_SWITCHED: Final = 101

# Of one hop each, or ours. Source: RFC 9110, 7.6.1.
_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "trailers", "transfer-encoding", "upgrade"),
    }
)
_NOT_SENT: Final = _HOP | {"host", "content-length", "expect", "accept-encoding"}
_NOT_GIVEN_BACK: Final = _HOP | {"content-length", "x-should-retry"}


class Opened:
    """An answer that is still coming.

    Args:
        answer: where it comes from.
        headers: that its caller gets.
        reader: which meters it.

    Attributes:
        at_border: whether what was passed on ends between two events, so that one of ours may follow.
    """

    __slots__ = ("_events", "answer", "at_border", "headers", "reader")

    def __init__(self, answer: aiohttp.ClientResponse, headers: CIMultiDict[str], reader: Reader) -> None:
        self.answer = answer
        self.headers = headers
        self.reader = reader
        kind = headers.get("content-type", "").lower()
        self._events = kind.startswith("text/event-stream") and "content-encoding" not in headers
        self.at_border = self._events

    def next(self, chunk: bytes | None) -> bytes:
        """What of the next bytes is passed on now; None for the end."""
        passed = self.reader.end() if chunk is None else self.reader.feed(chunk)
        if passed:
            self.at_border = self._events and passed.endswith((b"\n\n", b"\r\n\r\n"))
        return passed


class TooLong(aiohttp.ClientError):
    """The provider's answer is longer than what is held of one."""


class Switched(aiohttp.ClientError):
    """The provider has gone over to another protocol, for which it was not asked."""


class Asked(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it came.

    Attributes:
        method: such as ``"POST"``.
        told: its headers, as they came.
        headers: the same by lower-case name.
        body: its bytes.
        sender: on whose behalf it is.
        patience: of its caller.
    """

    method: str
    told: RawHeaders
    headers: Plain
    body: bytes
    sender: Sender
    patience: Patience


class Passage(Exchange):
    """An exchange of the gateway.

    Args:
        upstream: through which it goes.
        url: where it goes.
        path: the path of that, with the query.
        asked: what is sent.
        outgoing: that sends it.
        counts: where its tokens are counted.
    """

    __slots__ = ("_asked", "_body", "_counts", "_headers", "_outgoing", "_timeout", "_url")

    def __init__(  # noqa: PLR0913 - what it needs to be sent
        self, upstream: Upstream, url: str, path: str, asked: Asked, *, outgoing: Outgoing, counts: Counts
    ) -> None:
        super().__init__(
            upstream, method=asked.method, path=path, headers=asked.headers, body=asked.body, sender=asked.sender
        )
        self._asked = asked
        self._url = URL(url, encoded=True)
        self._outgoing = outgoing
        self._counts = counts
        self._body = asked.body if self.changed is None else self.changed
        self._headers = _forwarded(asked, plain=self.changed is not None)
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=asked.patience.silence)
        self.ask.deadline = min(self.ask.deadline, clock.now() + asked.patience.line)

    def journey(self) -> Journey[Passage] | None:
        """Its way through the accounts that may serve it; None if there is but its own."""
        if not self.upstream.fallbacks:
            return None
        return journey_of(self, self._elsewhere, key=self.key, fits=self.may_leave)

    def _elsewhere(self, stop: Stop, _: Desk) -> Passage | None:
        sent = self.readdressed(stop)
        if sent is None:
            return None
        origin = str(self._url.origin()) if sent.origin is None else sent.origin
        path = sent.path if sent.origin is not None else self._url.raw_path_qs.removesuffix(self._path) + sent.path
        asked = self._asked
        kept = [pair for pair in asked.told if pair[0].decode("latin-1").lower() not in sent.without]
        extra = [(name.encode(), value.encode()) for name, value in sent.extra.items()]
        sender = msgspec.structs.replace(asked.sender, deadline=self.ask.deadline, key=None)
        moved = msgspec.structs.replace(
            asked, told=(*kept, *extra), headers=sent.headers(asked.headers), body=sent.body, sender=sender
        )
        return Passage(stop.upstream, origin + path, sent.path, moved, outgoing=self._outgoing, counts=self._counts)

    async def attempt(self, permit: Permit) -> Tried:
        """Send it once."""
        answer: aiohttp.ClientResponse | None = None
        try:
            answer = await self._outgoing.send(self._asked.method, self._url, self._headers, self._body, self._timeout)
            headers = Plain.of_wire(answer.raw_headers)
            back = _given_back(answer)
            if self.is_open(answer.status, headers.get("content-type", "")):
                tried = self.open()
                tried.value = Opened(answer, back, self.reader(permit, headers))
                return tried
            raw = await _read(answer)
        except BaseException as error:
            if answer is not None:
                answer.close()
            if isinstance(error, FAILURES):
                sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
                tried = self.broke(permit, error, sent=sent, ours=isinstance(error, aiohttp.InvalidURL))
                tried.again = tried.again and not isinstance(error, TooLong)
                return tried
            raise
        answer.release()
        tried = self.whole(permit, answer.status, headers, _unpacked(headers, raw))
        tried.value = Answer(answer.status, tuple(back.items()), raw)
        return tried

    def ended(self, permit: Permit, outcome: Outcome, usage: Usage | None, heard: tuple[Notice, ...] = ()) -> Ended:
        """See `Exchange.ended`; what was used is counted."""
        if usage is not None:
            self._counts.used(self.upstream.name, self.ask.model, usage)
        return super().ended(permit, outcome, usage, heard)


def _forwarded(asked: Asked, *, plain: bool) -> CIMultiDict[str]:
    """The headers that the provider gets.

    Args:
        asked: the request.
        plain: the answer has to be read, so it may not be packed.
    """
    sent: CIMultiDict[str] = CIMultiDict()
    hop = []
    for name, value in asked.told:
        low = name.decode("latin-1").lower()
        if low == "connection":
            hop.append(value)
        if low not in _NOT_SENT and not low.startswith("x-forebay-"):
            sent.add(low, value.decode("utf-8", "surrogateescape"))
    _drop_named(hop, sent)
    packed = not plain and "gzip" in asked.headers.get("accept-encoding", "")
    sent.add("accept-encoding", "gzip" if packed else "identity")  # what can be metered
    return sent


def _given_back(answer: aiohttp.ClientResponse) -> CIMultiDict[str]:
    """The headers that the caller gets: it is not to try again what was tried again here.

    Raises:
        Switched: there is nothing to be given back.
    """
    if answer.status == _SWITCHED:
        raise Switched("it has switched to another protocol unasked")
    back: CIMultiDict[str] = CIMultiDict()
    hop = []
    for name, value in answer.raw_headers:
        low = name.decode("latin-1").lower()
        if low == "connection":
            hop.append(value)
        if low not in _NOT_GIVEN_BACK:
            back.add(low, value.decode("utf-8", "surrogateescape"))
    _drop_named(hop, back)
    back.add("x-should-retry", "false")
    return back


def _drop_named(hop: list[bytes], headers: CIMultiDict[str]) -> None:
    """Take out what Connection names, for it is of one hop as well."""
    for name in b",".join(hop).decode("latin-1").split(",") if hop else ():
        headers.popall(name.strip(), None)


async def _read(answer: aiohttp.ClientResponse) -> bytes:
    """The whole body, as it came.

    Raises:
        TooLong: it is longer than may be held.
    """
    pieces: list[bytes] = []
    size = 0
    async for piece in answer.content.iter_any():
        size += len(piece)
        if size > _MOST:
            raise TooLong(f"its answer is longer than {_MOST:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _unpacked(headers: Plain, raw: bytes) -> bytes:
    """A body without its Content-Encoding; nothing of one that is not to be understood, or is out of all proportion."""
    encoding = headers.get("content-encoding")
    if not encoding:
        return raw
    pieces: list[bytes] = []
    size = 0
    for piece in Unpacked(encoding).feed(raw):
        size += len(piece)
        if size > _MOST:
            return b""
        pieces.append(piece)
    return b"".join(pieces)
