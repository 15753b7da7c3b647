"""HTTP requests that users send through `Upstream.send`, with a client of their own."""

from __future__ import annotations

from collections.abc import Mapping
from urllib.parse import urlsplit, urlunsplit

import msgspec

from forebay.upstream.call_request import AttemptResult, Permit
from forebay.upstream.core import UpstreamCore
from forebay.upstream.exchange import Exchange
from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.providers import Headers
from forebay.upstream.sdk_exceptions import find_error_answer, never_connected


class HttpRequest(msgspec.Struct, frozen=True):
    """An HTTP request.

    Attributes:
        method: such as ``"POST"``.
        url: with scheme, host and query.
        headers: by name.
        body: its bytes.
    """

    method: str
    url: str
    headers: Mapping[str, str] = {}
    body: bytes = b""


class HttpResponse(msgspec.Struct, frozen=True):
    """The complete answer to an HTTP request.

    Attributes:
        status: such as 200.
        headers: by name.
        body: its bytes, without a Content-Encoding.
    """

    status: int
    headers: Mapping[str, str] = {}
    body: bytes = b""


class HttpCall(Exchange):
    """The exchange of one `HttpRequest`.

    Args:
        core: of the upstream that it is sent through.
        request: as its caller made it, or as it is rerouted.

    Attributes:
        request: as it is sent.
    """

    __slots__ = ("request",)

    def __init__(self, core: UpstreamCore, request: HttpRequest) -> None:
        parts = urlsplit(request.url)
        path = urlunsplit(("", "", parts.path, parts.query, ""))
        super().__init__(core, method=request.method, path=path, headers=_headers(request.headers), body=request.body)
        if self.changed_body is not None:
            kept = {name: value for name, value in request.headers.items() if name.lower() != "content-length"}
            request = msgspec.structs.replace(request, headers=kept, body=self.changed_body)
        self.request = request

    def reroute(self, route: FallbackRoute) -> HttpCall | None:
        """See `CallRoute`."""
        sent = self.rerouted_request(route)
        if sent is None:
            return None
        kept = {name: value for name, value in self.request.headers.items() if sent.keeps(name.lower())}
        parts = urlsplit(self.request.url)
        origin = f"{parts.scheme}://{parts.netloc}" if sent.origin is None else sent.origin
        headers = {**kept, **sent.added_headers}
        return HttpCall(route.core, HttpRequest(self.request.method, origin + sent.path, headers, sent.body))

    def answered(self, permit: Permit, response: HttpResponse) -> AttemptResult:
        """Return the result of an attempt that was answered."""
        headers = _headers(response.headers)
        if self.is_streamed(response.status, headers.get("content-type", "")):
            stream = self.metered_stream(permit, headers)
            result = self.stream_result()
            result.value = msgspec.structs.replace(response, body=stream.feed(response.body) + stream.end())
            return result
        result = self.judge_answer(permit, response.status, headers, response.body)
        result.value = response
        return result

    def failed(self, permit: Permit, error: Exception) -> AttemptResult:
        """Return the result of an attempt whose transport raised; the exception may report an answer."""
        answer = find_error_answer(error)
        if answer is None:
            return self.connection_failed(permit, error, sent=not never_connected(error))
        result = self.judge_answer(permit, *answer)
        result.error = error
        return result


def _headers(headers: Mapping[str, str]) -> Headers:
    return Headers({name.lower(): value for name, value in headers.items()})
