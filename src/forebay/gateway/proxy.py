"""What becomes of each request: whose it is, where it goes, and how its answer comes back."""

from __future__ import annotations

import asyncio
import contextlib
import functools
from collections.abc import AsyncIterator, Awaitable, Mapping
from typing import Any, Final

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict

from forebay import clock
from forebay.errors import Overloaded
from forebay.events import log
from forebay.gateway.bodies import Bodies, Body, NoRoom
from forebay.gateway.egress import origin_of, proxy_of
from forebay.gateway.guard import Guard
from forebay.gateway.intake import read_body
from forebay.gateway.metrics import Counts
from forebay.gateway.outgoing import Outgoing
from forebay.gateway.passage import FAILURES, Asked, Opened, Passage
from forebay.gateway.route import Place, Target, find_place, make_targets, spoken
from forebay.gateway.sender import TOKEN_HEADER, BadHeader, Senders, patience
from forebay.gateway.settings import GatewaySettings
from forebay.gateway.shapes import JSON, Answer, Answered, Protocol, broken_stream, full, problem, refusal
from forebay.upstream.attempt import Tried
from forebay.upstream.drive import conclude
from forebay.upstream.journey import travel
from forebay.upstream.rules import Plain, Route

_JSON_ROUTES: Final = frozenset(
    {Route.CHAT, Route.COMPLETIONS, Route.RESPONSES, Route.EMBEDDINGS, Route.MESSAGES, Route.COUNT_TOKENS}
)
_LONGEST: Final = 300  # characters of an error that are told
_COME_BACK: Final = 4.0  # seconds, on average, after which there may be room for a body
_GONE: Final = 499  # as nginx counts a caller that hung up
_object: Final = msgspec.json.Decoder(dict[str, Any])


