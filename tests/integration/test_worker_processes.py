"""Worker processes on one overflow: they come with a surge, go without losing a task, and may be killed."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from forebay import BackpressureSupervisor, Task, TaskResult, Verdict, clock
from forebay.errors import InvalidSetting
from forebay.events import Scaled
from forebay.scale import Autoscaler, ProcessTarget, process_target

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


# --- the end of a process ---------------------------------------------------------------------------------------------

HELD_OPEN = """
import os, signal, sys
descriptor = int(sys.argv[sys.argv.index("--report-to") + 1])
if os.fork() == 0:  # it has its parent's sockets, and ends when the other end is closed
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while os.read(descriptor, 1):
        pass
    os._exit(0)
os.write(descriptor, b'{"running": 0}\\n')
signal.pause()
"""
REPORTING = """
import os, sys, time
descriptor = int(sys.argv[sys.argv.index("--report-to") + 1])
while True:
    os.write(descriptor, b'{"running": 0}\\n')
    time.sleep(0.2)
"""
SILENT = """
import os, signal, sys
descriptor = int(sys.argv[sys.argv.index("--report-to") + 1])
os.write(descriptor, b'{"running": 4, "service": 2.0, "limited_by": "upstream:openai:requests"}\\n')
signal.pause()
"""
LEAVING = """
import os, signal, sys
descriptor = int(sys.argv[sys.argv.index("--report-to") + 1])
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})
os.write(descriptor, b'{"running": 1}\\n')
signal.sigwait({signal.SIGUSR1})
os.write(descriptor, b'{"running": 1, "draining": true}\\n')
signal.sigwait({signal.SIGUSR1})
"""


def double(program: str, **settings: Any) -> ProcessTarget:
    """Return a target whose processes are a small program, without a supervisor."""
    return ProcessTarget("app:supervisor", command=(sys.executable, "-S", "-c", program), **settings)


async def test_a_process_that_dies_is_replaced_though_its_socket_is_held_open() -> None:
    target = double(HELD_OPEN)
    await target.scale(1)
    await until_ready(target, 1)
    victim = target.pids[0]
    os.kill(victim, signal.SIGKILL)
    async with asyncio.timeout(20):
        await until(lambda: target.pids and victim not in target.pids)
    await until_ready(target, 1)
    await target.close()
    assert target.pids == []


async def test_a_process_that_drains_by_itself_is_not_ready_and_replaced() -> None:
    target = double(LEAVING)
    await target.scale(1)
    await until_ready(target, 1)
    leaving = target.pids[0]
    os.kill(leaving, signal.SIGUSR1)
    async with asyncio.timeout(20):
        await until(lambda: len(target.pids) == 2)
    await until_ready(target, 1)
    assert target.pids[0] == leaving
    assert (await target.replicas()).ready == 1
    os.kill(leaving, signal.SIGUSR1)
    await until(lambda: leaving not in target.pids)
    assert len(target.pids) == 1
    await target.close()


async def test_a_process_that_reports_no_more_counts_no_more_and_is_killed(caplog: pytest.LogCaptureFixture) -> None:
    target = double(SILENT, report_timeout=5.0)
    await target.scale(1)
    await until_ready(target, 1)
    assert (await target.replicas()).limited_by is not None
    silent = target.pids[0]
    async with asyncio.timeout(20):
        while (await target.replicas()).ready:  # noqa: ASYNC110
            await asyncio.sleep(0.02)
    assert target.pids == [silent]
    assert (await target.replicas()).limited_by is None
    await until(lambda: f"process {silent} has not reported for 5 s, and is killed" in caplog.text)
    await until(lambda: target.pids and silent not in target.pids)
    await target.close()


async def test_a_process_is_not_silent_because_this_one_has_stood_still() -> None:
    target = double(REPORTING, report_timeout=5.0)
    await target.scale(1)
    await until_ready(target, 1)
    pids = target.pids
    time.sleep(6.0)  # noqa: ASYNC251, TID251 - it stands still, as if it was stopped
    await asyncio.sleep(0.5)
    assert (target.pids, (await target.replicas()).ready) == (pids, 1)
    await target.close()


async def test_one_that_waits_to_be_replaced_holds_back_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(clock, "draw", lambda: 1.0)  # the longest delay
    target = double(REPORTING)
    await target.scale(2)
    await until_ready(target, 2)
    target._failures = 20  # the next one that dies young is replaced in a minute
    os.kill(target.pids[0], signal.SIGKILL)
    await until(lambda: target._restart is not None)
    await target.scale(2)
    assert len(target.pids) == 1
    await target.scale(4)
    async with asyncio.timeout(20):
        await until_ready(target, 4)
    await target.close()


async def test_processes_that_die_together_count_as_one_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    target = double(REPORTING)
    await target.scale(4)
    await until_ready(target, 4)
    monkeypatch.setattr(clock, "draw", lambda: 1.0)  # the longest delay
    killed = target.pids
    for pid in killed:
        os.kill(pid, signal.SIGKILL)
    await until(lambda: not set(killed) & set(target.pids))
    assert target._failures == 1
    await until_ready(target, 4)
    monkeypatch.setattr(process_target, "_LONG_LIFE", 0.1)
    await until(lambda: target._failures == 0)  # though none has died since
    await target.close()


def test_a_fork_has_no_socket_of_the_reports() -> None:
    program = """
