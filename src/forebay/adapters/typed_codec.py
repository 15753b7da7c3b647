"""Declared types that msgspec knows: Structs, dataclasses, attrs classes, TypedDicts, NamedTuples, generics, unions."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import msgspec

from forebay.adapters.round_trip import parts_of, round_trip
from forebay.interfaces import TypeMismatch, path_segment

_BYTES = (bytes,)  # kept as they are
_MAX_DEPTH = 100
# The messages of msgspec that speak of the type alone. Others may quote the value.
_SAFE_MESSAGE = re.compile(r"Expected `[^`]*`(, got `[^`]*`)?|Object missing required field `\w*`")
_PATH = re.compile(r" - at `(?:key in )?\$(.*)`$", re.DOTALL)


class TypedCodec:
    """The codec of a type that msgspec knows.

    `coerce` converts a value to plain data and back, so that a handler gets a new value of exactly the declared type.
    Plain parts are read as the type has them, ``"2025-01-01"`` as a date; objects have to be loaded as they were.
    """

    def __init__(self, declared: Any) -> None:
        unknown = next(_custom_types(msgspec.inspect.type_info(declared)), None)
        if unknown is not None:
            raise TypeError(_no_plain_form(unknown))
        self._declared = declared

    def coerce(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        return round_trip(self, value)

    def dump(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            return _to_plain(value)
        except Exception as error:  # noqa: BLE001 - a user's value may raise anything
            path, culprit = _find_unsupported(value, 0)
            reason = _no_plain_form(type(culprit))
            if isinstance(error, RecursionError):
                reason = "it is nested too deeply, or contains itself"
            raise TypeMismatch(path, reason) from None

    def load(self, plain: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            return msgspec.convert(plain, self._declared, builtin_types=_BYTES, str_keys=True)
        except msgspec.ValidationError as error:
            text = str(error)
            path = _PATH.search(text)
            safe = _SAFE_MESSAGE.match(text)
            raise TypeMismatch(path[1] if path else "", safe[0] if safe else "it is not valid") from None
        except Exception as error:  # noqa: BLE001 - the type's own checks may raise anything
            raise TypeMismatch("", f"its type raised {type(error).__name__}") from None


def _no_plain_form(kind: type) -> str:
    return f"a {kind.__name__} has no plain form"


def _to_plain(value: Any) -> Any:
    return msgspec.to_builtins(value, builtin_types=_BYTES, str_keys=True)


def _find_unsupported(value: Any, depth: int) -> tuple[str, Any]:
    """Return the path of the innermost part that has no plain form, and the part."""
    for name, part in parts_of(value) if depth < _MAX_DEPTH else ():
        try:
            _to_plain(part)
        except Exception:  # noqa: BLE001 - as in `dump`
            path, culprit = _find_unsupported(part, depth + 1)
            return path_segment(name) + path, culprit
    return "", value


def _custom_types(info: Any) -> Iterator[type]:
    """Yield the types within `info` that msgspec does not know."""
    yield from _walk(info, set())


def _walk(info: Any, seen: set[int]) -> Iterator[type]:
    if isinstance(info, msgspec.inspect.CustomType):
        if info.cls is not object:  # `object` means anything
            yield info.cls
    elif isinstance(info, list | tuple):
        for part in info:
            yield from _walk(part, seen)
    elif isinstance(info, msgspec.inspect.Type | msgspec.inspect.Field) and id(info) not in seen:
        seen.add(id(info))
        for name in info.__struct_fields__:
            yield from _walk(getattr(info, name), seen)
