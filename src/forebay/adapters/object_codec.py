"""Objects of a framework as plain data: of the listed classes only."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forebay.interfaces import TypeMismatch, path_segment

_MARK = "__forebay__"  # the key by which a dict stands for an object; a dict that has this key itself is wrapped
_PARTS = "parts"
_DICT = "dict"
_MAX_DEPTH = 100  # a deeper part is left as it is, and rejected when it is to be stored


class SerializableClass(NamedTuple):
    """A class whose objects an `ObjectCodec` can convert.

    Attributes:
        cls: the class itself; an object of a derived class is rejected.
        to_fields: returns the fields of an object, by name.
        from_fields: makes an object from its fields. They may come from anywhere, so it must check them, and must do
            nothing but make the object.
    """

    cls: type
    to_fields: Callable[[Any], Mapping[str, Any]]
    from_fields: Callable[[dict[str, Any]], Any]


class ObjectCodec:
    """The codec of plain data with objects of listed classes anywhere inside.

    For an adapter's ``Handler(codec=...)``: make one for the framework, once. A stored name is looked up in the list
    and nowhere else, so that stored data cannot choose the class.
    """

    def __init__(self, classes: Sequence[SerializableClass]) -> None:
        self._by_name = {each.cls.__name__: each for each in classes}
        self._by_class = {each.cls: each for each in classes}

    def coerce(self, value: Any) -> Any:  # noqa: D102 - as the Protocol; no type was declared
        return value

    def dump(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        return self._dump(value, 0, {})

    def load(self, plain: Any) -> Any:  # noqa: D102 - as the Protocol
        return self._load(plain, "")

    def _dump(self, value: Any, depth: int, known: dict[int, tuple[Any, Any]]) -> Any:
        cls = type(value)
        if depth > _MAX_DEPTH or not (cls is dict or cls is list or cls is tuple or cls in self._by_class):
            return value
        if id(value) in known:  # referenced more than once, converted once
            return known[id(value)][1]
        if cls is dict:
            made: Any = self._dump_fields(value, depth, known)
            if _MARK in value:
                made = {_MARK: _DICT, _PARTS: made}
        elif cls is list or cls is tuple:
            made = cls(self._dump(item, depth + 1, known) for item in value)
        else:
            fields = self._by_class[cls].to_fields(value)
            made = {_MARK: cls.__name__, _PARTS: self._dump_fields(fields, depth, known)}
        known[id(value)] = (value, made)  # the value is kept alive, or another could get its id
        return made

    def _dump_fields(self, fields: Mapping[str, Any], depth: int, known: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
        return {name: self._dump(field, depth + 1, known) for name, field in fields.items()}

    def _load(self, plain: Any, path: str) -> Any:
        cls = type(plain)
        if cls is list or cls is tuple:
            return cls(self._load(item, f"{path}[{index}]") for index, item in enumerate(plain))
        if cls is not dict:
            return plain
        if _MARK not in plain:
            return {name: self._load(item, path + path_segment(name)) for name, item in plain.items()}
        name, fields = plain[_MARK], plain.get(_PARTS)
        if type(fields) is not dict or not isinstance(name, str):
            raise TypeMismatch(path, "the stored form of an object is damaged")
        fields = {name: self._load(item, path + path_segment(name)) for name, item in fields.items()}
        if name == _DICT:
            return fields
        known = self._by_name.get(name)
        if known is None:
            raise TypeMismatch(path, "an object of a class that is not known here")
        try:
            return known.from_fields(fields)
        except Exception as error:  # noqa: BLE001 - the class's own checks may raise anything
            raise TypeMismatch(path, f"the fields of a {name} are rejected ({type(error).__name__})") from None
