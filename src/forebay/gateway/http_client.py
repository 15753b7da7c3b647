"""How calls leave the gateway: by one client, and by the HTTP proxy of a provider, if it has one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import aiohttp
from multidict import CIMultiDict
from yarl import URL

_NOT_ADDED: Final = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")


class HttpClient:
    """Sends requests.

    Args:
        session: that they are sent by.
        proxies: the origins that are reached through one, and which: see `forebay.gateway.http_proxy`.
    """

    def __init__(self, session: aiohttp.ClientSession, proxies: Mapping[str, str]) -> None:
        self._session = session
        self._proxies = {URL(origin, encoded=True).origin(): URL(proxy) for origin, proxy in proxies.items()}

    async def send(
        self, method: str, url: URL, headers: CIMultiDict[str], body: bytes, timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        """Send a request with these headers and no others, and wait for the head of its answer.

        Redirects are not followed: the key in the headers is for this address.

        Raises:
            aiohttp.ClientError, OSError, asyncio.TimeoutError: it could not be reached, or says nothing.
        """
        return await self._session.request(
            method,
            url,
            headers=headers,
            data=body or None,
            allow_redirects=False,
            skip_auto_headers=_NOT_ADDED,
            timeout=timeout,
            proxy=self._proxies.get(url.origin()) if self._proxies else None,
        )
