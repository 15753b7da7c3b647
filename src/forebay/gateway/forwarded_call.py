"""One call on its way through the gateway to a provider, over aiohttp."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Final, TypeAlias

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from forebay import clock
from forebay.gateway.caller import ClientTimeouts
from forebay.gateway.error_responses import GatewayResponse
from forebay.gateway.http_client import HttpClient
from forebay.gateway.metrics import GatewayMetrics
from forebay.interfaces import Outcome, RateLimitHeaders
from forebay.upstream.call_request import AttemptResult, Caller, CallOutcome, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.exchange import Exchange
from forebay.upstream.metered_stream import MeteredStream
from forebay.upstream.providers import Headers, Usage
from forebay.upstream.providers.content_encoding import Decompressor

if TYPE_CHECKING:
    from forebay.upstream.fallback_routes import FallbackRoute
    from forebay.upstream.shared_account import SharedAccount

RawHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]

TRANSPORT_ERRORS: Final = (aiohttp.ClientError, OSError, asyncio.TimeoutError)  # of the way to a provider
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


class StreamingResponse:
    """An answer that is still coming.

    Args:
        answer: where it comes from.
        headers: that its caller gets.
        reader: which meters it.

    Attributes:
        at_border: whether what was passed on ends between two events, so that one of ours may follow.
    """

    __slots__ = ("_events", "at_event_boundary", "headers", "reader", "response")

    def __init__(self, answer: aiohttp.ClientResponse, headers: CIMultiDict[str], reader: MeteredStream) -> None:
        self.response = answer
        self.headers = headers
        self.reader = reader
        kind = headers.get("content-type", "").lower()
        self._events = kind.startswith("text/event-stream") and "content-encoding" not in headers
        self.at_event_boundary = self._events

    def feed(self, chunk: bytes | None) -> bytes:
        """What of the next bytes is passed on now; None for the end."""
        passed = self.reader.end() if chunk is None else self.reader.feed(chunk)
        if passed:
            self.at_event_boundary = self._events and passed.endswith((b"\n\n", b"\r\n\r\n"))
        return passed


class ResponseTooLarge(aiohttp.ClientError):
    """The provider's answer is longer than what is held of one."""


class UnexpectedUpgrade(aiohttp.ClientError):
    """The provider has gone over to another protocol, for which it was not asked."""


class IncomingRequest(msgspec.Struct, frozen=True, kw_only=True):
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
    raw_headers: RawHeaders
    headers: Headers
    body: bytes
    caller: Caller
    timeouts: ClientTimeouts


