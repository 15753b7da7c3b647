"""The file of an overflow is removed, replaced or emptied while it is open: nothing is acknowledged and lost."""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.support.task_plane import Agent, error_of, flood, virtual

from forebay import BackpressureSupervisor, Task, TaskStatus, Verdict
from forebay.errors import StoreUnavailable

pytestmark = pytest.mark.blocks  # in virtual time SQLite's thread is the loop's own


def remove(path: Path) -> None:
    path.unlink()


def remove_all(path: Path) -> None:
    for each in path.parent.glob(f"{path.name}*"):
        each.unlink()


def remove_log(path: Path) -> None:
    path.with_name(f"{path.name}-wal").unlink()


def remove_index(path: Path) -> None:
    path.with_name(f"{path.name}-shm").unlink()


def move_away(path: Path) -> None:
    path.rename(path.with_suffix(".old"))


def move_back(path: Path) -> None:
    path.with_suffix(".old").rename(path)


def remove_directory(path: Path) -> None:
    shutil.rmtree(path.parent)


def replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.replace(path)


def empty(path: Path) -> None:
    os.truncate(path, 0)


ACCIDENTS = [remove, remove_all, remove_log, remove_index, move_away, remove_directory, replace, empty]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    directory = tmp_path / "stores"
    directory.mkdir()
    return directory / "spill.db"


def make_supervisor(path: Path, agent: Agent, *, max_queue_size: int = 100) -> BackpressureSupervisor:
    supervisor = BackpressureSupervisor(overflow=f"sqlite:///{path}?fsync=no", max_queue_size=max_queue_size)
    supervisor.register_worker("worker", handler=agent, task_types=["work"])
    return supervisor


@pytest.mark.parametrize("accident", ACCIDENTS)
@virtual
async def test_no_task_is_acknowledged_into_a_file_that_is_lost(accident: Callable[[Path], None], path: Path) -> None:
    agent = Agent(60.0)
    supervisor = make_supervisor(path, agent, max_queue_size=0)
    await supervisor.start()
    await supervisor.submit(Task("work", "runs"))
    before = await supervisor.submit(Task("work", "spilled before", spill=True))
    accident(path)
    spilled = await supervisor.submit(Task("work", "spilled after"))
    assert (spilled.verdict, spilled.limited_by) == (Verdict.REJECTED, "overflow")
    with pytest.raises(StoreUnavailable, match="Put it back, or restart"):
        await supervisor.submit(Task("work", "durable after", durable=True))
    await asyncio.sleep(130.0)
    assert before.verdict is Verdict.SPILLED
    if accident is not empty:  # otherwise SQLite may be unable to read it
        assert agent.started == ["runs", "spilled before"]
        assert (await before).success
    await supervisor.close()


@pytest.mark.parametrize("accident", [remove, replace])
@virtual
async def test_draining_leaves_nothing_in_a_file_that_is_lost(accident: Callable[[Path], None], path: Path) -> None:
    agent = Agent(1.0)
    async with make_supervisor(path, agent, max_queue_size=3) as supervisor:
        inside = flood(supervisor, "work", 4)
        spilled = [await supervisor.submit(Task("work", n)) for n in range(4, 8)]
        durable = [ticket for ticket in spilled if ticket.verdict is Verdict.SPILLED]
        assert len(durable) == 4
        accident(path)
        assert not await supervisor.submit(Task("work", "refused"))
        report = await supervisor.drain()
    assert (report.finished, report.spilled, report.cancelled) == (8, 0, 0)
    assert {(await ticket).status for ticket in (*inside, *spilled)} == {TaskStatus.SUCCEEDED}


@virtual
async def test_a_lost_file_is_logged_once_though_nobody_submits(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with make_supervisor(path, Agent()) as supervisor:
        remove(path)
        with caplog.at_level(logging.ERROR, "forebay"):
            await asyncio.sleep(100.0)
        (record,) = [record for record in caplog.records if "removed or replaced" in record.getMessage()]
        assert record.levelno == logging.ERROR
        assert supervisor.statistics().outside == 0


@virtual
async def test_a_file_that_is_in_its_place_again_is_used_again(path: Path) -> None:
    agent = Agent(1.0)
    async with make_supervisor(path, agent) as supervisor:
        move_away(path)
        assert isinstance(await error_of(supervisor.submit(Task("work", durable=True))), StoreUnavailable)
        move_back(path)
        assert (await (await supervisor.submit(Task("work", durable=True)))).success
