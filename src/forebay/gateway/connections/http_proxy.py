"""The HTTP proxy through which a provider is reached, as the environment names it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined] # missing in typeshed

from forebay._validate import reject
from forebay.gateway.address import is_loopback

_SUFFIX: Final = "_proxy"


def http_proxy_for(url: str, environment: Mapping[str, str]) -> str | None:
    """Return the HTTP proxy for an address, by the environment as curl and the SDKs read it; None to connect directly.

    ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``ALL_PROXY`` name it, ``NO_PROXY`` the hosts that are reached directly; a name
    in lower case outweighs one in upper case. Loopback is always reached directly.

    Raises:
        InvalidSetting: the proxy is not an ``http://`` address.
    """
    proxies = _proxies_in(environment)
    parts = urlsplit(url)
    host = parts.hostname or ""
    scheme = next((scheme for scheme in (parts.scheme, "all") if proxies.get(scheme)), None)
    if scheme is None or is_loopback(host) or proxy_bypass_environment(host, proxies):
        return None
    proxy = proxies[scheme] if "://" in proxies[scheme] else f"http://{proxies[scheme]}"
    if not _is_http(proxy):
        expected = "the address of an HTTP proxy, such as http://proxy:3128; or name the provider's host in NO_PROXY"
        reject("the environment", f"{scheme.upper()}_PROXY", without_password(proxy), expected)
    return proxy


def without_password(proxy: str) -> str:
    """Return the address of a proxy as it may be shown: with ``***`` in place of user and password."""
    before, _, host = proxy.rpartition("@")
    return f"{before.partition('://')[0]}://***@{host}" if before else proxy


def _proxies_in(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the proxies of an environment by scheme, and its ``NO_PROXY`` as ``no``."""
    proxies: dict[str, str] = {}
    for name in sorted(environment):  # names in lower case come last, and win
        if name.lower().endswith(_SUFFIX):
            proxies[name.lower().removesuffix(_SUFFIX)] = environment[name]
    return proxies


def _is_http(address: str) -> bool:
    try:
        parts = urlsplit(address)
        parts.port  # noqa: B018 - raises ValueError if it is invalid
    except ValueError:
        return False
    return parts.scheme == "http" and bool(parts.hostname)
