"""A LangGraph store, the memory of agents across threads, in sharded state."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from langgraph.store.base import (
    BaseStore,
    GetOp,
    Item,
    ListNamespacesOp,
    Op,
    PutOp,
    Result,
    SearchItem,
    SearchOp,
    TTLConfig,
    validate_op_namespace,
)

from forebay import _validate
from forebay.adapters.langgraph.checkpoint_keys import quote, unquote
from forebay.adapters.langgraph.item_filter import check_filter, is_listed, matches
from forebay.adapters.langgraph.large_value import gather
from forebay.adapters.langgraph.state_loop import StateLoop, check_state
from forebay.clock import wall_time
from forebay.errors import Conflict
from forebay.state import Entry, Namespace

_PREFIX = "langgraph/"  # of the keys of items: labels/of/namespace//key, quoted
_PAGE = 100
_MINUTE = 60.0


class ShardedStore(BaseStore):
    """A LangGraph store on sharded state. Make it in the event loop in which the state was connected.

    ::

        store = ShardedStore(state, ttl={"default_ttl": 60})
        graph = builder.compile(checkpointer=ShardedSaver(state), store=store)

    Items are spread over all shards by their namespace and key. Values are plain data. A search returns items in the
    order of their namespaces and keys. There is no vector index. The methods without an ``a`` block, so they are for
    other threads than that of the event loop.

    Args:
        state: the state; its keys that begin with ``langgraph/`` are the store's. Or a namespace of it, all of which is
            on one shard.
        ttl: the minutes after which items expire by default, and whether reading an item puts that off. An expired item
            is never returned, so nothing has to be swept.

    Raises:
        NoRunningLoop: no event loop is running.
        InvalidSetting: the state is no `ShardedState`, nor a namespace of one; or the ttl no dict.
    """

    supports_ttl = True

    def __init__(self, state: Namespace, *, ttl: TTLConfig | None = None) -> None:
        check_state(type(self).__name__, state)
        if ttl is not None and not isinstance(ttl, Mapping):
            _validate.reject(type(self).__name__, "ttl", ttl, 'a dict such as {"default_ttl": 60}, in minutes')
        self._state = state
        self._loop = StateLoop(type(self).__name__)
        self.ttl_config = ttl

    def batch(self, ops: Iterable[Op]) -> list[Result]:
        """Do what `abatch` does, for another thread than that of the event loop."""
        return self._loop.run_blocking("batch", self._batch(list(ops)))

    async def abatch(self, ops: Iterable[Op]) -> list[Result]:
        """Do all operations, and return their results: first what reads, then what writes.

        Raises:
            InvalidSetting: a search has a query, or an unknown operator; a number is negative.
            InvalidStateKey, InvalidStateValue: an item cannot be stored.
            ShardUnavailable, ShardAnswerLost: a shard is down.
        """
        return await self._loop.run(self._batch(list(ops)))

    async def _batch(self, ops: Sequence[Op]) -> list[Result]:
        for op in ops:
            _check(op)
        writes = {(op.namespace, op.key): op for op in ops if isinstance(op, PutOp)}  # the last one of each item
        results = list[Result]()
        for start in range(0, len(ops), _PAGE):
            results += await gather(self._read(op) for op in ops[start : start + _PAGE])
        puts = list(writes.values())
        for start in range(0, len(puts), _PAGE):
            await gather(self._write(op) for op in puts[start : start + _PAGE])
        return results

    async def _read(self, op: Op) -> Result:
        match op:
            case GetOp():
                return await self._get(op)
            case SearchOp():
                return await self._search(op)
            case ListNamespacesOp():
                return await self._namespaces(op)
        return None

    async def _get(self, op: GetOp) -> Item | None:
        key = _key(op.namespace, op.key)
        found = await self._state.get(key)
        if found is None:
            return None
        if op.refresh_ttl:
            await self._refresh([Entry(key, *found)])
        return Item(key=op.key, namespace=op.namespace, **_fields(found.value))

    async def _search(self, op: SearchOp) -> list[SearchItem]:
        wanted, end = op.filter or {}, op.offset + op.limit
        entries = list[Entry]()
        limit = None if wanted else end
        async for entry in self._state.scan(_prefix(op.namespace_prefix), limit=limit):
            if len(entries) >= end:
                break
            if matches(entry.value["value"], wanted):
                entries.append(entry)
        found = entries[op.offset :]
        if op.refresh_ttl:
            await self._refresh(found)
        places = [_place(entry.key) for entry in found]
        return [
            SearchItem(namespace, key, **_fields(entry.value))
            for entry, (namespace, key) in zip(found, places, strict=True)
        ]

    async def _refresh(self, entries: Sequence[Entry]) -> None:
        """Put off the expiry of items that expire, unless they have been written since."""

        async def refresh(entry: Entry) -> None:
            with suppress(Conflict):
                ttl = entry.value["ttl"] * _MINUTE
                await self._state.put(entry.key, entry.value, ttl=ttl, if_version=entry.version)

        await gather(refresh(entry) for entry in entries if entry.value["ttl"] is not None)

    async def _write(self, op: PutOp) -> None:
        key = _key(op.namespace, op.key)
        if op.value is None:
            await self._state.delete(key)
            return
        now = datetime.fromtimestamp(wall_time(), UTC)
        value, ttl = dict(op.value), op.ttl

        def change(old: Any) -> dict[str, Any]:
            return {"value": value, "created": now if old is None else old["created"], "updated": now, "ttl": ttl}

        await self._state.update(key, change, ttl=None if ttl is None else ttl * _MINUTE)

    async def _namespaces(self, op: ListNamespacesOp) -> list[tuple[str, ...]]:
        conditions = op.match_conditions or ()
        found = set[tuple[str, ...]]()
        async for namespace in self._all_namespaces(_common_prefix(op)):
            if is_listed(namespace, conditions):
                found.add(namespace[: op.max_depth])
        return sorted(found)[op.offset : op.offset + op.limit]

    async def _all_namespaces(self, prefix: tuple[str, ...]) -> AsyncIterator[tuple[str, ...]]:
        """Yield the namespaces of all items below `prefix`, some repeatedly."""
        after: str | None = None
        while True:
            page = [each async for each in self._state.scan(_prefix(prefix), after=after, limit=_PAGE)]
            if not page:
                return
            for namespace in dict.fromkeys(_place(entry.key)[0] for entry in page):
                yield namespace
            after = f"{_prefix(_place(page[-1].key)[0])}0"  # behind the items of this namespace, before the next one


def _check(op: Op) -> None:
    """Check an operation.

    Raises:
        InvalidNamespaceError: a label of its namespace is invalid.
        InvalidSetting: something else is.
    """
    validate_op_namespace(op)
    match op:
        case SearchOp():
            if op.query:
                expected = "left out: there is no vector index. Filter by fields, or use another store for this"
                _validate.reject("search", "query", type(op.query).__name__, expected)
            check_filter(op.filter or {})
        case ListNamespacesOp():
            if op.max_depth is not None:
                _validate.check_whole("list_namespaces", "max_depth", op.max_depth, minimum=1)
        case PutOp(namespace=()):
            _validate.reject("put", "namespace", (), "a tuple with at least one label")
        case PutOp(value=value) if not (value is None or isinstance(value, Mapping)):
            _validate.reject(
                "put", "value", type(value).__name__, "a mapping of plain data, or None to delete the item"
            )
        case _:
            return
    _validate.check_whole("search", "limit", op.limit, minimum=0)
    _validate.check_whole("search", "offset", op.offset, minimum=0)


def _prefix(namespace: Sequence[str]) -> str:
    return _PREFIX + "".join(f"{quote(label)}/" for label in namespace)


def _key(namespace: Sequence[str], key: str) -> str:
    return f"{_prefix(namespace)}/{quote(key)}"


def _place(key: str) -> tuple[tuple[str, ...], str]:
    """Return the namespace and the key of an item, by its key in the state."""
    labels, _, name = key.removeprefix(_PREFIX).rpartition("//")
    return tuple(unquote(label) for label in labels.split("/")), unquote(name)


def _fields(value: Mapping[str, Any]) -> dict[str, Any]:
    return {"value": value["value"], "created_at": value["created"], "updated_at": value["updated"]}


def _common_prefix(op: ListNamespacesOp) -> tuple[str, ...]:
    """Return labels with which all namespaces begin that an operation may list."""
    paths = [condition.path for condition in op.match_conditions or () if condition.match_type == "prefix"]
    if not paths:
        return ()
    path = paths[0]
    return tuple(path[: path.index("*")] if "*" in path else path)
