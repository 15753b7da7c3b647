"""The codec of a type that a worker declares for its payloads or results."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import msgspec

from forebay.adapters.typed_codec import TypedCodec
from forebay.errors import InvalidSetting
from forebay.interfaces import Codec

_INNER_TYPES = ("__origin__", "__value__", "__supertype__")  # of a generic, of an alias, of a NewType


def codec_for(declared: Any, *, owner: str, name: str) -> Codec:
    """Return the codec of a declared type: pydantic's if the type is a pydantic model or holds one, else msgspec's.

    Args:
        declared: the type.
        owner: what declared it, for messages.
        name: the setting that declares it.

    Raises:
        InvalidSetting: it is not a type whose values can be converted to plain data and back.
    """
    try:
        if not _uses_pydantic(declared, set()):
            return TypedCodec(declared)
        from forebay.adapters.pydantic_codec import PydanticCodec  # noqa: PLC0415 - imports pydantic, which is optional

        return PydanticCodec(declared)
    except Exception as error:  # noqa: BLE001 - a user's type may raise anything, for example a NameError
        expected = (
            "a type: a msgspec Struct, dataclass, attrs class, TypedDict, NamedTuple, pydantic model, or builtins,"
            f" generics and unions of these, defined where its annotations can be resolved ({error})"
        )
        raise InvalidSetting(owner=owner, name=name, value=type_name(declared), expected=expected) from None


def type_name(declared: Any) -> str:
    """Return the name of a type as messages show it."""
    return declared.__name__ if isinstance(declared, type) and not typing.get_args(declared) else str(declared)


def _uses_pydantic(declared: Any, seen: set[int]) -> bool:
    """Return whether a type is a pydantic model or holds one; found without importing pydantic."""
    if id(declared) in seen:
        return False
    seen.add(id(declared))
    if hasattr(declared, "__pydantic_core_schema__"):
        return True
    parts: list[Any] = [*typing.get_args(declared)]
    parts += [getattr(declared, name) for name in _INNER_TYPES if hasattr(declared, name)]
    if isinstance(declared, type) and not issubclass(declared, msgspec.Struct) and _has_fields(declared):
        parts += typing.get_type_hints(declared, include_extras=True).values()
    return any(_uses_pydantic(part, seen) for part in parts)


def _has_fields(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind) or typing.is_typeddict(kind) or hasattr(kind, "_fields")
