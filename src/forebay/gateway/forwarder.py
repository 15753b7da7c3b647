"""The forwarder: authorizes each request, sends it to its target through an upstream, and returns the response."""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Mapping
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict

from forebay import clock
from forebay.errors import Overloaded
from forebay.events import log
from forebay.gateway.body_memory import BodyMemory, BodyMemoryFull, BodyReservation
from forebay.gateway.caller import TOKEN_HEADER, CallerReader, InvalidHeader, check_one_credential
from forebay.gateway.client_timeouts import ClientTimeoutReader
from forebay.gateway.deployments import ModelDirectory, WrongProtocol
from forebay.gateway.error_responses import (
    JSON,
    ApiProtocol,
    EarlyResponse,
    GatewayResponse,
    capacity_response,
    error_response,
    overloaded_response,
    printable,
    stream_error_event,
)
from forebay.gateway.forwarded_call import (
    TRANSPORT_ERRORS,
    CorruptResponse,
    ForwardedCall,
    IncomingRequest,
    OutOfFiles,
    StreamingResponse,
)
from forebay.gateway.http_client import HttpClient
from forebay.gateway.metrics import GatewayMetrics
from forebay.gateway.model_list import is_model_list, model_in_path, model_response, with_aliases
from forebay.gateway.request_body import read_body
from forebay.gateway.request_validator import RequestValidator
from forebay.gateway.rewritten_request import NotRewritable, rewrite_request, without_compression
from forebay.gateway.settings import GatewaySettings
from forebay.gateway.targets import Destination, Target, detect_protocol, find_destination, make_targets
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.providers import Endpoint, Headers
from forebay.upstream.providers.json_text import replace_lone_surrogates

_JSON_ENDPOINTS: Final = frozenset(
    {
        Endpoint.CHAT,
        Endpoint.COMPLETIONS,
        Endpoint.RESPONSES,
        Endpoint.EMBEDDINGS,
        Endpoint.MESSAGES,
        Endpoint.COUNT_TOKENS,
    }
)
_MAX_SHOWN: Final = 300  # characters of an error in a message
_MAX_PATH_SHOWN: Final = 200
_MAX_HELD_RESPONSE: Final = 16 << 20  # bytes; a longer response is passed on as it arrives
_MAX_COMPRESSED_PART: Final = 1 << 13  # bytes of a compressed stream that are read in one turn of the event loop
_MAX_PART: Final = 1 << 18  # bytes of any other that are passed on at a time
_FILES_RETRY_AFTER: Final = 2.0  # seconds, on average, until other calls may have ended
_FILES_LOG_INTERVAL: Final = 10.0  # seconds
_BODY_RETRY_AFTER: Final = 4.0  # seconds, on average, until there may be memory for a body
_CLIENT_CLOSED: Final = 499  # nginx's status for a caller that disconnected
_BUG, _BAD_GATEWAY, _UNAVAILABLE = 500, 502, 503
_object: Final = msgspec.json.Decoder(dict[str, Any])


