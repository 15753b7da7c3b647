"""The settings of an upstream's accounts, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, Final, NoReturn, TypeGuard

from forebay.breaker import UPSTREAM_RULES, BreakerRules
from forebay.errors import InvalidSetting
from forebay.interfaces import Limit
from forebay.limit import AdaptiveLimit, FixedLimit
from forebay.quota import Quota

_QUOTAS: Final = "a list of Quota, such as [Quota(requests=500, per='minute')]"
_MODELS: Final = "quotas by pattern of model, such as {'gpt-4o*': [Quota(requests=500, per='minute')]}"
_LIMIT: Final = "a limit, such as VegasLimit(), or a callable that makes one for each account, such as VegasLimit"


class UpstreamSettings:
    """The limits that the accounts of an upstream work under. Raises `InvalidSetting` if one is invalid.

    See `Upstream` for the arguments.
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
    ) -> None:
        owner = f"Upstream {name!r}"
        check_models(owner, models or {})
        check_quotas(owner, "quotas", quotas)
        check_slots(owner, max_concurrent)
        check_limit(owner, limit, max_concurrent=max_concurrent, models=models)
        check_kind(owner, "breaker", breaker, BreakerRules, "BreakerRules(reset_timeout=30)")
        check_seconds(owner, "max_wait", max_wait)
        if max_start_wait is not None:
            check_seconds(owner, "max_start_wait", max_start_wait, none=True)
        check_weights(owner, weights or {})
        self.name = name
        self.models = {pattern: tuple(group) for pattern, group in (models or {}).items()}
        self.quotas = tuple(quotas)
        self.max_concurrent = max_concurrent
        self.breaker = breaker or UPSTREAM_RULES
        self.max_wait = max_wait
        self.max_start_wait = max_start_wait
        self.weights = dict(weights or {})
        self._limit = limit

    def model_group(self, model: str) -> str:
        """Return the model group of `model`: the longest pattern that matches it, or the model itself.

        A model that matches no pattern has an account of its own, whose limits are learned from headers. Without
        patterns all models share one account.
        """
        if not self.models:
            return ""
        matching = [pattern for pattern in self.models if fnmatchcase(model, pattern)]
        return max(matching, key=len) if matching else model

    @property
    def single_limit(self) -> Limit | None:
        """The limit that was given as an object, so only one account can have it."""
        return self._limit if _is_limit(self._limit) else None

    def new_limit(self) -> Limit:
        """Return the limit of another account.

        Raises:
            InvalidSetting: `limit` was given as a callable, and does not return a limit.
        """
        if self._limit is None:
            return AdaptiveLimit() if self.max_concurrent is None else FixedLimit(self.max_concurrent)
        if _is_limit(self._limit):
            return self._limit
        made: Any = self._limit()  # type: ignore[operator]  # checked
        if not _is_limit(made):
            reject(f"Upstream {self.name!r}", "limit", made, f"{_LIMIT}: the callable returned something else")
        return made


def check_kind(owner: str, name: str, value: Any, kind: type, example: str) -> None:
    """Check that a setting, if it is given, is of its type.

    Raises:
        InvalidSetting: it is not; the message has an example.
    """
    if value is not None and not isinstance(value, kind):
        reject(owner, name, value, f"a {kind.__name__}, such as {example}")


def check_seconds(owner: str, name: str, value: Any, *, none: bool = False) -> None:
    """Check that a setting is a duration in seconds; with `none` it may be 0.

    Raises:
        InvalidSetting: it is not.
    """
    if not _is_number(value) or not (0 < value < math.inf or (none and value == 0)):
        reject(owner, name, value, f"a {'' if none else 'positive '}number of seconds{', at least 0' if none else ''}")


def check_quotas(owner: str, name: str, quotas: Any) -> None:
    """Check that a setting is a list of quotas.

    Raises:
        InvalidSetting: it is not.
    """
    if not isinstance(quotas, Iterable):
        reject(owner, name, quotas, _QUOTAS)
    for quota in quotas:
        if not isinstance(quota, Quota):
            reject(owner, name, quota, _QUOTAS)


def check_models(owner: str, models: Any) -> None:
    """Check that `models` has quotas by pattern of model name.

    Raises:
        InvalidSetting: it has not.
    """
    if not isinstance(models, Mapping):
        reject(owner, "models", models, _MODELS)
    for pattern, quotas in models.items():
        check_quotas(owner, f"models[{pattern!r}]", quotas)


def check_slots(owner: str, value: Any) -> None:
    """Check that `max_concurrent` is a number of calls, or None.

    Raises:
        InvalidSetting: it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        reject(owner, "max_concurrent", value, "a whole number of at least 1, or None to find it out")


def check_limit(owner: str, limit: Any, *, max_concurrent: int | None, models: Mapping[str, Any] | None) -> None:
    """Check that `limit` is a limit or makes limits, and fits the other settings.

    Raises:
        InvalidSetting: it does not.
    """
    if limit is None:
        return
    if not _is_limit(limit) and not callable(limit):
        reject(owner, "limit", limit, _LIMIT)
    if max_concurrent is not None:
        reject(owner, "limit", limit, "left out where max_concurrent= is given: that is FixedLimit(max_concurrent)")
    if models and _is_limit(limit):
        expected = "a callable where models= is given, such as VegasLimit: each account needs a limit of its own"
        reject(owner, "limit", limit, expected)


def check_weights(owner: str, weights: Any) -> None:
    """Check that `weights` has positive weights by tenant.

    Raises:
        InvalidSetting: it has not.
    """
    if not isinstance(weights, Mapping):
        reject(owner, "weights", weights, "a number for each tenant, such as {'acme': 3}")
    for tenant, weight in weights.items():
        if not _is_number(weight) or not weight > 0:
            reject(owner, f"weights[{tenant}]", weight, "a positive weight")


def reject(owner: str, name: str, value: Any, expected: str) -> NoReturn:
    """Raise `InvalidSetting`, saying what is expected.

    Raises:
        InvalidSetting: always.
    """
    raise InvalidSetting(owner=owner, name=name, value=value, expected=expected)


def _is_limit(value: Any) -> TypeGuard[Limit]:
    """Return whether `value` is a limit object; a class of limits is not."""
    return not isinstance(value, type) and all(callable(getattr(value, name, None)) for name in ("limit", "observe"))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
