"""Through which HTTP proxy a provider is reached, as the environment has it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final
from urllib.parse import SplitResult, urlsplit
from urllib.request import proxy_bypass_environment  # type: ignore[attr-defined] # typeshed has it not

from forebay.errors import InvalidSetting
from forebay.gateway.address import is_loopback

_SUFFIX: Final = "_proxy"


def origin_of(url: str) -> str:
    """Scheme, host and port of an address, as they stand in it."""
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"


def http_proxy_for(url: str, environment: Mapping[str, str]) -> str | None:
    """The proxy by which an address is reached, as curl and the SDKs read the environment; None for none.

    ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``ALL_PROXY`` name it, ``NO_PROXY`` the hosts that are reached without; of a
    name in capital and small letters the small ones count. This machine is never reached through one.

    Raises:
        InvalidSetting: it is no ``http://`` address.
    """
    named = _proxies_in(environment)
    parts = urlsplit(url)
    host = parts.hostname or ""
    scheme = next((scheme for scheme in (parts.scheme, "all") if named.get(scheme)), None)
    if scheme is None or is_loopback(host) or proxy_bypass_environment(host, named):
        return None
    text = named[scheme] if "://" in named[scheme] else f"http://{named[scheme]}"
    if not _is_http(text):
        expected = "the address of an HTTP proxy, such as http://proxy:3128; or name the provider's host in NO_PROXY"
        raise InvalidSetting(
            owner="the environment", name=f"{scheme.upper()}_PROXY", value=without_password(text), expected=expected
        )
    return text


def without_password(proxy: str) -> str:
    """It without its password."""
    before, _, host = proxy.rpartition("@")
    return f"{before.partition('://')[0]}://***@{host}" if before else proxy


def _proxies_in(environment: Mapping[str, str]) -> dict[str, str]:
    named: dict[str, str] = {}
    for name in sorted(environment):  # small letters come last, and count
        if name.lower().endswith(_SUFFIX):
            named[name.lower().removesuffix(_SUFFIX)] = environment[name]
    return named


def _is_http(text: str) -> bool:
    try:
        parts: SplitResult = urlsplit(text)
        parts.port  # noqa: B018 - raises if it is none
    except ValueError:
        return False
    return parts.scheme == "http" and bool(parts.hostname)
