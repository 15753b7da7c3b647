"""A forwarded call: one request of a caller, sent to its provider by aiohttp, and the provider's response."""

from __future__ import annotations

import asyncio
import errno
import functools
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import aiohttp
import msgspec
from aiohttp.client_proto import ResponseHandler
from aiohttp.http_exceptions import HttpProcessingError, LineTooLong
from multidict import CIMultiDict

from forebay import clock
from forebay.gateway.call_record import CallRecord
from forebay.gateway.callers.caller_limits import CallerHold, CallerLimits
from forebay.gateway.callers.issued_keys import IssuedKey
from forebay.gateway.connections.http_client import (
    HttpClient,
    OutgoingRequest,
    ProviderResponse,
    connection_of,
    parse_address,
)
from forebay.gateway.connections.passed_headers import DROPPED, HOP_BY_HOP, PassedNames, hop_by_hop_names
from forebay.gateway.connections.request_headers import RequestHeaders
from forebay.gateway.error_responses import GatewayResponse, StreamProtocol, printable
from forebay.gateway.metrics.metrics import GatewayMetrics, Operation
from forebay.gateway.requests.body_memory import BodyMemoryFull, BodyReservation, BodyTooLarge
from forebay.gateway.targets.provider_key import ProviderKey
from forebay.interfaces import Outcome, RateLimitHeaders
from forebay.upstream.call_meter import ReadAnswer, StreamMeter
from forebay.upstream.call_request import AttemptResult, Caller, CallOutcome, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.exchange import ERRORS, REDIRECTS, Exchange
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.fallbacks.reroute import ReroutedRequest
from forebay.upstream.metered_stream import MeteredStream, StreamEnd
from forebay.upstream.providers import Endpoint, Headers, Usage, is_event_stream, normalize_credential
from forebay.upstream.providers.content_encoding import decompress_end

TRANSPORT_ERRORS: Final = (aiohttp.ClientError, OSError, asyncio.TimeoutError)  # on the way to a provider
_CONNECT_TIMEOUT: Final = 10.0  # seconds
_MAX_ERROR: Final = 1 << 20  # bytes of an error that are kept
_MAX_METERED: Final = 1 << 20  # bytes at the end of a compressed response that are read
_DECOMPRESSED_AT_ONCE: Final = 1 << 13  # bytes; a thread decompresses longer responses
_SWITCHING_PROTOCOLS: Final = 101
_OUT_OF_FILES: Final = frozenset({errno.EMFILE, errno.ENFILE})

_NOT_RETURNED: Final = HOP_BY_HOP | {"content-length", "x-should-retry"}


class StreamingResponse:
    """A response that is passed on as it arrives.

    Args:
        response: of the provider.
        headers: that the caller gets.
        reader: meters the body.
        first_bytes: what has arrived of its body already.

    Attributes:
        compressed: whether its body is, as it arrives.
        length: of the body, if that is known and it passes as it came.
        at_event_boundary: whether the bytes passed on end between two events, so that an error event may follow.
    """

    __slots__ = (
        "_events",
        "_first_bytes",
        "at_event_boundary",
        "compressed",
        "headers",
        "length",
        "reader",
        "response",
    )

    def __init__(
        self,
        response: ProviderResponse,
        headers: CIMultiDict[str],
        reader: MeteredStream,
        first_bytes: bytes = b"",
    ) -> None:
        self.response = response
        self.headers = headers
        self.reader = reader
        self._first_bytes = first_bytes
        self.compressed = "content-encoding" in headers
        if reader.decoded:
            headers.popall("content-encoding", None)
        self._events = is_event_stream(headers.get("content-type", "")) and "content-encoding" not in headers
        self.at_event_boundary = self._events
        self.length = None if self._events or response.method == "HEAD" else response.content_length

    def take_first_bytes(self) -> bytes:
        """Return what had arrived of the body already, and stop holding it."""
        first_bytes, self._first_bytes = self._first_bytes, b""
        return first_bytes

    def feed(self, chunk: bytes | None) -> bytes:
        """Read the next bytes, or None at the end; return those to pass on now.

        Raises:
            CorruptResponse: it cannot be decompressed.
        """
        passed = self.reader.end() if chunk is None else self.reader.feed(chunk)
        if passed:
            self.at_event_boundary = self._events and passed.endswith((b"\n\n", b"\r\n\r\n"))
        if self.reader.corrupt:
            raise CorruptResponse("its response cannot be decompressed")
        return passed


class CorruptResponse(aiohttp.ClientError):
    """The provider's response cannot be decompressed."""


