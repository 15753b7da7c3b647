"""The estimated size of a payload or a result, for the bound of what a supervisor keeps."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable
from typing import Any, Final

SCALARS: Final = frozenset({type(None), bool, int, float})  # they count for nothing

_MAX_VISITED: Final = 1000  # parts of a value that are looked at
_SAMPLE: Final = 50  # items of a container that stand for all of them
_ENTRY: Final = 100  # bytes of an entry of a small dict, without its value
_ITEM: Final = 60  # bytes of an item of a small list, likewise
_UNKNOWN: Final = 1000.0  # bytes of a part that cannot be looked at


def estimated_bytes(value: object) -> int:
    """Return about how many bytes a value takes with all that it holds. Large containers are sampled."""
    if type(value) in SCALARS:
        return 0
    if type(value) is str or type(value) is bytes:
        return len(value)
    if (plain := _plain_bytes(value)) is not None:
        return plain
    total, visited, seen = 0.0, 0, set[int]()
    parts: list[tuple[object, float]] = [(value, 1.0)]  # each with the number of parts that it stands for
    while parts and visited < _MAX_VISITED:
        part, weight = parts.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        visited += 1
        try:
            total += weight * sys.getsizeof(part)
            length, inner = _parts_of(part)
            sample = list(itertools.islice(inner, _SAMPLE))
        except BaseException:  # noqa: BLE001 - a value of the user's, which may have a broken __sizeof__
            total += weight * _UNKNOWN
            continue
        parts.extend((each, weight * length / len(sample)) for each in sample)
    return int(total + sum(weight * _UNKNOWN for _, weight in parts))


def _plain_bytes(value: object) -> int | None:
    """Return about how many bytes a small value of plain data takes; None if it is another one.

    Most payloads and results are such values, as those of a conversation: this takes a tenth of the time.
    """
    total, containers = 0, [value]
    for container in containers:  # which grows meanwhile
        kind = type(container)
        if kind is dict:
            total += _ENTRY * len(container)  # type: ignore[arg-type]  # as it is a dict
            inner: Any = container.values()  # type: ignore[attr-defined]
        elif kind is list or kind is tuple:
            total += _ITEM * len(container)  # type: ignore[arg-type]
            inner = container
        else:
            return None
        if len(inner) > _SAMPLE or len(containers) > _SAMPLE:  # so a container that holds itself ends here, too
            return None
        for each in inner:
            kind = type(each)
            if kind is str or kind is bytes:
                total += len(each)
            elif kind not in SCALARS:
                containers.append(each)
    return total


def _parts_of(part: Any) -> tuple[int, Iterable[object]]:
    """Return how many values a value holds, and these."""
    kind = type(part)
    if kind is dict:
        return 2 * len(part), itertools.chain.from_iterable(part.items())
    if kind in (list, tuple, set, frozenset):
        return len(part), part
    if kind in (str, bytes, bytearray, int, float, complex, bool, type(None), type):
        return 0, ()
    names = [name for base in kind.__mro__ for name in _slots(base)]
    inner = [getattr(part, name) for name in names if hasattr(part, name)]
    if (attributes := getattr(part, "__dict__", None)) is not None:
        inner.append(attributes)
    if isinstance(part, list | tuple | set | frozenset | dict):
        inner.extend(part.values() if isinstance(part, dict) else part)
    return len(inner), inner


def _slots(base: type) -> tuple[str, ...]:
    slots = base.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)
