"""What becomes of each request: whose it is, where it goes, and how its answer comes back."""

from __future__ import annotations

import asyncio
import contextlib
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
from forebay.gateway.caller import TOKEN_HEADER, CallerReader, InvalidHeader, read_client_timeouts
from forebay.gateway.error_responses import (
    JSON,
    ApiProtocol,
    EarlyResponse,
    GatewayResponse,
    capacity_response,
    error_response,
    overloaded_response,
    stream_error_event,
)
from forebay.gateway.forwarded_call import TRANSPORT_ERRORS, ForwardedCall, IncomingRequest, StreamingResponse
from forebay.gateway.http_client import HttpClient
from forebay.gateway.http_proxy import http_proxy_for, origin_of
from forebay.gateway.metrics import GatewayMetrics
from forebay.gateway.request_body import read_body
from forebay.gateway.request_validator import RequestValidator
from forebay.gateway.settings import GatewaySettings
from forebay.gateway.targets import Destination, Target, detect_protocol, find_destination, make_targets
from forebay.upstream.providers import Endpoint, Headers

_JSON_ROUTES: Final = frozenset(
    {
        Endpoint.CHAT,
        Endpoint.COMPLETIONS,
        Endpoint.RESPONSES,
        Endpoint.EMBEDDINGS,
        Endpoint.MESSAGES,
        Endpoint.COUNT_TOKENS,
    }
)
_LONGEST: Final = 300  # characters of an error that are told
_COME_BACK: Final = 4.0  # seconds, on average, after which there may be room for a body
_GONE: Final = 499  # as nginx counts a caller that hung up
_object: Final = msgspec.json.Decoder(dict[str, Any])