class UnexpectedUpgrade(aiohttp.ClientError):
    """The provider switched to another protocol, unasked."""


class OutOfFiles(aiohttp.ClientError):
    """This process may not open another file, so no connection either. That says nothing about the provider."""


class IncomingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it was received.

    Attributes:
        method: such as ``"POST"``.
        headers: of the request.
        body: its bytes.
        caller: whose request it is.
        read_timeout: seconds without a byte from the provider.
        held_keys: the keys of the gateway, by target and key: it may be sent with one of them.
        on_stored: called with the id of a response that is stored, the target's name, and the key of the gateway with
            which it was made, if that has one; None if nobody needs to know.
        key: the issued key of the caller, or None.
    """

    method: str
    headers: RequestHeaders
    body: bytes
    caller: Caller
    read_timeout: float
    held_keys: Mapping[tuple[str, str], ProviderKey] = MappingProxyType({})
    on_stored: Callable[[str, str, ProviderKey | None], None] | None = None
    key: IssuedKey | None = None


class ForwardedCall(Exchange):
    """The exchange of a gateway's call.

    Args:
        core: of the upstream that paces the call.
        url: of the provider.
        path: of that URL, with the query.
        request: as it was received.
        client: sends it.
        held: the memory that its response takes until it is passed on.
        metrics: of the gateway.
        record: of the request.
        limits: of its callers. A call that falls back holds none of its own.

    Attributes:
        record: of the request, whichever account serves it.
        hold: what it holds of the limits of its callers; closed by whoever passes its answer on.
    """

    __slots__ = (
        *("_client", "_error_type", "_held", "_held_key", "_metrics", "_operation", "_outgoing", "_request"),
        *("_address", "_rerouted", "hold", "record"),
    )

    def __init__(  # noqa: PLR0913 - all that it needs to be sent
        self,
        core: UpstreamCore,
        url: str,
        path: str,
        request: IncomingRequest,
        *,
        client: HttpClient,
        held: BodyReservation,
        metrics: GatewayMetrics,
        record: CallRecord,
        limits: Sequence[CallerLimits] = (),
    ) -> None:
        super().__init__(
            core,
            method=request.method,
            path=path,
            headers=request.headers.by_name,
            body=request.body,
            caller=request.caller,
        )
        self._request = request
        self._address = parse_address(url)
        self._client = client
        self._held = held
        self._metrics = metrics
        self._held_key: ProviderKey | None = None
        if request.held_keys:
            self._held_key = request.held_keys.get((core.name, normalize_credential(self.api_key)))
        self.record = record
        self._operation = Operation(core.name, core.profile.provider, self.parsed.endpoint, self.call_request.model)
        self._error_type = ""
        self._rerouted = False
        self.hold = CallerHold(limits, self.call_request, lambda: record.used)
        changed = self.changed_body
        self._outgoing = OutgoingRequest(
            method=request.method,
            address=self._address,
            headers=request.headers.sent(metered=changed is not None),
            body=request.body if changed is None else changed,
            credentials=request.headers.credentials,
            limits=_time_limits(request.read_timeout),
        )

    def reroute(self, route: FallbackRoute) -> ForwardedCall | None:
        """See `CallRoute`. A call with an issued key goes only where the key may go."""
        key = self._request.key
        if key is not None and not (key.allows_target(route.core.name) and key.allows_model(route.model)):
            return None
        rerouted = self.rerouted_request(route)
        if rerouted is None:
            return None
        request = self._request
        url = self._url_of(rerouted)
        kept = [pair for pair in request.headers.raw if rerouted.keeps(pair[0].decode("latin-1").lower())]
        added = [(name.encode(), value.encode()) for name, value in rerouted.added_headers.items()]
        moved = msgspec.structs.replace(
            request,
            headers=RequestHeaders((*kept, *added)),
            body=rerouted.body,
            caller=msgspec.structs.replace(
                request.caller,
                deadline=self.call_request.deadline,
                api_key=None,
                key_is_held=request.caller.key_is_held or route.api_key is not None,
            ),
        )
        call = ForwardedCall(
            route.core,
            url,
            rerouted.path,
            moved,
            client=self._client,
            held=self._held,
            metrics=self._metrics,
            record=self.record,
        )
        call._rerouted = True
        return call

    def mark_out_of_time(self, result: AttemptResult) -> None:  # noqa: ARG002 - see CallRoute
        """See `CallRoute`. The record adds the header."""
        self.record.out_of_time = True

    @property
    def wire_protocol(self) -> StreamProtocol:
        """The protocol of its events."""
        if self.core.profile.provider == "anthropic":
            return "anthropic"
        return "openai-responses" if self.parsed.endpoint is Endpoint.RESPONSES else "openai"

    def _url_of(self, rerouted: ReroutedRequest) -> str:
        if rerouted.origin is not None:
            return rerouted.origin + rerouted.path
        url = self._address.url
        prefix = url.raw_path_qs.removesuffix(self._path)
        return f"{url.origin()}{prefix}{rerouted.path}"

    async def attempt(self, permit: Permit) -> AttemptResult:
        """Send the call once, and return the result of this attempt."""
        self.record.begin_attempt(self.core.name, self.call_request.model, self.account.name)
        if permit.request.retries:
            self._metrics.count_retry(self._operation)
        self._error_type = ""
        try:
            result = await self._attempt(permit)
        except BaseException as error:
            self._error_type = type(error).__name__
            self._record_end(permit, CallOutcome(kind=Outcome.IGNORED))
            raise
        finally:
            self.record.end_attempt()
        if result.streaming:
            self._metrics.admit(self._operation, self.record)
        else:  # what streams is recorded at its end
            self._record_end(permit, result.outcome)
        if self._rerouted and result.outcome.kind is Outcome.SUCCESS:
            self._metrics.count_fallback(self.record.asked_target, self.core.name)
        return result

    def _record_end(self, permit: Permit, outcome: CallOutcome) -> None:
        seconds = clock.now() - permit.granted_at
        self._metrics.record_attempt(self._operation, outcome, seconds, error_type=self._error_type)

    def _settle_stream(self, permit: Permit, meter: StreamMeter | None, end: StreamEnd) -> None:
        self.record.first_output_at = end.output_at
        if end.kind is not Outcome.SUCCESS:
            self._error_type = "abandoned" if end.kind is Outcome.IGNORED else "incomplete"
        self._record_end(permit, CallOutcome(kind=end.kind))
        first_chunk, first_token = (
            None if at is None else at - permit.granted_at for at in (end.first_chunk_at, end.output_at)
        )
        self._metrics.record_stream(self._operation, first_chunk, first_token)
        super()._settle_stream(permit, meter, end)

    async def _attempt(self, permit: Permit) -> AttemptResult:
        response: ProviderResponse | None = None
        connection: ResponseHandler | None = None
        try:
            response = await self._client.send(self._outgoing)
            connection = connection_of(response)
            headers = Headers.from_wire(response.raw_headers)
            self.record.note_answer(headers)
            returned = _response_headers(response, headers)
            if self.is_streamed(response.status, headers.get("content-type", "")):
                return self._stream(permit, response, headers, returned)
            body, whole = await self._read(response)
            if not whole and response.status < REDIRECTS:
                return self._stream(permit, response, headers, returned, body)
            content = await _decompress(headers, body)
        except BaseException as error:
            result = self._failed(permit, error, connection) if isinstance(error, TRANSPORT_ERRORS) else None
            if response is not None:
                response.close()
            if result is not None:
                return result
            raise
        if whole:
            response.release()
        else:
            response.close()
        result = self.judge_answer(permit, response.status, headers, content)
        if response.status >= ERRORS:
            self._error_type = str(response.status)
        answer = GatewayResponse(response.status, tuple(returned), body, headers.keys())
        result.value = answer if self._held_key is None else self._held_key.passed_on(answer, self.core.name)
        return result

    def _stream(
        self,
        permit: Permit,
        response: ProviderResponse,
        headers: Headers,
        returned: list[tuple[str, str]],
        first_bytes: bytes = b"",
    ) -> AttemptResult:
        result = self.stream_result()
        reader = self.metered_stream(permit, headers, encoding=headers.get("content-encoding", ""))
        result.value = StreamingResponse(response, CIMultiDict(returned), reader, first_bytes)
        return result

    async def _read(self, response: ProviderResponse) -> tuple[bytes, bool]:
        """Return the body as it was sent, as far as it may be held, and whether that is all of it."""
        held = self._held
        held.release()  # of an attempt before
        body = bytearray()  # a list of pieces could take many times its bytes
        is_error = response.status >= REDIRECTS
        try:
            content = response.content
            if content.is_eof() and content.exception() is None and content.total_bytes <= _MAX_ERROR:
                held.grow(content.total_bytes)
                return content.read_nowait(), True  # all of it came with its head
            if not is_error:
                held.expect(response.content_length or 0)
            async for piece in response.content.iter_any():
                body += piece
                if is_error and len(body) > _MAX_ERROR:
                    return bytes(body), False
                held.grow(len(piece))
        except (BodyTooLarge, BodyMemoryFull):
            return bytes(body), False
        return bytes(body), True

    def _failed(self, permit: Permit, error: Exception, connection: ResponseHandler | None) -> AttemptResult:
        """Return the result of an attempt whose connection failed, before the response or within it."""
        self._error_type = type(error).__name__
        if _is_out_of_files(error):
            return self.connection_failed(permit, OutOfFiles(str(error)), local=True)
        sent = not isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
        result = self.connection_failed(permit, error, sent=sent, local=isinstance(error, aiohttp.InvalidURL))
        malformed = connection is not None and isinstance(connection.exception(), HttpProcessingError)
        if malformed or isinstance(error, aiohttp.ClientResponseError | UnexpectedUpgrade):
            result.retryable = False  # the provider would answer the same again, and charge for it
            if _exceeds_our_bounds(error):
                result.outcome = msgspec.structs.replace(result.outcome, kind=Outcome.IGNORED)
        return result

    def call_outcome(
        self,
        permit: Permit,
        kind: Outcome,
        usage: Usage | None,
        answer: ReadAnswer | None = None,
        rate_limit_headers: tuple[RateLimitHeaders, ...] = (),
    ) -> CallOutcome:
        """See `Exchange.call_outcome`; the metrics record the tokens, and the record the usage."""
        if answer is not None and answer.response_id is not None and self._request.on_stored is not None:
            self._request.on_stored(answer.response_id, self.core.name, self._held_key)
        if kind is Outcome.SUCCESS:  # before its tokens are recorded
            self._metrics.admit(self._operation, self.record)
        if usage is not None and not self._was_counted():
            self._metrics.record_tokens(self._operation, usage)
        outcome = super().call_outcome(permit, kind, usage, answer, rate_limit_headers)
        if usage is not None:
            self.record.add_usage(usage, outcome.usd)
        return outcome

    def _was_counted(self) -> bool:
        """Return whether the answer was metered when it was generated: this call fetches it."""
        return self.parsed.free and self.core.background.get(self.parsed.response_id) is None


@functools.lru_cache(maxsize=64)
def _time_limits(read_timeout: float) -> aiohttp.ClientTimeout:
    return aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT, sock_read=read_timeout)


_returned: Final = PassedNames(_NOT_RETURNED, lower=False).__getitem__


def _response_headers(response: ProviderResponse, by_name: Headers) -> list[tuple[str, str]]:
    """Return the headers that the caller gets. They tell its SDK not to retry: retries happen here.

    Args:
        response: of the provider.
        by_name: its headers by lower-case name.

    Raises:
        UnexpectedUpgrade: the provider switched to another protocol.
    """
    if response.status == _SWITCHING_PROTOCOLS:
        raise UnexpectedUpgrade("the provider switched to another protocol, unasked")
    raw = response.raw_headers
    headers = [(_returned(name), value.decode("utf-8", "surrogateescape")) for name, value in raw]
    if not "".join([value for _, value in headers]).isprintable():  # at least one of them is not
        headers = [(name, printable(value)) for name, value in headers]
    connection = by_name.get("connection")
    hop_by_hop = hop_by_hop_names(None if connection is None else connection.lower(), raw)
    if hop_by_hop is DROPPED:
        headers = [pair for pair in headers if pair[0]]
    else:
        headers = [pair for pair in headers if pair[0].lower() not in hop_by_hop]
    headers.append(("x-should-retry", "false"))
    return headers


async def _decompress(headers: Headers, body: bytes) -> bytes:
    """Return a body without its Content-Encoding, of a long one only the end; nothing if it cannot be decompressed."""
    encoding = headers.get("content-encoding")
    if not encoding:
        return body
    if len(body) <= _DECOMPRESSED_AT_ONCE:
        return decompress_end(encoding, body, least=_MAX_METERED)
    decompress = functools.partial(decompress_end, encoding, body, least=_MAX_METERED)
    return await asyncio.get_running_loop().run_in_executor(None, decompress)  # zlib does not hold the GIL


def _is_out_of_files(error: BaseException | None) -> bool:
    """Return whether the cause of an error is that this process, or the machine, has too many files open."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _OUT_OF_FILES:
            return True
        error = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error.__cause__
    return False


def _exceeds_our_bounds(error: BaseException | None) -> bool:
    """Return whether the head of a response has more than this gateway reads, which is no fault of the provider."""
    while error is not None:
        if isinstance(error, LineTooLong) or "Too many headers" in str(error):
            return True
        error = error.__cause__
    return False
