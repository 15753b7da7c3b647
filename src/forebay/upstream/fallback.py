"""Fallback: where calls go that their own account cannot serve."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from typing import TYPE_CHECKING, Any, Final
from urllib.parse import urlsplit

from forebay._renamed import renamed_arguments
from forebay.errors import InvalidSetting

if TYPE_CHECKING:
    from forebay.upstream.upstream import Upstream

_WILD: Final = re.compile(r"[*?\[]")
_KEY: Final = re.compile(r"[!-~]+")
_OWNER: Final = "Fallback"


@renamed_arguments(of="models", when="load_threshold")
@dataclass(frozen=True, slots=True)
class Fallback:
    """Sends a call on to another model or upstream when its own account cannot serve it, or is above a load.

    A call is sent on when it is refused (the breaker is open, the budget spent, the wait longer than allowed or than
    its deadline), and when its provider's last word, after all retries, is *not now* or a fault.

    Attributes:
        to: a model of the same upstream, under the same key; or another upstream of the same protocol, with its own
            limits, money and retries.
        when: the load from which calls are sent on without being refused first: the wait that is expected for the
            call, over the longest allowed. 1.0 is not before.
        of: pattern of the models whose calls are sent on.
        model: what the model is called there, if `to` is an upstream; None: the same.
        base_url: where that upstream is, as an SDK takes it; None: where the call was going.
        api_key: as whom. Neither shown nor logged. Without it, no key goes to another `base_url`.

    Raises:
        InvalidSetting: a setting cannot be meant.
    """

    to: str | Upstream
    _: KW_ONLY
    load_threshold: float = 1.0
    models: str = "*"
    model: str | None = None
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if (
            isinstance(self.load_threshold, bool)
            or not isinstance(self.load_threshold, int | float)
            or not 0 < self.load_threshold <= 1
        ):
            _refuse("load_threshold", self.load_threshold, "a load above 0, up to 1")
        for name in ("to", "models", "model", "api_key"):
            value = getattr(self, name)
            if value == "" or (name != "to" and value is not None and not isinstance(value, str)):
                _refuse(name, "***" if name == "api_key" else value, "a string that is not empty")
        if self.api_key is not None and not _KEY.fullmatch(self.api_key):
            _refuse("api_key", "***", "what a header carries: printable characters of ASCII, without blanks")
        if isinstance(self.to, str):
            for name in ("model", "base_url", "api_key"):
                if getattr(self, name) is not None:
                    _refuse(name, "***", "left out where `to` is a model: it goes to the same upstream, as the same")
        if self.base_url is not None and (problem := _problem(self.base_url)):
            _refuse("base_url", "***", f"the http:// or https:// address of an API: {problem}")

    def applies_to(self, model: str) -> bool:
        """Whether it is for calls of this model."""
        return fnmatchcase(model, self.models) and (bool(model) or not isinstance(self.to, str))

    @property
    def names_models(self) -> bool:
        """Whether it is for particular models."""
        return self.models != "*"

    @property
    def is_reachable(self) -> bool:
        """Whether it says how a request can be sent there."""
        return isinstance(self.to, str) or self.base_url is not None or self.api_key is not None


def check_fallbacks(
    upstream: Upstream, given: Fallback | Sequence[Fallback] | None, group: Callable[[str], str]
) -> tuple[Fallback, ...]:
    """What an upstream was given as `fallback`, checked against it.

    Args:
        upstream: whose they are.
        given: one, several, or none.
        group: the account of a model there, by name.

    Raises:
        InvalidSetting: one leads to where the call was, or to another protocol.
    """
    fallbacks: tuple[Any, ...]
    if isinstance(given, Iterable) and not isinstance(given, str | Fallback):
        fallbacks = tuple(given)
    else:
        fallbacks = () if given is None else (given,)
    for fallback in fallbacks:
        if not isinstance(fallback, Fallback):
            _refuse_of(upstream, fallback, "a Fallback or a sequence of them, such as Fallback(to='gpt-4o-mini')")
        to = fallback.to
        if isinstance(to, str):
            own = (
                "" if _WILD.search(fallback.models) else group(fallback.models)
            )  # "" is that of all, where there is but one
            if group(to) == own:
                expected = (
                    f"a model with an account of its own: {to!r} shares that of the calls which would be sent on."
                    " Give each its own pattern in models="
                )
                _refuse_of(upstream, to, expected)
        elif not isinstance(to, type(upstream)):
            _refuse_of(upstream, to, "a Fallback to the name of a model, or to an Upstream")
        else:
            _check_protocol(upstream, to)
    return fallbacks


def check_reachable(upstream: Upstream) -> None:
    """Check that requests can be sent on to wherever the fallbacks of an upstream lead.

    Raises:
        InvalidSetting: one says neither where that is nor as whom to call it.
    """
    for fallback in upstream.fallbacks:
        if not fallback.is_reachable and not isinstance(fallback.to, str):
            expected = "given a base_url= or an api_key= (or both): else its requests would be the very same"
            _refuse_of(upstream, fallback.to.name, expected)


def _check_protocol(upstream: Upstream, to: Upstream) -> None:
    ours, theirs = upstream.profile.protocol, to.profile.protocol
    if ours is not None and theirs is not None and ours != theirs:
        expected = (
            f"an upstream of the same protocol: calls of {upstream.provider!r} cannot be sent to {to.provider!r} as"
            " they are"
        )
        _refuse_of(upstream, to.name, expected)


def _refuse(name: str, value: Any, expected: str) -> None:
    raise InvalidSetting(owner=_OWNER, name=name, value=value, expected=expected)


def _refuse_of(upstream: Upstream, value: Any, expected: str) -> None:
    raise InvalidSetting(owner=f"Upstream {upstream.name!r}", name="fallback", value=value, expected=expected)


def _problem(url: object) -> str | None:
    """Why no request can be sent below this URL; None if one can."""
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        return "this is none"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is none
    except ValueError:
        return "this is none"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "this is none"
    if parts.username is not None or parts.password is not None:
        return "it holds a name or a password; give the key as api_key="
    return "it ends in a '#', where nothing can be appended" if parts.fragment else None