import os
from forebay.scale.process_target import _ReplicaProcess
from forebay.supervisor.worker_process import Manager

replica = _ReplicaProcess(0.0)
ours, theirs = replica.connect()
manager = Manager(theirs.detach())
assert not os.get_inheritable(ours.fileno()) and not os.get_inheritable(manager.socket.fileno())
if (child := os.fork()) == 0:
    os._exit(0 if ours.fileno() == manager.socket.fileno() == -1 else 1)
assert os.waitpid(child, 0)[1] == 0
assert ours.fileno() != -1 != manager.socket.fileno()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


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


async def test_several_sigterms_are_one_for_the_processes_of_a_target(app: Path, tmp_path: Path) -> None:
    async with submitter(tmp_path) as supervisor:
        target = ProcessTarget(f"{app}:supervisor")
        await target.scale(1)
        tickets = await submit(supervisor, 4, 2.5)
        await until(lambda: len(runs(tmp_path)) == 4)
        pid = target.pids[0]
        os.kill(pid, signal.SIGTERM)  # as a service manager does, which sends it to this process too
        closing = asyncio.ensure_future(target.close())
        await asyncio.sleep(1.2)
        os.kill(pid, signal.SIGTERM)
        assert all(result.success for result in await values(tickets))
        await closing
        assert len(runs(tmp_path)) == 4


async def test_a_sigterm_that_is_sent_on_at_once_is_the_same_one(app: Path, tmp_path: Path) -> None:
    async with submitter(tmp_path) as supervisor:
        running = worker("fleet_app:supervisor", folder=app.parent)
        tickets = await submit(supervisor, 2, 1.0)
        await until(lambda: len(runs(tmp_path)) == 2)
        running.send_signal(signal.SIGTERM)
        await asyncio.sleep(0.2)
        running.send_signal(signal.SIGTERM)
        assert all(result.success for result in await values(tickets))
        await asyncio.to_thread(running.communicate)  # noqa: TID251
        assert running.returncode == 0


STUBBORN = """
import asyncio, time
from forebay import BackpressureSupervisor

supervisor = BackpressureSupervisor(
    overflow="sqlite:///{folder}/spill.db?fsync=no", lease=6.0, max_queue_size=0, zombie_grace=0.2
)

@supervisor.worker("work")
async def work(task):
    open("{folder}/runs", "a").write("run\\n")
    if task.payload[0]:
        await asyncio.to_thread(time.sleep, 600)
    while True:
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            pass
"""


@pytest.mark.parametrize("number", [0, 1], ids=["a coroutine", "a thread"])
@pytest.mark.parametrize("cut_short", [False, True])
async def test_a_handler_that_does_not_stop_does_not_keep_the_process(
    tmp_path: Path, number: int, *, cut_short: bool
) -> None:
    (tmp_path / "stubborn_app.py").write_text(STUBBORN.format(folder=tmp_path))
    async with submitter(tmp_path) as supervisor:
        limit = () if cut_short else ("--drain-timeout", "0.2")
        running = worker("stubborn_app:supervisor", *limit, folder=tmp_path)
        await supervisor.submit(Task("work", [number, 0.0]))
        await until(lambda: len(runs(tmp_path)) == 1)
        running.send_signal(signal.SIGINT)
        if cut_short:
            await asyncio.sleep(0.3)
            running.send_signal(signal.SIGINT)
        async with asyncio.timeout(30):
            await asyncio.to_thread(running.communicate)  # noqa: TID251
        assert running.returncode == (1 if cut_short else 0)


def test_a_signal_during_the_import_ends_the_process(tmp_path: Path) -> None:
    (tmp_path / "slow_app.py").write_text("import time\nprint('importing', flush=True)\ntime.sleep(60)\n")
    for number in (signal.SIGTERM, signal.SIGINT):
        running = worker("slow_app:supervisor", folder=tmp_path)
        assert running.stdout is not None
        running.stdout.readline()
        running.send_signal(number)
        assert running.communicate(timeout=30) == ("", "")
        assert running.returncode == 0


