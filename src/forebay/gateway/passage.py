"""One call on its way through the gateway to a provider, over aiohttp."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Final, TypeAlias

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from forebay import clock
from forebay.gateway.metrics import Counts
from forebay.gateway.route import Place
from forebay.gateway.sender import Patience
from forebay.gateway.shapes import Answer
from forebay.typing import Notice, Outcome
from forebay.upstream.ask import Ended, Permit
from forebay.upstream.attempt import Tried
from forebay.upstream.exchange import Exchange, Sender
from forebay.upstream.reader import Reader
from forebay.upstream.rules import Plain, Usage
from forebay.upstream.rules.encoding import Unpacked

RawHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]

FAILURES: Final = (aiohttp.ClientError, OSError, asyncio.TimeoutError)  # of the way to a provider
_CONNECT: Final = 10.0  # seconds
_MOST: Final = 64 << 20  # bytes of an answer that is held until it is whole
_TYPICALLY: Final = 2.0  # typical calls of a caller's patience that are left to the call itself

# Of one hop each, or ours. Source: RFC 9110, 7.6.1.
_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "trailers", "transfer-encoding", "upgrade"),
    }
)
_NOT_SENT: Final = _HOP | {"host", "content-length", "expect", "accept-encoding"}
_NOT_GIVEN_BACK: Final = _HOP | {"content-length", "x-should-retry"}
_NOT_ADDED: Final = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")


class Opened:
    """An answer that is still coming."""

    __slots__ = ("answer", "headers", "reader")

    def __init__(self, answer: aiohttp.ClientResponse, headers: CIMultiDict[str], reader: Reader) -> None:
        self.answer = answer
        self.headers = headers
        self.reader = reader


class TooLong(aiohttp.ClientError):
    """The provider's answer is longer than what is held of one."""


class Passage(Exchange):
    """An exchange of the gateway.

    Args:
        place: where it goes.
        method: such as ``"POST"``.
        told: the request's headers, as they came.
        headers: the same by lower-case name.
        body: of the request.
        sender: on whose behalf.
        patience: of its caller.
        session: that sends it.
        counts: where its tokens are counted.
    """

    __slots__ = ("_body", "_counts", "_headers", "_method", "_session", "_silence", "_url", "place")

    def __init__(  # noqa: PLR0913 - the parts of a request
        self,
        place: Place,
        *,
        method: str,
        told: RawHeaders,
        headers: Plain,
        body: bytes,
        sender: Sender,
        patience: Patience,
        session: aiohttp.ClientSession,
        counts: Counts,
    ) -> None:
        upstream = place.target.upstream
        super().__init__(upstream, method=method, path=place.path, headers=headers, body=body, sender=sender)
        self.place = place
        self._method = method
        self._url = URL(place.url, encoded=True)
        self._session = session
        self._counts = counts
        self._silence = patience.silence
        self._body = body if self.changed is None else self.changed
        self._headers = _forwarded(told, headers, plain=self.changed is not None)
        left = _TYPICALLY * self.desk.typical()
        self.ask.deadline = min(self.ask.deadline, clock.now() + max(patience.line / 2, patience.line - left))

    async def attempt(self, permit: Permit) -> Tried:
        """Send it once."""
        answer: aiohttp.ClientResponse | None = None
        try:
            answer = await self._session.request(
                self._method,
                self._url,
                headers=self._headers,
                data=self._body or None,
                allow_redirects=False,
                skip_auto_headers=_NOT_ADDED,
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT, sock_read=self._silence),
            )
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
                return self.broke(permit, error, sent=sent, ours=isinstance(error, aiohttp.InvalidURL))
            raise
        answer.release()
        tried = self.whole(permit, answer.status, headers, _unpacked(headers, raw))
        tried.value = Answer(answer.status, tuple(back.items()), raw)
        return tried

    def ended(self, permit: Permit, outcome: Outcome, usage: Usage | None, heard: tuple[Notice, ...] = ()) -> Ended:
        """See `Exchange.ended`; what was used is counted."""
        if usage is not None:
            self._counts.used(self.place.target.name, self.ask.model, usage)
        return super().ended(permit, outcome, usage, heard)


def _forwarded(told: RawHeaders, headers: Plain, *, plain: bool) -> CIMultiDict[str]:
    """The headers that the provider gets.

    Args:
        told: those of the request, as they came.
        headers: the same by lower-case name.
        plain: the answer has to be read, so it may not be packed.
    """
    left_out: Collection[str] = _NOT_SENT
    if (named := headers.get("connection", "keep-alive").lower()) != "keep-alive":
        left_out = _NOT_SENT.union(name.strip() for name in named.split(","))
    sent: CIMultiDict[str] = CIMultiDict()
    for name, value in told:
        low = name.decode("latin-1").lower()
        if low not in left_out and not low.startswith("x-forebay-"):
            sent.add(low, value.decode("utf-8", "surrogateescape"))
    packed = not plain and "gzip" in headers.get("accept-encoding", "")
    sent.add("accept-encoding", "gzip" if packed else "identity")  # what can be metered
    return sent


def _given_back(answer: aiohttp.ClientResponse) -> CIMultiDict[str]:
    """The headers that the caller gets: it is not to try again what was tried again here."""
    back: CIMultiDict[str] = CIMultiDict()
    for name, value in answer.raw_headers:
        low = name.decode("latin-1").lower()
        if low not in _NOT_GIVEN_BACK:
            back.add(low, value.decode("utf-8", "surrogateescape"))
    back.add("x-should-retry", "false")
    return back


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
            raise TooLong
        pieces.append(piece)
    return b"".join(pieces)


def _unpacked(headers: Plain, raw: bytes) -> bytes:
    """A body without its Content-Encoding; nothing of one that is not to be understood."""
    encoding = headers.get("content-encoding")
    return raw if not encoding else b"".join(Unpacked(encoding).feed(raw))