class Forwarder:
    """Answers requests.

    Args:
        settings: of the gateway.
        environment: where its secrets are.
        session: that sends calls on.

    Raises:
        InvalidSecret: a secret is not there, or is not fit for one.
        InvalidSetting: a fallback leads to where calls cannot go; a proxy of the environment is none.
    """

    def __init__(
        self, settings: GatewaySettings, environment: Mapping[str, str], *, session: aiohttp.ClientSession
    ) -> None:
        self._settings = settings
        self.targets = make_targets(settings, environment)
        proxies = {origin_of(target.base_url): http_proxy_for(target.base_url, environment) for target in self.targets}
        self._outgoing = HttpClient(session, {origin: proxy for origin, proxy in proxies.items() if proxy is not None})
        self.metrics = GatewayMetrics(self.targets)
        self._senders = CallerReader(settings.trust, settings.token(environment), settings.context.tenant_headers)
        self._guard = RequestValidator(
            max_header_bytes=settings.max_header_bytes, local_only=settings.address.loopback and not settings.has_token
        )
        self.body_memory = BodyMemory(settings.max_body_bytes, settings.max_held_bytes)
        self.draining = False
        self._under_way = 0
        self._limits: set[asyncio.Timeout] = set()  # of those that can be cut off
        self._cut = False
        self.idle = asyncio.Event()
        self.idle.set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        headers = Headers.from_wire(request.raw_headers)
        try:
            self._let_in(request, headers)
            if (own := self._own(request.raw_path, headers)) is not None:
                return self._close_early(request, own)
            place = self._place(request.raw_path, headers)
        except EarlyResponse as answered:
            return self._close_early(request, _whole(answered.response, close=answered.close))
        began = clock.now()
        status = _GONE
        self._under_way += 1
        self.idle.clear()
        try:
            with self.body_memory.reserve() as body:
                response = await self._pass(request, headers, place, body)
            status = response.status
        except EarlyResponse as answered:
            response = self._close_early(request, _whole(answered.response, close=answered.close))
            status = response.status
        finally:
            self.metrics.count_response(place.target.name, status, clock.now() - began)
            self._under_way -= 1
            if not self._under_way:
                self.idle.set()
        return response

    def abort(self) -> None:
        """End what is still under way."""
        if self._limits:
            log.warning("cut off, for they did not end in time: %d of the calls under way", len(self._limits))
        self._cut = True
        for limit in self._limits:
            if not limit.expired():  # it was cut off before, and is on its way out
                limit.reschedule(0.0)

    @contextlib.asynccontextmanager
    async def _until_cut_off(self) -> AsyncIterator[None]:
        """Raises TimeoutError when it is cut off."""
        async with asyncio.timeout(0.0 if self._cut else None) as limit:
            self._limits.add(limit)
            try:
                yield
            finally:
                self._limits.discard(limit)

    def _close_early(self, request: web.BaseRequest, response: web.Response) -> web.Response:
        """Close the connection where its next request would not be found, or not be served."""
        if self.draining or not request.content.is_eof():
            response.force_close()
        return response

    def _let_in(self, request: web.BaseRequest, headers: Headers) -> None:
        found = self._guard.find_error(request.method, headers, request.raw_headers)
        if found is not None:
            protocol = detect_protocol(request.raw_path, headers)
            raise EarlyResponse(error_response(protocol, found.status, found.code, found.message), close=True)

    def _own(self, path: str, headers: Headers) -> web.Response | None:
        """The answer to what is asked of the gateway itself, for whoever may ask."""
        if path == "/healthz":
            body = msgspec.json.encode({"status": "draining" if self.draining else "ok"})
            return web.Response(status=503 if self.draining else 200, body=body, content_type=JSON)
        if not self._senders.is_authorized(headers):
            message = f"this gateway wants its token in the header {TOKEN_HEADER}"
            raise EarlyResponse(error_response(detect_protocol(path, headers), 401, "forebay_token", message))
        if path == "/metrics":
            return web.Response(body=self.metrics.render(), headers={"content-type": "text/plain; version=0.0.4"})
        return None

    def _place(self, path: str, headers: Headers) -> Destination:
        """Where a request goes."""
        protocol = detect_protocol(path, headers)
        if self.draining:
            raise _draining(protocol)
        place = find_destination(self.targets, path, headers)
        if place is None:
            names = ", ".join(f"/{target.name}/v1/..." for target in self.targets)
            there = f"/v1/... (by what is spoken), {names}, /healthz, /metrics"
            message = f"nothing is behind {path[:200]!r} here: there are {there}"
            raise EarlyResponse(error_response(protocol, 404, "forebay_no_such_path", message))
        return place

    async def _pass(
        self, request: web.BaseRequest, headers: Headers, place: Destination, body: BodyReservation
    ) -> web.StreamResponse:
        target = place.target
        try:
            async with self._until_cut_off():
                value = await self._ask(request, headers, place, body)
        except TimeoutError:
            raise _draining(target.protocol) from None
        if isinstance(value, GatewayResponse):
            return self._close_early(request, _whole(value))
        return await self._stream(request, value, target.protocol)

    async def _ask(self, request: web.BaseRequest, headers: Headers, place: Destination, body: BodyReservation) -> Any:
        """What the provider answers: an `Answer`, or one that is `StreamingResponse`.

        Raises:
            Answered: it does not.
        """
        target = place.target
        passage = await self._passage(request, headers, place, body)
        try:
            return await target.upstream.runner.run(passage, ForwardedCall.attempt)
        except Overloaded as error:
            self.metrics.count_rejection(target.name, (error.limited_by or "").rpartition(":")[2])
            raise EarlyResponse(overloaded_response(target.protocol, error)) from None
        except TRANSPORT_ERRORS as error:
            message = f"the provider {target.name!r} could not be reached, or broke off: {_why(error)}"
            raise EarlyResponse(error_response(target.protocol, 502, "forebay_upstream_failed", message)) from None

    async def _passage(
        self, request: web.BaseRequest, headers: Headers, place: Destination, body: BodyReservation
    ) -> ForwardedCall:
        """A request, read and found fit to be sent on."""
        target = place.target
        try:
            offset = clock.now() - clock.wall_time()
            sender = self._senders.read(headers, offset=offset, shared_account=target.settings.share_keys)
        except InvalidHeader as error:
            raise EarlyResponse(
                error_response(target.protocol, 400, "forebay_bad_header", str(error)), close=True
            ) from None
        try:
            content = await read_body(request, body, self._settings, target.protocol)
        except BodyMemoryFull:
            raise self._no_room(target) from None
        asked = IncomingRequest(
            method=request.method,
            raw_headers=request.raw_headers,
            headers=headers,
            body=content,
            caller=sender,
            timeouts=read_client_timeouts(headers),
        )
        passage = ForwardedCall(
            target.upstream.core, place.url, place.path, asked, client=self._outgoing, metrics=self.metrics
        )
        _object_to(passage, asked.body, target.protocol)
        return passage

    async def _stream(
        self, request: web.BaseRequest, opened: StreamingResponse, protocol: ApiProtocol
    ) -> web.StreamResponse:
        """Pass an answer on while it comes."""
        answer = opened.response
        response = web.StreamResponse(status=answer.status, reason=answer.reason, headers=opened.headers)
        try:
            try:
                async with self._until_cut_off():
                    await response.prepare(request)
                    broke = await _copy(opened, response)
            except TimeoutError:
                broke = "this gateway is shut down"
            if not broke:
                answer.release()
            elif opened.at_event_boundary and not (self._cut and request.protocol.writing_paused):
                await response.write(stream_error_event(protocol, broke))
            else:
                raise ConnectionResetError  # what follows would be taken for the rest of what has begun
            await response.write_eof()
        finally:
            opened.reader.abandon()
            answer.close()
        return response

    def _no_room(self, target: Target) -> EarlyResponse:
        """Nothing is read of a body for which there is no room; whoever sends it comes back, each at another time."""
        self.metrics.count_rejection(target.name, "bodies")
        most = self._settings.max_held_bytes
        message = f"the calls under way here hold {most:,} bytes together (max_held_bytes), or would with this one"
        seconds = _COME_BACK * (0.5 + clock.draw())
        return EarlyResponse(capacity_response(target.protocol, "forebay_bodies", message, seconds=seconds), close=True)


