"""The process that serves a GGUF file, with a double of llama.cpp in it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.frameworks.waiting import until
from tests.support import fake_xllamacpp

from forebay import BackpressureSupervisor, Task, WorkerState
from forebay.adapters import gguf_server
from forebay.adapters.gguf_server import GgufNotLoaded
from forebay.adapters.handler import Handler
from forebay.adapters.local_model import LocalModel, LocalServerUnavailable
from forebay.errors import InvalidSetting


@pytest.fixture(autouse=True)
def _library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "library"
    library.mkdir()
    shutil.copy(fake_xllamacpp.__file__, library / "xllamacpp.py")
    monkeypatch.syspath_prepend(library)


def model_file(directory: Path, text: str) -> Path:
    path = directory / f"{text}.gguf"
    path.write_text(text)
    return path


@pytest.fixture
def make(tmp_path: Path, _library: None) -> Callable[[str], LocalModel]:
    """Return what returns a model by its text. They are made here, outside of the event loop, as files are read."""
    made = {
        text: LocalModel.from_gguf(
            model_file(tmp_path, text), slots=4, context=512, threads=3, params={"sampling.seed": 7}
        )
        for text in ("bad", "slow", "good")
    }
    return made.__getitem__


async def started(model: LocalModel) -> Handler:
    """Return the handler of a worker that has started."""
    handler = model.__forebay_handler__()
    assert handler.start is not None
    await handler.start()
    return handler


def is_spawned(model: LocalModel) -> bool:
    return model._server is not None and model._server._process is not None


def has_ended(model: LocalModel) -> bool:
    """Return whether its process has ended with all its threads, the last of which close its connections."""
    assert model._server is not None
    assert model._server._process is not None
    return model._server._process.poll() is not None


def pid_of(model: LocalModel) -> int:
    assert model._server is not None
    assert model._server._process is not None
    return model._server._process.pid


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # the second one: it was reaped while its file was open
        return False


pytestmark = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc, as Linux has it")


async def test_a_file_is_served_while_its_worker_runs(make: Callable[[str], LocalModel]) -> None:
    model = make("good")
    assert await model.slots() == 4
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("local", handler=model, task_types=["ask"], max_concurrent=4)
        results = await asyncio.gather(*(supervisor.run(Task("ask", str(number))) for number in range(4)))
        assert [(result["output"], result["agent"]) for result in results] == [("4 2048 3 7 good", "good")] * 4
        pid = pid_of(model)
        assert is_alive(pid)
    assert not is_alive(pid)


async def test_its_process_is_that_of_all_workers_and_ends_with_the_last_one(make: Callable[[str], LocalModel]) -> None:
    model = make("good")
    async with BackpressureSupervisor() as first:
        first.register_worker("local", handler=model, task_types=["ask"])
        first.register_worker("another", handler=model, task_types=["sum up"])
        await asyncio.gather(*(first.run(Task(kind, "Which river?")) for kind in ("ask", "sum up")))
        pid = pid_of(model)
        async with BackpressureSupervisor() as second:
            second.register_worker("local", handler=model, task_types=["ask"])
            assert (await second.run(Task("ask", "Which river?")))["output"].endswith("good")
        await first.unregister_worker("another")
        assert pid_of(model) == pid
        assert (await first.run(Task("ask", "Which river?")))["output"].endswith("good")
    assert not is_alive(pid)


async def test_a_process_that_has_crashed_is_started_again_at_the_next_call(make: Callable[[str], LocalModel]) -> None:
    model = make("good")
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("local", handler=model, task_types=["ask"], max_concurrent=4)
        await supervisor.run(Task("ask", "before"))
        pid = pid_of(model)
        os.kill(pid, signal.SIGKILL)
        await until(lambda: has_ended(model))
        results = await asyncio.gather(*(supervisor.run(Task("ask", str(number))) for number in range(4)))
        assert all(result["output"].endswith("good") for result in results)
        again = pid_of(model)
        assert again != pid
    assert not is_alive(again)


async def test_a_worker_that_is_stopped_after_a_start_that_failed_takes_the_model_from_no_other(
    make: Callable[[str], LocalModel], tmp_path: Path
) -> None:
    model = make("good")
    file, away = tmp_path / "good.gguf", tmp_path / "away"
    failed = model.__forebay_handler__()
    assert failed.start is not None
    assert failed.stop is not None
    file.rename(away)
    with pytest.raises(GgufNotLoaded):
        await failed.start()
    away.rename(file)
    healthy = await started(model)
    assert healthy.stop is not None
    pid = pid_of(model)
    for _ in range(2):
        await failed.stop()
    assert (await healthy.call(Task("ask", "Which river?")))["output"].endswith("good")
    assert pid_of(model) == pid
    await healthy.stop()
    await healthy.stop()
    assert not is_alive(pid)
    again = await started(model)
    assert again.stop is not None
    await again.stop()


async def test_a_model_is_used_again_after_a_worker_that_did_not_start_in_time(
    make: Callable[[str], LocalModel],
) -> None:
    model = make("good")
    async with BackpressureSupervisor() as supervisor:
        worker = supervisor.register_worker("local", handler=model, task_types=["ask"], start_timeout=0.001)
        await until(lambda: worker.state is WorkerState.FAILED)
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("local", handler=model, task_types=["ask"])
        assert (await supervisor.run(Task("ask", "Which river?")))["output"].endswith("good")


async def test_a_call_to_a_process_that_is_about_to_end_is_made_once_more(
    make: Callable[[str], LocalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("good")
    handler = await started(model)
    assert handler.stop is not None
    pid = pid_of(model)
    poll, alive = subprocess.Popen.poll, 3

    def late_poll(self: subprocess.Popen[bytes]) -> int | None:
        """Return None for a while after the end, as the kernel does while it frees the memory."""
        nonlocal alive
        if self.pid == pid and alive:
            alive -= 1
            return None
        return poll(self)

    os.kill(pid, signal.SIGKILL)
    await until(lambda: not is_alive(pid))
    monkeypatch.setattr(subprocess.Popen, "poll", late_poll)
    assert (await handler.call(Task("ask", "Which river?")))["output"].endswith("good")
    assert alive == 0
    assert pid_of(model) != pid
    await handler.stop()


async def test_a_call_that_fails_while_its_process_lives_is_made_once(
    make: Callable[[str], LocalModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make("good")
    handler = await started(model)
    assert handler.stop is not None
    monkeypatch.setattr(gguf_server, "_CRASH_TIME", 0.1)
    assert model._server is not None
    address = await model._server.address()
    monkeypatch.setattr(model._server, "_address", address._replace(url="http://127.0.0.1:9/v1"))
    with pytest.raises(LocalServerUnavailable):
        await handler.call(Task("ask", "Which river?"))
    assert is_alive(pid_of(model))
    await handler.stop()


async def test_a_file_that_cannot_be_loaded_is_an_error_at_the_start(make: Callable[[str], LocalModel]) -> None:
    supervisor = BackpressureSupervisor()
    model = make("bad")
    supervisor.register_worker("local", handler=model, task_types=["ask"])
    with pytest.raises(GgufNotLoaded, match=r"bad.gguf' is not loaded: its process ended with status 1,"):
        await supervisor.start()


async def test_a_start_that_is_cancelled_leaves_no_process(make: Callable[[str], LocalModel]) -> None:
    model = make("slow")
    supervisor = BackpressureSupervisor()
    supervisor.register_worker("local", handler=model, task_types=["ask"])
    starting = asyncio.create_task(supervisor.start())
    await until(lambda: is_spawned(model))
    pid = pid_of(model)
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting
    await until(lambda: not is_alive(pid))
    assert not is_spawned(model)


@pytest.mark.slow
async def test_a_supervisor_that_is_closed_while_a_model_is_loaded_leaves_no_process(
    make: Callable[[str], LocalModel],
) -> None:
    model = make("slow")
    async with BackpressureSupervisor() as supervisor:
        supervisor.register_worker("local", handler=model, task_types=["ask"])
        await until(lambda: is_spawned(model))
        pid = pid_of(model)
    await until(lambda: not is_alive(pid))


@pytest.mark.parametrize("forks", [False, True])
async def test_the_process_ends_when_the_program_is_killed(tmp_path: Path, *, forks: bool) -> None:
    path = model_file(tmp_path, "good")
    program = f"""
        import asyncio, os, sys
        sys.path[:] = {sys.path!r}
        from forebay.adapters.local_model import LocalModel
        model = LocalModel.from_gguf({str(path)!r})
        async def main():
            await model.__forebay_handler__().start()
            if {forks} and os.fork() == 0:  # it has all files of its parent, and goes on without it
                sys.stdin.read()
                os._exit(0)
            print(model._server._process.pid, flush=True)
            await asyncio.sleep(60)
        asyncio.run(main())
    """

    def kill_it() -> int:
        command = [sys.executable, "-c", textwrap.dedent(program)]
        with subprocess.Popen(command, stdin=ours, stdout=subprocess.PIPE) as running:
            assert running.stdout is not None
            pid = int(running.stdout.readline())
            running.kill()
            running.wait()
        return pid

    ours, fork_lives = os.pipe()
    try:
        pid = await asyncio.get_running_loop().run_in_executor(None, kill_it)
        await until(lambda: not is_alive(pid))
    finally:
        os.close(ours)
        os.close(fork_lives)


async def test_the_event_loop_runs_while_a_model_is_loaded(make: Callable[[str], LocalModel]) -> None:
    model = make("slow")
    starting = asyncio.create_task(started(model))
    began = time.monotonic()  # noqa: TID251 - of the real time that the loop takes
    for _ in range(50):
        await asyncio.sleep(0)
    assert time.monotonic() - began < 5  # noqa: TID251
    assert not starting.done()
    starting.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await starting


async def test_a_call_without_a_start_is_an_error(make: Callable[[str], LocalModel]) -> None:
    model = make("good")
    with pytest.raises(GgufNotLoaded, match="no worker that uses it has started"):
        await model.__forebay_handler__().call(Task("ask", "Which river?"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"slots": 0}, "slots"),
        ({"context": 1.5}, "context"),
        ({"threads": 0}, "threads"),
        ({"params": "fast"}, "params"),
        ({"params": {"sampling.seed": object()}}, r"params\['sampling.seed'\]"),
        ({"slots": 10**30}, "slots"),
        ({"options": 1}, "options"),
    ],
)
def test_an_invalid_argument_is_an_error(tmp_path: Path, settings: dict[str, object], said: str) -> None:
    with pytest.raises(InvalidSetting, match=said):
        LocalModel.from_gguf(model_file(tmp_path, ""), **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize("path", [None, 5, b"tiny.gguf", "/none\0.gguf", "/\udcff.gguf", "/"])
def test_what_is_no_path_of_a_file_is_an_error(path: Any) -> None:
    with pytest.raises(InvalidSetting, match="a GGUF file that exists"):
        LocalModel.from_gguf(path)
