"""Plain data for JSON: None, bool, finite numbers, valid Unicode, lists and dicts with str keys."""

from __future__ import annotations

import math
from enum import Enum, IntEnum
from typing import Any

import msgspec

_MIN_INT, _MAX_INT = -(2**63), 2**64 - 1  # beyond these, some encoders fail


class JsonStruct(msgspec.Struct, frozen=True):
    """The base of frozen data that can be written as JSON."""

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data for JSON; a number that is not finite as None."""
        return {name: plain_field(getattr(self, name)) for name in self.__struct_fields__}


class _NoJsonForm(Exception):
    """A value holds something that JSON does not have."""


def plain_field(value: Any) -> Any:
    """Return the value of a field of Forebay's own data as plain data: an enum by its value, a Priority by its name."""
    match value:
        case JsonStruct():
            value = value.as_dict()
        case IntEnum():
            value = value.name.lower()
        case Enum():
            value = value.value
        case float() if not math.isfinite(value):
            value = None
        case str():
            value = _valid_unicode(value)
        case tuple() | list():
            value = [plain_field(item) for item in value]
        case msgspec.Struct():
            value = {name: plain_field(getattr(value, name)) for name in value.__struct_fields__}
    return value


def plain_value(name: str, value: Any) -> dict[str, Any]:
    """Return the field `name` with a value of the user's as plain data.

    It may hold what msgspec can write, such as dataclasses and dates, and models of pydantic. A value that JSON cannot
    hold becomes None, and a second field, named after the first, says why.
    """
    try:
        return {name: _plain(msgspec.to_builtins(value, str_keys=True, enc_hook=_dump))}
    except _NoJsonForm as error:
        why = f"it holds {error}"
    except RecursionError:
        why = "it is nested too deeply, or holds itself"
    except Exception as error:  # noqa: BLE001 - msgspec's own, of a key; or of the user's code
        why = f"writing it raised {type(error).__name__}"
    return {name: None, f"{name}_error": f"the value has no form in JSON: {why}"}


def _dump(value: Any) -> Any:
    """Return a value that msgspec cannot write as one that it can."""
    if isinstance(value, str):
        return str.__str__(value)
    for kind in (int, float):
        if isinstance(value, kind):
            return kind(value)
    dump = getattr(type(value), "model_dump", None)  # of pydantic, which need not be installed
    if dump is None:
        raise _NoJsonForm(f"a {type(value).__qualname__}")
    return dump(value, mode="json")


def _plain(value: Any) -> Any:
    """Return what msgspec has written without what only Python's JSON can read."""
    if isinstance(value, dict):
        return {_valid_unicode(name): _plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, str):
        return _valid_unicode(value)
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, int) and not _MIN_INT <= value <= _MAX_INT:
        raise _NoJsonForm("a whole number beyond 64 bits")
    return value


def _valid_unicode(text: str) -> str:
    """Return a text with surrogates, which no encoding has, written as escapes."""
    return text if text.isascii() else text.encode(errors="backslashreplace").decode()
