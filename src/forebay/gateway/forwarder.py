"""The forwarder: authorizes each request, sends it to its target through an upstream, and returns the response."""

from __future__ import annotations

import asyncio
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Final, NamedTuple

import aiohttp
import msgspec
from aiohttp import web
from multidict import CIMultiDict

from forebay import clock
from forebay.errors import Overloaded
from forebay.events import BudgetAlert, Event, log
from forebay.gateway.abortable_block import AbortableBlock
from forebay.gateway.access_log import AccessLog, make_entry
from forebay.gateway.call_record import CallRecord
from forebay.gateway.callers.caller import TOKEN_HEADER, CallerReader, InvalidHeader, check_one_credential
from forebay.gateway.callers.caller_ledgers import CallerLedgers
from forebay.gateway.callers.caller_limits import CallerLimits
from forebay.gateway.callers.issued_keys import IssuedKey, contains_key, hide_keys
from forebay.gateway.callers.key_permission import find_forbidden, headers_with_key
from forebay.gateway.callers.key_registry import KeyRefusal, KeyRegistry
from forebay.gateway.callers.tenants import Tenants, with_limits
from forebay.gateway.connections.http_client import HttpClient
from forebay.gateway.connections.request_headers import RequestHeaders
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
from forebay.gateway.metrics.metrics import GatewayMetrics
from forebay.gateway.requests.body_memory import BodyMemory, BodyMemoryFull, BodyReservation
from forebay.gateway.requests.client_timeouts import ClientTimeoutReader
from forebay.gateway.requests.model_list import is_model_list, model_in_path, model_response, with_aliases
from forebay.gateway.requests.request_body import read_body
from forebay.gateway.requests.request_head import RequestHead, RequestHeads
from forebay.gateway.requests.request_validator import RequestValidator
from forebay.gateway.rewritten_request import NotRewritable, rewrite_request, without_compression
from forebay.gateway.settings import GatewaySettings
from forebay.gateway.single_write_response import SingleWriteResponse, fits_single_write
from forebay.gateway.targets.deployments import ChosenDeployment, ModelDirectory, TargetNotAllowed, WrongProtocol
from forebay.gateway.targets.provider_key import ProviderKey, without_headers
from forebay.gateway.targets.targets import Destination, Target, detect_protocol, find_destination, make_targets
from forebay.gateway.workers.worker_group import WorkerGroup
from forebay.spend_log import SpendLog
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.call_request import Caller
from forebay.upstream.providers import Endpoint, Headers, ProviderRequest
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
_OWN_PAGES: Final = frozenset({"/healthz", "/readyz", "/metrics"})
_MAX_SHOWN: Final = 300  # characters of an error in a message
_MAX_PATH_SHOWN: Final = 200
_MAX_HELD_RESPONSE: Final = 16 << 20  # bytes; a longer response is passed on as it arrives
_MAX_COMPRESSED_PART: Final = 1 << 13  # bytes of a compressed stream that are read in one turn of the event loop
_MAX_PART: Final = 1 << 18  # bytes of any other that are passed on at a time
_FILES_RETRY_AFTER: Final = 2.0  # seconds, on average, until other calls may have ended
_FILES_LOG_INTERVAL: Final = 10.0  # seconds
_BODY_RETRY_AFTER: Final = 4.0  # seconds, on average, until there may be memory for a body
_CLIENT_CLOSED: Final = 499  # nginx's status for a caller that disconnected
_ERRORS, _BUG, _BAD_GATEWAY, _UNAVAILABLE = 400, 500, 502, 503
_object: Final = msgspec.json.Decoder(dict[str, Any])


class _CutOff(ConnectionResetError):
    """A response broke off where nothing can say so but the end of its connection.

    Args:
        status: that it counts as.
    """

    def __init__(self, status: int) -> None:
        super().__init__()
        self.status = status


