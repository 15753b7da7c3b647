"""Which kind of client it is, and the copy of it whose calls go through an upstream."""

from __future__ import annotations

import copy
import functools
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any, Final, TypeVar

from forebay.errors import AlreadyBound, NotBindable
from forebay.upstream.httpx_binding.bound_exchange import ClientBinding
from forebay.upstream.httpx_binding.httpx_transport import transport_classes
from forebay.upstream.httpx_binding.sdk_errors import SdkErrors, sdk_errors_of
from forebay.upstream.httpx_binding.websocket_warning import with_websocket_warning

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream

ClientT = TypeVar("ClientT")

_LIBRARIES: Final = ("httpx2", "httpx")
_SDK_BASES: Final = ("SyncAPIClient", "AsyncAPIClient")  # of every SDK that is made by Stainless
_RESOURCE_BASES: Final = ("SyncAPIResource", "AsyncAPIResource")
_LAZY: Final = ("_client", "_async_client")  # of LangChain models that take no client


def bind_client(upstream: Upstream, client: ClientT) -> ClientT:
    """See `Upstream.bind`."""
    bound: ClientT = ClientBinder(upstream).bind(client)
    return bound


class ClientBinder:
    """Makes bound copies; what several of them share stays shared."""

    def __init__(self, upstream: Upstream) -> None:
        self._upstream = upstream
        self._copies: dict[int, Any] = {}

    def bind(self, client: Any) -> Any:
        """A bound copy of a client of any known kind; the client itself if it is bound already."""
        if (http := _library_of(client)) is not None:
            return self._http(client, http, None)
        if (sdk := _sdk_of(client)) is not None:
            return self._sdk(client, sdk)
        if _is_langchain(client):
            return self._langchain(client)
        raise NotBindable(kind=f"{type(client).__module__}.{type(client).__qualname__}")

    # --- httpx and httpx2 ---

    def _http(self, client: Any, http: ModuleType, dress: SdkErrors | None) -> Any:
        if id(client) in self._copies:
            return self._copies[id(client)]
        if self._is_bound(client):
            return client
        binding = ClientBinding(self._upstream, http, dress)
        kit = transport_classes(http)
        wrap = kit.asynchronous if isinstance(client, http.AsyncClient) else kit.blocking
        bound = copy.copy(client)
        bound.__class__ = _kept(type(client))  # type: ignore[arg-type]  # a class can be hashed
        bound.headers, bound.cookies, bound.params = client.headers, client.cookies, client.params
        bound.event_hooks = client.event_hooks
        bound._transport = wrap(client._transport, binding)  # noqa: SLF001 - no other way in
        bound._mounts = {  # noqa: SLF001
            pattern: None if transport is None else wrap(transport, binding)
            for pattern, transport in client._mounts.items()  # noqa: SLF001
        }
        bound.forebay_copied_from = client  # whose connections it uses, and which may close them when it is collected
        self._copies[id(client)] = bound
        return bound

    def _is_bound(self, client: Any) -> bool:
        binding = getattr(client._transport, "binding", None)  # noqa: SLF001
        if not isinstance(binding, ClientBinding):
            return False
        if binding.upstream is not self._upstream:
            raise AlreadyBound(first=binding.upstream.name, second=self._upstream.name)
        return True

    # --- SDKs ---

    def _sdk(self, client: Any, sdk: str) -> Any:
        if id(client) in self._copies:
            return self._copies[id(client)]
        http = _library_of(client._client)  # noqa: SLF001 - what with_options hands on
        if http is None:
            raise NotBindable(kind=f"{type(client).__qualname__} over {type(client._client).__qualname__}")  # noqa: SLF001
        inner = self._http(client._client, http, sdk_errors_of(sdk))  # noqa: SLF001
        if inner is client._client and client.max_retries == 0:  # noqa: SLF001
            return client
        bound = client.copy(http_client=inner, max_retries=0)  # retries are the upstream's
        bound.__class__ = with_websocket_warning(type(client))  # type: ignore[arg-type]  # a class can be hashed
        self._copies[id(client)] = bound
        return bound

    # --- LangChain ---

    def _langchain(self, model: Any) -> Any:
        for name in _LAZY:
            if isinstance(getattr(type(model), name, None), functools.cached_property):
                getattr(model, name)
        found = {name: bound for name, value in vars(model).items() if (bound := self._part(value)) is not None}
        if not found:
            raise NotBindable(kind=f"{type(model).__qualname__}")
        if all(bound is vars(model)[name] for name, bound in found.items()):
            return model
        bound_model = model.model_copy()
        vars(bound_model).update(found)
        return bound_model

    def _part(self, value: Any) -> Any:
        """The bound form of what a model holds, if it is a client or a part of one."""
        if _library_of(value) is not None or _sdk_of(value) is not None:
            return self.bind(value)
        if _has_base(value, _RESOURCE_BASES) is not None and _sdk_of(value._client) is not None:  # noqa: SLF001
            bound = self.bind(value._client)  # noqa: SLF001
            return value if bound is value._client else type(value)(bound)  # noqa: SLF001
        return None


def _library_of(client: Any) -> ModuleType | None:
    """The HTTP library whose client it is. Whoever has a client has imported it."""
    for name in _LIBRARIES:
        http = sys.modules.get(name)
        if http is not None and isinstance(client, http.Client | http.AsyncClient):
            return http
    return None


def _sdk_of(client: Any) -> str | None:
    """The package of the SDK whose client it is."""
    return _has_base(client, _SDK_BASES)


def _has_base(thing: Any, names: tuple[str, ...]) -> str | None:
    for base in type(thing).__mro__:
        package, _, module = base.__module__.partition(".")
        if base.__name__ in names and module in ("_base_client", "_resource"):
            return package
    return None


def _is_langchain(client: Any) -> bool:
    return any(base.__module__.startswith("langchain_core.") for base in type(client).__mro__)


@functools.cache
def _kept(kind: Any) -> Any:
    """A client's class, without the finalizer by which SDKs close connections: those are still the original's too."""
    if not hasattr(kind, "__del__"):
        return kind
    return type(
        kind.__name__, (kind,), {"__module__": kind.__module__, "__qualname__": kind.__qualname__, "__del__": _stay}
    )


def _stay(_: object) -> None:
    """Close nothing."""
