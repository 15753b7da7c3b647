"""Which provider a request is for, and where it goes there."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Final, NamedTuple
from urllib.parse import unquote

from forebay.gateway.error_responses import ApiProtocol
from forebay.gateway.settings import FallbackSettings, GatewaySettings, TargetSettings
from forebay.upstream import Fallback

_ANTHROPICS_OWN: Final = ("/v1/messages", "/v1/complete")
_ANTHROPICS_HEADERS: Final = frozenset({"anthropic-version", "x-api-key"})
# Letters, digits and -._~ that are written as %XX though nothing needs it: a provider may take the path for one that is
# metered, or that is not below the target's URL. Source: RFC 3986, 2.3 and 6.2.2.2.
_DISGUISED: Final = re.compile(r"%(2[DdEe]|3[0-9]|[46][1-9A-Fa-f]|[57][0-9Aa]|5[Ff]|7[Ee])")


class Target:
    """A provider behind the gateway.

    Attributes:
        settings: what it was given.
        name: what it is called.
        upstream: through which its calls go.
        base: what every URL there begins with.
        protocol: what it speaks.
    """

    def __init__(self, settings: TargetSettings, fallbacks: Sequence[Fallback] = ()) -> None:
        self.settings = settings
        self.name = settings.name
        self.upstream = settings.upstream(fallbacks)
        self.protocol: ApiProtocol = "anthropic" if settings.resolved_provider == "anthropic" else "openai"
        self.base_url = settings.url.rstrip("/")


def make_targets(settings: GatewaySettings, environment: Mapping[str, str]) -> list[Target]:
    """The targets of a gateway, those before others to which these send calls on.

    Raises:
        MissingKey: the key of a fallback is not there.
        InvalidSetting: a fallback leads to where calls cannot go.
    """
    by_name = {target.name: target for target in settings.targets}
    made: dict[str, Target] = {}

    def make(name: str) -> Target:
        if name not in made:
            fallbacks = [_fallback(told) for told in by_name[name].fallback]
            made[name] = Target(by_name[name], fallbacks)
        return made[name]

    def _fallback(told: FallbackSettings) -> Fallback:
        if told.target is None:
            assert told.model is not None  # noqa: S101 - checked when it was made
            return Fallback(told.model, load_threshold=told.load_threshold, models=told.models)
        target = make(told.target)
        base = target.base_url if target.protocol == "anthropic" else f"{target.base_url}/v1"
        key = told.api_key(environment)
        return Fallback(
            target.upstream,
            load_threshold=told.load_threshold,
            models=told.models,
            model=told.model,
            base_url=base,
            api_key=key,
        )

    return [make(target.name) for target in settings.targets]


class Destination(NamedTuple):
    """Where a request goes.

    Attributes:
        target: the provider.
        path: there, with the query.
    """

    target: Target
    path: str

    @property
    def url(self) -> str:
        """The whole of it."""
        return self.target.base_url + self.path


def detect_protocol(path: str, headers: Mapping[str, str]) -> ApiProtocol:
    """Whose SDK sends a request, by its path or, where both have it (``/v1/models``), its headers."""
    if any(part in path for part in _ANTHROPICS_OWN):
        return "anthropic"
    return "anthropic" if not _ANTHROPICS_HEADERS.isdisjoint(headers) else "openai"


def find_destination(targets: Sequence[Target], path: str, headers: Mapping[str, str]) -> Destination | None:
    """Where a request goes; None if nowhere.

    ``/NAME/...`` is for the target of that name, whatever follows. ``/v1/...`` is for the first target that speaks what
    the request is written in.

    Args:
        targets: all there are.
        path: as it was sent, with the query.
        headers: of the request, by lower-case name.
    """
    if not _is_plain(path.partition("?")[0]):
        return None
    path = "/" + path.lstrip("/")
    first, _, rest = path[1:].partition("/")
    for target in targets:
        if first == target.name and rest:
            return Destination(target, "/" + rest)
    if first != "v1" or not rest:
        return None
    protocol = detect_protocol(path, headers)
    return next((Destination(target, path) for target in targets if target.protocol == protocol), None)


def _is_plain(path: str) -> bool:
    """Whether everybody reads a path alike: it stays below the target's URL, and says what is asked for."""
    if not path.startswith("/") or "\\" in path or _DISGUISED.search(path):
        return False
    if ".." in unquote(path).replace("\\", "/").split("/"):
        return False
    return not {"", "."}.intersection(path.strip("/").split("/"))
