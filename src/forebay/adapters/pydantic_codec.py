"""Declared types that pydantic knows: models, and types that hold them. Imported once such a type is declared."""

from __future__ import annotations

from typing import Any

import pydantic
import pydantic_core

from forebay.adapters.round_trip import round_trip
from forebay.interfaces import TypeMismatch, path_segment


class PydanticCodec:
    """The codec of a type that pydantic knows: plain data are pydantic's JSON, keyed by the names of the fields.

    `coerce` applies the model's own rules, aliases included; objects of the model itself have to be loaded as they
    were.
    """

    def __init__(self, declared: Any) -> None:
        if tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 11):
            message = f"pydantic is {pydantic.VERSION}, and 2.11 is needed"
            raise TypeError(message)
        self._type = pydantic.TypeAdapter(declared)

    def coerce(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            value = self._type.validate_python(value)
        except Exception as error:  # noqa: BLE001 - the model's own checks may raise anything
            raise _mismatch(error) from None
        return round_trip(self, value)

    def dump(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            return self._type.dump_python(value, mode="json", round_trip=True, by_alias=False, warnings=False)
        except Exception as error:  # noqa: BLE001 - the model's own serializers may raise anything
            raise TypeMismatch("", f"pydantic cannot write it as JSON ({type(error).__name__})") from None

    def load(self, plain: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            text = pydantic_core.to_json(plain, inf_nan_mode="constants")
            return self._type.validate_json(text, by_alias=False, by_name=True)
        except Exception as error:  # noqa: BLE001 - the model's own checks may raise anything
            raise _mismatch(error) from None


def _mismatch(error: Exception) -> TypeMismatch:
    if not isinstance(error, pydantic.ValidationError):
        return TypeMismatch("", f"its type raised {type(error).__name__}")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Some of its messages quote the value; its kind of error never does.
    return TypeMismatch("".join(map(path_segment, first["loc"])), f"pydantic finds {first['type'].replace('_', ' ')}")
