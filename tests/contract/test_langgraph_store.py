"""The contract of LangGraph's stores, on every place of state."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from langgraph.store.base import (
    GetOp,
    InvalidNamespaceError,
    ListNamespacesOp,
    MatchCondition,
    PutOp,
    SearchOp,
    TTLConfig,
)
from langgraph.store.memory import InMemoryStore
from tests.support.state_backends import BACKENDS, SHARED_BACKENDS, StateBackend

from forebay.adapters.langgraph import ShardedStore
from forebay.errors import InvalidSetting, InvalidStateKey, InvalidStateValue, NoRunningLoop, WouldDeadlock
from forebay.state import ShardedState


@pytest.fixture(params=BACKENDS, ids=str)
def urls(request: pytest.FixtureRequest, tmp_path: Path) -> list[str]:
    backend: StateBackend = request.param
    return backend.urls(tmp_path)


@pytest.fixture
async def state(urls: list[str]) -> AsyncIterator[ShardedState]:
    async with await ShardedState.connect(*urls) as state:
        yield state


@pytest.fixture
async def store(state: ShardedState) -> ShardedStore:
    return ShardedStore(state)


async def keys(store: ShardedStore, *namespace: str, **options: Any) -> list[str]:
    return [item.key for item in await store.asearch(namespace, **options)]


async def test_an_item_is_read_as_it_was_written(store: ShardedStore) -> None:
    value = {"theme": "dark", "sizes": [1, 2.5, None], "nested": {"a": {"b": True}}}
    assert await store.aget(("users", "7"), "prefs") is None
    await store.aput(("users", "7"), "prefs", value)
    item = await store.aget(("users", "7"), "prefs")
    assert item is not None
    assert (item.namespace, item.key, item.value) == (("users", "7"), "prefs", value)
    assert item.created_at == item.updated_at
    assert item.created_at.tzinfo is not None


async def test_an_item_that_is_written_again_was_created_once(store: ShardedStore) -> None:
    await store.aput(("users",), "a", {"n": 1})
    first = await store.aget(("users",), "a")
    await store.aput(("users",), "a", {"n": 2})
    second = await store.aget(("users",), "a")
    assert first is not None
    assert second is not None
    assert second.value == {"n": 2}
    assert second.created_at == first.created_at
    assert second.updated_at > first.updated_at


async def test_a_deleted_item_is_gone(store: ShardedStore) -> None:
    await store.aput(("users",), "a", {"n": 1})
    await store.adelete(("users",), "a")
    await store.adelete(("users",), "b")
    assert await store.aget(("users",), "a") is None
    assert await store.asearch(("users",)) == []


async def test_a_search_covers_the_namespaces_below(store: ShardedStore) -> None:
    for namespace in (("a",), ("a", "b"), ("a", "b", "c"), ("ab",), ("b",)):
        await asyncio.gather(*(store.aput(namespace, f"{number}", {"n": number}) for number in range(3)))
    assert len(await store.asearch(("a",), limit=100)) == 9
    assert [item.namespace for item in await store.asearch(("a", "b", "c"))] == [("a", "b", "c")] * 3
    assert len(await store.asearch((), limit=100)) == 15
    assert await store.asearch(("c",)) == []


async def test_a_search_has_a_limit_and_an_offset(store: ShardedStore) -> None:
    names = [f"{number:03}" for number in range(250)]
    await asyncio.gather(*(store.aput(("n",), name, {"even": int(name) % 2 == 0}) for name in names))
    assert await keys(store, "n") == names[:10]
    assert await keys(store, "n", limit=5, offset=240) == names[240:245]
    assert await keys(store, "n", limit=50, offset=240) == names[240:]
    assert await keys(store, "n", limit=3, offset=100, filter={"even": True}) == names[200:206:2]
    assert await keys(store, "n", limit=0) == []
    for options in ({"limit": -1}, {"offset": -1}, {"limit": 1.5}):
        with pytest.raises(InvalidSetting):
            await store.asearch(("n",), **options)


async def test_a_filter_chooses_what_langgraphs_own_store_chooses(store: ShardedStore) -> None:
    reference = InMemoryStore()
    values = [
        {"n": number, "name": "abc"[number % 3], "tags": [number], "in": {"side": number % 2}} for number in range(9)
    ]
    for number, value in enumerate(values):
        await store.aput(("f",), f"{number}", value)
        await reference.aput(("f",), f"{number}", value)
    filters: list[dict[str, Any]] = [
        {"n": 3},
        {"n": {"$eq": 3}},
        {"n": {"$ne": 3}},
        {"n": {"$gt": 3, "$lte": 7}},
        {"n": {"$gte": "3"}, "name": "b"},
        {"n": {"$lt": 3.5}},
        {"tags": [4]},
        {"tags": [4, 5]},
        {"in": {"side": 1}},
        {"in": {"side": {"$ne": 1}}},
        {"name": {"in": 1}},
        {"missing": None},
    ]
    for each in filters:
        expected = [item.key for item in await reference.asearch(("f",), filter=each)]
        assert await keys(store, "f", filter=each) == expected, each


async def test_what_has_no_order_does_not_match_an_order(store: ShardedStore) -> None:
    for key, value in (("none", None), ("list", [1]), ("text", "2026-11-30"), ("number", 2)):
        await store.aput(("f",), key, {"v": value})
    assert await keys(store, "f", filter={"v": {"$gt": 1}}) == ["number"]
    assert await keys(store, "f", filter={"v": {"$gt": "2026-01-01"}}) == ["text"]
    assert await keys(store, "f", filter={"other": {"$lt": 1}}) == []


async def test_what_the_store_cannot_do_is_an_error(store: ShardedStore) -> None:
    with pytest.raises(InvalidSetting, match="no vector index"):
        await store.asearch(("a",), query="rivers")
    with pytest.raises(InvalidSetting, match=r"\$gte"):
        await store.asearch(("a",), filter={"a": {"b": {"$like": 1}}})
    with pytest.raises(InvalidNamespaceError):
        await store.abatch([GetOp(("a.b",), "key")])
    with pytest.raises(InvalidSetting, match="at least one label"):
        await store.abatch([PutOp((), "key", {})])
    with pytest.raises(InvalidSetting, match="a mapping of plain data"):
        await store.aput(("a",), "key", "text")  # type: ignore[arg-type]
    with pytest.raises(InvalidStateKey):
        await store.aput(("a",), "x" * 2_000, {})
    with pytest.raises(InvalidStateValue):
        await store.aput(("a",), "b", {"object": object()})
    assert await store.asearch(()) == []


async def test_reading_an_item_puts_its_expiry_off(state: ShardedState, store: ShardedStore) -> None:
    await store.aput(("t",), "short", {}, ttl=0.1 / 60)
    await store.aput(("t",), "long", {}, ttl=60)
    await store.aput(("t",), "kept", {})

    async def version(key: str) -> int:
        found = await state.get(f"langgraph/t//{key}")
        assert found is not None
        return found.version

    kept, written = await version("kept"), await version("long")
    await store.aget(("t",), "long", refresh_ttl=False)
    await store.asearch(("t",), refresh_ttl=False)
    assert await version("long") == written
    await store.aget(("t",), "long")
    read = await version("long")
    assert read > written
    await store.asearch(("t",))
    assert await version("long") > read
    assert await version("kept") == kept  # it does not expire
    while await store.aget(("t",), "short", refresh_ttl=False) is not None:  # noqa: ASYNC110 - the server's clock decides
        await asyncio.sleep(0.01)
    assert await keys(store, "t") == ["kept", "long"]


async def test_the_ttl_of_the_store_is_the_default(state: ShardedState) -> None:
    store = ShardedStore(state, ttl=TTLConfig(default_ttl=0.1 / 60, refresh_on_read=False))
    await store.aput(("t",), "default", {})
    await store.aput(("t",), "kept", {}, ttl=None)
    while await store.aget(("t",), "default") is not None:  # noqa: ASYNC110 - the server's clock decides
        await asyncio.sleep(0.01)
    assert await keys(store, "t") == ["kept"]


async def test_namespaces_are_listed_as_langgraphs_own_store_lists_them(store: ShardedStore) -> None:
    reference = InMemoryStore()
    paths = [
        ("a",),
        ("a", "b"),
        ("a", "b", "c"),
        ("a", "x", "c"),
        ("a-", "b"),
        ("a0",),
        ("é", "%", "/"),
        ("a", "0", "c"),
    ]
    for path in paths:
        for number in range(3 if path != ("a", "b") else 150):
            await store.aput(path, f"{number}", {})
            await reference.aput(path, f"{number}", {})
    options: list[dict[str, Any]] = [
        {},
        {"prefix": ("a",)},
        {"prefix": ("a", "*", "c")},
        {"prefix": ("*", "b")},
        {"suffix": ("c",)},
        {"suffix": ("*", "c"), "prefix": ("a", "b")},
        {"max_depth": 1},
        {"max_depth": 2, "prefix": ("a",), "limit": 2, "offset": 1},
        {"prefix": ("none",)},
    ]
    for each in options:
        assert await store.alist_namespaces(**each) == await reference.alist_namespaces(**each), each


async def test_a_batch_reads_before_it_writes_and_the_last_write_of_an_item_counts(store: ShardedStore) -> None:
    await store.aput(("a",), "k", {"n": 0})
    conditions = (MatchCondition("prefix", ("a",)),)
    results = await store.abatch(
        [
            PutOp(("a",), "k", {"n": 1}),
            GetOp(("a",), "k"),
            PutOp(("a",), "k", {"n": 2}),
            SearchOp(("a",)),
            ListNamespacesOp(conditions),
            PutOp(("a",), "other", {"n": 3}),
            PutOp(("a",), "other", None),
        ]
    )
    assert results[0] is results[2] is results[5] is results[6] is None
    assert results[1].value == {"n": 0}  # type: ignore[union-attr]
    assert [item.value for item in results[3]] == [{"n": 0}]  # type: ignore[union-attr]
    assert results[4] == [("a",)]
    assert [(item.key, item.value) for item in await store.asearch(("a",))] == [("k", {"n": 2})]


async def test_hostile_names_stay_apart(store: ShardedStore) -> None:
    names = ["a", "a/b", "a//b", "a%2Fb", "/", "//", "%", "*", "}{", " ", "é", "\n", "\U0010ffff"]
    places = [((first, second), key) for first in names for second in ("a", "/") for key in (*names, "")]
    await store.abatch([PutOp(namespace, key, {"at": [*namespace, key]}) for namespace, key in places])
    found = await store.abatch([GetOp(namespace, key) for namespace, key in places])
    assert [item.value["at"] for item in found] == [[*namespace, key] for namespace, key in places]  # type: ignore[union-attr]
    items = await store.asearch((), limit=1_000)
    assert {(item.namespace, item.key) for item in items} == set(places)
    assert len(await store.asearch(("a",), limit=1_000)) == 2 * (len(names) + 1)


async def test_another_thread_uses_the_methods_that_block(store: ShardedStore) -> None:
    def use() -> Any:
        store.put(("a",), "k", {"n": 1})
        store.delete(("a",), "none")
        return store.get(("a",), "k"), store.search(("a",)), store.list_namespaces()

    item, items, namespaces = await asyncio.get_running_loop().run_in_executor(None, use)
    assert item.value == items[0].value == {"n": 1}
    assert namespaces == [("a",)]
    with pytest.raises(WouldDeadlock, match="await abatch"):
        store.get(("a",), "k")


def test_a_store_belongs_to_an_event_loop() -> None:
    async def connect() -> tuple[ShardedState, ShardedStore]:
        async with await ShardedState.connect("memory://") as state:
            return state, ShardedStore(state)

    state, store = asyncio.run(connect())
    with pytest.raises(NoRunningLoop, match="outside of an event loop"):
        ShardedStore(state)
    with pytest.raises(NoRunningLoop, match="runs no more"):
        store.get(("a",), "k")


@pytest.mark.parametrize("backend", SHARED_BACKENDS, ids=str)
def test_connections_share_items(backend: StateBackend, tmp_path: Path) -> None:
    urls = backend.urls(tmp_path)

    async def share() -> None:
        async with await ShardedState.connect(*urls) as one, await ShardedState.connect(*urls) as other:
            first, second = ShardedStore(one), ShardedStore(other)
            await first.aput(("a",), "k", {"n": 1})
            item = await second.aget(("a",), "k")
            assert item is not None
            assert item.value == {"n": 1}
            assert await second.alist_namespaces() == [("a",)]

    asyncio.run(share())
