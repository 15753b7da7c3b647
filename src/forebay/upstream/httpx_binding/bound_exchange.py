"""One request of an httpx client, and the answers that it gets: an exchange, in the words of its HTTP library."""

from __future__ import annotations

from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import TYPE_CHECKING, Any

from forebay.errors import Overloaded
from forebay.upstream.call_flow import AttemptResult
from forebay.upstream.call_request import Permit
from forebay.upstream.exchange import Exchange
from forebay.upstream.fallback_chain import FallbackChain, make_chain
from forebay.upstream.httpx_binding.sdk_errors import SdkErrors, find_sdk_errors
from forebay.upstream.providers import Headers

if TYPE_CHECKING:
    from forebay.upstream.fallback_routes import FallbackRoute
    from forebay.upstream.shared_account import SharedAccount
    from forebay.upstream.upstream import Upstream

_gave_up: ContextVar[tuple[type[Exception], str] | None] = ContextVar("forebay_gave_up", default=None)


@dataclass(frozen=True, slots=True)
class ClientBinding:
    """What the calls of one bound client have in common.

    Attributes:
        upstream: through which they go.
        http: the HTTP library of the client.
        dress: of the SDK that makes them; None where that is seen from each request.
    """

    upstream: Upstream
    http: ModuleType
    sdk_errors: SdkErrors | None


class BoundExchange(Exchange):
    """An exchange of a bound client.

    Args:
        binding: of the client.
        request: to be sent.
        stop: where it is sent on to; None for its own account.
        original: what the client asked for, if it is sent on.

    Attributes:
        request: as it is sent.
    """

    __slots__ = ("_binding", "_dress", "_http", "_original", "request")

    def __init__(
        self, binding: ClientBinding, request: Any, stop: FallbackRoute | None = None, *, original: Any = None
    ) -> None:
        self._binding = binding
        self._http = http = binding.http
        self.request = request
        self._original = request if original is None else original
        try:
            body: bytes | None = request.content
        except http.RequestNotRead:  # a file, say: it is read as it is sent
            body = None
        headers = Headers.relevant(request.headers.raw)
        self._dress = binding.sdk_errors or find_sdk_errors(http, headers, binding.upstream.provider)
        super().__init__(
            binding.upstream if stop is None else stop.upstream,
            method=request.method,
            path=request.url.raw_path.decode("ascii"),
            headers=headers,
            body=body,
        )
        if self.changed_body is not None:
            sent = request.headers.copy()
            sent["content-length"] = str(len(self.changed_body))
            self.request = http.Request(
                request.method, request.url, headers=sent, content=self.changed_body, extensions=request.extensions
            )

    # --- where else it may go ---

    def journey(self) -> FallbackChain[BoundExchange] | None:
        """Its way through the accounts that may serve it; None if there is but its own."""
        if not self.upstream.fallbacks:
            return None
        return make_chain(self, self._elsewhere, key=self.api_key, fits=self.can_reroute)

    def _elsewhere(self, stop: FallbackRoute, _: SharedAccount) -> BoundExchange | None:
        sent = self.reroute(stop)
        if sent is None:
            return None
        old = self._original
        headers = old.headers.copy()
        for name in sent.dropped_headers:
            headers.pop(name, None)
        headers.update(sent.added_headers)
        path = sent.path.encode("ascii")
        url = old.url.copy_with(raw_path=path) if sent.origin is None else self._http.URL(sent.origin + sent.path)
        request = self._http.Request(old.method, url, headers=headers, content=sent.body, extensions=old.extensions)
        return BoundExchange(self._binding, request, stop, original=old)

    # --- what is told to the caller ---

    def check_sdk_retry(self) -> None:
        """An SDK that calls again what was given up here is told the same at once: retries are made in one place."""
        gave_up = _gave_up.get()
        if gave_up is None:
            return
        _gave_up.set(None)
        if self._original.headers.get("x-stainless-retry-count", "0") != "0":
            _gave_up.set(gave_up)
            raise self._failure(gave_up[0](gave_up[1]))

    def rejection(self, error: Overloaded) -> Overloaded:
        """A refusal of ours, as the caller's SDK lets it through."""
        return self._dress.rejection(error, self._original)

    # --- what an attempt comes to ---

    def answered(self, permit: Permit, response: Any, headers: Headers, raw: bytes) -> AttemptResult:
        """The answer is all there; its stream has been read and closed, but it has not been, so it can be given on."""
        body = _decoded(self._http, headers, raw)
        tried = self.judge_answer(permit, response.status_code, headers, body)
        response.stream = self._http.ByteStream(raw)  # nobody else has it: to build another took 5 us of a call
        response.headers["x-should-retry"] = "false"
        tried.value = response
        return tried

    def opened(self, response: Any, stream: Any, *, decoded: bool) -> AttemptResult:
        """The answer has begun."""
        changed: tuple[bytes, ...] = ()
        if decoded:
            changed = (b"content-encoding", b"content-length")
        elif self.changed_body is not None:
            changed = (b"content-length",)
        tried = self.stream_result()
        tried.value = self._response(response, stream, without=changed)
        return tried

    def failed(self, permit: Permit, error: Exception) -> AttemptResult:
        """The connection failed, before the answer or within it.

        Raises:
            Exception: `error`, if that is not a connection's.
        """
        http = self._http
        if not isinstance(error, http.RequestError | OSError):
            raise error
        ours = isinstance(error, http.LocalProtocolError | http.UnsupportedProtocol | http.PoolTimeout)
        sent = not isinstance(error, http.ConnectError | http.ConnectTimeout)
        return self.connection_failed(permit, self._failure(error), sent=sent, local=ours)

    def _failure(self, error: Exception) -> Exception:
        http = self._http
        if isinstance(error, http.RequestError):
            _gave_up.set((type(error), str(error)))
            error.request = self._original
        return self._dress.connection_failure(error, self._original, timeout=isinstance(error, http.TimeoutException))

    def _response(self, response: Any, stream: Any, *, without: tuple[bytes, ...]) -> Any:
        """The answer as its caller gets it: with this body, and not to be tried again by anybody else."""
        dropped = (b"x-should-retry", *without)
        headers = [pair for pair in response.headers.raw if pair[0].lower() not in dropped]
        headers.append((b"x-should-retry", b"false"))
        return self._http.Response(response.status_code, headers=headers, stream=stream, extensions=response.extensions)


def _decoded(http: ModuleType, headers: Headers, raw: bytes) -> bytes:
    """The body without its content-encoding; as it is where that is none, or not to be understood."""
    encoding = headers.get("content-encoding")
    if encoding is None:
        return raw
    try:
        content: bytes = http.Response(200, headers={"content-encoding": encoding}, content=raw).content
    except http.DecodingError:
        return raw
    return content
