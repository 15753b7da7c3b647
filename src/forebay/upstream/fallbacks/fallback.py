"""The setting of a fallback: another model or upstream for calls that their own account cannot serve."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Final, NoReturn, Protocol
from urllib.parse import urlsplit

from forebay._renamed import renamed_arguments
from forebay._validate import is_positive, reject
from forebay.upstream.core import UpstreamCore

_WILDCARD: Final = re.compile(r"[*?\[]")
_HEADER_VALUE: Final = re.compile(r"[!-~]+")
_OWNER: Final = "Fallback"


class FallbackTarget(Protocol):
    """The part of an `Upstream` that fallbacks need."""

    @property
    def name(self) -> str:
        """The upstream's name."""

    @property
    def core(self) -> UpstreamCore:
        """Its accounts, money and retries."""

    @property
    def fallbacks(self) -> tuple[Fallback, ...]:
        """Its own fallbacks, in order."""


@renamed_arguments(of="models", when="load_threshold")
@dataclass(frozen=True, slots=True)
class Fallback:
    """Sends a call to another model or upstream when its own account cannot serve it, or is above a load.

    A call falls back when its account rejects it (the breaker is open, the budget is spent, the expected wait is longer
    than allowed or than its deadline), and when its provider still throttles or fails it after all retries.

    Attributes:
        to: a model of the same upstream, under the same API key; or another upstream of the same protocol, with its own
            limits, money and retries.
        weight: calls are shared with `to` from the first on, and not only those that their own account cannot serve:
            each goes to the account that would send it soonest, and of several with room to each in proportion to its
            room and weight. The call's own account has the weight 1. None for a fallback that waits its turn.
        load_threshold: the load from which calls go there without being rejected first: the expected wait of the call
            over the longest allowed, above 0 and at most 1. 1.0 waits for a rejection.
        models: pattern of the models whose calls may fall back.
        model: the model's name there, if `to` is an upstream; None for the same name.
        base_url: address of that upstream's API, as an SDK takes it; None for the address of the call.
        api_key: key for that upstream. It is never shown or logged. Without it no key is sent to another `base_url`.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    to: str | FallbackTarget
    _: KW_ONLY
    weight: float | None = None
    load_threshold: float = 1.0
    models: str = "*"
    model: str | None = None
    base_url: str | None = None
    api_key: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        threshold = self.load_threshold
        if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 < threshold <= 1:
            _reject("load_threshold", threshold, "a load above 0, up to 1")
        self._check_weight()
        for name in ("to", "models", "model", "api_key"):
            value = getattr(self, name)
            if value == "" or (name != "to" and value is not None and not isinstance(value, str)):
                _reject(name, "***" if name == "api_key" else value, "a string that is not empty")
        if self.api_key is not None and not _HEADER_VALUE.fullmatch(self.api_key):
            _reject("api_key", "***", "printable ASCII characters without spaces, as a header carries them")
        if isinstance(self.to, str):
            for name in ("model", "base_url", "api_key"):
                if getattr(self, name) is not None:
                    _reject(name, "***", "left out if `to` is a model: the call goes to the same upstream and key")
        if self.base_url is not None and (problem := _url_problem(self.base_url)):
            _reject("base_url", "***", f"the http:// or https:// address of an API: {problem}")

    def _check_weight(self) -> None:
        if self.weight is None:
            return
        if not is_positive(self.weight):
            _reject("weight", self.weight, "a positive number, or left out for a fallback that waits its turn")
        if self.load_threshold != 1.0:
            _reject("load_threshold", self.load_threshold, "left out if weight is given: calls go there at any load")

    def applies_to(self, model: str) -> bool:
        """Return whether calls of `model` may fall back here."""
        return fnmatchcase(model, self.models) and (bool(model) or not isinstance(self.to, str))

    @property
    def names_models(self) -> bool:
        """True if it applies to particular models only."""
        return self.models != "*"

    @property
    def is_reachable(self) -> bool:
        """True if a request can be sent there: to a model here, or with the address or the key of another upstream."""
        return isinstance(self.to, str) or self.base_url is not None or self.api_key is not None


def check_fallbacks(core: UpstreamCore, given: Fallback | Sequence[Fallback] | None) -> tuple[Fallback, ...]:
    """Check the `fallback` setting of an upstream, and return it as a tuple.

    Raises:
        InvalidSetting: it is not made of fallbacks, or one leads to the call's own account or to another protocol.
    """
    fallbacks: tuple[Any, ...]
    if isinstance(given, Iterable) and not isinstance(given, str | Fallback):
        fallbacks = tuple(given)
    else:
        fallbacks = () if given is None else (given,)
    for fallback in fallbacks:
        if not isinstance(fallback, Fallback):
            _reject_fallback(core, fallback, "a Fallback or a sequence of them, such as Fallback(to='gpt-4o-mini')")
        to = fallback.to
        if isinstance(to, str):
            _check_other_account(core, fallback.models, to)
        elif not isinstance(getattr(to, "core", None), UpstreamCore):
            _reject_fallback(core, to, "a Fallback to the name of a model, or to an Upstream")
        else:
            _check_protocol(core, to.core)
    return fallbacks


def check_reachable(target: FallbackTarget) -> None:
    """Check that a bound client's requests can be sent to all fallbacks of an upstream.

    Raises:
        InvalidSetting: a fallback has neither an address nor a key.
    """
    for fallback in target.fallbacks:
        if not fallback.is_reachable and not isinstance(fallback.to, str):
            expected = "given a base_url= or an api_key= (or both): otherwise the same request would be sent again"
            _reject_fallback(target.core, fallback.to.name, expected)


def _check_other_account(core: UpstreamCore, models: str, to: str) -> None:
    group = core.settings.model_group
    own = "" if _WILDCARD.search(models) else group(models)  # "" is the account of all models, if there is only one
    if group(to) == own:
        expected = (
            f"a model with an account of its own: {to!r} shares the account of the calls that would fall back."
            " Give each its own pattern in models="
        )
        _reject_fallback(core, to, expected)


def _check_protocol(core: UpstreamCore, to: UpstreamCore) -> None:
    ours, theirs = core.profile.protocol, to.profile.protocol
    if ours is not None and theirs is not None and ours != theirs:
        expected = (
            f"an upstream of the same protocol: requests for {core.provider!r} cannot be sent to {to.provider!r}"
            " unchanged"
        )
        _reject_fallback(core, to.name, expected)


def _reject(name: str, value: Any, expected: str) -> NoReturn:
    reject(_OWNER, name, value, expected)


def _reject_fallback(core: UpstreamCore, value: Any, expected: str) -> NoReturn:
    reject(f"Upstream {core.name!r}", "fallback", value, expected)


def _url_problem(url: object) -> str | None:
    """Return why requests cannot be sent below this URL; None if they can."""
    if not isinstance(url, str) or not url.isprintable() or " " in url:
        return "this is not a URL"
    try:
        parts = urlsplit(url)
        parts.port  # noqa: B018 - raises if it is invalid
    except ValueError:
        return "this is not a URL"
    if parts.scheme not in ("http", "https") or not parts.hostname:
        return "this is not a URL"
    if parts.username is not None or parts.password is not None:
        return "it contains a name or a password; give the key as api_key="
    return "it ends in a '#' fragment, and nothing can be appended to that" if parts.fragment else None
