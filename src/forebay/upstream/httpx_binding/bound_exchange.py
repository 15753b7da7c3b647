"""An exchange that reads the requests and responses of httpx or httpx2."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from forebay.errors import Overloaded
from forebay.interfaces import Outcome
from forebay.upstream.call_flow import CallRunner
from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.exchange import OUT_OF_TIME, Exchange
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.httpx_binding.sdk_errors import SdkErrors, find_sdk_errors
from forebay.upstream.providers import Headers
from forebay.upstream.sdk_exceptions import mark_judged

_last_failure: ContextVar[tuple[type[Exception], str] | None] = ContextVar("forebay_last_failure", default=None)


@dataclass(frozen=True, slots=True)
class ClientBinding:
    """The upstream, HTTP library and SDK of one bound client.

    Attributes:
        core: of the upstream that they are sent through.
        runner: runs the upstream's calls.
        http: the HTTP library of the client.
        sdk_errors: of the SDK that makes the calls; None to detect it from each request.
    """

    core: UpstreamCore
    runner: CallRunner
    http: ModuleType
    sdk_errors: SdkErrors | None


class BoundExchange(Exchange):
    """An exchange of a bound client.

    Args:
        binding: of the client.
        request: to be sent.
        core: of the upstream that it is sent through; None for the binding's.
        original: the client's own request, if this is a rerouted one.

    Attributes:
        request: as it is sent.
    """

    __slots__ = ("_binding", "_errors", "_original", "request")

    def __init__(
        self, binding: ClientBinding, request: Any, core: UpstreamCore | None = None, *, original: Any = None
    ) -> None:
        self._binding = binding
        http = binding.http
        self.request = request
        self._original = request if original is None else original
        try:
            body: bytes | None = request.content
        except http.RequestNotRead:  # a file, for example: it is read while it is sent
            body = None
        headers = Headers.relevant(request.headers.raw)
        self._errors = binding.sdk_errors or find_sdk_errors(http, headers, binding.core.provider)
        super().__init__(
            binding.core if core is None else core,
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

    def reroute(self, route: FallbackRoute) -> BoundExchange | None:
        """See `CallRoute`."""
        sent = self.rerouted_request(route)
        if sent is None:
            return None
        http, old = self._binding.http, self._original
        headers = http.Headers([pair for pair in old.headers.raw if sent.keeps(pair[0].decode("latin-1").lower())])
        headers.update(sent.added_headers)
        path = sent.path.encode("ascii")
        url = old.url.copy_with(raw_path=path) if sent.origin is None else http.URL(sent.origin + sent.path)
        request = http.Request(old.method, url, headers=headers, content=sent.body, extensions=old.extensions)
        return BoundExchange(self._binding, request, route.core, original=old)

    # --- errors, in the classes of the caller's SDK ---

    def check_sdk_retry(self) -> None:
        """Raise the last error again if an SDK retries a call that has failed here: only the upstream retries."""
        last = _last_failure.get()
        if last is None:
            return
        _last_failure.set(None)
        if self._original.headers.get("x-stainless-retry-count", "0") != "0":
            _last_failure.set(last)
            raise self._sdk_error(last[0](last[1]))

    def rejection(self, error: Overloaded) -> Overloaded:
        """Return a rejection as an error that the caller's SDK passes on."""
        return self._errors.rejection(error, self._original)

    def _sdk_error(self, error: Exception) -> Exception:
        """Return a connection's error as the caller's SDK raises it."""
        mark_judged(error)
        http = self._binding.http
        if isinstance(error, http.RequestError):
            _last_failure.set((type(error), str(error)))
            error.request = self._original
        return self._errors.connection_failure(error, self._original, timeout=isinstance(error, http.TimeoutException))

    # --- the result of an attempt ---

    def answered(self, permit: Permit, response: Any, headers: Headers, raw: bytes) -> AttemptResult:
        """Return the result of an attempt whose answer was read to its end, and whose stream was closed."""
        http = self._binding.http
        body = _decoded(http, headers, raw)
        result = self.judge_answer(permit, response.status_code, headers, body)
        response.stream = http.ByteStream(raw)  # nobody else has the response: a new one took 5 us of a call
        response.headers["x-should-retry"] = "false"
        if result.outcome.kind is not Outcome.SUCCESS:  # a guarded function may raise it as an exception
            response.extensions = {**response.extensions}
            mark_judged(response.extensions)
        result.value = response
        return result

    def mark_out_of_time(self, result: AttemptResult) -> None:
        """See `CallRoute`."""
        if result.value is not None:
            name, value = OUT_OF_TIME
            result.value.headers[name] = value

    @property
    def read_error(self) -> type[Exception]:
        """The HTTP library's error for an answer that breaks off."""
        error: type[Exception] = self._binding.http.ReadError
        return error

    def _can_decode(self, encoding: str) -> bool:
        """Return whether the HTTP library reads this Content-Encoding; it passes others on as they are, unread."""
        known = self._binding.http._decoders.SUPPORTED_DECODERS  # noqa: SLF001 - it depends on what is installed
        return all(name.strip().lower() in known for name in encoding.split(","))

    def opened(self, permit: Permit, response: Any, headers: Headers, make_body: Callable[..., Any]) -> AttemptResult:
        """Return the result of an attempt whose answer has begun.

        Args:
            permit: of the attempt, which the body releases.
            response: of the client's own transport.
            headers: of the response.
            make_body: makes its body: `AsyncBody` or `BlockingBody`.
        """
        encoding = headers.get("content-encoding", "")
        decoded = bool(encoding) and self._can_decode(encoding)
        metered = self.metered_stream(permit, headers, encoding="" if decoded else encoding)
        body = make_body(self, response, metered, decoded=decoded)
        dropped = {b"x-should-retry"}
        if decoded:
            dropped |= {b"content-encoding", b"content-length"}
        elif self.changed_body is not None:
            dropped.add(b"content-length")
        kept = [pair for pair in response.headers.raw if pair[0].lower() not in dropped]
        kept.append((b"x-should-retry", b"false"))
        result = self.stream_result()
        result.value = self._binding.http.Response(
            response.status_code, headers=kept, stream=body, extensions=response.extensions
        )
        return result

    def failed(self, permit: Permit, error: Exception) -> AttemptResult:
        """Return the result of an attempt whose connection failed, before the answer or within it.

        Raises:
            Exception: `error`, if it is not an error of the connection.
        """
        http = self._binding.http
        if not isinstance(error, http.RequestError | OSError):
            raise error
        local = isinstance(error, http.LocalProtocolError | http.UnsupportedProtocol | http.PoolTimeout)
        sent = not isinstance(error, http.ConnectError | http.ConnectTimeout)
        return self.connection_failed(permit, self._sdk_error(error), sent=sent, local=local)


def _decoded(http: ModuleType, headers: Headers, raw: bytes) -> bytes:
    """Return a body without its Content-Encoding; unchanged if that is unknown or wrong."""
    encoding = headers.get("content-encoding")
    if encoding is None:
        return raw
    try:
        content: bytes = http.Response(200, headers={"content-encoding": encoding}, content=raw).content
    except http.DecodingError:
        return raw
    return content