class _CutOff(ConnectionResetError):
    """A response broke off where nothing can say so but the end of its connection.

    Args:
        status: that it counts as.
    """

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class Forwarder:
    """The request handler of a gateway.

    Args:
        settings: of the gateway.
        environment: variables with its secrets, and with the HTTP proxies of its providers.
        session: sends the calls.

    Attributes:
        targets: the providers.
        metrics: of the gateway.
        body_memory: the memory that request bodies take.
        response_memory: the memory that responses take.
        draining: new calls are rejected.

    Raises:
        InvalidSecret: the token is missing, or not fit to be one.
        MissingFallbackKey: the API key of a fallback is missing.
        InvalidProviderKey: the API key of a target is missing, or a header cannot carry it.
        InvalidSetting: a fallback leads to a target of another protocol, or an HTTP proxy is invalid.
    """

    def __init__(
        self, settings: GatewaySettings, environment: Mapping[str, str], *, session: aiohttp.ClientSession
    ) -> None:
        self._settings = settings
        self.targets = make_targets(settings, environment)
        self._held_keys = {key.key: key for target in self.targets for key in target.keys}
        self._models = ModelDirectory(settings.models, self.targets)
        self.metrics = GatewayMetrics(self.targets, max_accounts=settings.max_metrics_accounts)
        self.body_memory = BodyMemory(settings.max_body_bytes, settings.max_held_bytes)
        self.response_memory = BodyMemory(_MAX_HELD_RESPONSE, settings.max_held_response_bytes)
        self._client = HttpClient(session, [target.base_url for target in self.targets], environment)
        self._callers = CallerReader(settings.trust, settings.token(environment), settings.context.tenant_headers)
        self._client_timeouts = ClientTimeoutReader(settings.client_timeout)
        self._validator = RequestValidator(
            max_header_bytes=settings.max_header_bytes,
            local_only=settings.address.loopback and not settings.has_token,
        )
        self.draining = False
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._abortable: set[asyncio.Timeout] = set()
        self._aborted = False
        self._files_logged_at = -math.inf

    def drain(self) -> None:
        """Reject new calls from now on."""
        self.draining = True

    async def wait_idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()

    def abort(self) -> None:
        """End the calls in progress with an error."""
        if self._abortable:
            log.warning("aborting %d calls that are still in progress", len(self._abortable))
        self._aborted = True
        for timeout in self._abortable:
            if not timeout.expired():  # else it was aborted before, and has not noticed yet
                timeout.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def _abortable_block(self) -> AsyncIterator[None]:
        """Run a block that raises TimeoutError when `abort` is called."""
        async with asyncio.timeout(0.0 if self._aborted else None) as timeout:
            self._abortable.add(timeout)
            try:
                yield
            finally:
                self._abortable.discard(timeout)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Return the response to one request."""
        headers = Headers.from_wire(request.raw_headers)
        try:
            self._validate(request, headers)
            if (own := self._own_response(request.raw_path.partition("?")[0], headers)) is not None:
                return self._close_if_needed(request, own)
            destination = self._find_destination(request.raw_path, headers)
            if (own := self._alias_response(request.method, destination)) is not None:
                return self._close_if_needed(request, own)
        except EarlyResponse as early:
            return self._close_if_needed(request, _to_aiohttp(early.response, close=early.close))
        started = clock.now()
        status = _CLIENT_CLOSED
        self._in_progress += 1
        self._idle.clear()
        try:
            with BodyReservation(self.body_memory) as body, BodyReservation(self.response_memory) as held:
                response, status = await self._forward(request, headers, destination, body, held)
        except EarlyResponse as early:
            response = self._close_if_needed(request, _to_aiohttp(early.response, close=early.close))
            status = response.status
        except _CutOff as cut:
            status = cut.status
            raise
        except (asyncio.CancelledError, ConnectionError):  # the caller has gone
            raise
        except BaseException:
            status = _BUG
            raise
        finally:
            self.metrics.count_response(destination.target.name, status, clock.now() - started)
            self._in_progress -= 1
            if not self._in_progress:
                self._idle.set()
        return response

    def _close_if_needed(self, request: web.BaseRequest, response: web.Response) -> web.Response:
        """Close the connection after this response while draining, or if the body of the request was not read."""
        if self.draining or not request.content.is_eof():
            response.force_close()
        return response

    def _validate(self, request: web.BaseRequest, headers: Headers) -> None:
        error = self._validator.find_error(request.method, headers, request.raw_headers)
        if error is not None:
            protocol = detect_protocol(request.raw_path, headers)
            raise EarlyResponse(error_response(protocol, error.status, error.code, error.message), close=True)

    def _own_response(self, path: str, headers: Headers) -> web.Response | None:
        """Return the response of the gateway's own pages, or None for a call.

        Raises:
            EarlyResponse: the caller is not authorized.
        """
        if path == "/healthz":
            body = msgspec.json.encode({"status": "draining" if self.draining else "ok"})
            return web.Response(status=503 if self.draining else 200, body=body, content_type=JSON)
        if not self._callers.is_authorized(headers):
            message = f"this gateway needs its token in the header {TOKEN_HEADER}"
            raise EarlyResponse(error_response(detect_protocol(path, headers), 401, "forebay_token", message))
        if path == "/metrics":
            return web.Response(body=self.metrics.render(), headers={"content-type": "text/plain; version=0.0.4"})
        return None

    def _find_destination(self, path: str, headers: Headers) -> Destination:
        """Return the destination of a call.

        Raises:
            EarlyResponse: the gateway is draining, or no target has this path.
        """
        protocol = detect_protocol(path, headers)
        if self.draining:
            raise _draining_response(protocol)
        destination = find_destination(self.targets, path, headers)
        if destination is None:
            names = ", ".join(f"/{target.name}/v1/..." for target in self.targets)
            paths = f"/v1/... (by the protocol of the call), {names}, /healthz, /metrics"
            shown = path.partition("?")[0][:_MAX_PATH_SHOWN]  # a query may contain an API key
            message = f"the path {shown!r} leads nowhere; the paths of this gateway are {paths}"
            raise EarlyResponse(error_response(protocol, 404, "forebay_no_such_path", message))
        return destination

    def _alias_response(self, method: str, destination: Destination) -> web.Response | None:
        """Return the description of an alias (``/v1/models/NAME``); None for any other request."""
        aliases = self._models.aliases
        if destination.by_name or not aliases or (name := model_in_path(method, destination.path)) not in aliases:
            return None
        return _to_aiohttp(model_response(name, aliases[name] or destination.target.protocol))

    async def _forward(
        self,
        request: web.BaseRequest,
        headers: Headers,
        destination: Destination,
        body: BodyReservation,
        held: BodyReservation,
    ) -> tuple[web.StreamResponse, int]:
        """Return the response, which has been written, and the status that it counts as."""
        try:
            async with self._abortable_block():
                call, runner = await self._read_call(request, headers, destination, body, held)
                started = clock.now()
                try:
                    answer = await self._call(call, runner, destination.target)
                except asyncio.CancelledError:
                    if not self.draining:
                        now = clock.now()
                        self._client_timeouts.record_hang_up(now, headers, now - started)
                    raise
                now = clock.now()
                self._client_timeouts.record_answer(now, headers, now - started)
        except TimeoutError:
            raise _draining_response(destination.target.protocol) from None
        if isinstance(answer, StreamingResponse):
            return await self._stream(request, answer, call, held)
        if self._lists_aliases(request.method, destination):
            answer = with_aliases(answer, self._models.aliases, destination.target.protocol)
        response = self._close_if_needed(request, _to_aiohttp(answer))
        await response.prepare(request)
        await response.write_eof()  # until its caller has taken it, it is held
        return response, response.status

    def _lists_aliases(self, method: str, destination: Destination) -> bool:
        """Return whether a request asks for the list of models to which the aliases are added."""
        return not destination.by_name and bool(self._models.aliases) and is_model_list(method, destination.path)

    async def _call(
        self, call: ForwardedCall, runner: CallRunner, target: Target
    ) -> GatewayResponse | StreamingResponse:
        """Return the provider's response.

        Raises:
            EarlyResponse: the upstream rejected the call, or its last attempt failed.
        """
        try:
            answer: GatewayResponse | StreamingResponse = await runner.run(call, ForwardedCall.attempt)
        except Overloaded as error:
            self.metrics.count_rejection(target.name, (error.limited_by or "").rpartition(":")[2])
            raise EarlyResponse(overloaded_response(target.protocol, error)) from None
        except OutOfFiles:
            raise self._out_of_files(target) from None
        except TRANSPORT_ERRORS as error:
            message = f"the provider {target.name!r} could not be reached, or broke off: {_describe(error)}"
            raise EarlyResponse(error_response(target.protocol, 502, "forebay_upstream_failed", message)) from None
        return answer

    async def _read_call(
        self,
        request: web.BaseRequest,
        headers: Headers,
        destination: Destination,
        reservation: BodyReservation,
        held: BodyReservation,
    ) -> tuple[ForwardedCall, CallRunner]:
        """Read a request, and return the call to make, and what runs it.

        Raises:
            EarlyResponse: a header or the body is invalid, or the bodies of all calls take too much memory.
        """
        target = destination.target
        try:
            offset = clock.now() - clock.wall_time()
            caller = self._callers.read(
                headers, offset=offset, shared_account=target.settings.share_keys and not target.keys
            )
            if caller.api_key is None and not target.keys:
                check_one_credential(headers, destination.path, target.upstream.core.profile.provider)
        except InvalidHeader as error:
            response = error_response(target.protocol, 400, "forebay_bad_header", str(error))
            raise EarlyResponse(response, close=True) from None
        try:
            body = await read_body(request, reservation, self._settings, target.protocol)
        except BodyMemoryFull:
            raise self._body_memory_full(target) from None
        now = clock.now()
        timeouts = self._client_timeouts.read(now, headers)
        incoming = IncomingRequest(
            method=request.method,
            raw_headers=request.raw_headers,
            headers=headers,
            body=body,
            caller=msgspec.structs.replace(caller, deadline=min(caller.deadline, now + timeouts.max_wait)),
            read_timeout=timeouts.read_timeout,
            held_keys=self._held_keys,
        )
        if self._lists_aliases(request.method, destination):
            incoming = without_compression(incoming)  # it is read
        incoming, destination, runner = self._choose_deployment(incoming, destination)
        call = ForwardedCall(
            destination.target.upstream.core,
            destination.url,
            destination.path,
            incoming,
            client=self._client,
            held=held,
            metrics=self.metrics,
        )
        _check_call(call, body, target.protocol)
        return call, runner

    def _choose_deployment(
        self, incoming: IncomingRequest, destination: Destination
    ) -> tuple[IncomingRequest, Destination, CallRunner]:
        """Return a request as the deployment of its model takes it, where it goes, and what runs its call.

        Raises:
            EarlyResponse: the model speaks another protocol, its name cannot be replaced, or two keys are given.
        """
        target = destination.target
        try:
            chosen = self._models.find(destination, incoming.body)
            if chosen is None:
                return incoming, destination, target.upstream.runner
            incoming = msgspec.structs.replace(incoming, on_stored=self._models.record_stored)
            return rewrite_request(incoming, destination, chosen)
        except (WrongProtocol, NotRewritable) as error:
            raise EarlyResponse(error_response(target.protocol, 400, "forebay_model", str(error))) from None
        except InvalidHeader as error:
            raise EarlyResponse(error_response(target.protocol, 400, "forebay_bad_header", str(error))) from None

    async def _stream(
        self, request: web.BaseRequest, streaming: StreamingResponse, call: ForwardedCall, held: BodyReservation
    ) -> tuple[web.StreamResponse, int]:
        """Pass a response on as it arrives; return it, and the status that it counts as.

        Raises:
            ConnectionError: the caller has gone, or its connection is to be cut, since the response broke off.
        """
        upstream = streaming.response
        try:
            response = web.StreamResponse(
                status=upstream.status, reason=printable(upstream.reason or ""), headers=streaming.headers
            )
            if streaming.length is not None:
                response.content_length = streaming.length
            status = response.status
            try:
                async with self._abortable_block():
                    await response.prepare(request)
                    problem = await _copy(streaming, held, response)
                if problem:
                    status = _BAD_GATEWAY
            except TimeoutError:
                problem, status = "this gateway was shut down", _UNAVAILABLE
            if not problem:
                upstream.release()
            elif streaming.at_event_boundary and not (self._aborted and request.protocol.writing_paused):
                await response.write(stream_error_event(call.wire_protocol, problem))
            else:
                raise _CutOff(status)  # an error event would be read as the rest of an unfinished event
            await response.write_eof()
        finally:
            try:
                streaming.reader.abandon()
            finally:
                upstream.close()
        return response, status

    def _out_of_files(self, target: Target) -> EarlyResponse:
        """Return the response to a call for which no connection can be opened. Callers retry spread out."""
        self.metrics.count_rejection(target.name, "files")
        if clock.now() >= self._files_logged_at + _FILES_LOG_INTERVAL:
            self._files_logged_at = clock.now()
            log.warning("no connection to %s could be opened: this process has too many open files", target.name)
        message = "this gateway has as many open files as it may have: raise its limit, or lower max_connections"
        seconds = _FILES_RETRY_AFTER * (0.5 + clock.draw())
        response = capacity_response(
            target.protocol, "forebay_files", message, seconds=seconds, limited_by="host:files"
        )
        return EarlyResponse(response)

    def _body_memory_full(self, target: Target) -> EarlyResponse:
        """Return the response to a call without memory for its body, which is not read. Callers retry spread out."""
        self.metrics.count_rejection(target.name, "bodies")
        limit = self._settings.max_held_bytes
        message = f"with this call the bodies of all calls would exceed {limit:,} bytes together (max_held_bytes)"
        seconds = _BODY_RETRY_AFTER * (0.5 + clock.draw())
        return EarlyResponse(capacity_response(target.protocol, "forebay_bodies", message, seconds=seconds), close=True)


async def _copy(streaming: StreamingResponse, held: BodyReservation, response: web.StreamResponse) -> str:
    """Pass a response on to its end; return why it broke off, or an empty string."""
    chunks = streaming.response.content.iter_any()
    chunk: bytes | None = streaming.take_first_bytes()
    try:
        while chunk is not None:
            await _pass_on(chunk, streaming, response)
            held.release()  # what had arrived before
            streaming.reader.wait()
            try:
                chunk = await anext(chunks, None)
            except TRANSPORT_ERRORS as error:  # of the provider: an error of the caller's connection is another
                return _broke_off(streaming, error)
        if passed := streaming.feed(None):
            await response.write(passed)
    except CorruptResponse as error:
        return _broke_off(streaming, error)
    return ""


async def _pass_on(chunk: bytes, streaming: StreamingResponse, response: web.StreamResponse) -> None:
    """Pass a chunk on in parts, with a turn of the event loop between them: a compressed one may become much longer.

    Raises:
        CorruptResponse: it cannot be decompressed.
    """
    size = _MAX_COMPRESSED_PART if streaming.compressed else _MAX_PART
    for start in range(0, len(chunk), size):
        if start:
            await asyncio.sleep(0)
        if passed := streaming.feed(chunk[start : start + size]):
            await response.write(passed)


def _broke_off(streaming: StreamingResponse, error: Exception) -> str:
    streaming.reader.fail(error)
    return f"the provider broke off: {_describe(error)}"


def _check_call(call: ForwardedCall, body: bytes, protocol: ApiProtocol) -> None:
    """Check a call for mistakes that are certain before its provider is asked.

    Raises:
        EarlyResponse: it opens a WebSocket, or its body is not the JSON object that its endpoint needs.
    """
    parsed = call.parsed
    if parsed.websocket:
        message = "WebSockets do not pass this gateway, since they cannot be metered: connect to the provider directly"
        raise EarlyResponse(error_response(protocol, 400, "forebay_websocket", message), close=True)
    if parsed.endpoint in _JSON_ENDPOINTS and not parsed.signed and not parsed.input_tokens:
        try:  # no input was found: is the body valid at all?
            _object.decode(replace_lone_surrogates(body))
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            message = f"the body is not a JSON object: {error}"
            raise EarlyResponse(error_response(protocol, 400, "forebay_bad_json", message)) from None


def _draining_response(protocol: ApiProtocol) -> EarlyResponse:
    message = "this gateway is shutting down: call again"
    response = error_response(protocol, 503, "forebay_draining", message, ("retry-after-ms", "1000"))
    return EarlyResponse(response, close=True)


def _to_aiohttp(response: GatewayResponse, *, close: bool = False) -> web.Response:
    result = web.Response(status=response.status, headers=CIMultiDict(response.headers), body=response.body)
    if close:
        result.force_close()
    return result


def _describe(error: BaseException) -> str:
    """Return the message of a transport error, without URLs: that of an HTTP proxy may contain a password."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the HTTP proxy answered {error.status} {error.message}"[:_MAX_SHOWN]
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    return (text or type(error).__name__)[:_MAX_SHOWN]
