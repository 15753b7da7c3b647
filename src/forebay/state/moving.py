"""Moving entries between shards, once the shards, or their weights, are others than before.

While a state moves, each key whose old shard differs from its new one is *misplaced*. An operation on it moves its
entry first: it copies the entry to the new shard with its version, deletes it on the old one if it still has that
version, and then uses the new shard. Each of these steps may be repeated, by any process, and a process may end between
any two:

- An entry is always on one of the two shards; on both it has the same version, since nobody changes it on the new one
  before it is gone from the old one.
- A process may have read an entry on the old shard, and restore it late, when others have moved it, and changed or
  deleted it since. The version that the new shard has then, or that of the tombstone, is larger, and restoring does
  nothing.

Two URLs may lead to one place, say after a host was renamed. To move an entry from there to there would delete it. So
before the first move between two shards, a mark is written on the new one, since the old one may be full, and looked
for on the old one.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

from forebay.clock import new_id, now
from forebay.state.entry import StoredEntry
from forebay.state.guarded_shard import GuardedShard
from forebay.state.placement import Placement, unit_of
from forebay.state.shard import NamePage, Page, WriteRefused

_PAGE = 100  # entries that are moved at a time
_MARKS = "%"  # the namespace of marks; a user's cannot have this name
_MARK_TTL = 60.0  # seconds

_T = TypeVar("_T")


class Rebalanced(NamedTuple):
    """The progress of `ShardedState.rebalance`.

    Attributes:
        examined: entries on the former shards that were looked at, those that stay included.
        moved: entries that this call has moved.
    """

    examined: int
    moved: int


class Move:
    """A move of the entries from where one placement has them to where another one does.

    Args:
        shards: all shards, by their URLs.
        old: where the entries were.
        new: where they are to be.
    """

    def __init__(self, shards: Mapping[str, GuardedShard], old: Placement, new: Placement) -> None:
        self._shards = shards
        self._old = old
        self._new = new
        self._is_one: dict[tuple[str, str], bool] = {}  # whether two URLs lead to one place

    def _route(self, namespace: str, key: bytes) -> tuple[GuardedShard, GuardedShard]:
        """Return the old shard of a key, and the new one."""
        unit = unit_of(namespace, key)
        return self._shards[self._old.shard_of(unit)], self._shards[self._new.shard_of(unit)]

    async def _is_misplaced(self, source: GuardedShard, target: GuardedShard) -> bool:
        """Return whether the keys of an old shard that a new one has are to be moved."""
        if source is target:
            return False
        pair = (source.url, target.url)
        if pair not in self._is_one:
            mark = new_id().encode()
            await target.call(target.shard.put, _MARKS, mark, mark, _MARK_TTL)
            found = await source.call(source.shard.get, _MARKS, mark)
            self._is_one[pair] = found is not None
        return not self._is_one[pair]

    def sources(self, namespace: str) -> Sequence[GuardedShard]:
        """Return the shards that may have had keys of a namespace."""
        if namespace:
            return [self._route(namespace, b"")[0]]
        return [self._shards[url] for url in self._old.shards]

    async def settle(self, namespace: str, key: bytes) -> int | None:
        """Move the entry of a key, if it is misplaced and that was not done yet.

        Returns:
            the floor of the versions of the key on its new shard; None if its shard has not changed.
        """
        source, target = self._route(namespace, key)
        if not await self._is_misplaced(source, target):
            return None
        _, latest = await self._move(namespace, key, source, target)
        return latest

    async def _move(self, namespace: str, key: bytes, source: GuardedShard, target: GuardedShard) -> tuple[bool, int]:
        """Return whether this call has moved the entry, and a version that none of its versions is larger than."""
        while True:
            asked_at = now()
            entry, ttl, latest = await source.call(source.shard.copy, namespace, key)
            if entry is None:
                return False, latest
            left = None if ttl is None else ttl - (now() - asked_at)
            if left is None or left > 0:
                await target.call(target.shard.restore, namespace, entry, left)
            try:
                await source.call(source.shard.delete, namespace, key, entry.version)
            except WriteRefused:  # another one has moved it
                continue
            return True, latest

    async def rebalance(self, progress: Callable[[Rebalanced], object] | None) -> Rebalanced:
        """Move all entries that are misplaced, and call `progress` after each page of them.

        It goes over the shards until it finds nothing more to move: the walk over a server may have holes while that
        fails over, or while a cluster moves its slots.
        """
        examined = moved = 0
        for number in itertools.count():
            found = 0
            async for shard, namespace, page in self._pages():
                moves = list[tuple[bytes, GuardedShard]]()
                for entry in page:
                    source, target = self._route(namespace, entry.key)
                    if source is shard and await self._is_misplaced(source, target):
                        moves.append((entry.key, target))
                results = await _all(self._move(namespace, key, shard, target) for key, target in moves)
                found += len(moves)
                examined += len(moves) if number else len(page)  # what stays is counted by the first walk
                moved += sum(was_moved for was_moved, _ in results)
                if progress is not None and (moves or not number):
                    progress(Rebalanced(examined, moved))
            if not found:
                break
        return Rebalanced(examined, moved)

    async def _pages(self) -> AsyncIterator[tuple[GuardedShard, str, Sequence[StoredEntry]]]:
        """Yield the entries on the old shards that may be misplaced, with their shards and namespaces."""
        for url in self._old.shards:
            shard = self._shards[url]
            async for namespace in _namespaces(shard):
                if namespace == _MARKS or (namespace and self._route(namespace, b"")[0] is not shard):
                    continue
                after: bytes | None = None
                while True:
                    page = await shard.call(shard.shard.scan, namespace, b"", after, _PAGE)
                    if page.entries:
                        yield shard, namespace, page.entries
                    after = page.after
                    if after is None:
                        break

    async def entries(  # noqa: PLR0913 - what a scan takes
        self,
        namespace: str,
        prefix: bytes,
        after: bytes | None,
        limit: int,
        targets: Sequence[GuardedShard],
        *,
        reverse: bool,
    ) -> AsyncIterator[StoredEntry]:
        """Yield the entries of a scan, by the order of their keys, each once.

        Of each part of the keys the old shards are read first: what is not there by then is on the new ones, which are
        read afterwards.
        """
        sources = self.sources(namespace)
        groups = (targets,) if namespace and sources == targets else (sources, targets)
        while True:
            found = dict[bytes, StoredEntry]()
            ends = list[bytes]()
            for shards in groups:
                pages: Sequence[Page] = await _all(
                    each.call(each.shard.scan, namespace, prefix, after, limit, reverse=reverse) for each in shards
                )
                for page in pages:
                    for entry in page.entries:
                        if entry.key not in found or found[entry.key].version < entry.version:
                            found[entry.key] = entry
                ends += [page.after for page in pages if page.after is not None]
            end = (max(ends) if reverse else min(ends)) if ends else None  # beyond it, a page may have more
            for key in sorted(found, reverse=reverse):
                if end is None or (key >= end if reverse else key <= end):
                    yield found[key]
            if end is None:
                return
            after = end


async def _namespaces(shard: GuardedShard) -> AsyncIterator[str]:
    after: str | None = None
    while True:
        page: NamePage = await shard.call(shard.shard.namespaces, after)
        for name in page.names:
            yield name
        after = page.after
        if after is None:
            return


async def _all(awaitables: Iterable[Awaitable[_T]]) -> Sequence[_T]:
    """Return the results, once all have ended; raise the first error."""
    results = await asyncio.gather(*awaitables, return_exceptions=True)
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results  # type: ignore[return-value]
