"""Filters of a LangGraph store: which values a search returns, and which namespaces a listing does."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from langgraph.store.base import MatchCondition

from forebay import _validate

_ORDERS: Mapping[str, Callable[[Any, Any], bool]] = {
    "$gt": operator.gt,
    "$gte": operator.ge,
    "$lt": operator.lt,
    "$lte": operator.le,
}
_OPERATORS = ("$eq", "$ne", *_ORDERS)


def check_filter(wanted: Mapping[str, Any]) -> None:
    """Check the operators of a filter.

    Raises:
        InvalidSetting: one is unknown.
    """
    for value in wanted.values():
        if isinstance(value, Mapping):
            if any(str(key).startswith("$") for key in value):
                for key in value.keys() - set(_OPERATORS):
                    _validate.reject("search", "filter", key, f"with the operators {', '.join(_OPERATORS)}")
            else:
                check_filter(value)


def matches(value: Mapping[str, Any], wanted: Mapping[str, Any]) -> bool:
    """Return whether `value` has all that a filter wants."""
    return all(_is_match(value.get(key), each) for key, each in wanted.items())


def _is_match(value: Any, wanted: Any) -> bool:
    if isinstance(wanted, Mapping):
        if any(str(key).startswith("$") for key in wanted):
            return all(_apply(name, value, operand) for name, operand in wanted.items())
        return isinstance(value, Mapping) and matches(value, wanted)
    if isinstance(wanted, list | tuple):
        return (
            isinstance(value, list | tuple)
            and len(value) == len(wanted)
            and all(_is_match(each, one) for each, one in zip(value, wanted, strict=True))
        )
    return bool(value == wanted)


def _apply(name: str, value: Any, operand: Any) -> bool:
    if name == "$eq":
        return bool(value == operand)
    if name == "$ne":
        return bool(value != operand)
    return _ordered(_ORDERS[name], value, operand)


def _ordered(order: Callable[[Any, Any], bool], value: Any, operand: Any) -> bool:
    """Compare two numbers, or texts that may be numbers, or any two texts; nothing else is in an order."""
    if not (isinstance(value, int | float | str) and isinstance(operand, int | float | str)):
        return False
    try:
        return order(float(value), float(operand))
    except ValueError:
        return isinstance(value, str) and isinstance(operand, str) and order(value, operand)


def is_listed(namespace: Sequence[str], conditions: Sequence[MatchCondition]) -> bool:
    """Return whether a namespace meets all conditions, in which ``*`` is any label."""
    return all(_meets(namespace, condition) for condition in conditions)


def _meets(namespace: Sequence[str], condition: MatchCondition) -> bool:
    path = condition.path
    if len(namespace) < len(path):
        return False
    labels = namespace[: len(path)] if condition.match_type == "prefix" else namespace[len(namespace) - len(path) :]
    return all(wanted in {"*", label} for label, wanted in zip(labels, path, strict=True))
