"""The operations on a store that blocks: their groups, and what becomes of them when one fails or the store closes."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator, Sequence
from typing import Any

import pytest

from forebay.errors import StoreUnavailable
from forebay.storage import OperationError, OperationQueue, operation_queue

MAX_GROUP = 3


class Diagnosed(Exception):
    """What the store raises in place of an error."""


class Broken(Exception):
    """An error of these tests."""


class RecordingStore:
    """A store of words, each of which is its own value; its thread may be held inside a group.

    Attributes:
        groups: the groups that have begun, in order; None for the end of the connection.
        fails: words whose operations fail alone.
        breaks: words whose operations fail with their group.
        disconnect_error: what the end of the connection raises.
        begun: set when a group has begun.
        goes_on: cleared while a group is held.
    """

    def __init__(self) -> None:
        self.groups: list[list[str] | None] = []
        self.fails: set[str] = set()
        self.breaks: set[str] = set()
        self.disconnect_error: Exception | None = None
        self.begun = asyncio.Event()
        self.goes_on = threading.Event()
        self.goes_on.set()
        self._loop = asyncio.get_running_loop()
        self.queue: OperationQueue[str, str] = OperationQueue(
            where="the store of words",
            thread_name="words",
            max_group=MAX_GROUP,
            connect=lambda: "connection",
            run=self._run,
            disconnect=self._disconnect,
            diagnose=self._diagnose,
        )

    def _run(self, connection: str, group: Sequence[str]) -> Sequence[Any]:
        assert connection == "connection"
        self.groups.append(list(group))
        self._loop.call_soon_threadsafe(self.begun.set)
        assert self.goes_on.wait(30)
        if self.breaks & set(group):
            raise Broken
        return [OperationError(Broken(word)) if word in self.fails else word for word in group]

    def _disconnect(self, connection: str) -> None:
        assert connection == "connection"
        self.groups.append(None)
        if self.disconnect_error is not None:
            raise self.disconnect_error

    @staticmethod
    def _diagnose(error: BaseException) -> BaseException:
        return Diagnosed(*error.args)

    async def hold(self, word: str) -> asyncio.Future[Any]:
        """Submit `word`, and hold its group on its way."""
        self.begun.clear()
        self.goes_on.clear()
        held = self.queue.submit(word)
        await self.begun.wait()
        return held


@pytest.fixture
async def store() -> AsyncIterator[RecordingStore]:
    store = RecordingStore()
    await store.queue.open()
    yield store
    store.goes_on.set()
    store.disconnect_error = None
    await store.queue.close()


async def test_operations_of_one_turn_of_the_loop_are_one_group_in_their_order(store: RecordingStore) -> None:
    assert await asyncio.gather(*map(store.queue.submit, "abc")) == ["a", "b", "c"]
    assert store.groups == [["a", "b", "c"]]


async def test_operations_that_come_while_a_group_is_on_its_way_share_the_next(store: RecordingStore) -> None:
    held = await store.hold("a")
    first = store.queue.submit("b")
    await asyncio.sleep(0)  # another turn
    second = store.queue.submit("c")
    assert store.groups == [["a"]]
    store.goes_on.set()
    assert list(await asyncio.gather(held, first, second)) == ["a", "b", "c"]
    assert store.groups == [["a"], ["b", "c"]]


async def test_no_group_is_larger_than_its_bound_and_none_is_overtaken(store: RecordingStore) -> None:
    assert await asyncio.gather(*map(store.queue.submit, "abcdefgh")) == list("abcdefgh")
    assert store.groups == [["a", "b", "c"], ["d", "e", "f"], ["g", "h"]]


async def test_what_a_caller_submits_when_it_is_answered_joins_the_next_group(store: RecordingStore) -> None:
    async def twice(word: str) -> None:
        await store.queue.submit(word)
        await store.queue.submit(word.upper())

    await asyncio.gather(*map(twice, "abc"))
    assert store.groups == [["a", "b", "c"], ["A", "B", "C"]]


async def test_an_operation_that_is_cancelled_before_its_group_begins_is_not_done(store: RecordingStore) -> None:
    held = await store.hold("a")
    waiting = [store.queue.submit(word) for word in "bcdefg"]
    for cancelled in waiting[:4]:  # a group of its own, and one of the next
        cancelled.cancel()
    store.goes_on.set()
    assert await asyncio.gather(held, *waiting[4:]) == ["a", "f", "g"]
    assert store.groups == [["a"], ["f", "g"]]


async def test_an_operation_that_is_cancelled_later_is_done_and_the_others_are_answered(store: RecordingStore) -> None:
    store.begun.clear()
    store.goes_on.clear()
    cancelled, other = store.queue.submit("a"), store.queue.submit("b")
    await store.begun.wait()
    cancelled.cancel()
    store.goes_on.set()
    assert await other == "b"
    assert store.groups == [["a", "b"]]


async def test_an_operation_that_fails_fails_alone(store: RecordingStore) -> None:
    store.fails = {"b"}
    results = await asyncio.gather(*map(store.queue.submit, "abc"), return_exceptions=True)
    assert [results[0], results[2]] == ["a", "c"]
    assert isinstance(results[1], Diagnosed)
    assert results[1].args == ("b",)


async def test_a_group_that_fails_fails_for_all_its_callers_and_no_others(store: RecordingStore) -> None:
    store.breaks = {"b"}
    results = await asyncio.gather(*map(store.queue.submit, "abcd"), return_exceptions=True)
    assert [type(each) for each in results] == [Diagnosed, Diagnosed, Diagnosed, str]
    assert store.groups == [["a", "b", "c"], ["d"]]


async def test_closing_finishes_what_is_pending_and_takes_nothing_more(store: RecordingStore) -> None:
    held = await store.hold("a")
    waiting = [store.queue.submit(word) for word in "bcde"]
    closing = [asyncio.ensure_future(store.queue.close()) for _ in range(2)]
    await asyncio.sleep(0)
    assert not store.queue.is_open
    with pytest.raises(StoreUnavailable, match=r"the store of words.*it is not open"):
        store.queue.submit("late")
    store.goes_on.set()
    await asyncio.gather(*closing)
    assert [future.result() for future in (held, *waiting)] == list("abcde")
    assert store.groups == [["a"], ["b", "c", "d"], ["e"], None]
    await store.queue.close()
    assert store.groups.count(None) == 1


async def test_a_caller_of_close_that_is_cancelled_leaves_the_others_their_close(store: RecordingStore) -> None:
    held = await store.hold("a")
    hasty, patient = (asyncio.ensure_future(store.queue.close()) for _ in range(2))
    await asyncio.sleep(0)
    hasty.cancel()
    store.goes_on.set()
    await patient
    assert hasty.cancelled()
    assert held.result() == "a"
    assert store.groups == [["a"], None]


async def test_opening_while_it_closes_waits_and_opens_again(store: RecordingStore) -> None:
    held = await store.hold("a")
    closing = asyncio.ensure_future(store.queue.close())
    await asyncio.sleep(0)
    opening = asyncio.ensure_future(store.queue.open())
    await asyncio.sleep(0)
    assert not opening.done()
    store.goes_on.set()
    await asyncio.gather(held, closing, opening)
    assert await store.queue.submit("b") == "b"
    assert store.groups == [["a"], None, ["b"]]


async def test_a_disconnection_that_fails_is_raised_by_close_and_the_store_is_closed(store: RecordingStore) -> None:
    store.disconnect_error = Broken()
    with pytest.raises(Broken):
        await store.queue.close()
    assert not store.queue.is_open
    store.disconnect_error = None
    await store.queue.open()
    assert await store.queue.submit("a") == "a"


async def test_a_store_that_was_not_opened_takes_nothing() -> None:
    store = RecordingStore()
    with pytest.raises(StoreUnavailable, match="it is not open"):
        store.queue.submit("a")
    await store.queue.close()
    assert store.groups == []


@pytest.mark.parametrize(
    ("sizes", "parts"),
    [
        ([3, 3, 2], [[3, 3, 2]]),
        ([3, 3, 3, 20, 1, 1, 0], [[3, 3], [3], [20], [1, 1, 0]]),
        ([20], [[20]]),
        ([20, 9, 0], [[20], [9], [0]]),
    ],
)
def test_a_part_has_not_too_many_bytes_unless_one_operation_has(
    sizes: list[int], parts: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(operation_queue, "_MAX_PART_BYTES", 8)
    assert operation_queue.in_parts(sizes, sizes) == parts


async def test_a_forked_child_is_told_that_the_store_is_its_parents(store: RecordingStore) -> None:
    store.queue.reset_after_fork()  # as in a child
    with pytest.raises(StoreUnavailable, match=rf"it was opened in process {os.getpid()}"):
        store.queue.submit("b")


async def test_a_forked_child_may_open_what_its_parent_had_not() -> None:
    store = RecordingStore()
    store.queue.reset_after_fork()
    await store.queue.open()
    assert await store.queue.submit("a") == "a"
    await store.queue.close()
