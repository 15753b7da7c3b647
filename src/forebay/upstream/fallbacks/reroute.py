"""A request rewritten for another account: its address, key and model there. Nothing here waits."""

from __future__ import annotations

import re
from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec

from forebay.upstream.fallbacks.fallback_routes import FallbackRoute
from forebay.upstream.providers import (
    Endpoint,
    Headers,
    ProviderRequest,
    depends_on_stored_state,
    path_with_model,
    with_model,
)

# Another provider gets what it needs to understand the request, and nothing else: any other header, and any other
# parameter of the query, may be a key.
_KEPT_HEADERS: Final = frozenset(
    {
        *("accept", "accept-encoding", "accept-language", "content-type", "user-agent"),
        *("anthropic-version", "anthropic-beta", "openai-beta", "traceparent"),
    }
)
_KEPT_PREFIX: Final = "x-stainless-"  # of the SDKs of both providers: their language, version and retries
_KEPT_PARAMETERS: Final = frozenset({"api-version", "beta"})
_SECRET_PARAMETER: Final = re.compile(r"key|token|secret|sig|auth|pass|pw|cred|session|code|^x-|jwt|sas", re.IGNORECASE)
_PATHS: Final = {
    Endpoint.CHAT: "/chat/completions",
    Endpoint.COMPLETIONS: "/completions",
    Endpoint.RESPONSES: "/responses",
    Endpoint.EMBEDDINGS: "/embeddings",
    Endpoint.MESSAGES: "/v1/messages",
    Endpoint.COUNT_TOKENS: "/v1/messages/count_tokens",
}
_DEPLOYMENTS: Final = "/deployments/"


class ReroutedRequest(msgspec.Struct, frozen=True, kw_only=True):
    """A request as it is sent to another account.

    Attributes:
        origin: such as ``"https://host:8000"``; None for the origin of the call.
        path: with the query.
        to_other: it goes to another provider, which gets only the headers that it needs.
        added_headers: headers to add.
        body: as it is sent.
    """

    origin: str | None
    path: str
    to_other: bool
    added_headers: dict[str, str]
    body: bytes

    def keeps(self, header: str) -> bool:
        """Return whether a header of the call is sent; `header`: its name in lower case."""
        if self.to_other:
            return header in _KEPT_HEADERS or header.startswith(_KEPT_PREFIX)
        return header != "content-length"

    def headers(self, headers: Headers) -> Headers:
        """Return the headers of the rerouted request, given those of the call."""
        kept = {name: value for name, value in headers.items() if self.keeps(name)}
        return Headers({**kept, **self.added_headers})


def can_reroute(route: FallbackRoute, parsed: ProviderRequest, model: str) -> bool:
    """Return whether a request for `model` could be answered there, by a cheap check.

    A signed or compressed request cannot be changed. A request without a model goes only between upstreams of unknown
    providers: another provider has other files. Embeddings of different models cannot be compared, so they go to
    another model only if the fallback names the models it is for.
    """
    if parsed.signed or parsed.websocket or not route.reachable:
        return False
    if parsed.endpoint in _PATHS:
        renamed = parsed.endpoint is Endpoint.EMBEDDINGS and route.model != model
        return parsed.model is not None and (not renamed or route.fallback.names_models)
    return parsed.endpoint is Endpoint.OTHER and route.other_upstream and route.core.profile.protocol is None


def reroute_request(
    route: FallbackRoute, path: str, parsed: ProviderRequest, body: bytes, key: str
) -> ReroutedRequest | None:
    """Return a request as it is sent to another account; None if it cannot be answered there.

    Args:
        route: to the account.
        path: of the request's URL, with the query.
        parsed: the request's endpoint, model and tokens.
        body: of the request.
        key: its API key, as its header has it.
    """
    if route.other_upstream and parsed.endpoint is Endpoint.RESPONSES and depends_on_stored_state(body):
        return None
    if parsed.model is not None:
        renamed = with_model(body, route.model)
        if renamed is None:
            return None
        body, path = renamed, path_with_model(path, route.model)
    if not route.other_upstream:
        return ReroutedRequest(origin=None, path=path, to_other=False, added_headers={}, body=body)
    origin, path = None, _without_secrets(path, parsed.endpoint)
    if route.base_url is not None:
        azure = route.core.provider == "azure"
        origin, path = _below(route.base_url, path, parsed.endpoint, azure=azure)
    return ReroutedRequest(
        origin=origin,
        path=path,
        to_other=True,
        added_headers=route.auth_headers(key),
        body=body,
    )


def _without_secrets(path: str, endpoint: Endpoint) -> str:
    """Return a path whose query has no key in it. Of an endpoint that is not known, any other parameter may matter."""
    resource, _, query = path.partition("?")
    pairs = parse_qsl(query, keep_blank_values=True)
    if endpoint is Endpoint.OTHER:
        kept = [(name, value) for name, value in pairs if not _SECRET_PARAMETER.search(name)]
    else:
        kept = [(name, value) for name, value in pairs if name in _KEPT_PARAMETERS]
    return f"{resource}?{urlencode(kept)}" if kept else resource


def _below(base_url: str, path: str, endpoint: Endpoint, *, azure: bool) -> tuple[str, str]:
    """Return the origin, and the path with its query, of a request below another base URL."""
    base, old = urlsplit(base_url), urlsplit(path)
    root = base.path.rstrip("/")
    ending = _PATHS.get(endpoint, old.path)
    if ending.startswith("/v1/"):
        root = root.removesuffix("/v1")  # Anthropic's SDK wants a base URL without it, but many people write it
    deployment = azure and _DEPLOYMENTS in old.path and _DEPLOYMENTS not in root and not root.endswith("/v1")
    if deployment:
        root = root or "/openai"
        ending = old.path[old.path.index(_DEPLOYMENTS) :]
    query = base.query
    if not query:
        pairs = parse_qsl(old.query, keep_blank_values=True)
        query = urlencode([(name, value) for name, value in pairs if deployment or name != "api-version"])
    return f"{base.scheme}://{base.netloc}", f"{root}{ending}" + (f"?{query}" if query else "")