class ReloadParts(NamedTuple):
    """The parts of a forwarder that serve by other settings.

    Attributes:
        targets: the providers.
        client: sends calls to them.
        callers: reads who calls.
    """

    targets: list[Target]
    client: HttpClient
    callers: CallerReader


class Forwarder:
    """The request handler of a gateway.

    Args:
        settings: of the gateway.
        environment: variables with its secrets, and with the HTTP proxies of its providers.
        session: sends the calls.
        spend_log: keeps what calls cost; open. None for none.
        token: of the gateway, that callers present; None if they need none.
        access_log: gets a line for each request; None for no log.
        keys: that the gateway has issued; None if it issues none.
        ledgers: of the limits of callers, which processes share; None: they are this process's.

    Attributes:
        targets: the providers.
        metrics: of the gateway.
        body_memory: the memory that request bodies take.
        response_memory: the memory that responses take.
        keys: that the gateway has issued; None if it issues none.
        draining: new calls are rejected.
        workers: the other workers of the gateway; None if it has one process.

    Raises:
        MissingFallbackKey: the API key of a fallback is missing.
        InvalidProviderKey: the API key of a target is missing, or a header cannot carry it.
        InvalidSetting: a fallback leads to a target of another protocol, or an HTTP proxy is invalid.
    """

    def __init__(  # noqa: PLR0913 - what a gateway gives it
        self,
        settings: GatewaySettings,
        environment: Mapping[str, str],
        *,
        session: aiohttp.ClientSession,
        token: str | None = None,
        spend_log: SpendLog | None = None,
        access_log: AccessLog | None = None,
        keys: KeyRegistry | None = None,
        ledgers: CallerLedgers | None = None,
    ) -> None:
        self._settings = settings
        self._environment = environment
        self._session = session
        self._access_log = access_log
        self._tenants = Tenants(settings.tenants, spend_log, ledgers)
        self._spend_log = spend_log
        self.targets = self._make_targets(settings)
        self._removed: dict[str, Target] = {}  # what they have spent counts if they come back
        self._held_keys = _held_keys(self.targets)
        self._models = ModelDirectory(settings.models, self.targets)
        self.metrics = GatewayMetrics(self.targets, settings)
        self.body_memory = BodyMemory(settings.max_body_bytes, settings.max_held_bytes)
        self.response_memory = BodyMemory(_MAX_HELD_RESPONSE, settings.max_held_response_bytes)
        self._client = self._make_client(self.targets)
        self._callers = _make_callers(settings, token)
        self._client_timeouts = ClientTimeoutReader(settings.client_timeout)
        self._validator = _make_validator(settings)
        self._own_pages_validator = RequestValidator(max_header_bytes=settings.max_header_bytes, local_only=True)
        self._heads = RequestHeads()
        self.keys = keys
        self._warn_of_unknown_targets()
        self.draining = False
        self.workers: WorkerGroup | None = None
        self._readiness_checks: list[Callable[[], str | None]] = [lambda: "draining" if self.draining else None]
        self._in_progress = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._abortable: set[AbortableBlock] = set()
        self._aborted = False
        self._files_logged_at = -math.inf

    def _on_event(self, event: Event) -> None:
        """Count the alerts of budgets; the upstream logs them."""
        if isinstance(event, BudgetAlert):
            self.metrics.count_budget_alert(event)

    def _make_client(self, targets: Sequence[Target]) -> HttpClient:
        return HttpClient(self._session, [target.base_url for target in targets], self._environment)

    def _make_targets(self, settings: GatewaySettings) -> list[Target]:
        return make_targets(settings, self._environment, spend_log=self._spend_log, on_event=self._on_event)

    def prepare_reload(self, settings: GatewaySettings, *, token: str | None) -> ReloadParts:
        """Return what serves by other settings, for `reload`. Nothing has changed yet.

        Args:
            settings: of the gateway, with the address on which it listens.
            token: of the gateway; None if callers need none.

        Raises:
            MissingFallbackKey, InvalidProviderKey, InvalidSetting: as when it is made.
        """
        targets = self._make_targets(settings)
        return ReloadParts(targets, self._make_client(targets), _make_callers(settings, token))

    def reload(
        self,
        settings: GatewaySettings,
        parts: ReloadParts,
        *,
        access_log: AccessLog | None,
        keys: KeyRegistry | None = None,
    ) -> None:
        """Serve by other settings from now on; calls in progress end by the old ones. It cannot fail.

        Targets of the same name keep what they have spent and, at the same address, the accounts whose limits are the
        same.

        Args:
            settings: of the gateway, with the address on which it listens.
            parts: that were prepared for these settings.
            access_log: gets a line for each request; None for no log.
            keys: that the gateway has issued; None if it issues none.
        """
        targets, client, callers = parts
        known = self._removed | {target.name: target for target in self.targets}
        for target in targets:
            if (old := known.pop(target.name, None)) is not None:
                target.adopt(old)
        self._removed = known
        self.targets[:] = targets  # the metrics have the list
        self._held_keys = _held_keys(targets)
        self._models = ModelDirectory(settings.models, targets)
        self.metrics.show_accounts(settings.max_metrics_accounts)
        self.body_memory.change(settings.max_body_bytes, settings.max_held_bytes)
        self.response_memory.change(_MAX_HELD_RESPONSE, settings.max_held_response_bytes)
        self._client, self._callers, self._validator = client, callers, _make_validator(settings)
        self._own_pages_validator = RequestValidator(max_header_bytes=settings.max_header_bytes, local_only=True)
        self._heads = RequestHeads()  # what was found out about the others depends on the old settings
        self._client_timeouts.change(settings.client_timeout)
        self._tenants.change(settings.tenants)
        self._settings, self._access_log, self.keys = settings, access_log, keys
        self._warn_of_unknown_targets()

    def _warn_of_unknown_targets(self) -> None:
        if self.keys is not None:
            self.keys.set_targets([target.name for target in self.targets])

    def drain(self) -> None:
        """Reject new calls from now on."""
        self.draining = True

    def add_readiness_check(self, check: Callable[[], str | None]) -> None:
        """Add a check to those of ``/readyz``: it returns why no call can be taken now, without secrets, or None."""
        self._readiness_checks.append(check)

    def readiness_problems(self) -> list[str]:
        """Return why no call can be taken now; empty if calls can be."""
        return [problem for check in self._readiness_checks if (problem := check())]

    async def wait_idle(self) -> None:
        """Wait until no call is in progress."""
        await self._idle.wait()

    def abort(self) -> None:
        """End the calls in progress with an error."""
        if self._abortable:
            log.warning("aborting %d calls that are still in progress", len(self._abortable))
        self._aborted = True
        for block in self._abortable:
            block.abort()

    def _abortable_block(self) -> AbortableBlock:
        """Return a block that raises TimeoutError when `abort` is called."""
        return AbortableBlock(self._abortable, aborted=self._aborted)

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """Return the response to one request."""
        head = self._heads.read(request.method, request.raw_path, request.raw_headers)
        record = CallRecord(request.method, hide_keys(request.raw_path), head.headers.by_name)
        destination = head.destination
        if destination is None or self.draining:
            try:
                found = await self._admit(request, head, record)
            except EarlyResponse as early:
                response: web.StreamResponse = self._early_response(request, early, record)
                self._log(record, response.status)
                return response
            if isinstance(found, web.Response):
                return self._close_if_needed(request, found)
            destination = found
        status = _CLIENT_CLOSED
        self._in_progress += 1
        self._idle.clear()
        try:
            with BodyReservation(self.body_memory) as body, BodyReservation(self.response_memory) as held:
                response, status = await self._forward(request, head, destination, body, held, record)
        except EarlyResponse as early:
            response = self._early_response(request, early, record)
            status = response.status
        except _CutOff as cut:
            status = cut.status
            raise
        except (asyncio.CancelledError, ConnectionError):  # the caller has gone
            record.result = "caller_left"
            raise
        except BaseException:
            status = _BUG
            record.result = "bug"
            raise
        finally:
            self._log(record, status)
            self.metrics.record_call(destination.target.name, record, status)
            self._in_progress -= 1
            if not self._in_progress:
                self._idle.set()
        return response

    async def _admit(
        self, request: web.BaseRequest, head: RequestHead, record: CallRecord
    ) -> Destination | web.Response:
        """Return where a request goes, or the response of one of the gateway's own pages.

        Raises:
            EarlyResponse: its head is invalid, or its caller is not authorized, or it leads nowhere.
        """
        headers = head.headers.by_name
        if not head.valid:
            self._validate(request, headers)
            if (path := head.path.partition("?")[0]) in _OWN_PAGES:
                return await self._own_response(path, headers)
            head.valid = True
        key = self._authenticate(head.path, headers, record)
        destination = self._find_destination(head.path, headers, key)
        if (own := self._alias_response(head.method, destination)) is not None:
            return own
        if self.keys is None:  # a key may be revoked or changed at any time
            head.destination = destination
        return destination

    def _log(self, record: CallRecord, status: int) -> None:
        """Write the line of a request that has ended."""
        record.end()
        if self._access_log is not None:
            self._access_log.add(functools.partial(make_entry, record, status, wall=clock.wall_time()))

    def _early_response(self, request: web.BaseRequest, early: EarlyResponse, record: CallRecord) -> web.Response:
        record.end_waiting()
        response = _to_aiohttp(early.response, close=early.close)
        self._add_headers(response.headers, record, detect_protocol(request.raw_path, {}))
        return self._close_if_needed(request, response)

    def _add_headers(self, headers: CIMultiDict[str], record: CallRecord, protocol: ApiProtocol) -> None:
        """Add to the headers of an answer what is known of its call. A request id of the provider stays."""
        if not self._settings.response_headers:
            return
        for name, value in record.headers():
            headers[name] = value
        for name, value in record.request_ids(protocol):
            headers.setdefault(name, value)

    def _with_own_headers(
        self, headers: Sequence[tuple[str, str]], names: AbstractSet[str], record: CallRecord, protocol: ApiProtocol
    ) -> Sequence[tuple[str, str]]:
        """Return the headers of an answer with what `_add_headers` adds to them; `names`: theirs, in lower case."""
        if not self._settings.response_headers:
            return headers
        own, ids = record.headers(), record.request_ids(protocol)
        if not names.isdisjoint([name for name, _ in own]):
            replaced = {name for name, _ in own}
            headers = [pair for pair in headers if pair[0].lower() not in replaced]
        return [*headers, *own, *[pair for pair in ids if pair[0] not in names]]

    def _close_if_needed(self, request: web.BaseRequest, response: web.Response) -> web.Response:
        """Close the connection after this response while draining, or if the body of the request was not read."""
        if self._must_close(request):
            response.force_close()
        return response

    def _must_close(self, request: web.BaseRequest) -> bool:
        return self.draining or not request.content.is_eof()

    def _validate(self, request: web.BaseRequest, headers: Headers) -> None:
        error = self._validator.find_error(request.method, headers, request.raw_headers)
        if error is not None:
            protocol = detect_protocol(request.raw_path, headers)
            raise EarlyResponse(error_response(protocol, error.status, error.code, error.message), close=True)

    async def _own_response(self, path: str, headers: Headers) -> web.Response:
        """Return the response of one of the gateway's own pages.

        Raises:
            EarlyResponse: the caller is not authorized.
        """
        if path == "/healthz":
            body = msgspec.json.encode({"status": "draining" if self.draining else "ok"})
            return web.Response(body=body, content_type=JSON)
        if path == "/readyz":
            return await self._readiness_response()
        self._check_operator(path, headers)
        snapshot = None if self.workers is None else await self.workers.metrics()
        page, content_type = self.metrics.render_for(headers.get("accept", ""), snapshot)
        return web.Response(body=page, headers={"content-type": content_type})

    async def _readiness_response(self) -> web.Response:
        """Return the response of ``/readyz``."""
        if self.workers is None:
            problems: Sequence[str] = self.readiness_problems()
            workers = {}
        else:
            problems, ready, count = await self.workers.readiness()
            workers = {"workers": {"ready": ready, "count": count}}
        body = msgspec.json.encode({"status": "unready" if problems else "ready", "problems": problems, **workers})
        return web.Response(status=503 if problems else 200, body=body, content_type=JSON)

    def _check_token(self, path: str, headers: Headers) -> None:
        """Check that a caller presents the gateway's token, if one is needed.

        Raises:
            EarlyResponse: it does not.
        """
        if not self._callers.is_authorized(headers):
            message = f"this gateway needs its token in the header {TOKEN_HEADER}"
            raise EarlyResponse(error_response(detect_protocol(path, headers), 401, "forebay_token", message))

    def _check_operator(self, path: str, headers: Headers) -> None:
        """Check that a caller may see what all callers do: with the token, or without one on this machine.

        Raises:
            EarlyResponse: it may not.
        """
        self._check_token(path, headers)
        if self._settings.has_token or not self._settings.needs_key:
            return
        if not self._settings.address.loopback:
            message = f"{path} tells about all callers, so it needs the gateway's token, which is not configured"
            raise EarlyResponse(error_response("openai", 403, "forebay_token", message))
        if (error := self._own_pages_validator.find_error("GET", headers, ())) is not None:
            raise EarlyResponse(error_response("openai", error.status, error.code, error.message))

    def _authenticate(self, path: str, headers: Headers, record: CallRecord) -> IssuedKey | None:
        """Return the issued key of a caller; None if it needs none, and has none. The record gets its name.

        Raises:
            EarlyResponse: it has none that is valid, or not the token that it needs instead.
        """
        if self.keys is None:
            self._check_token(path, headers)
            return None
        try:
            key = self._find_key(self.keys, path, headers)
        except KeyRefusal as refusal:
            record.key_name = refusal.key_name
            response = error_response(detect_protocol(path, headers), 401, "invalid_api_key", f"{refusal}")
            raise EarlyResponse(response) from None
        record.key_name = "" if key is None else key.name
        return key

    def _find_key(self, keys: KeyRegistry, path: str, headers: Headers) -> IssuedKey | None:
        """Return the issued key of a caller; None if it needs none, and has none.

        Raises:
            KeyRefusal: it has none that is valid.
            EarlyResponse: it has not the token that it needs instead.
        """
        if contains_key(path):  # it is in the logs of whatever is on the way by now
            raise KeyRefusal("an API key of this gateway is in the URL: send it in a header, and let it be replaced")
        presented = set(headers_with_key(headers).values())
        if len(presented) > 1:
            raise KeyRefusal("two different API keys of this gateway were sent: send one")
        if presented:
            return keys.find(presented.pop())
        if self._settings.require_key:
            message = "this gateway needs one of its API keys, as Authorization: Bearer, or in the header x-api-key"
            raise KeyRefusal(message)
        self._check_token(path, headers)
        return None

    def _find_destination(self, path: str, headers: Headers, key: IssuedKey | None) -> Destination:
        """Return the destination of a call.

        Raises:
            EarlyResponse: the gateway is draining, no target has this path, or the key is not for the one that has.
        """
        protocol = detect_protocol(path, headers)
        if self.draining:
            raise _draining_response(protocol)
        allowed = [each for each in self.targets if key is None or key.allows_target(each.name)]
        destination = find_destination(allowed, path, headers)
        if destination is not None:
            return destination._replace(key=key)
        if len(allowed) < len(self.targets):
            destination = find_destination(self.targets, path, headers)
        if destination is not None:
            message = f"this API key is not for the target {destination.target.name!r}"
            raise EarlyResponse(error_response(protocol, 403, "forebay_target", message))
        if destination is None:
            names = ", ".join(f"/{target.name}/v1/..." for target in self.targets)
            paths = f"/v1/... (by the protocol of the call), {names}, /healthz, /readyz, /metrics"
            shown = path.partition("?")[0][:_MAX_PATH_SHOWN]  # a query may contain an API key
            message = f"the path {shown!r} leads nowhere; the paths of this gateway are {paths}"
            raise EarlyResponse(error_response(protocol, 404, "forebay_no_such_path", message))
        return destination

    def _alias_response(self, method: str, destination: Destination) -> web.Response | None:
        """Return the description of an alias (``/v1/models/NAME``); None for any other request."""
        aliases = self._aliases_for(destination.key)
        if destination.by_name or not aliases or (name := model_in_path(method, destination.path)) not in aliases:
            return None
        return _to_aiohttp(model_response(name, aliases[name] or destination.target.protocol))

    async def _forward(  # noqa: PLR0913, PLR0917 - the parts of a request
        self,
        request: web.BaseRequest,
        head: RequestHead,
        destination: Destination,
        body: BodyReservation,
        held: BodyReservation,
        record: CallRecord,
    ) -> tuple[web.StreamResponse, int]:
        """Return the response, which has been written, and the status that it counts as."""
        call: ForwardedCall | None = None
        try:
            try:
                with self._abortable_block():
                    call, runner = await self._read_call(request, head, destination, body, held, record)
                    answer = await self._wait_for_answer(call, runner, head.headers.by_name, destination.target)
            except TimeoutError:
                record.result = "shut_down"
                raise _draining_response(destination.target.protocol) from None
            return await self._pass_answer(request, answer, call, destination, held)
        finally:
            if call is not None:
                call.hold.close()

    async def _wait_for_answer(
        self, call: ForwardedCall, runner: CallRunner, headers: Headers, target: Target
    ) -> GatewayResponse | StreamingResponse:
        """Return the provider's response, and learn how long the caller waits for it."""
        started = clock.now()
        try:
            answer = await self._call(call, runner, target)
        except asyncio.CancelledError:
            if not self.draining:
                now = clock.now()
                self._client_timeouts.record_hang_up(now, headers, now - started)
            raise
        if self._client_timeouts.knows_hang_ups:
            now = clock.now()
            self._client_timeouts.record_answer(now, headers, now - started)
        return answer

    async def _pass_answer(
        self,
        request: web.BaseRequest,
        answer: GatewayResponse | StreamingResponse,
        call: ForwardedCall,
        destination: Destination,
        held: BodyReservation,
    ) -> tuple[web.StreamResponse, int]:
        """Pass the answer of a provider on; return the response and the status that it counts as."""
        protocol: ApiProtocol = "anthropic" if call.wire_protocol == "anthropic" else "openai"
        if isinstance(answer, StreamingResponse):
            self._add_headers(answer.headers, call.record, protocol)
            return await self._stream(request, answer, call, held)
        if self._lists_aliases(request.method, destination):
            answer = with_aliases(answer, self._aliases_for(destination.key), destination.target.protocol)
        call.record.result = "answered" if answer.status < _ERRORS else "provider_error"
        if fits_single_write(request, answer.status, answer.body):
            names = answer.names or {name.lower() for name, _ in answer.headers}
            headers = self._with_own_headers(answer.headers, names, call.record, protocol)
            single = SingleWriteResponse(answer.status, headers, names, answer.body)
            if self._must_close(request):
                single.force_close()
            await single.send(request)  # until its caller has taken it, it is held
            return single, answer.status
        response = self._close_if_needed(request, _to_aiohttp(answer))
        self._add_headers(response.headers, call.record, protocol)
        await response.prepare(request)
        await response.write_eof()  # the same
        return response, response.status

    def _aliases_for(self, key: IssuedKey | None) -> dict[str, ApiProtocol | None]:
        """Return the aliases that a caller may use, with their protocols."""
        aliases = self._models.aliases
        if key is None:
            return aliases
        return {name: aliases[name] for name in aliases if key.allows_model(name) and self._models.serves(name, key)}

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
            await call.hold.acquire()
            answer: GatewayResponse | StreamingResponse = await runner.run(call, ForwardedCall.attempt)
        except Overloaded as error:
            call.record.reject(error.limited_by or "")
            self.metrics.count_rejection(target.name, _limit_name(error.limited_by or ""))
            raise EarlyResponse(overloaded_response(target.protocol, error)) from None
        except OutOfFiles:
            call.record.reject("host:files")
            raise self._out_of_files(target) from None
        except TRANSPORT_ERRORS as error:
            call.record.result = "unreachable"
            message = f"the provider {target.name!r} could not be reached, or broke off: {_describe(error)}"
            raise EarlyResponse(error_response(target.protocol, 502, "forebay_upstream_failed", message)) from None
        finally:
            call.record.end_waiting()
        return answer

    async def _read_call(  # noqa: PLR0913, PLR0917 - the parts of a request
        self,
        request: web.BaseRequest,
        head: RequestHead,
        destination: Destination,
        reservation: BodyReservation,
        held: BodyReservation,
        record: CallRecord,
    ) -> tuple[ForwardedCall, CallRunner]:
        """Read a request, and return the call to make, and what runs it.

        Raises:
            EarlyResponse: a header or the body is invalid, or the bodies of all calls take too much memory.
        """
        target, key = destination.target, destination.key
        headers = _without_issued_key(head, key)
        caller = head.caller or self._read_caller(head, headers, destination)
        try:
            body = await read_body(request, reservation, self._settings, target.protocol)
        except BodyMemoryFull:
            record.reject("host:bodies")
            raise self._body_memory_full(target) from None
        limits = self._limits_of(key, caller.tenant)
        caller = with_limits(caller, limits)
        now = clock.now()
        timeouts = self._client_timeouts.timeouts(now, head.timeouts)
        incoming = IncomingRequest(
            method=request.method,
            headers=headers,
            body=body,
            caller=caller,
            read_timeout=timeouts.read_timeout,
            key=key,
            held_keys=self._held_keys,
        )
        if self._lists_aliases(request.method, destination):
            incoming = without_compression(incoming)  # it is read
        chosen = self._choose_deployment(incoming, destination)
        called, runner = None, target.upstream.runner
        if chosen is not None:
            called, runner = chosen.called if chosen.called != chosen.model else None, chosen.runner
            incoming, destination = self._rewrite(incoming, destination, chosen)
        call = ForwardedCall(
            destination.target.upstream.core,
            destination.url,
            destination.path,
            incoming,
            client=self._client,
            held=held,
            metrics=self.metrics,
            record=record,
            limits=limits,
        )
        call.call_request.deadline = min(caller.deadline, now + timeouts.max_wait)
        record.begin(caller, destination.target.name, call.call_request.model, call.account.name)
        _check_call(call, body, target.protocol)
        if key is not None and (forbidden := find_forbidden(key, _as_called(call.parsed, called), body)):
            raise EarlyResponse(error_response(target.protocol, 403, "model_not_found", forbidden))
        return call, runner

    def _read_caller(self, head: RequestHead, headers: RequestHeaders, destination: Destination) -> Caller:
        """Return the caller of a request; `headers`: without an issued key.

        Raises:
            EarlyResponse: a header is invalid.
        """
        target, key, by_name = destination.target, destination.key, head.headers.by_name
        try:
            offset = clock.now() - clock.wall_time()
            shared = target.settings.share_keys and not target.keys
            if key is None:
                caller = self._callers.read(by_name, offset=offset, shared_account=shared)
            else:
                caller = self._callers.read_with_key(by_name, key, offset=offset, shared_account=shared)
            named = key is not None or self._callers.names_priority(by_name)
            caller = self._tenants.caller(caller, names_priority=named)
            if caller.api_key is None and not target.keys:
                check_one_credential(headers.by_name, destination.path, target.upstream.core.profile.provider)
        except InvalidHeader as error:
            response = error_response(target.protocol, 400, "forebay_bad_header", str(error))
            raise EarlyResponse(response, close=True) from None
        if key is None and caller.deadline == math.inf:  # a deadline by the wall clock is another one each time
            head.caller = caller
        return caller

    def _choose_deployment(self, incoming: IncomingRequest, destination: Destination) -> ChosenDeployment | None:
        """Return the deployment that serves a request; None if it goes as it is to the target of its path.

        Raises:
            EarlyResponse: the model speaks another protocol, or is only at targets that the caller's key is not for.
        """
        protocol = destination.target.protocol
        try:
            return self._models.find(destination, incoming.body)
        except WrongProtocol as error:
            raise EarlyResponse(error_response(protocol, 400, "forebay_model", str(error))) from None
        except TargetNotAllowed as error:
            raise EarlyResponse(error_response(protocol, 403, "forebay_target", str(error))) from None

    def _rewrite(
        self, incoming: IncomingRequest, destination: Destination, chosen: ChosenDeployment
    ) -> tuple[IncomingRequest, Destination]:
        """Return a request as a deployment takes it, and where it goes.

        Raises:
            EarlyResponse: the model's name cannot be replaced, or two keys are given.
        """
        incoming = msgspec.structs.replace(incoming, on_stored=self._models.record_stored)
        try:
            return rewrite_request(incoming, destination, chosen)
        except (InvalidHeader, NotRewritable) as error:
            code = "forebay_bad_header" if isinstance(error, InvalidHeader) else "forebay_model"
            raise EarlyResponse(error_response(destination.target.protocol, 400, code, str(error))) from None

    def _limits_of(self, key: IssuedKey | None, tenant: str) -> list[CallerLimits]:
        """Return the limits of the callers of a call, which it takes in this order: of its key, and of its tenant."""
        of_key = None if key is None or self.keys is None else self.keys.limits_of(key)
        return [each for each in (of_key, self._tenants.limits_of(tenant)) if each is not None]

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
                with self._abortable_block():
                    await response.prepare(request)
                    problem = await _copy(streaming, held, response)
                call.record.result = "broke_off" if problem else "answered"
                if problem:
                    status = _BAD_GATEWAY
            except TimeoutError:
                problem, status = "this gateway was shut down", _UNAVAILABLE
                call.record.result = "shut_down"
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


