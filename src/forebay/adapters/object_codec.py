"""Objects of a framework in plain data: of a few classes that are listed, and of no others."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from forebay.interfaces import TypeMismatch, path_segment

_MARK = "__forebay__"  # the key by which a dict stands for an object; a dict that has it itself is wrapped
_PARTS = "parts"
_DICT = "dict"
_DEEPEST = 100  # what is deeper is left as it is, and refused when it is to be stored


class SerializableClass(NamedTuple):
    """A class whose objects may travel.

    Attributes:
        cls: the class itself: an object of a derived one is refused.
        parts: what an object is made of, by name.
        make: an object of its parts. They may come from anywhere, so it must check them, and do nothing but make it.
    """

    cls: type
    to_fields: Callable[[Any], Mapping[str, Any]]
    from_fields: Callable[[dict[str, Any]], Any]


class ObjectCodec:
    """Plain data with objects of known kinds in it, anywhere. The table alone says which class a name is.

    For an adapter's ``Handler(codec=...)``: make one for the framework, once.
    """

    def __init__(self, kinds: Sequence[SerializableClass]) -> None:
        self._by_name = {kind.cls.__name__: kind for kind in kinds}
        self._by_class = {kind.cls: kind for kind in kinds}

    def coerce(self, value: Any) -> Any:  # noqa: D102 - as the Protocol; nothing was declared
        return value

    def dump(self, value: Any) -> Any:  # noqa: D102 - as the Protocol
        return self._dump(value, 0, {})

    def load(self, plain: Any) -> Any:  # noqa: D102 - as the Protocol
        return self._load(plain, "")

    def _dump(self, value: Any, depth: int, known: dict[int, tuple[Any, Any]]) -> Any:
        cls = type(value)
        if depth > _DEEPEST or not (cls is dict or cls is list or cls is tuple or cls in self._by_class):
            return value
        if id(value) in known:  # held more than once: walked once
            return known[id(value)][1]
        if cls is dict:
            made: Any = self._dump_all(value, depth, known)
            if _MARK in value:
                made = {_MARK: _DICT, _PARTS: made}
        elif cls is list or cls is tuple:
            made = cls(self._dump(item, depth + 1, known) for item in value)
        else:
            kind = self._by_class[cls]
            made = {_MARK: cls.__name__, _PARTS: self._dump_all(kind.to_fields(value), depth, known)}
        known[id(value)] = (value, made)  # kept alive, or another could take its id
        return made

    def _dump_all(self, parts: Mapping[str, Any], depth: int, known: dict[int, tuple[Any, Any]]) -> dict[str, Any]:
        return {name: self._dump(part, depth + 1, known) for name, part in parts.items()}

    def _load(self, plain: Any, path: str) -> Any:
        cls = type(plain)
        if cls is list or cls is tuple:
            return cls(self._load(item, f"{path}[{index}]") for index, item in enumerate(plain))
        if cls is not dict:
            return plain
        if _MARK not in plain:
            return {name: self._load(item, path + path_segment(name)) for name, item in plain.items()}
        name, parts = plain[_MARK], plain.get(_PARTS)
        if type(parts) is not dict or not isinstance(name, str):
            raise TypeMismatch(path, "what stands for an object there is damaged")
        parts = {name: self._load(item, path + path_segment(name)) for name, item in parts.items()}
        if name == _DICT:
            return parts
        kind = self._by_name.get(name)
        if kind is None:
            raise TypeMismatch(path, "an object of a kind that is not known here")
        try:
            return kind.from_fields(parts)
        except Exception as error:  # noqa: BLE001 - whatever the class's own checks may raise
            raise TypeMismatch(path, f"the parts of a {name} are refused ({type(error).__name__})") from None
