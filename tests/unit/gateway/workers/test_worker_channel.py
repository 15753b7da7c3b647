"""The private directory and the sockets of a gateway's workers."""

from __future__ import annotations

import os
import shutil
import stat
import tempfile
from pathlib import Path

import pytest
from tests.support.issued_keys import in_thread

from forebay.errors import StoreUnavailable
from forebay.gateway.workers.worker_channel import (
    WorkerChannel,
    make_worker_directory,
    remove_if_last,
    restore_worker_directory,
    socket_path,
)


def test_only_this_user_can_open_the_directory(monkeypatch: pytest.MonkeyPatch) -> None:
    with tempfile.TemporaryDirectory() as runtime:  # a short path, as a socket needs it
        monkeypatch.setenv("XDG_RUNTIME_DIR", runtime)
        made = make_worker_directory()
        assert made.parent == Path(runtime)
        assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_what_cleans_temporary_files_leaves_the_directory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fcntl = pytest.importorskip("fcntl")  # Windows has none, and no workers
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    cleaner = os.open(make_worker_directory(), os.O_RDONLY)
    with pytest.raises(BlockingIOError):
        fcntl.flock(cleaner, fcntl.LOCK_SH | fcntl.LOCK_NB)  # as systemd-tmpfiles does, which then skips it
    os.close(cleaner)


async def test_a_worker_whose_directory_was_removed_says_so(tmp_path: Path) -> None:
    with pytest.raises(StoreUnavailable, match=r"was removed.*Start the gateway again"):
        await WorkerChannel(tmp_path / "removed", 0, 2).open({})


async def test_a_worker_whose_socket_is_removed_with_its_directory_can_be_asked_again(tmp_path: Path) -> None:
    async def echo(body: bytes) -> bytes:
        return body

    directory = tmp_path / "workers"
    directory.mkdir(mode=0o700)
    one, other = WorkerChannel(directory, 0, 2), WorkerChannel(directory, 1, 2)
    await other.open({"echo": echo})
    await other.keep()
    assert await one.ask_others("echo", b"a", within=60.0) == {1: b"a"}
    await in_thread(shutil.rmtree, directory)
    assert await one.ask_others("echo", b"a", within=60.0) == {1: None}
    await other.keep()
    assert await one.ask_others("echo", b"a", within=60.0) == {1: b"a"}
    assert stat.S_IMODE((await in_thread(directory.stat)).st_mode) == 0o700
    await other.close()
    assert await one.ask_others("echo", b"a", within=60.0) == {1: None}


@pytest.mark.parametrize("place", ["open to others", "a link"])
def test_a_directory_that_others_may_have_made_is_not_used(tmp_path: Path, place: str) -> None:
    directory = tmp_path / "workers"
    if place == "a link":
        directory.symlink_to(tmp_path)
    else:
        directory.mkdir()
        directory.chmod(0o755)
    with pytest.raises(StoreUnavailable, match="not a directory that only this user can open"):
        restore_worker_directory(directory)


def test_a_path_that_is_too_long_for_a_socket_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = tmp_path / ("d" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    made = make_worker_directory()
    assert made.parent == Path(tempfile.gettempdir())
    made.rmdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    with pytest.raises(StoreUnavailable, match=r"too long for a Unix socket.*TMPDIR"):
        make_worker_directory()
    assert list(long.iterdir()) == []


async def test_a_worker_answers_by_the_handler_of_a_message(tmp_path: Path) -> None:
    async def double(body: bytes) -> bytes:
        return body * 2

    one, other = WorkerChannel(tmp_path, 0, 3), WorkerChannel(tmp_path, 1, 3)
    await other.open({"double": double})
    assert await one.ask_others("double", b"ab", within=60.0) == {1: b"abab", 2: None}
    assert await one.ask_others("nonsense", within=60.0) == {1: None, 2: None}
    await other.close()
    assert await one.ask_others("double", b"ab", within=60.0) == {1: None, 2: None}


async def test_a_worker_takes_the_place_of_one_that_was_killed(tmp_path: Path) -> None:
    socket_path(tmp_path, 1).write_bytes(b"")
    other = WorkerChannel(tmp_path, 1, 2)

    async def answer(_: bytes) -> bytes:
        return b"here"

    await other.open({"where": answer})
    assert await WorkerChannel(tmp_path, 0, 2).ask_others("where", within=60.0) == {1: b"here"}
    await other.close()


def test_the_directory_is_removed_by_the_last_worker(tmp_path: Path) -> None:
    directory = tmp_path / "workers"
    directory.mkdir()
    socket_path(directory, 0).touch()
    (directory / "1.counted").touch()
    remove_if_last(directory)
    assert directory.is_dir()
    socket_path(directory, 0).unlink()
    remove_if_last(directory)
    assert not directory.exists()
