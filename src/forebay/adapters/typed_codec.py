"""Declared types: msgspec's own, dataclasses, attrs, TypedDicts, NamedTuples, generics and unions of them."""

from __future__ import annotations

import dataclasses
import re
import typing
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import msgspec

from forebay.errors import InvalidSetting
from forebay.interfaces import Codec, TypeMismatch, path_segment

_BYTES = (bytes,)  # travel as they are
_PLAIN = (type(None), bool, int, float, str, bytes)
_CONTAINERS = (dict, list, tuple)
_SETS = (set, frozenset)
_DEEPEST = 100
_BEHIND = ("__origin__", "__value__", "__supertype__")  # of a generic, of an alias, of a NewType
# What msgspec says of a misfit, where that is of the type alone. The rest may quote the value.
_TELLING = re.compile(r"Expected `[^`]*`(, got `[^`]*`)?|Object missing required field `\w*`")
_PATH = re.compile(r" - at `(?:key in )?\$(.*)`$", re.DOTALL)


def codec_for(declared: Any, *, owner: str, name: str) -> Codec:
    """The codec of a type that was declared, of pydantic's where it is one or holds one.

    Args:
        declared: the type.
        owner: who declared it, for messages.
        name: as what.

    Raises:
        InvalidSetting: it is no type whose values could be told from plain data.
    """
    try:
        if _of_pydantic(declared, set()):
            codec: Codec = import_module("forebay.adapters.pydantic_codec").PydanticCodec(declared)
            return codec
        return TypedCodec(declared)
    except Exception as error:  # noqa: BLE001 - of the user's types anything may be raised, a NameError for example
        expected = (
            "a type: a msgspec Struct, dataclass, attrs class, TypedDict, NamedTuple, pydantic model, or builtins,"
            f" generics and unions of these, defined where its annotations can be resolved ({error})"
        )
        raise InvalidSetting(owner=owner, name=name, value=type_name(declared), expected=expected) from None


def type_name(declared: Any) -> str:
    """A type as messages show it."""
    return declared.__name__ if isinstance(declared, type) and not typing.get_args(declared) else str(declared)


