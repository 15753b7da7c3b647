"""The limits of one API key among several of the same upstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Final

from forebay._validate import check_name, check_whole, reject
from forebay.quota import Quota, check_quotas

_OWNER: Final = "ProviderKeyLimits"


@dataclass(frozen=True, slots=True)
class ProviderKeyLimits:
    """The limits of the accounts of one API key, where keys of the same provider have different ones.

    Attributes:
        name: of the key, for people: it stands for the key in readings, metrics and messages.
        quotas: instead of the upstream's `quotas`; None for those. Those of its `models` hold for each key.
        max_concurrent: calls in flight at most, instead of the upstream's; None for that.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    name: str
    _: KW_ONLY
    quotas: Sequence[Quota] | None = None
    max_concurrent: int | None = None

    def __post_init__(self) -> None:
        check_name(_OWNER, "name", self.name)
        if self.quotas is not None:
            check_quotas(_OWNER, "quotas", self.quotas)
        check_whole(_OWNER, "max_concurrent", self.max_concurrent, none="for that of the upstream")


def check_key_limits(owner: str, given: Any) -> dict[str, ProviderKeyLimits]:
    """Check the `key_limits` setting of an upstream, and return it as a dict by API key.

    Raises:
        InvalidSetting: it is not a mapping of keys to limits, or two keys have one name.
    """
    expected = "limits by API key, such as {'sk-...': ProviderKeyLimits('paid', max_concurrent=20)}"
    if not isinstance(given, Mapping):
        reject(owner, "key_limits", "***", expected)
    for key, limits in given.items():
        if not isinstance(key, str) or not key.strip() or not isinstance(limits, ProviderKeyLimits):
            reject(owner, "key_limits", "***", expected)
    names = [limits.name for limits in given.values()]
    for name in names:
        if names.count(name) > 1:
            reject(owner, "key_limits", name, "limits of different names, one for each key")
    return dict(given)
