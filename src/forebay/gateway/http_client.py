"""The HTTP client that sends calls to providers, through the HTTP proxy that the environment names, if any."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from typing import Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from forebay.gateway.http_proxy import http_proxy_for

_HEADERS_NOT_ADDED: Final = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")
_LONG_BODY: Final = 1 << 20  # bytes, beyond which aiohttp warns of bytes, and writes a file piece by piece


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
        proxies = {url: http_proxy_for(url, environment) for url in providers}
        self._proxies = {
            URL(url, encoded=True).origin(): URL(proxy) for url, proxy in proxies.items() if proxy is not None
        }

    async def send(
        self, method: str, url: URL, headers: CIMultiDict[str], body: bytes, limits: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        """Send a request with exactly these headers, and return the response once its head has arrived.

        Redirects are not followed: the API key in the headers is for this address only.

        Raises:
            aiohttp.ClientError, OSError, asyncio.TimeoutError: the provider could not be reached, or did not answer
                within the time limits.
        """
        return await self._session.request(
            method,
            url,
            headers=headers,
            data=io.BytesIO(body) if len(body) > _LONG_BODY else body or None,
            allow_redirects=False,
            skip_auto_headers=_HEADERS_NOT_ADDED,
            timeout=limits,
            proxy=self._proxies.get(url.origin()) if self._proxies else None,
        )
