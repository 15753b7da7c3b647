"""The checkpoints of one thread, as entries of its namespace; `checkpoint_keys` says under which keys.

A crash between two writes loses no more than the write that was under way: the values of channels are there before the
checkpoint that names them, and a checkpoint is deleted before what it names.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from forebay.adapters.langgraph import checkpoint_keys as keys
from forebay.adapters.langgraph.large_value import (
    find_entry,
    gather,
    get_value,
    joined_values,
    orphan_horizon,
    put_value,
    remove_prefix,
    remove_values,
)
from forebay.errors import Conflict
from forebay.state import Namespace

_PAGE = 100
_MAX_BLOBS = 10_000  # keys of values that are looked for among all checkpoints at a time

Typed = tuple[str, bytes]  # as a serializer returns it


class Record(msgspec.Struct, frozen=True, kw_only=True):
    """A checkpoint, as it is stored.

    Attributes:
        ns: its checkpoint_ns.
        id: its checkpoint_id.
        parent: the id of the checkpoint before it.
        run: the id of the run that wrote it.
        blobs: the channels that had a value, and in which version.
        delta: the channels whose values are made from the writes since an earlier checkpoint.
        checkpoint: the rest of it, serialized.
        metadata: serialized.
    """

    ns: str
    id: str
    parent: str | None
    run: str | None
    blobs: dict[str, str | int | float]
    delta: list[str]
    checkpoint: Typed
    metadata: Typed

    @property
    def blob_keys(self) -> set[str]:
        """The keys of the values of its channels."""
        return {keys.blob_key(self.ns, channel, version) for channel, version in self.blobs.items()}


Enter = Callable[[Record], Awaitable[None]]  # enters the run of a checkpoint into an index


class StoredWrite(NamedTuple):
    """A write of a task.

    Attributes:
        task_id: of the task.
        idx: its place among the writes of the task, or a negative number for a kind of which a task has one.
        channel: to which it goes.
        value: serialized.
        task_path: of the task.
    """

    task_id: str
    idx: int
    channel: str
    value: Typed
    task_path: str


class ThreadCheckpoints:
    """The checkpoints of one thread.

    Args:
        space: the namespace of the thread.
    """

    def __init__(self, space: Namespace) -> None:
        self.space = space

    async def put(self, record: Record) -> None:
        """Write a checkpoint, after its values."""
        value = msgspec.to_builtins(record, builtin_types=(bytes,))
        await self.space.put(keys.checkpoint_key(record.ns, record.id), value)

    async def get(self, checkpoint_ns: str, checkpoint_id: str) -> Record | None:
        """Return a checkpoint; None if there is none."""
        found = await self.space.get(keys.checkpoint_key(checkpoint_ns, checkpoint_id))
        return None if found is None else _record(found.value)

    async def has(self, record: Record) -> bool:
        """Return whether a checkpoint is still there."""
        return await find_entry(self.space, keys.checkpoint_key(record.ns, record.id)) is not None

    async def latest(self, checkpoint_ns: str) -> Record | None:
        """Return the latest checkpoint, by one operation, however many there are."""
        found = [record async for record in self.records(checkpoint_ns, limit=1)]
        return found[0] if found else None

    async def records(
        self, checkpoint_ns: str, *, before: str | None = None, limit: int | None = None, oldest_first: bool = False
    ) -> AsyncIterator[Record]:
        """Yield the checkpoints of a checkpoint_ns, the latest first.

        Args:
            checkpoint_ns: whose.
            before: only those with smaller ids.
            limit: how many.
            oldest_first: the other way round.
        """
        after = None if before is None else keys.checkpoint_key(checkpoint_ns, before)
        prefix = keys.checkpoints_prefix(checkpoint_ns)
        async for entry in self.space.scan(prefix, reverse=not oldest_first, after=after, limit=limit):
            yield _record(entry.value)

    async def ancestors(self, record: Record) -> AsyncIterator[Record]:
        """Yield the checkpoint before `record`, the one before that, and so on."""
        page, seen = dict[str, Record](), {record.id}
        parent = record.parent
        while parent is not None and parent not in seen:
            if parent not in page:  # the ones before it are likely its ancestors
                upwards = self.records(record.ns, before=f"{parent}\0", limit=_PAGE)
                page = {each.id: each async for each in upwards}
            if parent not in page:
                return
            seen.add(parent)
            yield page[parent]
            parent = page[parent].parent

    async def namespaces(self) -> AsyncIterator[str]:
        """Yield each checkpoint_ns, by one operation each."""
        after: str | None = None
        while True:
            entries = [each async for each in self.space.scan(keys.checkpoints_prefix(), after=after, limit=1)]
            if not entries:
                return
            name = _record(entries[0].value).ns
            yield name
            after = keys.after_checkpoints(name)

    # --- values of channels ---

    async def put_blob(self, checkpoint_ns: str, channel: str, version: str | float, value: Typed) -> None:
        """Write the value that a channel has in a version."""
        await put_value(self.space, keys.blob_key(checkpoint_ns, channel, version), value)

    async def blob(self, checkpoint_ns: str, channel: str, version: str | float) -> Typed | None:
        """Return the value that a channel had in a version; None if there is none."""
        found = await get_value(self.space, keys.blob_key(checkpoint_ns, channel, version))
        return None if found is None else tuple(found[0])

    # --- writes of tasks ---

    async def put_writes(self, checkpoint_ns: str, checkpoint_id: str, writes: Sequence[StoredWrite]) -> None:
        """Add writes of one task to those that follow a checkpoint, all or none.

        A write that is there already stays, unless its index is negative.
        """
        if not writes:
            return
        key = keys.writes_key(checkpoint_ns, checkpoint_id, writes[0].task_id)
        known = dict[int, StoredWrite]()
        version = 0
        while True:
            merged = {**known}
            for write in writes:
                if write.idx < 0 or write.idx not in known:
                    merged[write.idx] = write
            if merged == known:
                return
            try:
                await put_value(self.space, key, list(merged.values()), if_version=version)
            except Conflict:
                found = await get_value(self.space, key, past_cache=True)
                value, version = ([], 0) if found is None else found
                known = {write.idx: write for write in map(_write, value)}
            else:
                return

    async def writes(self, checkpoint_ns: str, checkpoint_id: str) -> list[StoredWrite]:
        """Return the writes that follow a checkpoint, in no certain order."""
        prefix = keys.writes_prefix(checkpoint_ns, checkpoint_id)
        entries = {entry.key: entry.value async for entry in self.space.scan(prefix)}
        return [_write(each) for value in joined_values(entries) for each in value]

    # --- deleting and copying ---

    async def delete_all(self) -> None:
        """Delete all checkpoints, values and writes, the checkpoints first."""
        for prefix in ("c/", "w/", "b/"):
            await remove_prefix(self.space, prefix)

    async def delete_where(self, checkpoint_ns: str, doomed: Callable[[Record], bool]) -> bool:
        """Delete checkpoints with what only they name, and return whether there are others."""
        page, blobs = list[Record](), set[str]()
        async for record in self.records(checkpoint_ns, oldest_first=True):
            if doomed(record):
                page.append(record)
            if len(page) == _PAGE:
                blobs |= await self._delete(page)
                page.clear()
            if len(blobs) > _MAX_BLOBS:
                await self._delete_unnamed(checkpoint_ns, blobs)
                blobs.clear()
        blobs |= await self._delete(page)
        return await self._delete_unnamed(checkpoint_ns, blobs)

    async def prune(self, checkpoint_ns: str, keep: int) -> None:
        """Delete all checkpoints but the latest `keep` and those from which their values are made.

        What no checkpoint names is deleted too, once it is an hour old: a crash between two writes leaves that.
        """
        needed = await self._needed(checkpoint_ns, keep)
        newest = max(needed, default="")
        # A checkpoint that is written meanwhile stays.
        await self.delete_where(checkpoint_ns, lambda each: each.id <= newest and each.id not in needed)
        await self._delete_orphans(checkpoint_ns)

    async def _delete(self, records: Sequence[Record]) -> set[str]:
        """Delete checkpoints and their writes, and return the keys of the values that they named."""
        await gather(self.space.delete(keys.checkpoint_key(each.ns, each.id)) for each in records)
        await gather(remove_prefix(self.space, keys.writes_prefix(each.ns, each.id)) for each in records)
        return {key for record in records for key in record.blob_keys}

    async def _delete_unnamed(self, checkpoint_ns: str, blobs: set[str]) -> bool:
        """Delete those of some values that no checkpoint names by now, and return whether there are checkpoints."""
        unnamed, has_some = set(blobs), False
        async for record in self.records(checkpoint_ns):
            has_some = True
            unnamed -= record.blob_keys
        await remove_values(self.space, sorted(unnamed))
        return has_some

    async def _delete_orphans(self, checkpoint_ns: str) -> None:
        horizon = orphan_horizon()
        named, prefixes = set[str](), set[str]()
        async for record in self.records(checkpoint_ns):
            named |= record.blob_keys
            prefixes.add(keys.writes_prefix(checkpoint_ns, record.id))
        orphans = list[str]()
        for prefix in (keys.blobs_prefix(checkpoint_ns), keys.writes_prefix(checkpoint_ns)):
            async for entry in self.space.scan(prefix):
                parts = entry.key.split("/")
                whole, owner = "/".join(parts[:4]), "/".join(parts[:3]) + "/"
                if entry.version < horizon and whole not in named and owner not in prefixes:
                    orphans.append(entry.key)
        for start in range(0, len(orphans), _PAGE):
            await gather(self.space.delete(key) for key in orphans[start : start + _PAGE])

    async def _needed(self, checkpoint_ns: str, keep: int) -> set[str]:
        """Return the ids of the latest `keep` checkpoints, and of those from which their values are made."""
        ids, count = set[str](), 0
        wanted = dict[str, set[str]]()  # by checkpoint: the channels whose last whole value is there or before
        async for record in self.records(checkpoint_ns):
            count += 1
            channels = wanted.pop(record.id, set())
            if count <= keep:
                channels |= set(record.delta)
            elif not channels:
                if not wanted:
                    break
                continue
            ids.add(record.id)
            channels -= record.blobs.keys()
            if channels and record.parent is not None:
                wanted.setdefault(record.parent, set()).update(channels)
        return ids

    async def copy_to(self, target: ThreadCheckpoints, enter: Enter) -> None:
        """Copy all checkpoints, each after what it names; `enter` is awaited for each before it is written."""
        async for checkpoint_ns in self.namespaces():
            copied: Mapping[str, bool] = {}
            page = list[Record]()
            async for record in self.records(checkpoint_ns, oldest_first=True):
                page.append(record)
                if len(page) == _PAGE:
                    copied = await self._copy(page, copied, target, enter)
                    page.clear()
            await self._copy(page, copied, target, enter)

    async def _copy(
        self, records: Sequence[Record], copied: Mapping[str, bool], target: ThreadCheckpoints, enter: Enter
    ) -> Mapping[str, bool]:
        """Copy some checkpoints but for the values that have been `copied`; return the values that they have."""
        blobs = dict.fromkeys((key for record in records for key in sorted(record.blob_keys)), True)
        await gather(_copy_value(self.space, target.space, key) for key in blobs if key not in copied)
        all_writes = await gather(self.writes(record.ns, record.id) for record in records)
        for record, writes in zip(records, all_writes, strict=True):
            by_task = dict[str, list[StoredWrite]]()
            for write in writes:
                by_task.setdefault(write.task_id, []).append(write)
            await gather(target.put_writes(record.ns, record.id, each) for each in by_task.values())
            await enter(record)
        await gather(target.put(record) for record in records)
        return blobs


async def _copy_value(source: Namespace, target: Namespace, key: str) -> None:
    found = await get_value(source, key)
    if found is not None:
        await put_value(target, key, found[0])


def _record(value: Any) -> Record:
    return msgspec.convert(value, Record, builtin_types=(bytes,))


def _write(value: Sequence[Any]) -> StoredWrite:
    task_id, idx, channel, typed, task_path = value
    return StoredWrite(task_id, idx, channel, (typed[0], typed[1]), task_path)
