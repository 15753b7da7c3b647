"""A request that is sent on: where to, as whom and with which model. Nothing here waits."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec

from forebay.upstream.fallback_routes import FallbackRoute
from forebay.upstream.providers import (
    Endpoint,
    Headers,
    ProviderRequest,
    depends_on_stored_state,
    path_with_model,
    with_model,
)

_OWN: Final = frozenset(  # what says who the caller is to whom it was going
    {
        *("authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"),
        *("openai-organization", "openai-project"),
        *("host", "content-length"),
    }
)
_BODY: Final = frozenset({"content-length"})
_ENDINGS: Final = {
    Endpoint.CHAT: "/chat/completions",
    Endpoint.COMPLETIONS: "/completions",
    Endpoint.RESPONSES: "/responses",
    Endpoint.EMBEDDINGS: "/embeddings",
    Endpoint.MESSAGES: "/v1/messages",
    Endpoint.COUNT_TOKENS: "/v1/messages/count_tokens",
}
_DEPLOYMENTS: Final = "/deployments/"


class ReroutedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it is sent elsewhere.

    Attributes:
        origin: such as ``"https://host:8000"``; None: where it was going.
        path: with the query.
        without: headers that it has no longer, in lower case.
        extra: headers that it has instead.
        body: as it is sent.
    """

    origin: str | None
    path: str
    dropped_headers: frozenset[str]
    added_headers: dict[str, str]
    body: bytes

    def headers(self, headers: Headers) -> Headers:
        """Those that it has, of those that it had."""
        return Headers(
            {**{name: told for name, told in headers.items() if name not in self.dropped_headers}, **self.added_headers}
        )


def can_reroute(stop: FallbackRoute, read: ProviderRequest, model: str) -> bool:
    """Whether a request for `model` could be answered there, as far as that is cheap to tell.

    One that is signed or compressed cannot be changed. What is no model's is sent on between upstreams of which nothing
    is known, and nowhere else: another provider has other files. Embeddings of another model are not comparable, so
    they go to one only where the fallback names what it is for.
    """
    if read.signed or read.websocket or not stop.reachable:
        return False
    if read.endpoint in _ENDINGS:
        renamed = read.endpoint is Endpoint.EMBEDDINGS and stop.model != model
        return read.model is not None and (not renamed or stop.fallback.names_models)
    return read.endpoint is Endpoint.OTHER and stop.other_upstream and stop.upstream.profile.protocol is None


def reroute_request(
    stop: FallbackRoute, path: str, read: ProviderRequest, body: bytes, key: str
) -> ReroutedRequest | None:
    """The request as it is sent there; None if it cannot be answered there.

    Args:
        stop: where to.
        path: of its URL, with the query.
        read: what it asks for.
        body: as it was to be sent.
        key: its API key, as its header has it.
    """
    if stop.other_upstream and read.endpoint is Endpoint.RESPONSES and depends_on_stored_state(body):
        return None
    if read.model is not None:
        renamed = with_model(body, stop.model)
        if renamed is None:
            return None
        body, path = renamed, path_with_model(path, stop.model)
    if not stop.other_upstream:
        return ReroutedRequest(origin=None, path=path, dropped_headers=_BODY, added_headers={}, body=body)
    origin = None
    if stop.base_url is not None:
        origin, path = _below(stop.base_url, path, read.endpoint, azure=stop.upstream.provider == "azure")
    return ReroutedRequest(
        origin=origin, path=path, dropped_headers=_OWN, added_headers=stop.auth_headers(key), body=body
    )


def _below(base_url: str, path: str, route: Endpoint, *, azure: bool) -> tuple[str, str]:
    """The origin, and the path with its query, of a request below another base URL."""
    base, old = urlsplit(base_url), urlsplit(path)
    root = base.path.rstrip("/")
    ending = _ENDINGS.get(route, old.path)
    if ending.startswith("/v1/"):
        root = root.removesuffix("/v1")  # of Anthropic's SDK the base URL has none, and many write it all the same
    dated = azure and _DEPLOYMENTS in old.path and _DEPLOYMENTS not in root and not root.endswith("/v1")
    if dated:
        root = root or "/openai"
        ending = old.path[old.path.index(_DEPLOYMENTS) :]
    query = base.query
    if not query:
        told = parse_qsl(old.query, keep_blank_values=True)
        query = urlencode([(name, value) for name, value in told if dated or name != "api-version"])
    return f"{base.scheme}://{base.netloc}", f"{root}{ending}" + (f"?{query}" if query else "")
