"""The demo as a newcomer runs it, in small: processes, real HTTP, LangGraph and the openai SDK."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple

import msgspec
import pytest

from demo.stored_tasks import StoredTasks, count_overflow, count_stored_tasks
from demo.workload import surge
from forebay.clock import monotonic
from forebay.simulation.provider.provider_config import ProviderConfig
from forebay.simulation.provider.provider_process import start_provider

TASKS, SEED = 60, 5
SMALL = ("--tasks", f"{TASKS}", "--seconds", "6", "--workers", "2", "--slots", "2", "--speed", "10")
ALL_OF_IT = ("--seconds", "60", "--speed", "10")
PNG = b"\x89PNG\r\n\x1a\n"


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "demo", *arguments]


def environment(**more: str) -> dict[str, str]:
    ours = ("PROVIDER_URL", "PROVIDER_API_KEY", "PROVIDER_MODEL", "OPENAI_API_KEY", "SEED", "OVERFLOW")
    return {name: value for name, value in os.environ.items() if name not in ours} | more


def demo(folder: Path, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    line = command(*arguments, "--out", str(folder))
    return subprocess.run(line, env=environment(**more), capture_output=True, text=True, check=False, timeout=100)


class Ran(NamedTuple):
    """A demo, what it wrote, and what it left on disk."""

    folder: Path
    done: subprocess.CompletedProcess[str]
    report: dict[str, Any]
    left: StoredTasks


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    folder = tmp_path_factory.mktemp("demo")
    done = demo(folder, *SMALL, SEED=f"{SEED}")
    assert done.returncode == 0, done.stdout + done.stderr
    shutil.copy(folder / "spill.db", folder / "left.db")  # before anybody goes on with it
    return Ran(
        folder,
        done,
        msgspec.json.decode((folder / "report.json").read_bytes()),
        count_stored_tasks(folder / "spill.db"),
    )


@pytest.mark.slow
def test_the_report_has_the_figures_of_all_sides(ran: Ran) -> None:
    assert (ran.report["tasks"], ran.report["workers"], ran.report["seed"]) == (TASKS, 2, SEED)
    for name in ("classic", "semaphore", "forebay"):
        side = ran.report[name]
        assert side["done"] + side["failed"] + side["spilled"] + side["lost"] == TASKS
        assert 0 < side["peak_rss_mb"] < ran.report["memory_limit_mb"]
        assert not side["out_of_memory"]


@pytest.mark.slow
def test_forebay_does_some_tasks_keeps_the_rest_and_loses_none(ran: Ran) -> None:
    ours = ran.report["forebay"]
    assert ours["done"] > 0
    assert ours["spilled"] > 0
    assert ours["lost"] == ours["failed"] == 0
    assert ours["p50_s"] <= ours["p99_s"]
    assert ours["usd_per_done"] >= ran.report["usd_least"]
    assert ours["usd_ratio"] == ran.report["usd_ratio"]
    assert ours["calls_429"] == ours["stray_429"]  # none of them for a rate limit that was in the headers


@pytest.mark.slow
def test_the_spilled_tasks_are_in_the_store(ran: Ran) -> None:
    assert ran.left.total == TASKS
    assert ran.left.to_do == ran.report["forebay"]["spilled"]
    assert ran.left.done == ran.report["forebay"]["done"]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["classic", "semaphore"])
def test_tasks_in_memory_are_lost_with_the_process(ran: Ran, side: str) -> None:
    theirs = ran.report[side]
    assert theirs["spilled"] == 0
    assert theirs["lost"] == TASKS - theirs["done"] - theirs["failed"]


@pytest.mark.slow
def test_the_client_and_the_provider_count_the_same_calls(ran: Ran) -> None:
    ours = ran.report["forebay"]
    assert 0 <= ours["bill"]["finished"] - ours["calls_answered"] <= 4  # answers on their way to agents cut off
    assert 0 <= ours["calls"] - ours["bill"]["calls"] <= 4


@pytest.mark.slow
def test_the_picture_is_a_png(ran: Ran) -> None:
    assert (ran.folder / "surge.png").read_bytes().startswith(PNG)


@pytest.mark.slow
def test_the_output_has_all_sides_and_how_to_resume(ran: Ran) -> None:
    for side in ("classic   0:00  0 done", "semaphore 0:00  0 done", "forebay   0:00  0 done"):
        assert side in ran.done.stdout
    assert "did not run out of memory" in " ".join(ran.done.stdout.split())
    assert 'make demo ARGS="--resume' in ran.done.stdout


@pytest.mark.slow
def test_the_seed_repeats_the_tasks(ran: Ran) -> None:
    with closing(sqlite3.connect(ran.folder / "spill.db")) as store:
        stored = dict(store.execute("SELECT task_id, priority FROM task"))
    assert stored == {job.task_id: int(job.priority) for job in surge(TASKS, SEED)}


@pytest.mark.slow
def test_resume_does_the_rest_and_then_nothing(ran: Ran) -> None:
    done = demo(ran.folder, "--resume", *ALL_OF_IT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"Nothing is left to do: {TASKS} tasks are done" in done.stdout
    assert count_stored_tasks(ran.folder / "spill.db") == StoredTasks(done=TASKS)
    again = demo(ran.folder, "--resume")
    assert (again.returncode, again.stdout.count("Nothing is left to do")) == (0, 1)


def test_without_a_demo_there_is_nothing_to_resume(tmp_path: Path) -> None:
    done = demo(tmp_path / "none", "--resume")
    assert done.returncode == 1
    assert "run `make demo` first" in done.stderr


@pytest.mark.slow
def test_the_demo_spills_into_the_store_that_is_named_and_clears_none_that_is_in_use(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/own.db"
    done = demo(tmp_path / "demo", *SMALL, OVERFLOW=url)
    assert done.returncode == 0, done.stdout + done.stderr
    left = count_overflow(url)
    report = msgspec.json.decode((tmp_path / "demo" / "report.json").read_bytes())
    assert (left.total, left.to_do) == (TASKS, report["forebay"]["spilled"])
    assert "in the store that OVERFLOW names" in done.stdout
    again = demo(tmp_path / "demo", *SMALL, OVERFLOW=url)
    assert again.returncode == 1
    assert "holds 60 records already" in again.stderr
    assert count_overflow(url) == left
    nothing = demo(tmp_path / "demo", "--resume", *SMALL[2:], OVERFLOW=f"sqlite:///{tmp_path}/empty.db")
    assert nothing.returncode == 1
    assert "no tasks to resume in the store that OVERFLOW names" in nothing.stderr


# --- ended from outside ---------------------------------------------------------------------------------------------


@contextmanager
def resuming(folder: Path, left: Path) -> Iterator[subprocess.Popen[str]]:
    """A demo that goes on with what another left, and has done some of it."""
    shutil.copy(left / "left.db", folder / "spill.db")
    before = count_stored_tasks(folder / "spill.db").done
    line = command("--resume", "--workers", "2", "--slots", "2", "--speed", "10", "--out", str(folder))
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, text=True) as process:
        try:
            while count_stored_tasks(folder / "spill.db").done < before + 3:
                assert not ended(process)
            yield process
        finally:
            process.kill()


def side_of(process: subprocess.Popen[str]) -> int:
    """The process of the side that a demo plays now."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    (side,) = (int(pid) for pid in children if b"demo.side_main" in Path(f"/proc/{pid}/cmdline").read_bytes())
    return side