def _held_keys(targets: Sequence[Target]) -> dict[tuple[str, str], ProviderKey]:
    """Return the keys that the gateway holds, by target and key."""
    return {(target.name, key.key): key for target in targets for key in target.keys}


def _make_callers(settings: GatewaySettings, token: str | None) -> CallerReader:
    return CallerReader(settings.trust, token, settings.context.tenant_headers)


def _make_validator(settings: GatewaySettings) -> RequestValidator:
    return RequestValidator(
        max_header_bytes=settings.max_header_bytes,
        local_only=settings.address.loopback and not (settings.has_token or settings.needs_key),
    )


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


def _without_issued_key(head: RequestHead, key: IssuedKey | None) -> RequestHeaders:
    """Return the headers of a request without the issued key of its caller, which ends here."""
    if key is None:
        return head.headers
    if head.headers_without_key is None:
        names = [name.encode() for name in headers_with_key(head.headers.by_name)]
        head.headers_without_key = RequestHeaders(without_headers(head.headers.raw, names))
    return head.headers_without_key


def _as_called(parsed: ProviderRequest, called: str | None) -> ProviderRequest:
    """Return what is read of a request, with the alias that its caller used, which its key permits or not."""
    return parsed if called is None else msgspec.structs.replace(parsed, model=called)


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


def _limit_name(limited_by: str) -> str:
    """Return the name of a limit without that of its upstream, or of the key or tenant whose limit it is."""
    of, _, name = limited_by.partition(":")
    last = name.rpartition(":")[2] or of
    return f"{of} {last}" if of in ("key", "tenant") and name else last
