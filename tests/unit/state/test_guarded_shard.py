"""A shard that is down, one whose state is closed, and one that belongs to another event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from tests.support.task_plane import virtual

from forebay.errors import ShardUnavailable, StoreUnavailable, WrongLoop
from forebay.state import MemoryShard, ShardedState
from forebay.state.shard import OperationRejected

UNUSABLE = StoreUnavailable(where="there", why="it cannot write to its disk", advice="Free space.")


class FailingShard(MemoryShard):
    """A shard whose operations fail.

    Attributes:
        get_error: that of `get`.
        ping_error: that of `ping`.
        pings: asked so far.
    """

    get_error: Exception | None = None
    ping_error: Exception | None = None
    pings = 0

    async def get(self, *args: Any, **options: Any) -> Any:
        if self.get_error is not None:
            raise self.get_error
        return await super().get(*args, **options)

    async def ping(self) -> None:
        self.pings += 1
        if self.ping_error is not None:
            raise self.ping_error


async def go_down(state: ShardedState, shard: FailingShard) -> None:
    """Let the shard fail once."""
    shard.get_error = UNUSABLE
    with pytest.raises(ShardUnavailable):
        await state.get("key")
    shard.get_error = None


@virtual
async def test_a_shard_that_rejects_the_ping_has_answered() -> None:
    shard = FailingShard("memory://failing")
    async with await ShardedState.connect(shard) as state:
        shard.ping_error = OperationRejected(UNUSABLE)
        await go_down(state, shard)
        await asyncio.sleep(1.0)
        assert await state.get("key") is None


@virtual
async def test_whatever_a_probe_raises_another_one_follows() -> None:
    shard = FailingShard("memory://failing")
    async with await ShardedState.connect(shard) as state:
        shard.ping_error = OSError("of a shard that somebody else wrote")
        await go_down(state, shard)
        await asyncio.sleep(10.0)
        assert state.down
        assert shard.pings > 10
        shard.ping_error = None
        await asyncio.sleep(1.0)
        assert await state.get("key") is None


@virtual
async def test_a_call_that_fails_while_the_state_is_closed_starts_no_probe() -> None:
    shard = FailingShard("memory://failing")
    state = await ShardedState.connect(shard)
    begun, may_fail = asyncio.Event(), asyncio.Event()

    async def get(*_: Any, **__: Any) -> Any:
        begun.set()
        await may_fail.wait()
        raise UNUSABLE

    shard.get = get  # type: ignore[method-assign]
    call = asyncio.ensure_future(state.get("key"))
    await begun.wait()
    await state.close()
    may_fail.set()
    with pytest.raises(ShardUnavailable):
        await call
    await asyncio.sleep(10.0)
    assert not shard.pings


CALLS: list[Callable[[ShardedState], Awaitable[Any]]] = [
    lambda state: state.get("key"),
    lambda state: state.put("key", 1),
    lambda state: state.update("key", lambda _: 1),
    lambda state: state.namespace("space").delete("key"),
    lambda state: anext(state.scan()),
]


@pytest.mark.parametrize("call", CALLS)
async def test_a_closed_state_says_so_and_stays_closed(
    call: Callable[[ShardedState], Awaitable[Any]], tmp_path: Path
) -> None:
    state = await ShardedState.connect(f"sqlite:////{tmp_path}/state.db")
    await state.put("key", 0)
    await state.close()
    for _ in range(2):
        with pytest.raises(ShardUnavailable, match="its state has been closed"):
            await call(state)
        await state.close()


@pytest.mark.parametrize("call", [*CALLS, ShardedState.close])
def test_another_event_loop_is_told_so(call: Callable[[ShardedState], Awaitable[Any]]) -> None:
    state = asyncio.run(ShardedState.connect("memory://"))
    with pytest.raises(WrongLoop, match="A ShardedState"):
        asyncio.run(_awaited(call, state))


async def _awaited(call: Callable[[ShardedState], Awaitable[Any]], state: ShardedState) -> None:
    await call(state)


class HangingShard(MemoryShard):
    """A shard that is never reached."""

    async def open(self) -> None:
        await asyncio.Event().wait()


@virtual
async def test_a_cancelled_connect_leaves_no_shard_open() -> None:
    closed = list[str]()

    class ClosingShard(FailingShard):
        async def close(self) -> None:
            closed.append(self.url)

    down = ClosingShard("memory://down")
    down.open = partial(_fail)  # type: ignore[method-assign]
    shards = (ClosingShard("memory://up"), down, HangingShard("memory://hangs"))
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(1.0):
            await ShardedState.connect(*shards)
    assert sorted(closed) == ["memory://down", "memory://up"]
    await asyncio.sleep(10.0)
    assert not down.pings
    assert [task for task in asyncio.all_tasks() if "probe" in task.get_name()] == []


async def _fail() -> None:
    raise UNUSABLE