def test_a_signal_during_the_start_ends_the_process(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"redis://127.0.0.1:{silent.getsockname()[1]}/0"
        program = f"from forebay import BackpressureSupervisor\nsupervisor = BackpressureSupervisor(overflow={url!r})\n"
        (tmp_path / "away_app.py").write_text(program)
        running = worker("away_app:supervisor", folder=tmp_path)
        connection, _ = silent.accept()  # which is never answered
        with connection:
            running.send_signal(signal.SIGTERM)
            running.send_signal(signal.SIGTERM)
            assert running.communicate(timeout=30) == ("", "")
        assert running.returncode == 0


@pytest.mark.parametrize("seconds", ["inf", "nan", "-1"])
def test_a_wrong_drain_timeout_is_refused_at_the_start(app: Path, seconds: str) -> None:
    command = [sys.executable, "-m", "forebay.supervisor.worker_process", "fleet_app:supervisor"]
    done = subprocess.run(
        [*command, "--drain-timeout", seconds], cwd=app.parent, capture_output=True, text=True, check=False, timeout=30
    )
    assert done.returncode == 2
    assert done.stderr.startswith("forebay: forebay worker was given --drain-timeout=")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("fleet_app", "it must be the import path of a supervisor"),
        ("fleet_app:missing", "it must be the import path of a supervisor"),
        ("fleet_app:os", "it must be the import path of a supervisor"),
        ("no_such_module:supervisor", "No module named 'no_such_module'"),
        ("fleet_app:alone", "'fleet_app:alone'; it must be that of a supervisor with an overflow"),
        ("no_such_file.py:supervisor", "no_such_file.py:supervisor cannot be loaded: FileNotFoundError"),
        ("no_syntax:supervisor", "SyntaxError: invalid syntax (no_syntax.py, line 1)"),
        ("mistakes:needs_one", "the function takes no arguments, and is not async"),
        ("mistakes:is_async", "the function takes no arguments, and is not async"),
        ("mistakes:wrong_overflow", "The overflow 5 cannot be opened"),
    ],
)
def test_a_mistake_is_one_line(app: Path, path: str, message: str) -> None:
    (app.parent / "no_syntax.py").write_text("def supervisor(:\n")
    (app.parent / "mistakes.py").write_text(MISTAKES)
    running = worker(path, folder=app.parent)
    out, err = running.communicate(timeout=30)
    assert (running.returncode, out) == (2, "")
    assert message in err
    assert err.startswith("forebay: ")
    assert err.count("\n") == 1


MISTAKES = """
from forebay import BackpressureSupervisor

def needs_one(settings): ...

async def is_async(): ...

def wrong_overflow():
    return BackpressureSupervisor(overflow=5)

def raises():
    return read()

def read():
    raise RuntimeError("no key")
"""


def test_an_error_of_the_program_is_named_first_and_its_last_frames_follow(tmp_path: Path) -> None:
    (tmp_path / "mistakes.py").write_text(MISTAKES)
    running = worker("mistakes:raises", folder=tmp_path)
    _, err = running.communicate(timeout=30)
    first, *frames = err.splitlines()
    assert (running.returncode, first) == (2, "forebay: mistakes:raises cannot be loaded: RuntimeError: no key")
    assert [each.strip() for each in frames if "File" in each] == [
        f'File "{tmp_path}/mistakes.py", line 12, in raises',
        f'File "{tmp_path}/mistakes.py", line 15, in read',
    ]


@pytest.mark.parametrize("held_by", ["nobody", "a fork", "a program"])
async def test_the_workers_of_a_process_that_was_killed_drain(app: Path, tmp_path: Path, held_by: str) -> None:
    program = f"""
import asyncio, os, subprocess, sys, time
from forebay.scale import ProcessTarget

async def main():
    target = ProcessTarget("{app}:supervisor")
    await target.open()
    await target.scale(1)
    while not (await target.replicas()).ready:
        await asyncio.sleep(0.02)
    holder = 0
    if {held_by == "a fork"} and (holder := os.fork()) == 0:
        time.sleep(60)
        os._exit(0)
    if {held_by == "a program"}:
        sockets = [each._socket.fileno() for each in target._processes]
        holder = subprocess.Popen(["sleep", "60"], pass_fds=sockets).pid
    print(*target.pids, holder, flush=True)
    await asyncio.sleep(60)

asyncio.run(main())
"""
    async with submitter(tmp_path) as supervisor:
        parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)  # noqa: ASYNC220
        assert parent.stdout is not None
        line = await asyncio.to_thread(parent.stdout.readline)  # noqa: TID251
        pid, holder = (int(each) for each in line.split())
        tickets = await submit(supervisor, 4, 1.0)
        await until(lambda: len(runs(tmp_path)) == 4)
        parent.kill()
        parent.wait()
        try:
            assert all(result.success for result in await values(tickets))
            await until(lambda: not Path(f"/proc/{pid}").exists())
        finally:
            parent.stdout.close()
            if holder:
                os.kill(holder, signal.SIGKILL)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"supervisor": "app"}, 'such as "app:supervisor"'),
        ({"supervisor": ""}, "supervisor"),
        ({"drain_timeout": -1.0}, "drain_timeout"),
        ({"start_timeout": 0.0}, "start_timeout"),
        ({"report_timeout": 1.0}, "at least 5 seconds"),
        ({"report_timeout": math.nan}, "report_timeout"),
        ({"env": {"A": 1}}, "a string"),
        ({"env": {"A=B": "1"}}, "names of environment variables"),
        ({"env": {1: "1"}}, "names of environment variables"),
        ({"command": "python3 worker.py"}, "command"),
        ({"command": ()}, "command"),
    ],
)
def test_a_wrong_setting_is_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        ProcessTarget(**{"supervisor": "app:supervisor", **settings})
