"""The settings of an upstream's accounts, checked."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final

from forebay._validate import check_instance, check_not_negative, check_positive, check_whole, is_positive, reject
from forebay.breaker import UPSTREAM_RULES, BreakerRules
from forebay.limit import AdaptiveLimit, FixedLimit, Limit
from forebay.quota import Quota, check_quotas
from forebay.upstream.provider_key_limits import ProviderKeyLimits, check_key_limits
from forebay.upstream.providers.credentials import digest_credential

_MODELS: Final = "quotas by pattern of model, such as {'gpt-4o*': [Quota(requests=500, per='minute')]}"
_LIMIT: Final = "a limit, such as VegasLimit(), or a callable that makes one for each account, such as VegasLimit"

_SHOWN: Final = 8  # hex digits that stand for an API key wherever it is shown
_DATE: Final = re.compile(r"(?<=.)[-@:](?:\d{4}-?\d{2}-?\d{2}|latest)$")


class UpstreamSettings:
    """The settings of an upstream's accounts. See `Upstream` for the arguments.

    Raises:
        InvalidSetting: a setting is invalid.
    """

    def __init__(  # noqa: PLR0913 - as Upstream takes them
        self,
        name: str,
        *,
        models: Mapping[str, Sequence[Quota]] | None = None,
        quotas: Sequence[Quota] = (),
        max_concurrent: int | None = None,
        limit: Limit | Callable[[], Limit] | None = None,
        breaker: BreakerRules | None = None,
        max_wait: float = 60.0,
        max_start_wait: float | None = None,
        weights: Mapping[str, float] | None = None,
        unmetered: str = "reject",
        unpriced: str | None = None,
        key_limits: Mapping[str, ProviderKeyLimits] | None = None,
    ) -> None:
        owner = f"Upstream {name!r}"
        _check_models(owner, models or {})
        check_quotas(owner, "quotas", quotas)
        check_whole(owner, "max_concurrent", max_concurrent, none="to find it out")
        _check_limit(owner, limit, max_concurrent=max_concurrent, models=models)
        check_instance(owner, "breaker", breaker, BreakerRules, example="BreakerRules(reset_timeout=30)", optional=True)
        check_positive(owner, "max_wait", max_wait, unit="seconds")
        check_not_negative(
            owner, "max_start_wait", max_start_wait, unit="seconds", none="for a quarter of a typical call"
        )
        _check_weights(owner, weights or {})
        if unmetered not in ("reject", "allow"):
            reject(owner, "unmetered", unmetered, "'reject' or 'allow'")
        if unpriced not in ("warn", "refuse", None):
            reject(owner, "unpriced", unpriced, "'warn', 'refuse', or None to refuse them unless unmetered is 'allow'")
        self.unmetered = unmetered
        self.refuses_unpriced = unmetered == "reject" if unpriced is None else unpriced == "refuse"
        self.name = name
        self.models = {pattern: tuple(group) for pattern, group in (models or {}).items()}
        self.quotas = tuple(quotas)
        self._keys = {
            digest_credential(key): limits for key, limits in check_key_limits(owner, key_limits or {}).items()
        }
        of_keys = [tuple(limits.quotas) for limits in self._keys.values() if limits.quotas]
        groups = (self.quotas, *self.models.values(), *of_keys)
        self.has_quotas = any(groups)
        self._has_strict = any(quota.strict for group in groups for quota in group)
        self.max_concurrent = max_concurrent
        self.breaker = breaker or UPSTREAM_RULES
        self.max_wait = max_wait
        self.max_start_wait = max_start_wait
        self.weights = dict(weights or {})
        self._limit = limit
        given = bool(self.quotas) or bool(of_keys) or max_concurrent is not None or isinstance(limit, Limit)
        given = given or any(limits.max_concurrent is not None for limits in self._keys.values())
        self._one_group = given and not self.models

    def model_group(self, model: str) -> str:
        """Return the model group of `model`: the longest pattern that matches it, or the model itself without its date.

        Providers count ``gpt-4o`` and ``gpt-4o-2024-08-06`` together. If limits are given and no patterns, the limits
        hold for all models together, which share one account.
        """
        if self._one_group:
            return ""
        matching = [pattern for pattern in self.models if fnmatchcase(model, pattern)]
        return max(matching, key=len) if matching else _DATE.sub("", model)

    def is_like(self, other: UpstreamSettings) -> bool:
        """Return whether accounts have the same limits by other settings, apart from their quotas."""
        ours, theirs = (
            (each.max_concurrent, each.breaker, each.max_wait, each.max_start_wait, each.weights, each._limit)  # noqa: SLF001
            for each in (self, other)
        )
        return ours == theirs

    def has_strict_quota(self, model: str) -> bool:
        """Return whether a quota of `model` is strict, so that its calls reserve the most that they may use."""
        if not self._has_strict:
            return False
        group = self.model_group(model)
        return any(quota.strict for mark in ("", *self._keys) for quota in self.quotas_of(mark, group))

    def quotas_of(self, mark: str, group: str) -> Sequence[Quota]:
        """Return the quotas of an account, by the digest of its API key and its model group."""
        limits = self._keys.get(mark)
        own = self.quotas if limits is None or limits.quotas is None else tuple(limits.quotas)
        return self.models.get(group, own)

    def limits_of_key(self, mark: str) -> ProviderKeyLimits | None:
        """Return the limits of an API key, by its digest; None if it has those of all."""
        return self._keys.get(mark)

    def label_of(self, mark: str) -> str:
        """Return what stands for an API key wherever it is shown: its name, or some digits of its digest."""
        limits = self._keys.get(mark)
        return mark[:_SHOWN] if limits is None else limits.name

    @property
    def single_limit(self) -> Limit | None:
        """The limit that was given as an object, which only one account can have; None if there is none."""
        return self._limit if isinstance(self._limit, Limit) else None

    @property
    def limit_kind(self) -> str:
        """Names the kind of limit of an account, for messages."""
        if self._limit is None:
            return "AdaptiveLimit" if self.max_concurrent is None else "FixedLimit"
        kind = type(self._limit) if isinstance(self._limit, Limit) else self._limit
        return getattr(kind, "__qualname__", None) or type(kind).__qualname__

    def new_limit(self, mark: str = "") -> Limit:
        """Return the limit of another account; `mark`: digest of its API key.

        Raises:
            InvalidSetting: `limit` was given as a callable, and does not return a limit.
        """
        limits = self._keys.get(mark)
        if limits is not None and limits.max_concurrent is not None:
            return FixedLimit(limits.max_concurrent)
        if self._limit is None:
            return AdaptiveLimit() if self.max_concurrent is None else FixedLimit(self.max_concurrent)
        limit: Any = self._limit if isinstance(self._limit, Limit) else self._limit()
        if not isinstance(limit, Limit):
            reject(f"Upstream {self.name!r}", "limit", limit, f"{_LIMIT}; the callable returned something else")
        return limit


def _check_models(owner: str, models: Any) -> None:
    if not isinstance(models, Mapping):
        reject(owner, "models", models, _MODELS)
    for pattern, quotas in models.items():
        check_quotas(owner, f"models[{pattern!r}]", quotas)


def _check_limit(owner: str, limit: Any, *, max_concurrent: int | None, models: Any) -> None:
    if limit is None:
        return
    if not isinstance(limit, Limit) and not callable(limit):
        reject(owner, "limit", limit, _LIMIT)
    if max_concurrent is not None:
        reject(
            owner, "limit", limit, "left out if max_concurrent is given, which stands for FixedLimit(max_concurrent)"
        )
    if models and isinstance(limit, Limit):
        expected = "a callable if models is given, such as VegasLimit: each account needs a limit of its own"
        reject(owner, "limit", limit, expected)


def _check_weights(owner: str, weights: Any) -> None:
    if not isinstance(weights, Mapping):
        reject(owner, "weights", weights, "a number for each tenant, such as {'acme': 3}")
    for tenant, weight in weights.items():
        if not (is_positive(weight) or weight == float("inf")):
            reject(owner, f"weights[{tenant}]", weight, "a positive weight")
