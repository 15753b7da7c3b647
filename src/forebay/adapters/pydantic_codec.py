"""Declared types of pydantic's: models, and whatever holds them. Imported once one is declared."""

from __future__ import annotations

from typing import Any

import pydantic
import pydantic_core

from forebay.adapters.typed_codec import round_trip
from forebay.interfaces import TypeMismatch, path_segment


class PydanticCodec:
    """A type that pydantic knows, in the form of its own JSON; what is stored goes by the names of the fields.

    What is submitted is read by the model's own rules, aliases too; objects of the model itself have to come back as
    they were.
    """

    def __init__(self, declared: Any) -> None:
        if tuple(map(int, pydantic.VERSION.split(".")[:2])) < (2, 11):
            message = f"pydantic is {pydantic.VERSION}, and 2.11 is needed"
            raise TypeError(message)
        self._type = pydantic.TypeAdapter(declared)

    def coerce(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            value = self._type.validate_python(value)
        except Exception as error:  # noqa: BLE001 - whatever the model's own checks may raise
            raise _misfit(error) from None
        return round_trip(self, value)

    def dump(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            return self._type.dump_python(value, mode="json", round_trip=True, by_alias=False, warnings=False)
        except Exception as error:  # noqa: BLE001 - whatever the model's own serializers may raise
            raise TypeMismatch("", f"pydantic cannot write it as JSON ({type(error).__name__})") from None

    def load(self, plain: Any) -> Any:  # noqa: D102 - as the Protocol
        try:
            text = pydantic_core.to_json(plain, inf_nan_mode="constants")
            return self._type.validate_json(text, by_alias=False, by_name=True)
        except Exception as error:  # noqa: BLE001 - whatever the model's own checks may raise
            raise _misfit(error) from None


def _misfit(error: Exception) -> TypeMismatch:
    if not isinstance(error, pydantic.ValidationError):
        return TypeMismatch("", f"its type raised {type(error).__name__}")
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    # Of its messages some quote the value; its kind of error never does.
    return TypeMismatch("".join(map(path_segment, first["loc"])), f"pydantic finds {first['type'].replace('_', ' ')}")
