"""A reload of a gateway with several workers: all serve by the new settings, or none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.support.gateway_harness import GatewayHarness

from forebay.errors import InvalidSetting
from forebay.gateway import GatewaySettings, TargetSettings
from forebay.gateway.server import Gateway, keep_until_restart
from forebay.gateway.workers import worker_reload
from forebay.gateway.workers.worker_channel import WorkerChannel
from forebay.gateway.workers.worker_reload import WorkerReload, read_settings, reload_workers


class Worker:
    """A worker of a gateway in this process, on a port of its own.

    Args:
        harness: of the gateway.
        directory: of the gateway's processes.
        number: of the worker, of two.
        environment: variables with secrets.
    """

    def __init__(
        self, harness: GatewayHarness, directory: Path, number: int, environment: dict[str, str] | None = None
    ) -> None:
        self.reload = WorkerReload(directory, 0, self._prepare)
        self.gateway = Gateway(
            harness.settings(),
            environment or {},
            channel=WorkerChannel(directory, number, 2),
            messages=self.reload.handlers,
        )

    async def _prepare(self, settings: GatewaySettings) -> Any:
        return await self.gateway.prepare_reload(settings)

    @property
    def client_timeout(self) -> float:
        """The setting that tests change."""
        return self.gateway.settings.client_timeout


@asynccontextmanager
async def two_workers(
    harness: GatewayHarness, directory: Path, *, environment: dict[str, str] | None = None
) -> AsyncIterator[list[Worker]]:
    workers = [Worker(harness, directory, 0), Worker(harness, directory, 1, environment)]
    async with workers[0].gateway, workers[1].gateway:
        yield workers


async def reload(directory: Path, load: Callable[[], GatewaySettings]) -> bool:
    """Reload as the process does that the parent of the workers forks."""
    return await asyncio.get_running_loop().run_in_executor(
        None, lambda: reload_workers(directory, 2, lambda: (load(), []))
    )


async def test_all_workers_serve_by_the_new_settings(harness: GatewayHarness, tmp_path: Path) -> None:
    settings = harness.settings(gateway={"client_timeout": 7.0})
    async with two_workers(harness, tmp_path) as workers:
        assert await reload(tmp_path, lambda: settings)
        assert [worker.client_timeout for worker in workers] == [7.0, 7.0]
        assert [(await harness.post(worker.gateway))[0] for worker in workers] == [200, 200]


async def test_settings_that_one_worker_cannot_serve_by_change_none(
    harness: GatewayHarness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = harness.settings(gateway={"client_timeout": 7.0}, api_key_env="KEY")
    async with two_workers(harness, tmp_path, environment={"KEY": "sk-1"}) as workers:
        with caplog.at_level(logging.ERROR):
            assert not await reload(tmp_path, lambda: settings)
        assert [worker.client_timeout for worker in workers] == [300.0, 300.0]
        assert read_settings(tmp_path) is None
    assert "nothing is reloaded, and the old settings stay" in caplog.text
    assert "KEY" in caplog.text


async def test_a_file_with_a_mistake_changes_no_worker(harness: GatewayHarness, tmp_path: Path) -> None:
    def load() -> GatewaySettings:
        return harness.settings(gateway={"client_timeout": -1.0})

    with pytest.raises(InvalidSetting):
        load()
    async with two_workers(harness, tmp_path) as workers:
        assert not await reload(tmp_path, load)
        assert [worker.client_timeout for worker in workers] == [300.0, 300.0]


async def test_settings_that_cannot_be_noted_change_no_worker(
    harness: GatewayHarness, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    settings = harness.settings(gateway={"client_timeout": 7.0})
    (tmp_path / "settings.new").mkdir()  # in the place of the file
    async with two_workers(harness, tmp_path) as workers:
        with caplog.at_level(logging.ERROR):
            assert not await reload(tmp_path, lambda: settings)
        assert [worker.client_timeout for worker in workers] == [300.0, 300.0]
        assert [worker.reload._prepared for worker in workers] == [None, None]
    assert "nothing is reloaded, and the old settings stay" in caplog.text


def test_no_worker_waits_for_one_that_hangs_before_it_serves_by_the_new_settings(
    harness: GatewayHarness, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, int]] = []

    def ask(_: Path, number: int, kind: str, *_body: bytes, **_within: float) -> bytes | None:
        asked.append((kind, number))
        return None if number == 0 else b"done"

    monkeypatch.setattr(worker_reload, "ask_worker", ask)
    assert reload_workers(tmp_path, 3, lambda: (harness.settings(), []))
    assert asked[3:] == [("commit", 1), ("commit", 2), ("commit", 0)]


async def test_a_worker_that_was_away_serves_by_the_settings_of_the_reload(
    harness: GatewayHarness, tmp_path: Path
) -> None:
    first, second = Worker(harness, tmp_path, 0), Worker(harness, tmp_path, 1)
    async with first.gateway:
        assert await reload(tmp_path, lambda: harness.settings(gateway={"client_timeout": 7.0}))
        async with second.gateway:  # it began with the old ones
            await second.reload.catch_up()
            assert [first.client_timeout, second.client_timeout] == [7.0, 7.0]
            assert await reload(tmp_path, lambda: harness.settings(gateway={"client_timeout": 8.0}))
            assert [first.client_timeout, second.client_timeout] == [8.0, 8.0]


async def test_a_worker_that_is_to_serve_by_settings_that_it_has_not_prepared_reads_them(
    harness: GatewayHarness, tmp_path: Path
) -> None:
    async with two_workers(harness, tmp_path) as workers:
        assert await reload(tmp_path, lambda: harness.settings(gateway={"client_timeout": 7.0}))
        late = WorkerReload(tmp_path, 0, workers[0]._prepare)
        assert await late.handlers["commit"](b"") == b"done"
        assert late._generation == 1


async def test_settings_in_force_whose_file_was_removed_are_noted_again(
    harness: GatewayHarness, tmp_path: Path
) -> None:
    loop = asyncio.get_running_loop()
    async with two_workers(harness, tmp_path) as workers:
        assert await reload(tmp_path, lambda: harness.settings(gateway={"client_timeout": 7.0}))
        await loop.run_in_executor(None, (tmp_path / "settings").unlink)
        for worker in workers:
            await loop.run_in_executor(None, worker.reload.restore)
    found = await loop.run_in_executor(None, read_settings, tmp_path)
    assert found is not None
    assert (found.generation, found.settings.client_timeout) == (1, 7.0)


def test_what_needs_a_restart_stays_and_is_said() -> None:
    targets = (TargetSettings(name="openai", url="http://127.0.0.1:1"),)
    before = GatewaySettings(targets=targets, listen="127.0.0.1:0")
    settings, kept = keep_until_restart(GatewaySettings(targets=targets, listen="127.0.0.1:1", workers=3), before)
    assert settings == before
    assert len(kept) == 2