def ended(process: subprocess.Popen[str]) -> bool:
    """Whether it ends within a twentieth of a second."""
    with suppress(subprocess.TimeoutExpired):
        process.wait(0.05)
    return process.returncode is not None


@pytest.mark.slow
def test_a_polite_kill_puts_everything_back(ran: Ran, tmp_path: Path) -> None:
    with resuming(tmp_path, ran.folder) as process:
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 130
    left = count_stored_tasks(tmp_path / "spill.db")
    assert (left.total, left.leased, left.failed) == (TASKS, 0, 0)


@pytest.mark.slow
def test_after_a_kill_of_the_parent_its_side_puts_everything_back_by_itself(ran: Ran, tmp_path: Path) -> None:
    with resuming(tmp_path, ran.folder) as process:
        process.kill()
    orphan, never = monotonic(), Event()
    while (left := count_stored_tasks(tmp_path / "spill.db")).leased and monotonic() < orphan + 20:
        never.wait(0.05)  # only the orphan can return a lease: nobody else uses the store
    assert (left.total, left.leased, left.failed) == (TASKS, 0, 0)


@pytest.mark.slow
def test_after_a_kill_of_its_side_everything_is_still_on_disk(ran: Ran, tmp_path: Path) -> None:
    with resuming(tmp_path, ran.folder) as process:
        os.kill(side_of(process), signal.SIGKILL)
        assert process.wait(30) == 1
    left = count_stored_tasks(tmp_path / "spill.db")
    assert (left.total, left.failed) == (TASKS, 0)
    assert left.leased > 0  # what it was running, until its lease runs out


@pytest.mark.slow
def test_a_side_over_its_memory_is_ended_and_that_is_said(tmp_path: Path) -> None:
    done = demo(tmp_path, *SMALL, "--memory", "64")
    assert done.returncode == 0, done.stdout + done.stderr
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes())
    assert report["classic"]["out_of_memory"]
    assert report["semaphore"]["out_of_memory"]
    assert report["forebay"]["out_of_memory"]
    assert "ran out of its 64 MB" in " ".join(done.stdout.split())


# --- a real provider ------------------------------------------------------------------------------------------------


def test_a_provider_without_a_key_is_a_mistake(tmp_path: Path) -> None:
    done = demo(tmp_path, PROVIDER_URL="http://127.0.0.1:9/v1")
    assert done.returncode == 1
    assert "PROVIDER_API_KEY" in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_real_money_is_not_spent_unasked(tmp_path: Path) -> None:
    done = demo(tmp_path, PROVIDER_URL="http://127.0.0.1:9/v1", OPENAI_API_KEY="secret")
    assert done.returncode == 1
    assert "60 tasks" in done.stderr
    assert "secret" not in done.stderr + done.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_server_of_ones_own_is_counted_by_what_it_answers(tmp_path: Path) -> None:
    with start_provider(ProviderConfig(ttft=0.05, tpot=0.001)) as simulated:
        more = {"PROVIDER_URL": simulated.openai_url, "PROVIDER_API_KEY": "mine", "PROVIDER_MODEL": "gpt-4o-mini"}
        done = demo(tmp_path, "--yes", "--tasks", "4", "--seconds", "40", **more)
    assert done.returncode == 0, done.stdout + done.stderr
    report = msgspec.json.decode((tmp_path / "report.json").read_bytes())
    for side in (report["classic"], report["semaphore"], report["forebay"]):
        assert (side["done"], side["calls_answered"], side["bill"]) == (4, 12, None)
        assert side["tokens_wasted"] == 0
        assert side["usd_per_done"] > 0
    assert "gpt-4o-mini" in report["provider"]
