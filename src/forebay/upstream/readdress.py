"""A request that is sent on: where to, as whom and with which model. Nothing here waits."""

from __future__ import annotations

from typing import Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import msgspec

from forebay.upstream.rules import Plain, Request, Route, leans_on_its_provider, path_with_model, with_model
from forebay.upstream.stops import Stop

_OWN: Final = frozenset(  # what says who the caller is to whom it was going
    {
        *("authorization", "x-api-key", "api-key", "cookie", "proxy-authorization"),
        *("openai-organization", "openai-project"),
        *("host", "content-length"),
    }
)
_BODY: Final = frozenset({"content-length"})
_ENDINGS: Final = {
    Route.CHAT: "/chat/completions",
    Route.COMPLETIONS: "/completions",
    Route.RESPONSES: "/responses",
    Route.EMBEDDINGS: "/embeddings",
    Route.MESSAGES: "/v1/messages",
    Route.COUNT_TOKENS: "/v1/messages/count_tokens",
}
_DEPLOYMENTS: Final = "/deployments/"


class Readdressed(msgspec.Struct, frozen=True, kw_only=True):
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
    without: frozenset[str]
    extra: dict[str, str]
    body: bytes

    def headers(self, headers: Plain) -> Plain:
        """Those that it has, of those that it had."""
        return Plain({**{name: told for name, told in headers.items() if name not in self.without}, **self.extra})


def may_leave(stop: Stop, read: Request, model: str) -> bool:
    """Whether a request for `model` could be answered there, as far as that is cheap to tell.

    One that is signed or compressed cannot be changed. What is no model's is sent on between upstreams of which nothing
    is known, and nowhere else: another provider has other files. Embeddings of another model are not comparable, so
    they go to one only where the fallback names what it is for.
    """
    if read.signed or read.websocket or not stop.reached:
        return False
    if read.route in _ENDINGS:
        renamed = read.route is Route.EMBEDDINGS and stop.model != model
        return read.model is not None and (not renamed or stop.by.names_models)
    return read.route is Route.OTHER and stop.elsewhere and stop.upstream.rules.protocol is None


def readdress(stop: Stop, path: str, read: Request, body: bytes, key: str) -> Readdressed | None:
    """The request as it is sent there; None if it cannot be answered there.

    Args:
        stop: where to.
        path: of its URL, with the query.
        read: what it asks for.
        body: as it was to be sent.
        key: its API key, as its header has it.
    """
    if stop.elsewhere and read.route is Route.RESPONSES and leans_on_its_provider(body):
        return None
    if read.model is not None:
        renamed = with_model(body, stop.model)
        if renamed is None:
            return None
        body, path = renamed, path_with_model(path, stop.model)
    if not stop.elsewhere:
        return Readdressed(origin=None, path=path, without=_BODY, extra={}, body=body)
    origin = None
    if stop.base_url is not None:
        origin, path = _below(stop.base_url, path, read.route, azure=stop.upstream.provider == "azure")
    return Readdressed(origin=origin, path=path, without=_OWN, extra=stop.auth(key), body=body)


def _below(base_url: str, path: str, route: Route, *, azure: bool) -> tuple[str, str]:
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
