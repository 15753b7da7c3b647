"""The index of threads, and of the runs in them: for what is asked of all threads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection
from contextlib import suppress
from functools import cached_property

from forebay.adapters.langgraph.checkpoint_keys import digest, marker_key
from forebay.adapters.langgraph.large_value import gather, orphan_horizon
from forebay.errors import Conflict
from forebay.state import Entry, Namespace

_BUCKETS = 64  # namespaces over which the index is spread


class ThreadIndex:
    """The index of threads and runs.

    It is spread over buckets. The entries of a thread are in a bucket on the shard of the thread, so a thread needs no
    shard but its own; where they are sought, all buckets are asked. A marker in the thread says that it has entries.

    Args:
        space: the namespace in which it is.
    """

    def __init__(self, space: Namespace) -> None:
        self._space = space

    @cached_property
    def _buckets(self) -> list[Namespace]:
        return [self._space.namespace(f"index={number}") for number in range(_BUCKETS)]

    async def add(self, thread: Namespace, thread_id: str, run: str | None) -> None:
        """Enter a thread, and one of its runs, unless its marker says that they are."""
        marker = marker_key(run)
        if await thread.get(marker) is not None:
            return
        number = self._bucket_of(thread, thread_id)
        await gather(self._buckets[number].put(key, [thread_id, run]) for key in _keys(thread_id, run))
        await thread.put(marker, [number, run])

    def _bucket_of(self, thread: Namespace, thread_id: str) -> int:
        first = int(digest(thread_id), 16)
        shard = thread.shard_of("i/")
        numbers = [(first + offset) % _BUCKETS for offset in range(_BUCKETS)]
        return next((each for each in numbers if self._buckets[each].shard_of("t/") == shard), numbers[0])

    async def threads(self) -> AsyncIterator[str]:
        """Yield the ids of all threads, once each."""
        seen = set[str]()  # a thread may be in two buckets, if it has moved to another shard
        for bucket in self._buckets:
            async for entry in bucket.scan("t/"):
                if entry.key not in seen:
                    seen.add(entry.key)
                    yield entry.value[0]

    async def threads_of(self, run: str) -> list[str]:
        """Return the ids of the threads with checkpoints of a run."""

        async def ask(bucket: Namespace) -> list[str]:
            return [entry.value[0] async for entry in bucket.scan(f"r/{digest(run)}/")]

        return list(dict.fromkeys(each for found in await gather(map(ask, self._buckets)) for each in found))

    async def remove(self, thread: Namespace, thread_id: str) -> None:
        """Remove a thread that has been deleted, with its runs. If it is written to meanwhile, it is entered again."""
        await self._remove(thread, thread_id, [entry async for entry in thread.scan("i/")])

    async def remove_run(self, thread: Namespace, thread_id: str, run: str) -> None:
        """Remove a run of a thread."""
        key = marker_key(run)
        await self._remove(thread, thread_id, [each async for each in thread.scan(key)], only_run=True)

    async def remove_other_runs(self, thread: Namespace, thread_id: str, runs: Collection[str | None]) -> None:
        """Remove the runs of a thread that are not among `runs`, unless they have just been entered."""
        horizon = orphan_horizon()
        others = [each async for each in thread.scan("i/") if each.version < horizon and each.value[1] not in runs]
        await self._remove(thread, thread_id, [each for each in others if each.value[1] is not None], only_run=True)

    async def _remove(self, thread: Namespace, thread_id: str, markers: list[Entry], *, only_run: bool = False) -> None:
        places = [
            (self._buckets[number], key)
            for number, run in (marker.value for marker in markers)
            for key in _keys(thread_id, run)[only_run:]
        ]
        found = await gather(bucket.get(key) for bucket, key in places)
        # First the markers: an entry without a marker does no harm, but a thread with one and no entry is not found.
        await gather(thread.delete(marker.key) for marker in markers)
        for (bucket, key), entry in zip(places, found, strict=True):
            if entry is not None:
                with suppress(Conflict):
                    await bucket.delete(key, if_version=entry.version)


def _keys(thread_id: str, run: str | None) -> list[str]:
    thread = digest(thread_id)
    return [f"t/{thread}"] if run is None else [f"t/{thread}", f"r/{digest(run)}/{thread}"]
