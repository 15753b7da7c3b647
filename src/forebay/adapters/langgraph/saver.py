"""A LangGraph checkpointer that keeps threads in sharded state."""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from langchain_core.runnables import RunnableConfig
from langgraph.checkpoint.base import (
    WRITES_IDX_MAP,
    BaseCheckpointSaver,
    ChannelVersions,
    Checkpoint,
    CheckpointMetadata,
    CheckpointTuple,
    DeltaChannelHistory,
    PendingWrite,
    get_checkpoint_id,
    get_checkpoint_metadata,
    writes_sort_key,
)
from langgraph.checkpoint.serde.base import SerializerProtocol

from forebay import _validate
from forebay.adapters.langgraph.large_value import gather
from forebay.adapters.langgraph.state_loop import StateLoop, check_state
from forebay.adapters.langgraph.thread_checkpoints import Record, StoredWrite, ThreadCheckpoints
from forebay.adapters.langgraph.thread_index import ThreadIndex
from forebay.clock import draw
from forebay.errors import CheckpointDamaged, InvalidStateKey
from forebay.state import Namespace

_STRATEGIES = ("keep_latest", "delete")
_PAGE = 100  # checkpoints whose writes are read at once


class ShardedSaver(BaseCheckpointSaver[str]):
    """A LangGraph checkpointer on sharded state. Make it in the event loop in which the state was connected.

    ::

        async with await ShardedState.connect("redis://a", "redis://b") as state:
            graph = builder.compile(checkpointer=ShardedSaver(state))
            await graph.ainvoke(inputs, {"configurable": {"thread_id": "thread-1"}})

    All of a thread is on one shard. The latest checkpoint is read in the same time however many there are. A checkpoint
    is there as a whole or not at all, and so are the writes of a task. The methods without an ``a`` block, so they are
    for other threads than that of the event loop. The state is closed by the code that opened it.

    Args:
        state: the state, or a namespace of it, with its own threads.
        serde: what turns values into bytes; None: LangGraph's own, which does not pickle.

    Raises:
        NoRunningLoop: no event loop is running.
        InvalidSetting: the state is no `ShardedState`, nor a namespace of one.
    """

    def __init__(self, state: Namespace, *, serde: SerializerProtocol | None = None) -> None:
        super().__init__(serde=serde)
        check_state(type(self).__name__, state)
        self._space = state.namespace("langgraph")
        self._index = ThreadIndex(self._space)
        self._loop = StateLoop(type(self).__name__)

    # --- reading ---

    async def aget_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Return the checkpoint that `config` names, or the latest one of its thread; None if there is none.

        Raises:
            CheckpointDamaged: something that it consists of is gone.
            ShardUnavailable: the shard of the thread is down.
        """
        return await self._loop.run(self._get(config))

    async def _get(self, config: RunnableConfig) -> CheckpointTuple | None:
        thread_id, checkpoint_ns = _place(config)
        thread = self._thread(thread_id)
        while (record := await _find(thread, checkpoint_ns, get_checkpoint_id(config))) is not None:
            found = await self._tuple(thread_id, thread, record)
            if found is not None:
                return found
        return None

    async def _tuple(
        self, thread_id: str, thread: ThreadCheckpoints, record: Record, metadata: Any = None
    ) -> CheckpointTuple | None:
        """Return a checkpoint with all that it names; None if it has been deleted meanwhile."""
        try:
            writes, *values = await gather(
                [
                    thread.writes(record.ns, record.id),
                    *(self._load(thread_id, thread, record, channel) for channel in record.blobs),
                ]
            )
        except CheckpointDamaged:
            if await thread.has(record):
                raise
            return None
        checkpoint: Checkpoint = self.serde.loads_typed(record.checkpoint)
        return CheckpointTuple(
            config=_config(thread_id, record.ns, record.id),
            checkpoint={**checkpoint, "channel_values": dict(zip(record.blobs, values, strict=True))},
            metadata=self.serde.loads_typed(record.metadata) if metadata is None else metadata,
            parent_config=_config(thread_id, record.ns, record.parent) if record.parent else None,
            pending_writes=self._pending(writes),
        )

    def _pending(self, writes: Sequence[StoredWrite]) -> list[PendingWrite]:
        ordered = sorted(writes, key=lambda each: writes_sort_key(each.task_path, each.task_id, each.idx))
        return [(each.task_id, each.channel, self.serde.loads_typed(each.value)) for each in ordered]

    async def alist(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> AsyncIterator[CheckpointTuple]:
        """Yield checkpoints: by thread, by checkpoint_ns, the latest first.

        Args:
            config: the thread, and a checkpoint_ns or a checkpoint of it; None: all threads.
            filter: what their metadata must have.
            before: a checkpoint; only those with smaller ids.
            limit: how many.
        """
        stream = self._list(config, filter or {}, get_checkpoint_id(before) if before else None, limit)
        try:
            while (found := await self._loop.run(_advance(stream))) is not None:
                yield found
        finally:
            await self._loop.run(_close(stream))

    async def _list(
        self, config: RunnableConfig | None, wanted: dict[str, Any], before: str | None, limit: int | None
    ) -> AsyncGenerator[CheckpointTuple]:
        left = limit
        async for thread_id, thread, record in self._records(config, before, None if wanted else limit):
            if left is not None and left <= 0:
                return
            metadata = self.serde.loads_typed(record.metadata)
            if all(metadata.get(key) == value for key, value in wanted.items()):
                found = await self._tuple(thread_id, thread, record, metadata)
                if found is not None:
                    yield found
                    left = None if left is None else left - 1

    async def _records(
        self, config: RunnableConfig | None, before: str | None, limit: int | None
    ) -> AsyncIterator[tuple[str, ThreadCheckpoints, Record]]:
        if config is None:
            async for thread_id in self._index.threads():
                async for each in self._records({"configurable": {"thread_id": thread_id}}, before, limit):
                    yield each
            return
        thread_id, checkpoint_ns = _place(config)
        thread = self._thread(thread_id)
        checkpoint_id = get_checkpoint_id(config)
        limit = None if limit is None else max(0, limit)
        one = config["configurable"].get("checkpoint_ns") is not None
        async for name in _only(checkpoint_ns) if one else thread.namespaces():
            if checkpoint_id is None:
                async for record in thread.records(name, before=before, limit=limit):
                    yield thread_id, thread, record
            elif before is None or checkpoint_id < before:
                found = await thread.get(name, checkpoint_id)
                if found is not None:
                    yield thread_id, thread, found

    # --- writing ---

    async def aput(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Write a checkpoint after the one that `config` names, and return the config that names it.

        Raises:
            InvalidStateKey, InvalidStateValue: something is too large to be stored.
            ShardUnavailable, ShardAnswerLost: the shard of the thread is down.
        """
        return await self._loop.run(self._put(config, checkpoint, metadata, new_versions))

    async def _put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        thread_id, checkpoint_ns = _place(config)
        thread = self._thread(thread_id)
        values = checkpoint["channel_values"]
        versions = checkpoint["channel_versions"]
        whole_metadata: Mapping[str, Any] = get_checkpoint_metadata(config, metadata)
        run = whole_metadata.get("run_id")
        record = Record(
            ns=checkpoint_ns,
            id=checkpoint["id"],
            parent=get_checkpoint_id(config),
            run=run if isinstance(run, str) else None,
            blobs={channel: versions[channel] for channel in values if channel in versions},
            delta=list(whole_metadata.get("counters_since_delta_snapshot") or ()),
            checkpoint=self.serde.dumps_typed(
                {key: each for key, each in checkpoint.items() if key != "channel_values"}
            ),
            metadata=self.serde.dumps_typed(whole_metadata),
        )
        blobs = [
            (channel, version, self.serde.dumps_typed(values[channel]))
            for channel, version in new_versions.items()
            if channel in values
        ]
        await gather(
            [
                self._index.add(thread.space, thread_id, record.run),
                *(thread.put_blob(checkpoint_ns, *blob) for blob in blobs),
            ]
        )
        await thread.put(record)
        return _config(thread_id, checkpoint_ns, record.id)

    async def aput_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Write what a task has written after the checkpoint that `config` names, all of it or nothing.

        Raises:
            InvalidStateKey, InvalidStateValue, ShardUnavailable, ShardAnswerLost: as `aput`.
        """
        await self._loop.run(self._put_writes(config, writes, task_id, task_path))

    async def _put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str
    ) -> None:
        thread_id, checkpoint_ns = _place(config)
        stored = [
            StoredWrite(task_id, WRITES_IDX_MAP.get(channel, idx), channel, self.serde.dumps_typed(value), task_path)
            for idx, (channel, value) in enumerate(writes)
        ]
        await self._thread(thread_id).put_writes(checkpoint_ns, config["configurable"]["checkpoint_id"], stored)

    def get_next_version(self, current: str | None, channel: None) -> str:  # noqa: ARG002 - LangGraph's signature
        """Return a version after `current` that no other run gives its channel, if two go on from one checkpoint."""
        number = 0 if current is None else int(str(current).partition(".")[0])
        return f"{number + 1:032}.{draw():016}"

    # --- deleting and copying ---

    async def adelete_thread(self, thread_id: str) -> None:
        """Delete all of a thread. End its runs before: one that goes on may leave a checkpoint that cannot be read."""
        await self._loop.run(self._delete_thread(str(thread_id)))

    async def _delete_thread(self, thread_id: str) -> None:
        thread = self._thread(thread_id)
        await thread.delete_all()
        await self._index.remove(thread.space, thread_id)

    async def adelete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Delete the checkpoints and writes of runs, in all threads.

        A thread that goes on may need them: the value of a `DeltaChannel` is made from the writes of earlier runs, and
        a run that has just begun may go on from the checkpoint of an earlier one.
        """
        await self._loop.run(self._delete_for_runs([str(each) for each in run_ids]))

    async def _delete_for_runs(self, runs: Sequence[str]) -> None:
        for run in runs:
            for thread_id in await self._index.threads_of(run):
                thread = self._thread(thread_id)
                has_others = False
                async for checkpoint_ns in thread.namespaces():
                    has_others |= await thread.delete_where(checkpoint_ns, partial(_is_of, run))
                await self._index.remove_run(thread.space, thread_id, run)
                if not has_others:
                    await self._index.remove(thread.space, thread_id)

    async def acopy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Copy all checkpoints and writes of a thread to another one."""
        if str(source_thread_id) != str(target_thread_id):
            await self._loop.run(self._copy_thread(str(source_thread_id), str(target_thread_id)))

    async def _copy_thread(self, source_id: str, target_id: str) -> None:
        target = self._thread(target_id)

        async def enter(record: Record) -> None:
            await self._index.add(target.space, target_id, record.run)

        await self._thread(source_id).copy_to(target, enter)

    async def aprune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest", keep: int = 1) -> None:
        """Delete old checkpoints of threads, and the values that no other checkpoint has.

        The checkpoints from which the values of a `DeltaChannel` are made stay. Do not prune a thread while a run goes
        on from one of its earlier checkpoints.

        Args:
            thread_ids: the threads.
            strategy: "keep_latest": each checkpoint_ns keeps its latest checkpoints; "delete": none are kept.
            keep: how many are kept.

        Raises:
            InvalidSetting: the strategy is unknown, or `keep` is not a positive number.
        """
        if strategy not in _STRATEGIES:
            _validate.reject("prune", "strategy", strategy, " or ".join(map(repr, _STRATEGIES)))
        _validate.check_whole("prune", "keep", keep, minimum=1)
        await self._loop.run(self._prune([str(each) for each in thread_ids], strategy, keep))

    async def _prune(self, thread_ids: Sequence[str], strategy: str, keep: int) -> None:
        for thread_id in thread_ids:
            if strategy == "delete":
                await self._delete_thread(thread_id)
                continue
            thread = self._thread(thread_id)
            runs = set[str | None]()
            async for checkpoint_ns in thread.namespaces():
                await thread.prune(checkpoint_ns, keep)
                runs |= {record.run async for record in thread.records(checkpoint_ns)}
            await self._index.remove_other_runs(thread.space, thread_id, runs)

    # --- channels whose values are made from writes ---

    async def aget_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Return, for each of `channels`, its last whole value before a checkpoint, and the writes since."""
        return await self._loop.run(self._history(config, channels))

    async def _history(self, config: RunnableConfig, channels: Sequence[str]) -> Mapping[str, DeltaChannelHistory]:
        thread_id, checkpoint_ns = _place(config)
        thread = self._thread(thread_id)
        record = await _find(thread, checkpoint_ns, get_checkpoint_id(config))
        if record is None or not channels:
            return {channel: {"writes": []} for channel in channels}
        remaining = set(channels)
        path = list[tuple[Record, set[str]]]()  # the checkpoints on it, and the channels whose writes count
        seeds = dict[str, Record]()
        async for ancestor in thread.ancestors(record):
            path.append((ancestor, set(remaining)))
            for channel in remaining & ancestor.blobs.keys():
                seeds[channel] = ancestor
                remaining.remove(channel)
            if not remaining:
                break
        history: dict[str, DeltaChannelHistory] = {channel: {"writes": []} for channel in channels}
        path.reverse()
        for start in range(0, len(path), _PAGE):
            page = path[start : start + _PAGE]
            all_writes = await gather(thread.writes(checkpoint_ns, ancestor.id) for ancestor, _ in page)
            for (_, counting), writes in zip(page, all_writes, strict=True):
                for write in self._pending([each for each in writes if each.channel in counting]):
                    history[write[1]]["writes"].append(write)
        for channel, ancestor in seeds.items():
            history[channel]["seed"] = await self._load(thread_id, thread, ancestor, channel)
        return history

    # --- for other threads than that of the event loop ---

    def get_tuple(self, config: RunnableConfig) -> CheckpointTuple | None:
        """Do what `aget_tuple` does."""
        return self._loop.run_blocking("get_tuple", self._get(config))

    def list(
        self,
        config: RunnableConfig | None,
        *,
        filter: dict[str, Any] | None = None,  # noqa: A002 - LangGraph's name
        before: RunnableConfig | None = None,
        limit: int | None = None,
    ) -> Iterator[CheckpointTuple]:
        """Do what `alist` does."""
        stream = self._list(config, filter or {}, get_checkpoint_id(before) if before else None, limit)
        while (found := self._loop.run_blocking("list", _advance(stream))) is not None:
            yield found

    def put(
        self,
        config: RunnableConfig,
        checkpoint: Checkpoint,
        metadata: CheckpointMetadata,
        new_versions: ChannelVersions,
    ) -> RunnableConfig:
        """Do what `aput` does."""
        return self._loop.run_blocking("put", self._put(config, checkpoint, metadata, new_versions))

    def put_writes(
        self, config: RunnableConfig, writes: Sequence[tuple[str, Any]], task_id: str, task_path: str = ""
    ) -> None:
        """Do what `aput_writes` does."""
        self._loop.run_blocking("put_writes", self._put_writes(config, writes, task_id, task_path))

    def delete_thread(self, thread_id: str) -> None:
        """Do what `adelete_thread` does."""
        self._loop.run_blocking("delete_thread", self.adelete_thread(thread_id))

    def delete_for_runs(self, run_ids: Sequence[str]) -> None:
        """Do what `adelete_for_runs` does."""
        self._loop.run_blocking("delete_for_runs", self.adelete_for_runs(run_ids))

    def copy_thread(self, source_thread_id: str, target_thread_id: str) -> None:
        """Do what `acopy_thread` does."""
        self._loop.run_blocking("copy_thread", self.acopy_thread(source_thread_id, target_thread_id))

    def prune(self, thread_ids: Sequence[str], *, strategy: str = "keep_latest", keep: int = 1) -> None:
        """Do what `aprune` does."""
        self._loop.run_blocking("prune", self.aprune(thread_ids, strategy=strategy, keep=keep))

    def get_delta_channel_history(
        self, *, config: RunnableConfig, channels: Sequence[str]
    ) -> Mapping[str, DeltaChannelHistory]:
        """Do what `aget_delta_channel_history` does."""
        return self._loop.run_blocking("get_delta_channel_history", self._history(config, channels))

    # ---

    def _thread(self, thread_id: str) -> ThreadCheckpoints:
        try:
            return ThreadCheckpoints(self._space.namespace(f"thread={thread_id}"))
        except InvalidStateKey as error:
            expected = f"{error.expected}, of which the name of its namespace takes some, and a slash or % three"
            raise InvalidStateKey(what="thread_id", why=error.why, expected=expected) from None

    async def _load(self, thread_id: str, thread: ThreadCheckpoints, record: Record, channel: str) -> Any:
        value = await thread.blob(record.ns, channel, record.blobs[channel])
        if value is None:
            where = thread.space.shard_of("c/")
            raise CheckpointDamaged(checkpoint_id=record.id, thread_id=thread_id, channel=channel, where=where)
        return self.serde.loads_typed(value)