class ForwardedCall(Exchange):
    """An exchange of the gateway.

    Args:
        core: of the upstream that it is sent through.
        url: where it goes.
        path: the path of that, with the query.
        asked: what is sent.
        outgoing: that sends it.
        counts: where its tokens are counted.
    """

    __slots__ = ("_asked", "_body", "_counts", "_headers", "_outgoing", "_timeout", "_url")

    def __init__(  # noqa: PLR0913 - what it needs to be sent
        self,
        core: UpstreamCore,
        url: str,
        path: str,
        request: IncomingRequest,
        *,
        client: HttpClient,
        metrics: GatewayMetrics,
    ) -> None:
        super().__init__(
            core,
            method=request.method,
            path=path,
            headers=request.headers,
            body=request.body,
            caller=request.caller,
        )
        self._asked = request
        self._url = URL(url, encoded=True)
        self._outgoing = client
        self._counts = metrics
        self._body = request.body if self.changed_body is None else self.changed_body
        self._headers = _request_headers(request, plain=self.changed_body is not None)
        self._timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=_CONNECT, sock_read=request.timeouts.read_timeout
        )
        self.call_request.deadline = min(self.call_request.deadline, clock.now() + request.timeouts.max_wait)

    def reroute(self, route: FallbackRoute, account: SharedAccount) -> ForwardedCall | None:  # noqa: ARG002
        """See `CallRoute`."""
        sent = self.rerouted_request(route)
        if sent is None:
            return None
        origin = str(self._url.origin()) if sent.origin is None else sent.origin
        path = sent.path if sent.origin is not None else self._url.raw_path_qs.removesuffix(self._path) + sent.path
        asked = self._asked
        kept = [pair for pair in asked.raw_headers if pair[0].decode("latin-1").lower() not in sent.dropped_headers]
        extra = [(name.encode(), value.encode()) for name, value in sent.added_headers.items()]
        sender = msgspec.structs.replace(asked.caller, deadline=self.call_request.deadline, api_key=None)
        moved = msgspec.structs.replace(
            asked, raw_headers=(*kept, *extra), headers=sent.headers(asked.headers), body=sent.body, caller=sender
        )
        return ForwardedCall(route.core, origin + path, sent.path, moved, client=self._outgoing, metrics=self._counts)

    async def attempt(self, permit: Permit) -> AttemptResult:
        """Send it once."""
        answer: aiohttp.ClientResponse | None = None
        try:
            answer = await self._outgoing.send(self._asked.method, self._url, self._headers, self._body, self._timeout)
            headers = Headers.from_wire(answer.raw_headers)
            back = _response_headers(answer)
            if self.is_streamed(answer.status, headers.get("content-type", "")):
                tried = self.stream_result()
                tried.value = StreamingResponse(answer, back, self.metered_stream(permit, headers))
                return tried
            raw = await _read(answer)
        except BaseException as error:
            if answer is not None:
                answer.close()
            if isinstance(error, TRANSPORT_ERRORS):
                sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
                tried = self.connection_failed(permit, error, sent=sent, local=isinstance(error, aiohttp.InvalidURL))
                tried.retryable = tried.retryable and not isinstance(error, ResponseTooLarge)
                return tried
            raise
        answer.release()
        tried = self.judge_answer(permit, answer.status, headers, _unpacked(headers, raw))
        tried.value = GatewayResponse(answer.status, tuple(back.items()), raw)
        return tried

    def call_outcome(
        self,
        permit: Permit,
        kind: Outcome,
        usage: Usage | None,
        rate_limit_headers: tuple[RateLimitHeaders, ...] = (),
    ) -> CallOutcome:
        """See `Exchange.call_outcome`; what was used is counted."""
        if usage is not None:
            self._counts.count_tokens(self.core.name, self.call_request.model, usage)
        return super().call_outcome(permit, kind, usage, rate_limit_headers)


def _request_headers(asked: IncomingRequest, *, plain: bool) -> CIMultiDict[str]:
    """The headers that the provider gets.

    Args:
        asked: the request.
        plain: the answer has to be read, so it may not be packed.
    """
    sent: CIMultiDict[str] = CIMultiDict()
    hop = []
    for name, value in asked.raw_headers:
        low = name.decode("latin-1").lower()
        if low == "connection":
            hop.append(value)
        if low not in _NOT_SENT and not low.startswith("x-forebay-"):
            sent.add(low, value.decode("utf-8", "surrogateescape"))
    _drop_named(hop, sent)
    packed = not plain and "gzip" in asked.headers.get("accept-encoding", "")
    sent.add("accept-encoding", "gzip" if packed else "identity")  # what can be metered
    return sent


def _response_headers(answer: aiohttp.ClientResponse) -> CIMultiDict[str]:
    """The headers that the caller gets: it is not to try again what was tried again here.

    Raises:
        Switched: there is nothing to be given back.
    """
    if answer.status == _SWITCHED:
        raise UnexpectedUpgrade("it has switched to another protocol unasked")
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
            raise ResponseTooLarge(f"its answer is longer than {_MOST:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _unpacked(headers: Headers, raw: bytes) -> bytes:
    """A body without its Content-Encoding; nothing of one that is not to be understood, or is out of all proportion."""
    encoding = headers.get("content-encoding")
    if not encoding:
        return raw
    pieces: list[bytes] = []
    size = 0
    for piece in Decompressor(encoding).feed(raw):
        size += len(piece)
        if size > _MOST:
            return b""
        pieces.append(piece)
    return b"".join(pieces)
