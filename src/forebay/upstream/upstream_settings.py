"""What an upstream is given, looked at before anything is made of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from forebay.errors import InvalidSetting
from forebay.quota import Quota

_QUOTAS = "a list of Quota, such as [Quota(requests=500, per='minute')]"
_MODELS = "quotas by pattern of model, such as {'gpt-4o*': [Quota(requests=500, per='minute')]}"


def check_kind(owner: str, name: str, value: Any, kind: type, example: str) -> None:
    """Check that a setting is of its kind, if it is given.

    Raises:
        InvalidSetting: it is not; the message shows one that is.
    """
    if value is not None and not isinstance(value, kind):
        refuse(owner, name, value, f"a {kind.__name__}, such as {example}")


def check_seconds(owner: str, name: str, value: Any, *, none: bool = False) -> None:
    """Check that a setting is a span of time, or if that may be said, none at all: 0 seconds.

    Raises:
        InvalidSetting: it is not.
    """
    if not _is_number(value) or not (0 < value < math.inf or (none and value == 0)):
        refuse(owner, name, value, f"a {'' if none else 'positive '}number of seconds{', at least 0' if none else ''}")


def check_quotas(owner: str, name: str, quotas: Any) -> None:
    """Check that these are quotas.

    Raises:
        InvalidSetting: they are not.
    """
    if not isinstance(quotas, Iterable):
        refuse(owner, name, quotas, _QUOTAS)
    for quota in quotas:
        if not isinstance(quota, Quota):
            refuse(owner, name, quota, _QUOTAS)


def check_models(owner: str, models: Any) -> None:
    """Check that these are quotas by pattern of model.

    Raises:
        InvalidSetting: they are not.
    """
    if not isinstance(models, Mapping):
        refuse(owner, "models", models, _MODELS)
    for pattern, quotas in models.items():
        check_quotas(owner, f"models[{pattern!r}]", quotas)


def check_slots(owner: str, value: Any) -> None:
    """Check that this is how many calls may be in flight, or None.

    Raises:
        InvalidSetting: it is not.
    """
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        refuse(owner, "max_concurrent", value, "a whole number of at least 1, or None to find it out")


def check_weights(owner: str, weights: Any) -> None:
    """Check that these are weights by tenant.

    Raises:
        InvalidSetting: they are not.
    """
    if not isinstance(weights, Mapping):
        refuse(owner, "weights", weights, "a number for each tenant, such as {'acme': 3}")
    for tenant, weight in weights.items():
        if not _is_number(weight) or not weight > 0:
            refuse(owner, f"weights[{tenant}]", weight, "a positive weight")


def refuse(owner: str, name: str, value: Any, expected: str) -> None:
    """Say what should have been given.

    Raises:
        InvalidSetting: always.
    """
    raise InvalidSetting(owner=owner, name=name, value=value, expected=expected)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
