"""The LangGraph checkpointer does what LangGraph's own does in memory, whatever is asked of both."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import CheckpointTuple, empty_checkpoint
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.checkpoint.serde.types import ERROR, INTERRUPT

from forebay.adapters.langgraph import ShardedSaver
from forebay.state import MemoryShard, ShardedState

threads = st.sampled_from(["t", "t/1", "u"])
namespaces = st.sampled_from(["", "child:1", "child:1|x"])
channels = st.lists(st.sampled_from(["a", "b", "c"]), unique=True)
steps = st.one_of(
    st.tuples(st.just("put"), threads, namespaces, channels, st.booleans()),
    st.tuples(
        st.just("writes"),
        threads,
        namespaces,
        st.lists(st.sampled_from(["a", "b", ERROR, INTERRUPT]), max_size=3),
        st.tuples(st.sampled_from(["task-1", "task-2"]), st.sampled_from(["", "path-1", "path-2"])),
    ),
    st.tuples(st.just("delete"), threads),
    st.tuples(st.just("compare"), threads, st.none() | namespaces, st.none() | st.integers(0, 4), st.integers(0, 20)),
)


def place(thread_id: str, checkpoint_ns: str | None = None, checkpoint_id: str | None = None) -> RunnableConfig:
    names = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
    return {"configurable": {name: value for name, value in names.items() if value is not None}}


class Pair:
    """Both savers, which get the same calls."""

    def __init__(self, saver: ShardedSaver) -> None:
        self.savers: tuple[Any, Any] = (saver, InMemorySaver())
        self.ids = dict[tuple[str, str], list[str]]()
        self.count = 0

    async def put(self, thread_id: str, checkpoint_ns: str, changed: list[str], forks: bool) -> None:  # noqa: FBT001
        known = self.ids.setdefault((thread_id, checkpoint_ns), [])
        parent = known[0 if forks else -1] if known else None
        config = place(thread_id, checkpoint_ns, parent)
        latest = await self.savers[1].aget_tuple(config) if parent else None
        checkpoint = empty_checkpoint()
        if latest is not None:
            checkpoint["channel_values"] = dict(latest.checkpoint["channel_values"])
            checkpoint["channel_versions"] = dict(latest.checkpoint["channel_versions"])
        new = {}
        for channel in changed:
            self.count += 1
            if self.count % 5:
                checkpoint["channel_values"][channel] = [channel, self.count]
            else:
                checkpoint["channel_values"].pop(channel, None)
            new[channel] = self.savers[0].get_next_version(checkpoint["channel_versions"].get(channel), None)
        checkpoint["channel_versions"].update(new)
        for saver in self.savers:
            await saver.aput(config, checkpoint, {"step": self.count % 3, "parents": {}}, new)
        known.append(checkpoint["id"])

    async def writes(self, thread_id: str, checkpoint_ns: str, to: list[str], task: tuple[str, str]) -> None:
        known = self.ids.get((thread_id, checkpoint_ns))
        if known:
            self.count += 1
            writes = [(channel, [channel, self.count]) for channel in to]
            for saver in self.savers:
                await saver.aput_writes(place(thread_id, checkpoint_ns, known[-1]), writes, *task)

    async def delete(self, thread_id: str) -> None:
        for saver in self.savers:
            await saver.adelete_thread(thread_id)
        self.ids = {key: ids for key, ids in self.ids.items() if key[0] != thread_id}

    async def compare(self, thread_id: str, checkpoint_ns: str | None, limit: int | None, at: int) -> None:
        known = self.ids.get((thread_id, checkpoint_ns or ""), [])
        before = place(thread_id, checkpoint_ns, known[at % len(known)]) if known and at % 2 else None
        wanted = {"step": 1} if at % 3 == 0 else None
        if checkpoint_ns is None:
            limit = None  # which namespace comes first is not promised
        found: Any = [
            [
                each
                async for each in saver.alist(
                    place(thread_id, checkpoint_ns), before=before, filter=wanted, limit=limit
                )
            ]
            for saver in self.savers
        ]
        assert self.by_namespace(found[0]) == self.by_namespace(found[1])

    @staticmethod
    def by_namespace(found: list[CheckpointTuple]) -> list[CheckpointTuple]:
        return sorted(found, key=lambda each: each.config["configurable"]["checkpoint_ns"])

    async def check(self) -> None:
        for (thread_id, checkpoint_ns), ids in self.ids.items():
            for checkpoint_id in (None, *ids):
                config = place(thread_id, checkpoint_ns, checkpoint_id)
                found, expected = [await saver.aget_tuple(config) for saver in self.savers]
                assert found == expected


@settings(deadline=None)
@given(st.lists(steps, max_size=30))
def test_it_does_what_the_saver_in_memory_does(script: list[tuple[Any, ...]]) -> None:
    async def run() -> None:
        shards = [MemoryShard(f"memory://{letter}") for letter in "ab"]
        async with await ShardedState.connect(*shards) as state:
            pair = Pair(ShardedSaver(state))
            for name, *arguments in script:
                await getattr(pair, name)(*arguments)
            await pair.check()
            everything: Any = [
                sorted([each async for each in saver.alist(None)], key=lambda each: str(each.config))
                for saver in pair.savers
            ]
            assert everything[0] == everything[1]

    asyncio.run(run())
