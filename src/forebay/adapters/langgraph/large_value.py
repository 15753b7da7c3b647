"""Values of any size in a namespace: a large one is kept in parts, whose keys begin with its own and a slash.

The parts are written before the entry that names them, so a value is there as a whole, or it is not.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import msgspec

from forebay.clock import new_id, wall_time
from forebay.state import Entry, Namespace

_T = TypeVar("_T")

_MAX_PART = 4 << 20  # bytes; an entry may have twice as many
_ORPHAN_AGE = 3_600  # seconds in which what nothing names yet may still get its name
_MAX_CONCURRENT = 100  # operations that go to a shard at once

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder().decode


async def gather(work: Iterable[Awaitable[_T]]) -> list[_T]:
    """Return the results of `work`; if some fails, raise its error after the rest has ended, so that none runs on."""
    results = await asyncio.gather(*work, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]


async def put_value(space: Namespace, key: str, value: Sequence[Any], if_version: int | None = None) -> None:
    """Write `value`, a list of plain data.

    Raises:
        Conflict: the key has another version than `if_version`.
    """
    data = _encode(value)
    if len(data) <= _MAX_PART:
        await space.put(key, value, if_version=if_version)
        return
    name = new_id()
    parts = [data[start : start + _MAX_PART] for start in range(0, len(data), _MAX_PART)]
    await gather(space.put(f"{key}/{name}/{number}", part) for number, part in enumerate(parts))
    await space.put(key, {"name": name, "parts": len(parts)}, if_version=if_version)


async def find_entry(space: Namespace, key: str) -> Entry | None:
    """Return the entry of a key as its shard has it now, whatever a near cache has; None if there is none."""
    found = [entry async for entry in space.scan(key, limit=1)]  # a key sorts before those that begin with it
    return found[0] if found and found[0].key == key else None


async def get_value(space: Namespace, key: str, *, past_cache: bool = False) -> tuple[Any, int] | None:
    """Return a value and its version; None if there is none, or a part is missing."""
    found = await (find_entry(space, key) if past_cache else space.get(key))
    if found is None:
        return None
    if isinstance(found.value, dict):
        names = _part_keys(key, found.value)
        parts = await gather(space.get(name) for name in names)
        value = _joined([None if part is None else part.value for part in parts])
        return None if value is None else (value, found.version)
    return found.value, found.version


def joined_values(entries: Mapping[str, Any]) -> list[Any]:
    """Return the values among `entries`, by their keys, which have their parts too."""
    heads = {key: value for key, value in entries.items() if not isinstance(value, bytes)}
    values = [
        _joined([entries.get(name) for name in _part_keys(key, value)]) if isinstance(value, dict) else value
        for key, value in heads.items()
    ]
    return [value for value in values if value is not None]


def _part_keys(key: str, head: Mapping[str, Any]) -> list[str]:
    return [f"{key}/{head['name']}/{number}" for number in range(head["parts"])]


def _joined(parts: Sequence[Any]) -> Any:
    return None if None in parts else _decode(b"".join(parts))


async def remove_values(space: Namespace, keys: Sequence[str]) -> None:
    """Delete values and their parts."""
    for start in range(0, len(keys), _MAX_CONCURRENT):
        some = keys[start : start + _MAX_CONCURRENT]
        await gather(space.delete(key) for key in some)
        await gather(remove_prefix(space, f"{key}/") for key in some)


async def remove_prefix(space: Namespace, prefix: str) -> None:
    """Delete all entries whose keys begin with `prefix`."""
    keys = list[str]()
    async for entry in space.scan(prefix):
        keys.append(entry.key)
        if len(keys) == _MAX_CONCURRENT:
            await gather(space.delete(key) for key in keys)
            keys.clear()
    await gather(space.delete(key) for key in keys)


def orphan_horizon() -> float:
    """Return the version before which an entry that nothing names is no part of something that is being written."""
    return (wall_time() - _ORPHAN_AGE) * 1_000_000  # versions are microseconds since the epoch, or more
