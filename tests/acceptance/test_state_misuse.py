"""Shared state that is used as it cannot be: the error says what is wrong, and what to do."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.support.switched_shard import SwitchedShard
from tests.support.task_plane import error_of, virtual

from forebay.adapters.langgraph import ShardedSaver, ShardedStore
from forebay.errors import InvalidSetting, InvalidShardUrl, ShardUnavailable, WrongLoop
from forebay.state import ShardedState


class HalfAShard:
    url = "half://"

    async def scan(self) -> None: ...


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([["memory://"]], r"it is a list; give each shard as an argument of its own"),
        ([Path("state.db")], r'write "sqlite:///" \+ str\(path\)'),
        ([object()], "it is a object, not a URL or a shard"),
        ([HalfAShard()], "a shard of your own also needs open, close, get, put, delete, copy, restore"),
    ],
)
async def test_what_is_no_shard_is_rejected(shards: list[Any], message: str) -> None:
    with pytest.raises(InvalidShardUrl, match=message):
        await ShardedState.connect(*shards)


async def test_a_state_needs_a_shard() -> None:
    with pytest.raises(InvalidSetting, match="at least one URL of a shard"):
        await ShardedState.connect()


async def test_no_password_is_shown() -> None:
    url: Any = "redis://user:secret@host/0"
    with pytest.raises(InvalidSetting, match="@host") as of_former:
        await ShardedState.connect("memory://", moving_from=url)
    with pytest.raises(InvalidSetting, match="@host") as of_saver:
        ShardedSaver(url)
    with pytest.raises(InvalidSetting, match="@host") as of_store:
        ShardedStore(url)
    assert "secret" not in f"{of_former.value} {of_saver.value} {of_store.value}"


async def test_what_is_no_state_is_rejected_by_the_saver_and_the_store() -> None:
    for kind in (ShardedSaver, ShardedStore):
        connecting: Any = ShardedState.connect("memory://")  # its await was forgotten
        with pytest.raises(InvalidSetting, match=r"which `await ShardedState\.connect"):
            kind(connecting)
        connecting.close()
    async with await ShardedState.connect("memory://") as state:
        ttl: Any = 60
        with pytest.raises(InvalidSetting, match="in minutes"):
            ShardedStore(state, ttl=ttl)


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{path}/state.db"])
async def test_a_state_in_another_event_loop_is_rejected(url: str, tmp_path: Path) -> None:
    async with await ShardedState.connect(url.format(path=tmp_path)) as state:
        put = error_of(state.put("key", 1))
        error = await asyncio.get_running_loop().run_in_executor(None, asyncio.run, put)
        assert isinstance(error, WrongLoop)
        assert "run_coroutine_threadsafe" in str(error)
        assert await state.get("key") is None


@pytest.mark.parametrize("url", ["memory://", "sqlite:///{path}/state.db"])
async def test_a_closed_state_is_rejected(url: str, tmp_path: Path) -> None:
    async with await ShardedState.connect(url.format(path=tmp_path)) as state:
        await state.put("key", 1)
    for call in (state.get("key"), state.put("key", 2)):
        with pytest.raises(ShardUnavailable, match="its state has been closed"):
            await call


@virtual
async def test_a_call_that_fails_once_the_state_is_closed_does_not_open_the_shard_again() -> None:
    shard = SwitchedShard("memory://switched")
    state = await ShardedState.connect(shard)
    shard.is_off = True
    getting = asyncio.create_task(error_of(state.get("key")))
    await asyncio.sleep(0.5)
    await state.close()
    assert isinstance(await getting, ShardUnavailable)
    await asyncio.sleep(10.0)
    assert shard.opened == 1


@virtual
async def test_the_log_says_once_that_a_shard_is_down_and_that_it_is_back(caplog: pytest.LogCaptureFixture) -> None:
    shard = SwitchedShard("memory://switched")
    async with await ShardedState.connect(shard) as state:
        shard.is_off = True
        errors = await asyncio.gather(*(error_of(state.get(f"key {number}")) for number in range(10)))
        assert {type(error) for error in errors} == {ShardUnavailable}
        await asyncio.sleep(10.0)
        shard.is_off = False
        await asyncio.sleep(10.0)
    said = [(record.levelno, record.getMessage()) for record in caplog.records if record.name == "forebay"]
    switched_off = "it is switched off. Its keys fail until it is back. Switch it on."
    assert said == [
        (logging.ERROR, f"the shard memory://switched is down: {switched_off}"),
        (logging.WARNING, "the shard memory://switched is back"),
    ]
