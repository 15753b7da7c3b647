"""The targets of a gateway: its providers, and which of them a request goes to."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import unquote

from forebay._validate import reject
from forebay.events import Event
from forebay.gateway.callers.issued_keys import IssuedKey
from forebay.gateway.error_responses import ApiProtocol
from forebay.gateway.secret import read_provider_key
from forebay.gateway.settings import FallbackSettings, GatewaySettings, TargetSettings
from forebay.gateway.targets.provider_key import ProviderKey
from forebay.spend_log import SpendLog
from forebay.upstream import Fallback
from forebay.upstream.providers import profile_for

_MAX_CACHED_PATH: Final = 100  # characters of a path whose check is remembered; callers choose them
_RESOURCE: Final = re.compile(r"/v1/([^/]+)")
_ANTHROPIC_RESOURCES: Final = frozenset({"messages", "complete"})
_SHARED_RESOURCES: Final = frozenset({"models", "files"})  # of both protocols; all others are OpenAI's
# Letters, digits and -._~ written as %XX without need: a provider may decode such a path into one that is metered, or
# that is not below the target's URL. Source: RFC 3986, 2.3 and 6.2.2.2.
_NEEDLESSLY_ESCAPED: Final = re.compile(r"%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")

# An escape of an escape, of a control character, or of nothing.
_BADLY_ESCAPED: Final = re.compile(r"%(25[0-9A-Fa-f]{2}|[01][0-9A-Fa-f]|7[Ff]|(?![0-9A-Fa-f]{2}))")


class Target:
    """A provider behind the gateway.

    Args:
        settings: of the target.
        fallbacks: of its upstream.
        keys: that the gateway holds for it.
        spend_log: of the gateway, open; None for none.
        on_event: called with the events of its upstream.
        shared: the store of its limits, see `Upstream`.

    Attributes:
        settings: of the target.
        name: in paths, metrics and logs.
        upstream: paces its calls.
        base_url: without a slash at its end.
        protocol: of its API.
        keys: that the gateway holds for it; none if calls are sent with those of their callers.
    """

    def __init__(  # noqa: PLR0913 - what a gateway gives all of its targets
        self,
        settings: TargetSettings,
        fallbacks: Sequence[Fallback] = (),
        keys: Sequence[ProviderKey] = (),
        *,
        spend_log: SpendLog | None = None,
        on_event: Callable[[Event], object] | None = None,
        shared: str | None = None,
    ) -> None:
        self.settings = settings
        self.name = settings.name
        limits = {key.key: each.limits() for key, each in zip(keys, settings.keys, strict=False)}
        self.upstream = settings.upstream(fallbacks, limits, spend_log=spend_log, on_event=on_event, shared=shared)
        self.protocol: ApiProtocol = settings.protocol
        self.base_url = settings.url.rstrip("/")
        self.keys = tuple(keys)
        self._accept_own_keys()

    @property
    def sdk_url(self) -> str:
        """The base URL as an SDK takes it."""
        return self.base_url if self.protocol == "anthropic" else f"{self.base_url}/v1"

    def adopt(self, old: Target) -> None:
        """Take over the state of the target that this one replaces. See `UpstreamCore.adopt`."""
        same_accounts = (self.base_url, self.settings.resolved_provider, self.settings.share_keys) == (
            old.base_url,
            old.settings.resolved_provider,
            old.settings.share_keys,
        )
        self.upstream.core.adopt(old.upstream.core, accounts=same_accounts)
        self._accept_own_keys()

    def _accept_own_keys(self) -> None:
        """Let calls with a key that is held be sent with the key of a fallback: they are no stranger's."""
        for key in self.keys:
            self.upstream.core.accepted_keys.record(key.key, accepted=True)


def make_targets(
    settings: GatewaySettings,
    environment: Mapping[str, str],
    *,
    spend_log: SpendLog | None = None,
    on_event: Callable[[Event], object] | None = None,
) -> list[Target]:
    """Return the targets of a gateway, in the order of its settings.

    Args:
        settings: of the gateway.
        environment: variables with the API keys of fallbacks.
        spend_log: of the gateway, open; None for none.
        on_event: called with the events of their upstreams.

    Raises:
        MissingFallbackKey: the API key of a fallback is missing.
        InvalidProviderKey: an API key of a target is missing, or a header cannot carry it.
        InvalidSetting: a fallback leads to a target of another protocol, or two keys of a target are the same.
    """
    by_name = {target.name: target for target in settings.targets}
    made: dict[str, Target] = {}

    def make(name: str) -> Target:
        if name not in made:
            fallbacks = [made for fallback in by_name[name].fallback for made in make_fallbacks(fallback)]
            keys = _read_keys(by_name[name], environment)
            made[name] = Target(
                by_name[name], fallbacks, keys, spend_log=spend_log, on_event=on_event, shared=settings.shared
            )
        return made[name]

    def make_fallbacks(settings: FallbackSettings) -> list[Fallback]:
        if settings.target is None:
            assert settings.model is not None  # noqa: S101 - FallbackSettings checks it
            return [Fallback(settings.model, load_threshold=settings.load_threshold, models=settings.models)]
        target = make(settings.target)
        own = settings.api_key(environment)
        keys = [own] if own is not None or not target.keys else [key.key for key in target.keys]
        return [
            Fallback(
                target.upstream,
                load_threshold=settings.load_threshold,
                models=settings.models,
                model=settings.model,
                base_url=target.sdk_url,
                api_key=key,
            )
            for key in keys
        ]

    return [make(target.name) for target in settings.targets]


