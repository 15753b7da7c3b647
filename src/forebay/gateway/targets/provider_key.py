"""The API key of a provider that the gateway holds, in place of whatever credentials its callers send."""

from __future__ import annotations

import math
from collections.abc import Container
from typing import Final
from urllib.parse import unquote_plus

import msgspec

from forebay import clock
from forebay.events import log
from forebay.gateway.connections.direct_request import RawHeaders
from forebay.gateway.error_responses import ApiProtocol, GatewayResponse, error_response
from forebay.upstream.providers import CREDENTIAL_HEADERS, ProviderProfile

_LOG_INTERVAL: Final = 60.0  # seconds
_ERRORS, _UNAUTHORIZED, _BAD_GATEWAY = 400, 401, 502


# What says whose account pays: with a key that is held, that is for the gateway alone to say. A project or organization
# of a caller would be refused, or would be another one that the key has.
_OF_THE_ACCOUNT: Final = frozenset(
    {
        *(name.encode() for name in CREDENTIAL_HEADERS),
        *(b"cookie", b"sec-websocket-protocol"),  # browsers put keys into the second
        *(b"openai-organization", b"openai-project", b"x-goog-user-project"),
    }
)
_KEY_PARAMETERS: Final = frozenset(
    {"key", "api-key", "api_key", "apikey", "x-api-key", "subscription-key", "access_token"}
)


class ProviderKey:
    """An API key of one target.

    Args:
        key: as the provider gave it.
        profile: of the provider.
        label: stands for the key in messages, where there are several.
        weight: its share of calls, where there are several.

    Attributes:
        key: as given.
        label: as given.
        weight: as given.
    """

    __slots__ = ("_logged_at", "_profile", "key", "label", "weight")

    def __init__(self, key: str, profile: ProviderProfile, *, label: str = "", weight: float = 1.0) -> None:
        self.key = key
        self.label = label
        self.weight = weight
        self._profile = profile
        self._logged_at = -math.inf

    def __repr__(self) -> str:
        return "ProviderKey(...)"

    def header(self, path: str) -> tuple[str, str]:
        """Return the name and the value of the header with this key, for a request to `path`."""
        return self._profile.auth_header(path, self.key)

    def replace_credentials(self, raw_headers: RawHeaders, path: str) -> RawHeaders:
        """Return the headers of a request with this key, and without anything of its caller's own account."""
        name, value = self.header(path)
        kept = without_account(raw_headers)
        return (*kept, (name.encode(), value.encode()))

    def passed_on(self, response: GatewayResponse, target: str) -> GatewayResponse:
        """Return an answer to a call with this key as its caller gets it.

        That the key was refused (401) is no fault of the caller, and is logged, once a minute. Any error may quote it.

        Args:
            response: of the provider.
            target: its name.
        """
        if response.status != _UNAUTHORIZED:
            return self.redact(response)
        if clock.now() >= self._logged_at + _LOG_INTERVAL:
            self._logged_at = clock.now()
            which = f" {self.label!r}" if self.label else ""
            log.error("%s refused the API key%s that this gateway holds for it (401): replace it", target, which)
        protocol: ApiProtocol = "anthropic" if self._profile.provider == "anthropic" else "openai"
        message = f"the provider {target!r} refused the API key that this gateway holds: tell who runs the gateway"
        return error_response(protocol, _BAD_GATEWAY, "forebay_provider_key", message)

    def redact(self, response: GatewayResponse) -> GatewayResponse:
        """Return an answer without this key, which an error may quote."""
        secret = self.key.encode()
        if response.status < _ERRORS or secret not in response.body:
            return response
        return msgspec.structs.replace(response, body=response.body.replace(secret, b"***"))


def without_account(raw_headers: RawHeaders) -> RawHeaders:
    """Return the headers of a request without anything of its caller's own account."""
    return without_headers(raw_headers, _OF_THE_ACCOUNT)


def without_headers(raw_headers: RawHeaders, dropped: Container[bytes]) -> RawHeaders:
    """Return headers without those of these names, which are in lower case."""
    return tuple([pair for pair in raw_headers if pair[0].lower() not in dropped])


def without_query_keys(path: str) -> str:
    """Return a path without the API keys in its query; the rest of the query stays as it is written."""
    resource, mark, query = path.partition("?")
    if not mark:
        return path
    pairs = query.split("&")
    kept = [pair for pair in pairs if unquote_plus(pair.partition("=")[0]).lower() not in _KEY_PARAMETERS]
    if len(kept) == len(pairs):
        return path
    return f"{resource}?{'&'.join(kept)}" if kept else resource