class Proxy:
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
        proxies = {origin_of(target.base): proxy_of(target.base, environment) for target in self.targets}
        self._outgoing = Outgoing(session, {origin: proxy for origin, proxy in proxies.items() if proxy is not None})
        self.counts = Counts(self.targets)
        self._senders = Senders(settings.trust, settings.token(environment), settings.context.tenant_headers)
        self._guard = Guard(
            most=settings.max_header_bytes, own_only=settings.address.loopback and not settings.has_token
        )
        self.bodies = Bodies(settings.max_body_bytes, settings.max_held_bytes)
        self.draining = False
        self._under_way = 0
        self._limits: set[asyncio.Timeout] = set()  # of those that can be cut off
        self._cut = False
        self.idle = asyncio.Event()
        self.idle.set()

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Answer one request."""
        headers = Plain.of_wire(request.raw_headers)
        try:
            self._let_in(request, headers)
            if (own := self._own(request.raw_path, headers)) is not None:
                return self._close_early(request, own)
            place = self._place(request.raw_path, headers)
        except Answered as answered:
            return self._close_early(request, _whole(answered.answer, close=answered.close))
        began = clock.now()
        status = _GONE
        self._under_way += 1
        self.idle.clear()
        try:
            with self.bodies.body() as body:
                response = await self._pass(request, headers, place, body)
            status = response.status
        except Answered as answered:
            response = self._close_early(request, _whole(answered.answer, close=answered.close))
            status = response.status
        finally:
            self.counts.answered(place.target.name, status, clock.now() - began)
            self._under_way -= 1
            if not self._under_way:
                self.idle.set()
        return response

    def cut_off(self) -> None:
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

    def _let_in(self, request: web.BaseRequest, headers: Plain) -> None:
        found = self._guard.objection(request.method, headers, request.raw_headers)
        if found is not None:
            protocol = spoken(request.raw_path, headers)
            raise Answered(problem(protocol, found.status, found.code, found.message), close=True)

    def _own(self, path: str, headers: Plain) -> web.Response | None:
        """The answer to what is asked of the gateway itself, for whoever may ask."""
        if path == "/healthz":
            body = msgspec.json.encode({"status": "draining" if self.draining else "ok"})
            return web.Response(status=503 if self.draining else 200, body=body, content_type=JSON)
        if not self._senders.may_enter(headers):
            message = f"this gateway wants its token in the header {TOKEN_HEADER}"
            raise Answered(problem(spoken(path, headers), 401, "forebay_token", message))
        if path == "/metrics":
            return web.Response(body=self.counts.text(), headers={"content-type": "text/plain; version=0.0.4"})
        return None

    def _place(self, path: str, headers: Plain) -> Place:
        """Where a request goes."""
        protocol = spoken(path, headers)
        if self.draining:
            raise _draining(protocol)
        place = find_place(self.targets, path, headers)
        if place is None:
            names = ", ".join(f"/{target.name}/v1/..." for target in self.targets)
            there = f"/v1/... (by what is spoken), {names}, /healthz, /metrics"
            message = f"nothing is behind {path[:200]!r} here: there are {there}"
            raise Answered(problem(protocol, 404, "forebay_no_such_path", message))
        return place

    async def _pass(self, request: web.BaseRequest, headers: Plain, place: Place, body: Body) -> web.StreamResponse:
        target = place.target
        try:
            async with self._until_cut_off():
                value = await self._ask(request, headers, place, body)
        except TimeoutError:
            raise _draining(target.protocol) from None
        if isinstance(value, Answer):
            return self._close_early(request, _whole(value))
        return await self._stream(request, value, target.protocol)

    async def _ask(self, request: web.BaseRequest, headers: Plain, place: Place, body: Body) -> Any:
        """What the provider answers: an `Answer`, or one that is `Opened`.

        Raises:
            Answered: it does not.
        """
        target = place.target
        passage = await self._passage(request, headers, place, body)
        try:
            return await _drive(passage)
        except Overloaded as error:
            self.counts.refused(target.name, (error.binding or "").rpartition(":")[2])
            raise Answered(refusal(target.protocol, error)) from None
        except FAILURES as error:
            message = f"the provider {target.name!r} could not be reached, or broke off: {_why(error)}"
            raise Answered(problem(target.protocol, 502, "forebay_upstream_failed", message)) from None

    async def _passage(self, request: web.BaseRequest, headers: Plain, place: Place, body: Body) -> Passage:
        """A request, read and found fit to be sent on."""
        target = place.target
        try:
            offset = clock.now() - clock.wall_time()
            sender = self._senders.read(headers, offset=offset, share=target.settings.share_keys)
        except BadHeader as error:
            raise Answered(problem(target.protocol, 400, "forebay_bad_header", str(error)), close=True) from None
        try:
            content = await read_body(request, body, self._settings, target.protocol)
        except NoRoom:
            raise self._no_room(target) from None
        asked = Asked(
            method=request.method,
            told=request.raw_headers,
            headers=headers,
            body=content,
            sender=sender,
            patience=patience(headers),
        )
        passage = Passage(target.upstream, place.url, place.path, asked, outgoing=self._outgoing, counts=self.counts)
        _object_to(passage, asked.body, target.protocol)
        return passage

    async def _stream(self, request: web.BaseRequest, opened: Opened, protocol: Protocol) -> web.StreamResponse:
        """Pass an answer on while it comes."""
        answer = opened.answer
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
            elif opened.at_border and not (self._cut and request.protocol.writing_paused):
                await response.write(broken_stream(protocol, broke))
            else:
                raise ConnectionResetError  # what follows would be taken for the rest of what has begun
            await response.write_eof()
        finally:
            opened.reader.left()
            answer.close()
        return response

    def _no_room(self, target: Target) -> Answered:
        """Nothing is read of a body for which there is no room; whoever sends it comes back, each at another time."""
        self.counts.refused(target.name, "bodies")
        most = self._settings.max_held_bytes
        message = f"the calls under way here hold {most:,} bytes together (max_held_bytes), or would with this one"
        seconds = _COME_BACK * (0.5 + clock.draw())
        return Answered(full(target.protocol, "forebay_bodies", message, seconds=seconds), close=True)


async def _drive(passage: Passage) -> Any:
    """Make the call; what its caller gets of it.

    Raises:
        Overloaded: it was refused. Whatever the last attempt failed by.
    """
    journey = passage.journey()
    if journey is None:
        return await passage.upstream.driver(passage.desk).run(passage.ask, passage.attempt)

    def drive(leg: Passage) -> Awaitable[Tried]:
        hurries = functools.partial(journey.hurries, leg)
        return leg.upstream.driver(leg.desk, hurries).drive(leg.ask, leg.attempt)

    return conclude(await travel(journey, drive))


async def _copy(opened: Opened, response: web.StreamResponse) -> str:
    """Pass an answer on to its end; returns why it broke off, or nothing."""
    chunks = opened.answer.content.iter_any()
    chunk: bytes | None = b""
    while chunk is not None:
        try:
            chunk = await anext(chunks, None)
        except FAILURES as error:
            opened.reader.broke()
            return f"the provider broke off: {_why(error)}"
        if passed := opened.next(chunk):
            await response.write(passed)
    return ""


def _object_to(passage: Passage, body: bytes, protocol: Protocol) -> None:
    """Answer what its provider need not be asked about.

    Raises:
        Answered: it is wrong.
    """
    if passage.read.websocket:
        message = "WebSockets do not pass this gateway, for nothing on them can be metered: connect to the provider"
        raise Answered(problem(protocol, 400, "forebay_websocket", message), close=True)
    if passage.read.route in _JSON_ROUTES and not passage.read.signed and not passage.read.input_tokens:
        try:  # nothing was found in it to be sent: why not?
            _object.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            message = f"the body is no JSON object: {error}"
            raise Answered(problem(protocol, 400, "forebay_bad_json", message)) from None


def _draining(protocol: Protocol) -> Answered:
    back = ("retry-after-ms", "1000")
    message = "this gateway is shutting down: call again"
    return Answered(problem(protocol, 503, "forebay_draining", message, back), close=True)


def _whole(answer: Answer, *, close: bool = False) -> web.Response:
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