class TypedCodec:
    """A type that msgspec knows.

    A value is made plain and read back when it is fitted, so that what a handler gets is what the type says, made anew.
    Plain parts are read as the type has them, ``"2025-01-01"`` as a date; objects have to come back as they were.
    """

    def __init__(self, declared: Any) -> None:
        culprit = next(_customs(msgspec.inspect.type_info(declared)), None)
        if culprit is not None:
            message = f"nothing tells how a {type_name(culprit)} is written"
            raise TypeError(message)
        self._declared = declared

    def coerce(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        return round_trip(self, value)

    def dump(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            return _to_plain(value)
        except Exception as error:  # noqa: BLE001 - whatever a value of the user's may raise
            path, culprit = _unwritable(value, 0)
            why = f"nothing tells how a {type(culprit).__name__} is written"
            if isinstance(error, RecursionError):
                why = "it is too deep, or holds itself"
            raise TypeMismatch(path, why) from None

    def load(self, plain: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            return msgspec.convert(plain, self._declared, builtin_types=_BYTES, str_keys=True)
        except msgspec.ValidationError as error:
            text = str(error)
            path = _PATH.search(text)
            telling = _TELLING.match(text)
            raise TypeMismatch(path[1] if path else "", telling[0] if telling else "it is not valid") from None
        except Exception as error:  # noqa: BLE001 - whatever the type's own checks may raise
            raise TypeMismatch("", f"its type raised {type(error).__name__}") from None


def round_trip(codec: Codec, value: Any) -> Any:
    """The value made plain and read back, as it will be whenever that is done again.

    Raises:
        Misfit: it is not of the type, or would come back as something else.
    """
    made = codec.load(codec.dump(value))
    changed = _changed(value, made, exact=False)
    if changed is None and isinstance(value, _CONTAINERS):  # what was made of it has to come back as well
        changed = _changed(made, codec.load(codec.dump(made)), exact=True)
    if changed is not None:
        raise TypeMismatch(*changed)
    return made


def _to_plain(value: Any) -> Any:
    return msgspec.to_builtins(value, builtin_types=_BYTES, str_keys=True)


def _unwritable(value: Any, depth: int) -> tuple[str, Any]:
    """Where the part is that cannot be made plain, and what it is."""
    for name, part in _parts(value) if depth < _DEEPEST else ():
        try:
            _to_plain(part)
        except Exception:  # noqa: BLE001 - as in `dump`
            path, culprit = _unwritable(part, depth + 1)
            return path_segment(name) + path, culprit
    return "", value


def _changed(value: Any, made: Any, *, exact: bool) -> tuple[str, str] | None:
    """Where something came back as something else, and as what.

    Objects have to come back as they were, with all that they hold. Plain data that were submitted as such are what the
    type makes of them; unless `exact`.
    """
    if _equal(value, made) or not _equal(value, value):  # what is not a number equals nothing
        return None
    if not exact and isinstance(value, _PLAIN):
        return None
    exact = exact or not isinstance(value, _CONTAINERS)
    back = {} if isinstance(made, _SETS) else dict(_parts(made))
    why = _another(value, made, back) if exact else _key_lost(value, made)
    if why is not None:
        return "", why
    for name, part in _parts(value):
        found = _changed(part, back[name], exact=exact) if name in back else None
        if found is not None:
            return path_segment(name) + found[0], found[1]
    return None


def _another(value: Any, made: Any, back: dict[Any, Any]) -> str | None:
    if isinstance(value, _SETS) and isinstance(made, _SETS):
        return None
    if type(made) is not type(value):
        return f"a {type(value).__name__} would come back as a {type(made).__name__}"
    names = dict(_parts(value))
    return None if names and names.keys() == back.keys() else f"this {type(value).__name__} would come back as another"


def _key_lost(value: Any, made: Any) -> str | None:
    both = isinstance(value, dict) and isinstance(made, dict)
    lost = both and any(name not in made and not isinstance(name, str) for name in value)
    return "a key that is no str would come back as one" if lost else None


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # noqa: BLE001 - an __eq__ of the user's
        return False


def _parts(value: Any) -> Iterator[tuple[Any, Any]]:
    """What a value is made of, by key, index or field."""
    if isinstance(value, dict):
        yield from value.items()
    elif isinstance(value, list | tuple | set | frozenset):
        yield from enumerate(value)
    else:
        for name in _fields(type(value)):
            if hasattr(value, name):
                yield name, getattr(value, name)


def _fields(kind: type) -> tuple[str, ...]:
    if issubclass(kind, msgspec.Struct):
        return kind.__struct_fields__
    if dataclasses.is_dataclass(kind):
        return tuple(field.name for field in dataclasses.fields(kind))
    if hasattr(kind, "__attrs_attrs__"):
        return tuple(field.name for field in kind.__attrs_attrs__)
    return tuple(getattr(kind, "model_fields", ()))  # pydantic


def _customs(info: Any) -> Iterator[type]:
    """The types below that msgspec knows nothing of."""
    yield from _below(info, set())


def _below(info: Any, seen: set[int]) -> Iterator[type]:
    if isinstance(info, msgspec.inspect.CustomType):
        if info.cls is not object:  # anything
            yield info.cls
    elif isinstance(info, list | tuple):
        for part in info:
            yield from _below(part, seen)
    elif isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field) and id(info) not in seen:
        seen.add(id(info))
        for name in info.__struct_fields__:
            yield from _below(getattr(info, name), seen)


def _of_pydantic(declared: Any, seen: set[int]) -> bool:
    """Whether a type is of pydantic's or holds one, found without importing pydantic."""
    if id(declared) in seen:
        return False
    seen.add(id(declared))
    if hasattr(declared, "__pydantic_core_schema__"):
        return True
    parts: list[Any] = [*typing.get_args(declared)]
    parts += [getattr(declared, name) for name in _BEHIND if hasattr(declared, name)]
    if isinstance(declared, type) and not issubclass(declared, msgspec.Struct) and _has_fields(declared):
        parts += _hints(declared).values()
    return any(_of_pydantic(part, seen) for part in parts)


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.is_typeddict(kind) or hasattr(kind, "_fields")


def _hints(kind: Callable[..., Any]) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)