def _read_keys(settings: TargetSettings, environment: Mapping[str, str]) -> list[ProviderKey]:
    """Return the keys that the gateway holds for a target."""
    profile = profile_for(settings.resolved_provider)
    if (only := settings.api_key(environment)) is not None:
        return [ProviderKey(only, profile)]
    keys: list[ProviderKey] = []
    for each in settings.keys:
        secret = read_provider_key(settings.name, each.api_key_env, None, environment)
        if same := next((key.label for key in keys if key.key == secret), None):
            expected = f"a key of its own: {each.label!r} has the same one as {same!r}, so that their limits are one"
            reject(f"targets.{settings.name}", "keys", each.label, expected)
        keys.append(ProviderKey(secret, profile, label=each.label, weight=each.weight))
    return keys


class Destination(NamedTuple):
    """A target and a path, to which a request goes.

    Attributes:
        target: the provider.
        path: below its base URL, with the query.
        by_name: the path of the request names the target.
        key: the issued key of the caller, or None.
    """

    target: Target
    path: str
    by_name: bool = False
    key: IssuedKey | None = None

    @property
    def url(self) -> str:
        """The full URL."""
        return self.target.base_url + self.path


def detect_protocol(path: str, headers: Mapping[str, str]) -> ApiProtocol:
    """Return the protocol of a request: by its path or, where both have it (``/v1/models``), by its headers.

    There, ``anthropic-version`` means Anthropic's, which all its SDKs send, and so does ``x-api-key`` alone. Elsewhere
    headers mean nothing: many servers of OpenAI's protocol take their key in ``x-api-key``.
    """
    resource = _resource(path)
    if resource in _ANTHROPIC_RESOURCES:
        return "anthropic"
    if resource not in _SHARED_RESOURCES:
        return "openai"
    return "anthropic" if "anthropic-version" in headers or _has_key_alone(headers) else "openai"


def _resource(path: str) -> str:
    """Return the first segment after ``/v1/``; empty if there is none."""
    found = _RESOURCE.search(path.partition("?")[0])
    return "" if found is None else found[1]


def _has_key_alone(headers: Mapping[str, str]) -> bool:
    """Return whether ``x-api-key`` is all that tells the protocol."""
    return "x-api-key" in headers and not {"authorization", "anthropic-version"}.intersection(headers)


def find_destination(targets: Sequence[Target], path: str, headers: Mapping[str, str]) -> Destination | None:
    """Return the destination of a request, or None.

    ``/NAME/...`` goes to the target of that name, whatever follows. ``/v1/...`` goes to the first target with the
    protocol of the request.

    Args:
        targets: of the gateway.
        path: as it was received, with the query.
        headers: of the request, by lower-case name.
    """
    if not _is_unambiguous(path.partition("?")[0]):
        return None
    path = "/" + path.lstrip("/")
    first, _, rest = path[1:].partition("/")
    for target in targets:
        if first == target.name and rest:
            return Destination(target, "/" + rest, by_name=True)
    if first != "v1" or not rest:
        return None
    protocols = [detect_protocol(path, headers)]
    if protocols == ["anthropic"] and _has_key_alone(headers) and _resource(path) in _SHARED_RESOURCES:
        protocols.append("openai")  # where there is no target of Anthropic's protocol
    matching = (target for protocol in protocols for target in targets if target.protocol == protocol)
    return next((Destination(target, path) for target in matching), None)


def _is_unambiguous(path: str) -> bool:
    """Return whether every server reads the path alike, so that it stays below the target's URL and is metered."""
    return _is_unambiguous_cached(path) if len(path) <= _MAX_CACHED_PATH else _check_unambiguous(path)


@functools.lru_cache(maxsize=256)
def _is_unambiguous_cached(path: str) -> bool:
    return _check_unambiguous(path)


def _check_unambiguous(path: str) -> bool:
    if not path.startswith("/") or "\\" in path or _NEEDLESSLY_ESCAPED.search(path) or _BADLY_ESCAPED.search(path):
        return False
    try:
        decoded = unquote(path, errors="strict").replace("\\", "/")
    except UnicodeDecodeError:  # also an overlong form, which lenient servers read as a dot or a slash
        return False
    # Some servers cut a segment at its parameters, or at spaces, before they look for dots.
    if {"..", "."}.intersection(segment.partition(";")[0].strip() for segment in decoded.split("/")):
        return False
    return not {"", "."}.intersection(segment.partition(";")[0] for segment in path.strip("/").split("/"))
