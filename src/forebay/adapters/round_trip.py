"""A value converted to plain data and back, with a check that nothing of it was changed or lost on the way."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import msgspec

from forebay.interfaces import Codec, TypeMismatch, path_segment

_PLAIN = (type(None), bool, int, float, str, bytes)
_CONTAINERS = (dict, list, tuple)
_SETS = (set, frozenset)


def round_trip(codec: Codec, value: Any) -> Any:
    """Return the value after `codec` has dumped and loaded it, which is what a handler in any process would get.

    Raises:
        TypeMismatch: the value is not of the codec's type, or would be loaded as something else.
    """
    made = codec.load(codec.dump(value))
    changed = _find_change(value, made, exact=False)
    if changed is None and isinstance(value, _CONTAINERS):  # the loaded value has to survive another round trip too
        changed = _find_change(made, codec.load(codec.dump(made)), exact=True)
    if changed is not None:
        raise TypeMismatch(*changed)
    return made


def parts_of(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a value by key, index or field name; nothing for a scalar."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    else:
        for name in _field_names(type(value)):
            if hasattr(value, name):
                yield name, getattr(value, name)


def _find_change(value: Any, made: Any, *, exact: bool) -> tuple[str, str] | None:
    """Return the path of the first part that was loaded as something else, and what it became.

    Objects have to be loaded as they were, with everything in them. Plain data may become what the type makes of them,
    unless `exact`.
    """
    if _equal(value, made) or not _equal(value, value):  # a NaN equals nothing
        return None
    if not exact and isinstance(value, _PLAIN):
        return None
    exact = exact or not isinstance(value, _CONTAINERS)
    loaded = {} if isinstance(made, _SETS) else dict(parts_of(made))
    why = _replaced(value, made, loaded) if exact else _lost_key(value, made)
    if why is not None:
        return "", why
    for name, part in parts_of(value):
        found = _find_change(part, loaded[name], exact=exact) if name in loaded else None
        if found is not None:
            return path_segment(name) + found[0], found[1]
    return None


def _replaced(value: Any, made: Any, loaded: dict[Any, Any]) -> str | None:
    if isinstance(value, _SETS) and isinstance(made, _SETS):
        return None
    if type(made) is not type(value):
        return f"a {type(value).__name__} would come back as a {type(made).__name__}"
    names = dict(parts_of(value))
    same = names and names.keys() == loaded.keys()
    return None if same else f"this {type(value).__name__} would come back as another"


def _lost_key(value: Any, made: Any) -> str | None:
    both = isinstance(value, dict) and isinstance(made, dict)
    lost = both and any(name not in made and not isinstance(name, str) for name in value)
    return "a key that is not a str would come back as one" if lost else None


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - __eq__ may be the user's
        return False


def _field_names(kind: type) -> tuple[str, ...]:
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(field.name for field in kind.__attrs_attrs__)
    return tuple(getattr(kind, "model_fields", ()))  # pydantic
