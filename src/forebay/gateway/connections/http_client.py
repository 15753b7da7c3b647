"""The HTTP client that sends calls to providers, through the HTTP proxy that the environment names, if any."""

from __future__ import annotations

import functools
import io
from collections.abc import Iterable, Mapping
from typing import Final, NamedTuple, TypeAlias

import aiohttp
import msgspec
from aiohttp.client_proto import ResponseHandler
from multidict import CIMultiDict
from yarl import URL

from forebay.gateway.connections.direct_request import ConnectionRequest, DirectResponse, send_post
from forebay.gateway.connections.http_proxy import http_proxy_for
from forebay.gateway.connections.request_headers import SentHeaders

_HEADERS_NOT_ADDED: Final = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")
_LONG_BODY: Final = (
    1 << 20
)  # bytes, beyond which a body is written piece by piece while its provider may answer already
_MAX_KNOWN_URL: Final = 200  # characters of one that is remembered: callers choose them
_MAX_CONNECTION_REQUESTS: Final = 1000  # providers and credentials that are remembered

ProviderResponse: TypeAlias = aiohttp.ClientResponse | DirectResponse
"""A provider's response, once its head has arrived. Both have what a gateway reads."""


class Address(NamedTuple):
    """The address of a request.

    Attributes:
        url: with path and query.
        origin: of the URL.
        path: of the URL, with the query, as it is sent.
    """

    url: URL
    origin: str
    path: bytes


def parse_address(url: str) -> Address:
    """Return the address that a URL names; that of a short one is remembered, for calls go to a few."""
    return _known_address(url) if len(url) <= _MAX_KNOWN_URL else _parse_address(url)


def _parse_address(url: str) -> Address:
    parsed = URL(url, encoded=True)
    path = parsed.raw_path_qs.encode("utf-8", "surrogateescape")  # as it was received
    return Address(parsed, f"{parsed.scheme}://{parsed.raw_authority}", path)


_known_address: Final = functools.lru_cache(256)(_parse_address)


class OutgoingRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as a provider gets it.

    Attributes:
        method: such as ``"POST"``.
        address: of the provider.
        headers: as they are sent.
        body: its bytes.
        credentials: a hash of its credentials, for calls with the same ones share connections.
        limits: of which ``sock_connect`` and ``sock_read`` count.
    """

    method: str
    address: Address
    headers: SentHeaders
    body: bytes
    credentials: int
    limits: aiohttp.ClientTimeout


class HttpClient:
    """The client of all calls of a gateway.

    Args:
        session: sends the requests.
        providers: base URLs of the providers.
        environment: names their HTTP proxies, see `http_proxy_for`.

    Raises:
        InvalidSetting: an HTTP proxy in the environment is not an ``http://`` address.
    """

    def __init__(
        self, session: aiohttp.ClientSession, providers: Iterable[str], environment: Mapping[str, str]
    ) -> None:
        self._session = session
        assert session.connector is not None  # noqa: S101 - it is open
        self._connector = session.connector
        self._connection_requests: dict[tuple[str, int], ConnectionRequest] = {}
        proxies = {url: http_proxy_for(url, environment) for url in providers}
        self._proxies = {
            URL(url, encoded=True).origin(): URL(proxy) for url, proxy in proxies.items() if proxy is not None
        }

    async def send(self, request: OutgoingRequest) -> ProviderResponse:
        """Send a request with exactly these headers, and return the response once its head has arrived.

        Redirects are not followed: the API key in the headers is for this address only.

        Raises:
            aiohttp.ClientError, OSError, asyncio.TimeoutError: the provider could not be reached, or did not answer
                within the time limits.
        """
        proxy = self._proxies.get(request.address.url.origin()) if self._proxies else None
        if request.method == "POST" and proxy is None and len(request.body) <= _LONG_BODY:
            return await send_post(
                self._connection_request(request),
                path=request.address.path,
                head=request.headers.wire,
                body=request.body,
                connector=self._connector,
                limits=request.limits,
            )
        headers = CIMultiDict(
            [
                (name.decode("latin-1"), value.decode("utf-8", "surrogateescape"))
                for name, value in request.headers.pairs
            ]
        )
        return await self._session.request(
            request.method,
            request.address.url,
            headers=headers,
            data=io.BytesIO(request.body) if len(request.body) > _LONG_BODY else request.body or None,
            allow_redirects=False,
            skip_auto_headers=_HEADERS_NOT_ADDED,
            timeout=request.limits,
            proxy=proxy,
        )

    def _connection_request(self, request: OutgoingRequest) -> ConnectionRequest:
        """Return what names the connections of a request, from a cache: it is the same from call to call."""
        key = (request.address.origin, request.credentials)
        found = self._connection_requests.get(key)
        if found is None:
            if len(self._connection_requests) >= _MAX_CONNECTION_REQUESTS:
                self._connection_requests.clear()
            found = ConnectionRequest(request.address.url.origin(), request.credentials, self._session)
            self._connection_requests[key] = found
        return found


def connection_of(response: ProviderResponse) -> ResponseHandler | None:
    """Return the connection that a response arrives on; None if it has arrived, and left that."""
    if isinstance(response, DirectResponse):
        return response.protocol
    return response.connection.protocol if response.connection is not None else None
