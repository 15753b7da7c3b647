"""A supervisor on uvloop, which servers such as uvicorn run, with each engine."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest
from tests.contract import engine_handlers

from forebay import BackpressureSupervisor, Task, TaskStatus
from forebay.engine import Engine, ProcessEngine

if sys.platform == "win32":  # pragma: no cover
    pytest.skip("there is no uvloop", allow_module_level=True)
import uvloop

ENGINES = ["loop", "thread", ProcessEngine(grace=0.1)]


@pytest.mark.parametrize("engine", ENGINES, ids=str)
def test_tasks_run_fail_are_cut_off_and_stored_on_uvloop(engine: Engine | str, tmp_path: Path) -> None:
    async def main() -> None:
        async with (
            asyncio.timeout(60),
            BackpressureSupervisor(overflow=f"sqlite:///{tmp_path}/tasks.db") as supervisor,
        ):
            supervisor.register_worker(
                "worker", handler=engine_handlers.coroutine, task_types=["work"], max_concurrent=2, engine=engine
            )
            assert await supervisor.run(Task("work", ("echo", 1))) == 1
            assert await supervisor.run(Task("work", ("echo", 2), durable=True)) == 2
            tickets = [await supervisor.submit(Task("work", ("echo", number))) for number in range(50)]
            assert [(await ticket).result for ticket in tickets] == list(range(50))
            failed = await supervisor.submit(Task("work", ("raise", "ValueError")))
            assert (await failed).status is TaskStatus.FAILED
            cut_off = await supervisor.submit(Task("work", ("wait", f"{tmp_path}/stopped"), timeout=0.3))
            assert (await cut_off).status is TaskStatus.TIMED_OUT

    uvloop.run(main())
    assert (tmp_path / "stopped").exists()
