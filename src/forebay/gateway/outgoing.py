"""How calls leave the gateway: by one client, and by the HTTP proxy that the environment names for a provider."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined] # typeshed has it not

import aiohttp
from multidict import CIMultiDict
from yarl import URL

from forebay.errors import InvalidSetting
from forebay.gateway.address import is_loopback

_NOT_ADDED: Final = ("User-Agent", "Content-Type", "Accept", "Accept-Encoding")
_SUFFIX: Final = "_proxy"


class Outgoing:
    """Sends requests.

    Args:
        session: that they are sent by.
        proxies: by the origins that are reached through one.
    """

    def __init__(self, session: aiohttp.ClientSession, proxies: Mapping[URL, URL]) -> None:
        self._session = session
        self._proxies = proxies

    async def send(
        self, method: str, url: URL, headers: CIMultiDict[str], body: bytes, bounds: aiohttp.ClientTimeout
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
            timeout=bounds,
            proxy=self._proxies.get(url.origin()) if self._proxies else None,
        )


def proxies_of(urls: Iterable[str], environment: Mapping[str, str]) -> dict[URL, URL]:
    """The proxies by which these addresses are reached, by origin, as curl and the SDKs read the environment.

    ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``ALL_PROXY`` name them, ``NO_PROXY`` the hosts that are reached without; of a
    name in capital and small letters the small ones count. This machine is never reached through one.

    Raises:
        InvalidSetting: one is no ``http://`` address.
    """
    named = _named(environment)
    found = {}
    for url in urls:
        origin = URL(url).origin()
        scheme = next((scheme for scheme in (origin.scheme, "all") if named.get(scheme)), None)
        host = origin.host or ""
        if scheme is None or is_loopback(host) or proxy_bypass_environment(host, dict(named)):
            continue
        found[origin] = _proxy(named[scheme], f"{scheme.upper()}_PROXY")
    return found


def _named(environment: Mapping[str, str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in sorted(environment):  # small letters come last, and count
        if name.lower().endswith(_SUFFIX):
            named[name.lower().removesuffix(_SUFFIX)] = environment[name]
    return named


def _proxy(text: str, name: str) -> URL:
    try:
        url = URL(text if "://" in text else f"http://{text}")
    except ValueError:
        url = URL()
    if url.scheme != "http" or not url.host:
        expected = "the address of an HTTP proxy, such as http://proxy:3128; or name the provider's host in NO_PROXY"
        shown = str(url.with_user(None)) if url.host else "..."  # it may hold a password
        raise InvalidSetting(owner="the environment", name=name, value=shown, expected=expected)
    return url
