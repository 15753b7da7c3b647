"""The issued keys as a running gateway knows them."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path

import pytest
from tests.support.issued_keys import IssuedKeys

from forebay.gateway.callers import key_registry
from forebay.gateway.callers.key_file import KeyFile
from forebay.gateway.callers.key_registry import KeyRefusal, KeyRegistry


@pytest.mark.blocks  # another process changes the file
async def test_the_limits_of_a_key_that_changes_while_its_first_call_arrives_are_those_of_the_file(
    tmp_path: Path,
) -> None:
    keys = IssuedKeys(tmp_path / "keys.db")
    text = keys.add("writer", budget_usd=5.0)
    registry = KeyRegistry(keys.path)
    registry.load()
    found = registry.find(text)  # and the body of the call has not arrived
    with KeyFile(keys.path) as file:
        file.update("writer", {"budget_usd": 1.0})
    await registry.refresh()
    budget = registry.limits_of(found).budget
    assert budget is not None
    assert budget.usd == 1.0


@pytest.mark.blocks  # another process changes the file
async def test_a_bug_in_following_the_file_is_logged_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    keys = IssuedKeys(tmp_path / "keys.db")
    text = keys.add("writer")
    registry = KeyRegistry(keys.path)
    registry.load()
    monkeypatch.setattr(key_registry, "_POLL_INTERVAL", 0.0)
    failures, followed = iter(range(3)), asyncio.Event()

    async def refresh(self: KeyRegistry) -> None:
        if next(failures, None) is not None:
            raise TypeError("a bug")
        await original(self)
        followed.set()

    original = KeyRegistry.refresh
    monkeypatch.setattr(KeyRegistry, "refresh", refresh)
    with KeyFile(keys.path) as file:
        file.revoke("writer", now=1.0)
    with caplog.at_level(logging.ERROR, logger="forebay"):
        watch = asyncio.create_task(registry.watch())
        await asyncio.wait([watch, asyncio.create_task(followed.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert not watch.done()
    watch.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await watch
    assert len(caplog.records) == 1
    with pytest.raises(KeyRefusal, match="revoked"):
        registry.find(text)
