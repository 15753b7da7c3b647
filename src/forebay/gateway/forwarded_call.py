"""A forwarded call: one request of a caller, sent to its provider by aiohttp, and the provider's response."""

from __future__ import annotations

import asyncio
from collections.abc import Container
from typing import Final, TypeAlias

import aiohttp
import msgspec
from multidict import CIMultiDict
from yarl import URL

from forebay.gateway.error_responses import GatewayResponse
from forebay.gateway.http_client import HttpClient
from forebay.gateway.metrics import GatewayMetrics
from forebay.interfaces import Outcome, RateLimitHeaders
from forebay.upstream.call_request import AttemptResult, Caller, CallOutcome, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.exchange import Exchange
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.fallbacks.reroute import ReroutedRequest
from forebay.upstream.metered_stream import MeteredStream
from forebay.upstream.providers import Headers, Usage
from forebay.upstream.providers.content_encoding import Decompressor

RawHeaders: TypeAlias = tuple[tuple[bytes, bytes], ...]

TRANSPORT_ERRORS: Final = (aiohttp.ClientError, OSError, asyncio.TimeoutError)  # on the way to a provider
_CONNECT_TIMEOUT: Final = 10.0  # seconds
_MAX_RESPONSE: Final = 64 << 20  # bytes of a response that is not streamed
_SWITCHING_PROTOCOLS: Final = 101

# Headers that hold for one connection only. Source: RFC 9110, 7.6.1.
_HOP_BY_HOP: Final = frozenset(
    {
        *("connection", "keep-alive", "proxy-authenticate", "proxy-authorization", "proxy-connection"),
        *("te", "trailer", "trailers", "transfer-encoding", "upgrade"),
    }
)
_NOT_SENT: Final = _HOP_BY_HOP | {"host", "content-length", "expect", "accept-encoding"}
_NOT_RETURNED: Final = _HOP_BY_HOP | {"content-length", "x-should-retry"}


class StreamingResponse:
    """A response whose body is still arriving.

    Args:
        response: of the provider.
        headers: that the caller gets.
        reader: meters the body.

    Attributes:
        at_event_boundary: whether the bytes passed on end between two events, so that an error event may follow.
    """

    __slots__ = ("_events", "at_event_boundary", "headers", "reader", "response")

    def __init__(self, response: aiohttp.ClientResponse, headers: CIMultiDict[str], reader: MeteredStream) -> None:
        self.response = response
        self.headers = headers
        self.reader = reader
        content_type = headers.get("content-type", "").lower()
        self._events = content_type.startswith("text/event-stream") and "content-encoding" not in headers
        self.at_event_boundary = self._events

    def feed(self, chunk: bytes | None) -> bytes:
        """Read the next bytes, or None at the end; return those to pass on now."""
        passed = self.reader.end() if chunk is None else self.reader.feed(chunk)
        if passed:
            self.at_event_boundary = self._events and passed.endswith((b"\n\n", b"\r\n\r\n"))
        return passed


class ResponseTooLarge(aiohttp.ClientError):
    """The provider's response is too large to be held in memory."""


class UnexpectedUpgrade(aiohttp.ClientError):
    """The provider switched to another protocol, unasked."""


class IncomingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it was received.

    Attributes:
        method: such as ``"POST"``.
        raw_headers: as they were received.
        headers: the same, by lower-case name.
        body: its bytes.
        caller: whose request it is.
        read_timeout: seconds without a byte from the provider.
    """

    method: str
    raw_headers: RawHeaders
    headers: Headers
    body: bytes
    caller: Caller
    read_timeout: float


class ForwardedCall(Exchange):
    """The exchange of a gateway's call.

    Args:
        core: of the upstream that paces the call.
        url: of the provider.
        path: of that URL, with the query.
        request: as it was received.
        client: sends it.
        metrics: count its tokens.
    """

    __slots__ = ("_body", "_client", "_headers", "_metrics", "_request", "_timeout", "_url")

    def __init__(  # noqa: PLR0913 - all that it needs to be sent
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
        self._request = request
        self._url = URL(url, encoded=True)
        self._client = client
        self._metrics = metrics
        self._body = request.body if self.changed_body is None else self.changed_body
        self._headers = _request_headers(request, metered=self.changed_body is not None)
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=request.read_timeout)

    def reroute(self, route: FallbackRoute) -> ForwardedCall | None:
        """See `CallRoute`."""
        rerouted = self.rerouted_request(route)
        if rerouted is None:
            return None
        request = self._request
        url = self._url_of(rerouted)
        kept = [
            pair for pair in request.raw_headers if pair[0].decode("latin-1").lower() not in rerouted.dropped_headers
        ]
        added = [(name.encode(), value.encode()) for name, value in rerouted.added_headers.items()]
        moved = msgspec.structs.replace(
            request,
            raw_headers=(*kept, *added),
            headers=rerouted.headers(request.headers),
            body=rerouted.body,
            caller=msgspec.structs.replace(request.caller, deadline=self.call_request.deadline, api_key=None),
        )
        return ForwardedCall(route.core, url, rerouted.path, moved, client=self._client, metrics=self._metrics)

    def _url_of(self, rerouted: ReroutedRequest) -> str:
        if rerouted.origin is not None:
            return rerouted.origin + rerouted.path
        prefix = self._url.raw_path_qs.removesuffix(self._path)
        return f"{self._url.origin()}{prefix}{rerouted.path}"

    async def attempt(self, permit: Permit) -> AttemptResult:
        """Send the call once, and return the result of this attempt."""
        try:
            result = await self._attempt(permit)
        except BaseException:
            self._metrics.count_attempt(self.core.name, Outcome.IGNORED)
            raise
        if not result.streaming:  # else it is counted at the end of the stream
            self._metrics.count_attempt(self.core.name, result.outcome.kind)
        return result

    def _settle_stream(self, permit: Permit, kind: Outcome, usage: Usage | None) -> None:
        self._metrics.count_attempt(self.core.name, kind)
        super()._settle_stream(permit, kind, usage)

    async def _attempt(self, permit: Permit) -> AttemptResult:
        response: aiohttp.ClientResponse | None = None
        try:
            response = await self._client.send(
                self._request.method, self._url, self._headers, self._body, self._timeout
            )
            headers = Headers.from_wire(response.raw_headers)
            returned = _response_headers(response)
            if self.is_streamed(response.status, headers.get("content-type", "")):
                result = self.stream_result()
                stream = self.metered_stream(permit, headers, encoding=headers.get("content-encoding", ""))
                result.value = StreamingResponse(response, returned, stream)
                return result
            body = await _read(response)
        except BaseException as error:
            if response is not None:
                response.close()
            if isinstance(error, TRANSPORT_ERRORS):
                sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
                result = self.connection_failed(permit, error, sent=sent, local=isinstance(error, aiohttp.InvalidURL))
                result.retryable = result.retryable and not isinstance(error, ResponseTooLarge)
                return result
            raise
        response.release()
        result = self.judge_answer(permit, response.status, headers, _decompress(headers, body))
        result.value = GatewayResponse(response.status, tuple(returned.items()), body)
        return result

    def call_outcome(
        self,
        permit: Permit,
        kind: Outcome,
        usage: Usage | None,
        rate_limit_headers: tuple[RateLimitHeaders, ...] = (),
    ) -> CallOutcome:
        """See `Exchange.call_outcome`; the tokens count in the metrics."""
        if usage is not None:
            self._metrics.count_tokens(self.core.name, self.call_request.model, usage)
        return super().call_outcome(permit, kind, usage, rate_limit_headers)


def _request_headers(request: IncomingRequest, *, metered: bool) -> CIMultiDict[str]:
    """Return the headers that the provider gets.

    Args:
        request: as it was received.
        metered: whether the response must be read, so that it may not be compressed.
    """
    headers = _end_to_end(request.raw_headers, _NOT_SENT)
    for name in [name for name in headers if name.startswith("x-forebay-")]:
        headers.popall(name, None)
    gzip = not metered and "gzip" in request.headers.get("accept-encoding", "")
    headers.add("accept-encoding", "gzip" if gzip else "identity")  # encodings that can be metered
    return headers


def _response_headers(response: aiohttp.ClientResponse) -> CIMultiDict[str]:
    """Return the headers that the caller gets. They tell its SDK not to retry: retries happen here.

    Raises:
        UnexpectedUpgrade: the provider switched to another protocol.
    """
    if response.status == _SWITCHING_PROTOCOLS:
        raise UnexpectedUpgrade("the provider switched to another protocol, unasked")
    headers = _end_to_end(response.raw_headers, _NOT_RETURNED)
    headers.add("x-should-retry", "false")
    return headers


def _end_to_end(raw_headers: RawHeaders, dropped: Container[str]) -> CIMultiDict[str]:
    """Return headers without those in `dropped`, and those that a Connection header names: they are hop-by-hop too."""
    headers: CIMultiDict[str] = CIMultiDict()
    connection = []
    for name, value in raw_headers:
        lower = name.decode("latin-1").lower()
        if lower == "connection":
            connection.append(value)
        if lower not in dropped:
            headers.add(lower, value.decode("utf-8", "surrogateescape"))
    for named in b",".join(connection).decode("latin-1").split(",") if connection else ():
        headers.popall(named.strip(), None)
    return headers


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """Return the whole body, as it was sent.

    Raises:
        ResponseTooLarge: it is too large to be held.
    """
    pieces: list[bytes] = []
    size = 0
    async for piece in response.content.iter_any():
        size += len(piece)
        if size > _MAX_RESPONSE:
            raise ResponseTooLarge(f"its response is larger than {_MAX_RESPONSE:,} bytes")
        pieces.append(piece)
    return b"".join(pieces)


def _decompress(headers: Headers, body: bytes) -> bytes:
    """Return a body without its Content-Encoding; empty if that is unknown, or the body grows too large."""
    encoding = headers.get("content-encoding")
    if not encoding:
        return body
    pieces: list[bytes] = []
    size = 0
    for piece in Decompressor(encoding).feed(body):
        size += len(piece)
        if size > _MAX_RESPONSE:
            return b""
        pieces.append(piece)
    return b"".join(pieces)
