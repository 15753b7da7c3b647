"""The workers of one gateway: what they have counted is kept, in virtual time."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
from tests.support.task_plane import virtual

from forebay.gateway.metrics.metric_snapshot import FamilySnapshot, MetricSnapshot, SampleSnapshot
from forebay.gateway.workers.worker_channel import MessageHandler, restore_worker_directory
from forebay.gateway.workers.worker_group import WorkerGroup


class SilentChannel:
    """A channel without sockets, which virtual time has not: no other worker answers."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.number = 0
        self.others = [1]

    async def open(self, handlers: Mapping[str, MessageHandler]) -> None:
        pass

    async def close(self) -> None:
        pass

    async def keep(self) -> None:
        restore_worker_directory(self.directory)

    async def ask_others(self, kind: str, body: bytes = b"", *, within: float) -> dict[int, bytes | None]:
        del kind, body, within
        return {1: None}


class CountingWorker:
    """A worker of a gateway that counts calls."""

    def __init__(self, directory: Path) -> None:
        self.calls = 0.0
        channel = SilentChannel(directory)
        self.group = WorkerGroup(channel, snapshot=self._snapshot, problems=list)  # type: ignore[arg-type]

    def _snapshot(self) -> MetricSnapshot:
        return MetricSnapshot([FamilySnapshot("calls", "counter", "calls", [SampleSnapshot("calls", {}, self.calls)])])

    async def kill(self) -> None:
        """End as kill -9 does: it notes nothing."""
        await self.group.stop_keeping()


async def counted(directory: Path) -> float:
    """Return the calls that a worker begins with which replaces the one that was killed."""
    replaced = CountingWorker(directory)
    await replaced.group.open({})
    page = await replaced.group.metrics()
    await replaced.group.close()
    return sum(each.value for family in page.families for each in family.samples if each.name == "calls")


@pytest.mark.blocks
@virtual
async def test_a_worker_that_is_killed_loses_what_it_counted_in_the_last_five_seconds_at_most(tmp_path: Path) -> None:
    worker = CountingWorker(tmp_path)
    await worker.group.open({})
    worker.calls = 3.0
    await asyncio.sleep(5.1)
    worker.calls = 4.0
    await worker.kill()
    assert await counted(tmp_path) == 3.0


@pytest.mark.blocks
@virtual
async def test_what_was_counted_is_kept_though_its_directory_is_removed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = tmp_path / "workers"
    directory.mkdir(mode=0o700)
    worker = CountingWorker(directory)
    await worker.group.open({})
    worker.calls = 3.0
    shutil.rmtree(directory)
    await asyncio.sleep(20.0)
    await worker.kill()
    assert await counted(directory) == 3.0
    (record,) = caplog.records
    assert "was removed: it is made again" in record.getMessage()


@pytest.mark.blocks
@virtual
async def test_a_directory_that_cannot_be_made_again_is_logged_once_and_tried_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    base = tmp_path / "base"
    directory = base / "workers"
    directory.mkdir(mode=0o700, parents=True)
    worker = CountingWorker(directory)
    await worker.group.open({})
    worker.calls = 3.0
    shutil.rmtree(base)
    await asyncio.sleep(20.0)
    (record,) = caplog.records
    assert "cannot be made again" in record.getMessage()
    base.mkdir()
    await asyncio.sleep(5.1)
    await worker.kill()
    assert await counted(directory) == 3.0
