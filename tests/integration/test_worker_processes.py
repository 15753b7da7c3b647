"""Worker processes on one overflow: they come with a surge, go without losing a task, and may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forebay import BackpressureSupervisor, Task, TaskResult, Verdict
from forebay.errors import InvalidSetting
from forebay.events import Scaled
from forebay.scale import Autoscaler, ProcessTarget

pytestmark = [pytest.mark.slow, pytest.mark.blocks]

APP = """
import asyncio, os
from forebay import BackpressureSupervisor

supervisor = BackpressureSupervisor(overflow="sqlite:///{folder}/spill.db?fsync=no", lease=6.0, max_queue_size=0)
alone = BackpressureSupervisor()

@supervisor.worker("work", max_concurrent=4)
async def work(task):
    with open("{folder}/runs", "a") as runs:
        runs.write(f"{{task.payload[0]}} {{os.getpid()}}\\n")
    await asyncio.sleep(task.payload[1])
    return os.getpid()

def broken():
    os._exit(7)
"""


@pytest.fixture
def app(tmp_path: Path) -> Path:
    """Return a program with a supervisor whose overflow is a file beside it."""
    path = tmp_path / "fleet_app.py"
    path.write_text(textwrap.dedent(APP).format(folder=tmp_path))
    return path


@contextlib.asynccontextmanager
async def submitter(folder: Path, **settings: Any) -> AsyncIterator[BackpressureSupervisor]:
    """Run a supervisor whose tasks all wait in the overflow, for other processes."""
    overflow = f"sqlite:///{folder}/spill.db?fsync=no"
    async with BackpressureSupervisor(overflow=overflow, lease=6.0, max_queue_size=0, **settings) as supervisor:
        supervisor.register_worker("elsewhere", handler=_never, task_types=["work"])
        supervisor.pause("work")
        yield supervisor


async def _never(_: Task) -> None:
    raise AssertionError


async def submit(supervisor: BackpressureSupervisor, count: int, seconds: float) -> list[Any]:
    tickets = [await supervisor.submit(Task("work", [number, seconds])) for number in range(count)]
    assert {ticket.verdict for ticket in tickets} == {Verdict.SPILLED}
    return tickets


def autoscaler(supervisor: BackpressureSupervisor, target: ProcessTarget, **settings: Any) -> Autoscaler:
    quick: dict[str, Any] = {
        "task_types": ["work"], "seats": 4, "minimum": 0, "maximum": 3, "interval": 0.1, "window": 2.0,
        "panic_window": 0.3, "stabilization": 2.0,
    }  # fmt: skip
    return Autoscaler(supervisor, target, **{**quick, **settings})


async def until(condition: Any) -> None:
    """Wait until something holds; the test's timeout bounds it."""
    while not condition():  # noqa: ASYNC110 - of other processes, which set no event
        await asyncio.sleep(0.02)


async def until_ready(target: ProcessTarget, replicas: int) -> None:
    """Wait until so many processes take tasks."""
    while (await target.replicas()).ready < replicas:  # noqa: ASYNC110
        await asyncio.sleep(0.02)


def runs(folder: Path) -> list[str]:
    file = folder / "runs"
    return file.read_text().split("\n")[:-1] if file.exists() else []


async def values(tickets: list[Any]) -> list[TaskResult]:
    return [await ticket for ticket in tickets]