async def _copy(opened: StreamingResponse, response: web.StreamResponse) -> str:
    """Pass an answer on to its end; returns why it broke off, or nothing."""
    chunks = opened.response.content.iter_any()
    chunk: bytes | None = b""
    while chunk is not None:
        try:
            chunk = await anext(chunks, None)
        except TRANSPORT_ERRORS as error:
            opened.reader.fail()
            return f"the provider broke off: {_why(error)}"
        if passed := opened.feed(chunk):
            await response.write(passed)
    return ""


def _object_to(passage: ForwardedCall, body: bytes, protocol: ApiProtocol) -> None:
    """Answer what its provider need not be asked about.

    Raises:
        Answered: it is wrong.
    """
    if passage.parsed.websocket:
        message = "WebSockets do not pass this gateway, for nothing on them can be metered: connect to the provider"
        raise EarlyResponse(error_response(protocol, 400, "forebay_websocket", message), close=True)
    if passage.parsed.endpoint in _JSON_ROUTES and not passage.parsed.signed and not passage.parsed.input_tokens:
        try:  # nothing was found in it to be sent: why not?
            _object.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            message = f"the body is no JSON object: {error}"
            raise EarlyResponse(error_response(protocol, 400, "forebay_bad_json", message)) from None


def _draining(protocol: ApiProtocol) -> EarlyResponse:
    back = ("retry-after-ms", "1000")
    message = "this gateway is shutting down: call again"
    return EarlyResponse(error_response(protocol, 503, "forebay_draining", message, back), close=True)


def _whole(answer: GatewayResponse, *, close: bool = False) -> web.Response:
    response = web.Response(status=answer.status, headers=CIMultiDict(answer.headers), body=answer.body)
    if close:
        response.force_close()
    return response


def _why(error: BaseException) -> str:
    """What went wrong on the way to a provider; its address is left out, for that of a proxy may hold a password."""
    if isinstance(error, aiohttp.ClientHttpProxyError):
        return f"the HTTP proxy on the way there answered {error.status} {error.message}"[:_LONGEST]
    text = error.message if isinstance(error, aiohttp.ClientResponseError) else str(error)
    return (text or type(error).__name__)[:_LONGEST]