def _place(config: RunnableConfig) -> tuple[str, str]:
    """Return the thread_id and the checkpoint_ns that a config names."""
    configurable = config.get("configurable") or {}
    if configurable.get("thread_id") is None:
        expected = "set, in the configurable of the config: checkpoints are kept by thread"
        _validate.reject("ShardedSaver", "thread_id", None, expected)
    return str(configurable["thread_id"]), configurable.get("checkpoint_ns") or ""


def _config(thread_id: str, checkpoint_ns: str, checkpoint_id: str) -> RunnableConfig:
    names = {"thread_id": thread_id, "checkpoint_ns": checkpoint_ns, "checkpoint_id": checkpoint_id}
    return {"configurable": names}


def _is_of(run: str, record: Record) -> bool:
    return record.run == run


async def _find(thread: ThreadCheckpoints, checkpoint_ns: str, checkpoint_id: str | None) -> Record | None:
    return await (thread.get(checkpoint_ns, checkpoint_id) if checkpoint_id else thread.latest(checkpoint_ns))


async def _only(name: str) -> AsyncIterator[str]:
    yield name


async def _advance(stream: AsyncIterator[CheckpointTuple]) -> CheckpointTuple | None:
    return await anext(stream, None)


async def _close(stream: AsyncGenerator[CheckpointTuple]) -> None:
    await stream.aclose()