async def test_processes_come_with_a_surge_and_go_after_it(
    app: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[Scaled] = []

    def keep(event: Any) -> None:
        if isinstance(event, Scaled):
            events.append(event)

    async with submitter(tmp_path, on_event=keep) as supervisor:
        target = ProcessTarget(f"{app}:supervisor")
        async with autoscaler(supervisor, target) as scaler:
            results = await values(await submit(supervisor, 120, 0.25))
            assert all(result.success for result in results)
            assert len({result.result for result in results}) >= 2
            await until(lambda: not target.pids)
            assert (await target.replicas()).current == 0
            statistics = scaler.statistics()
            assert (statistics.failures, statistics.reversals) == (0, 1)
            assert max(event.after for event in events) >= 2
            assert events[-1].after == 0
    assert len(runs(tmp_path)) == 120  # nothing was run twice: those that went had drained
    assert "process" not in caplog.text


async def test_a_killed_process_is_replaced_and_loses_nothing(app: Path, tmp_path: Path) -> None:
    async with submitter(tmp_path) as supervisor:
        target = ProcessTarget(f"{app}:supervisor")
        async with autoscaler(supervisor, target, minimum=2):
            await until(lambda: len(target.pids) == 2)
            tickets = await submit(supervisor, 40, 0.3)
            await until(lambda: len(runs(tmp_path)) > 8)
            victim = target.pids[0]
            os.kill(victim, signal.SIGKILL)
            results = await values(tickets)
            assert all(result.success for result in results)
            await until(lambda: len(target.pids) == 2 and victim not in target.pids)


async def test_a_process_that_goes_while_it_runs_tasks_finishes_them(app: Path, tmp_path: Path) -> None:
    async with submitter(tmp_path) as supervisor:
        target = ProcessTarget(f"{app}:supervisor")
        await target.open()
        await target.scale(2)
        tickets = await submit(supervisor, 16, 1.0)
        await until(lambda: len(runs(tmp_path)) == 8)
        await target.scale(1)
        assert (await target.replicas()).current == 1
        results = await values(tickets)
        assert all(result.success for result in results)
        await until(lambda: len(target.pids) == 1)
        assert len(runs(tmp_path)) == 16
        await target.close()
        assert target.pids == []


async def test_what_does_not_end_in_time_goes_back_to_the_overflow(app: Path, tmp_path: Path) -> None:
    async with submitter(tmp_path) as supervisor:
        target = ProcessTarget(f"{app}:supervisor", drain_timeout=0.2)
        await target.open()
        await target.scale(1)
        await submit(supervisor, 2, 60.0)
        await until(lambda: len(runs(tmp_path)) == 2)
        await target.scale(0)
        await until(lambda: not target.pids)
        demand = await supervisor.demand(["work"])
        assert (demand.spilled, demand.elsewhere) == (2, 0)


async def test_processes_that_die_at_once_are_started_later_and_later(app: Path) -> None:
    target = ProcessTarget(f"{app}:broken")
    spawned: list[float] = []
    spawn = target._spawn

    async def counted(report_to: int) -> Any:
        spawned.append(asyncio.get_running_loop().time())
        return await spawn(report_to)

    target._spawn = counted  # type: ignore[method-assign]
    await target.open()
    await target.scale(1)
    await asyncio.sleep(4.0)
    assert target._failures >= 1
    assert len(spawned) == target._failures + len(target._processes) < 8
    assert (await target.replicas()).ready == 0
    await target.close()


REPORTER = """
import json, os, sys
descriptor = int(sys.argv[sys.argv.index("--report-to") + 1])
report = {"running": 1, "service": 2.0, "limited_by": os.environ["SHORT"]}
os.write(descriptor, b"no report\\n[]\\n" + json.dumps(report).encode() + b"\\n")
os.read(descriptor, 1)
"""


async def test_replicas_report_what_they_are_short_of() -> None:
    command = (sys.executable, "-c", REPORTER)
    target = ProcessTarget("app:supervisor", command=command, env={"SHORT": "upstream:openai:requests"})
    await target.open()
    await target.scale(2)
    await until_ready(target, 2)
    replicas = await target.replicas()
    assert (replicas.service, replicas.limited_by) == (2.0, "upstream:openai:requests")
    await target.close()


async def test_a_process_that_does_not_start_in_time_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    command = (sys.executable, "-c", "import time; time.sleep(60)")
    target = ProcessTarget("app:supervisor", command=command, start_timeout=0.5)
    await target.open()
    await target.scale(1)
    await until(lambda: "has not started within 0.5 s" in caplog.text)
    await target.close()


# --- the command ------------------------------------------------------------------------------------------------------


def worker(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "forebay.cli", "worker", *arguments],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


async def test_the_command_drains_at_sigterm_and_exits_with_0(app: Path, tmp_path: Path) -> None:
    async with submitter(tmp_path) as supervisor:
        running = worker("fleet_app:supervisor", folder=app.parent)
        tickets = await submit(supervisor, 8, 1.0)
        await until(lambda: len(runs(tmp_path)) == 4)
        running.send_signal(signal.SIGTERM)
        results = await values(tickets[:4])
        assert all(result.success for result in results)
        assert await asyncio.to_thread(running.communicate) == ("", "")  # noqa: TID251 - a test's thread
        assert running.returncode == 0
        demand = await supervisor.demand(["work"])
        assert (demand.spilled, demand.elsewhere) == (4, 0)


async def test_a_second_signal_cuts_the_draining_short(app: Path, tmp_path: Path) -> None:
    async with submitter(tmp_path) as supervisor:
        running = worker("fleet_app:supervisor", folder=app.parent)
        await submit(supervisor, 2, 60.0)
        await until(lambda: len(runs(tmp_path)) == 2)
        running.send_signal(signal.SIGINT)
        await asyncio.sleep(0.3)
        assert running.poll() is None
        running.send_signal(signal.SIGINT)
        await asyncio.to_thread(running.communicate)  # noqa: TID251
        assert running.returncode == 1
        demand = await supervisor.demand(["work"])
        assert (demand.spilled, demand.elsewhere) == (2, 0)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fleet_app", "it must be the import path of a supervisor"),
        ("fleet_app:missing", "it must be the import path of a supervisor"),
        ("fleet_app:os", "it must be the import path of a supervisor"),
        ("no_such_module:supervisor", "No module named 'no_such_module'"),
        ("fleet_app:alone", "a supervisor with an overflow"),
    ],
)
def test_a_mistake_is_one_line(app: Path, path: str, message: str) -> None:
    running = worker(path, folder=app.parent)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (2, "")
    assert message in err
    assert err.startswith("forebay: ")
    assert err.count("\n") == 1


async def test_the_workers_of_a_process_that_was_killed_drain(app: Path, tmp_path: Path) -> None:
    program = f"""
import asyncio, sys
from forebay.scale import ProcessTarget

async def main():
    target = ProcessTarget("{app}:supervisor")
    await target.open()
    await target.scale(1)
    while not (await target.replicas()).ready:
        await asyncio.sleep(0.02)
    print(*target.pids, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    async with submitter(tmp_path) as supervisor:
        parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert parent.stdout is not None
        pid = int(await asyncio.to_thread(parent.stdout.readline))  # noqa: TID251
        tickets = await submit(supervisor, 4, 1.0)
        await until(lambda: len(runs(tmp_path)) == 4)
        parent.kill()
        parent.communicate()
        assert all(result.success for result in await values(tickets))
        await until(lambda: not Path(f"/proc/{pid}").exists())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"supervisor": "app"}, 'such as "app:supervisor"'),
        ({"supervisor": ""}, "supervisor"),
        ({"drain_timeout": -1.0}, "drain_timeout"),
        ({"start_timeout": 0.0}, "start_timeout"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        ProcessTarget(**{"supervisor": "app:supervisor", **settings})
