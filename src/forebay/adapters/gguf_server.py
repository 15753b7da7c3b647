"""A GGUF file, served by llama.cpp in a process of its own, whose program is `main`.

llama.cpp comes as xllamacpp, which has wheels, and whose server batches the calls of its slots. It has a process of its
own because xllamacpp (2026.10) holds the GIL while it loads a model, so that an event loop would stand still for as
long; because an assertion that fails in C++ ends the process; and because a process gives all its memory back at once.
See ADR 41.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import select
import subprocess
import sys
import threading
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec

from forebay._text import is_unicode
from forebay._threads import DaemonThreadExecutor
from forebay._validate import check_instance, check_whole, reject
from forebay.errors import ForebayError

_THREADS: Final = DaemonThreadExecutor("forebay-gguf")  # each waits for a start
_OWNER: Final = "LocalModel.from_gguf"
_NOT_STARTED: Final = (
    'no worker that uses it has started, or all have stopped; it needs no engine="process", having a process of its own'
)
_NOT_LOADED: Final = (
    "its process ended with status {status}, and has said why on stderr: the file may be damaged, of an architecture"
    " that this llama.cpp does not know, or too large for the memory, or a name in params unknown"
)
# The first code of the new interpreter: it makes the same modules importable as in this one.
_BOOT: Final = (
    "import sys; parent = int(sys.argv[1]); sys.path[:] = sys.argv[2:]; sys.argv[1:] = [];"
    " from forebay.adapters.gguf_server import main; main(parent)"
)
_ERRORS_ONLY: Final = 1  # of llama.cpp's levels of verbosity; those go to stderr
_MOST: Final = 2**31 - 1  # of what llama.cpp has an int for
_PARENT_POLL: Final = 0.5  # seconds between two looks whether the other process lives
_CRASH_TIME: Final = 10.0  # seconds that a process may take to end that answers no more: it frees or dumps its memory
_CRASH_POLL: Final = 0.02  # seconds between two looks whether it has


def to_json(value: Any) -> bytes:
    """Return plain data as JSON.

    Raises:
        ValueError: JSON cannot carry it.
    """
    try:
        return json.dumps(value, allow_nan=False, ensure_ascii=False).encode()  # msgspec writes NaN as null
    except (TypeError, RecursionError) as error:
        raise ValueError(str(error)) from error


def check_plain(owner: str, name: str, value: Mapping[str, Any] | None) -> None:
    """Check that a mapping, or None, is by text, and that JSON can carry it.

    Raises:
        InvalidSetting: it is not so.
    """
    for key, each in (value or {}).items():
        expected = "plain data by text: text without surrogates, numbers but not NaN, lists and dicts"
        try:
            to_json({key: each})
        except ValueError:
            reject(owner, f"{name}[{key!r}]" if isinstance(key, str) and is_unicode(key) else name, each, expected)
        if not isinstance(key, str):
            reject(owner, name, value, expected)


class LocalModelNotInstalled(ForebayError, ImportError):
    """A local model needs the library {library}, which is not installed: pip install 'forebay[{extra}]'."""


class GgufNotLoaded(ForebayError, RuntimeError):
    """The model {path!r} is not loaded: {why}."""


class Address(NamedTuple):
    """The address of a server, the key that it asks for, and the id of its process, if this one has started it."""

    url: str
    key: str
    pid: int | None = None


class _Job(msgspec.Struct, frozen=True):
    """A model to be served, as the process that serves it is told on its standard input.

    Attributes:
        path: of the model.
        name: that it is listed by.
        slots: calls that are served at a time.
        context: tokens of each.
        threads: that compute; None: as many as llama.cpp takes by itself.
        key: that the server asks for, because any user of this machine can connect to it.
        params: fields of xllamacpp's CommonParams, by their names.
    """

    path: str
    name: str
    slots: int
    context: int
    threads: int | None
    key: str
    params: dict[str, Any]


class GgufServer:
    """A server of one GGUF file, for all workers that use it: it runs from the first `start` to the last `stop`.

    Its process ends with this one, however this one ends.

    Args:
        path: of the file.
        slots: calls that are served at a time.
        context: tokens of each, its prompt and its answer.
        threads: that compute; None: as many as llama.cpp takes by itself.
        params: fields of xllamacpp's CommonParams, such as ``{"n_gpu_layers": 0}``; that of a part with a dot.

    Raises:
        InvalidSetting: an argument is invalid, or the file is missing.
        LocalModelNotInstalled: xllamacpp is missing.
    """

    def __init__(
        self, path: str | Path, *, slots: int, context: int, threads: int | None, params: Mapping[str, Any] | None
    ) -> None:
        check_whole(_OWNER, "slots", slots, maximum=_MOST)
        check_whole(_OWNER, "context", context, maximum=_MOST)
        check_whole(_OWNER, "threads", threads, maximum=_MOST, none="for as many as llama.cpp takes by itself")
        check_instance(_OWNER, "params", params, Mapping, example="{'n_gpu_layers': 0}", optional=True)
        check_plain(_OWNER, "params", params)
        if not isinstance(path, str | Path) or not is_unicode(str(path)) or not Path(path).is_file():
            reject(_OWNER, "path", path if path is None else str(path), "a GGUF file that exists")
        if find_spec("xllamacpp") is None:
            raise LocalModelNotInstalled(library="xllamacpp", extra="local")
        self.path = str(path)
        self.slots = slots
        self._job = _Job(self.path, Path(path).stem, slots, context, threads, os.urandom(16).hex(), dict(params or {}))
        self._starting = threading.Lock()
        self._lock = threading.Lock()  # for the three below; held for no time
        self._users: set[object] = set()
        self._process: subprocess.Popen[bytes] | None = None
        self._address: Address | None = None

    async def start(self, user: object) -> Address:
        """Add a user, and return the address once the model has been loaded.

        Args:
            user: whoever stops it again. One that has started it already stays one user.

        Raises:
            GgufNotLoaded: it cannot be loaded; then, and if this is cancelled, it is no user.
        """
        with self._lock:
            self._users.add(user)
        try:
            return await self.address()
        except BaseException:
            self._leave(user)  # not awaited: this may be a cancellation
            raise

    async def stop(self, user: object) -> None:
        """Remove a user, if it is one. Without any, kill the process, and wait until its memory is free."""
        if (ending := self._leave(user)) is not None:
            await ending

    def _leave(self, user: object) -> asyncio.Future[int] | None:
        """Remove a user. Without any, kill the process, and return a future that is done once it has ended."""
        with self._lock:
            self._users.discard(user)  # a worker is also stopped after a start that has failed
            if self._users or self._process is None:
                return None
            process, self._process = self._process, None
        return asyncio.get_running_loop().run_in_executor(_THREADS, _end, process)

    async def address(self) -> Address:
        """Return the address; if the process has ended by itself, once it has been started again.

        Raises:
            GgufNotLoaded: there is no user, or the model cannot be loaded.
        """
        if (running := self._running()) is not None:
            return running
        return await asyncio.get_running_loop().run_in_executor(_THREADS, self._start)

    async def has_crashed(self, address: Address) -> bool:
        """Return whether the process at an address has ended. It may take a moment, and answers no more meanwhile."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CRASH_TIME):
                while (process := self._process) is not None and process.pid == address.pid:
                    if process.poll() is not None:
                        break
                    await asyncio.sleep(_CRASH_POLL)
                return True
        return False

    def _running(self) -> Address | None:
        """Return the address of the process if it runs. Without the lock: `_start` sets the address after it."""
        process = self._process
        return self._address if process is not None and process.poll() is None else None

    def _start(self) -> Address:
        """Start the process unless it runs, and wait until it has loaded the model. Blocks."""
        with self._starting:
            if (running := self._running()) is not None:
                return running
            process = self._spawn()
            url = _load(process, self._job)
            if not url:
                raise GgufNotLoaded(path=self.path, why=_NOT_LOADED.format(status=_end(process)))
            address = Address(f"{url}/v1", self._job.key, process.pid)
            with self._lock:
                if self._process is process:
                    self._address = address
            return address

    def _spawn(self) -> subprocess.Popen[bytes]:
        """Return a new process, in place of one that has crashed."""
        # A process group of its own: Ctrl-C in a terminal must not end it before the runs that use it.
        process = subprocess.Popen(  # noqa: S603 - our own interpreter and code
            [sys.executable, "-c", _BOOT, str(os.getpid()), *sys.path],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            process_group=0,
        )
        with self._lock:
            crashed, is_wanted = self._process, bool(self._users)
            self._address = None
            self._process = process if is_wanted else None
        if crashed is not None:
            _end(crashed)
        if not is_wanted:
            _end(process)
            raise GgufNotLoaded(path=self.path, why=_NOT_STARTED)
        return process


def _load(process: subprocess.Popen[bytes], job: _Job) -> str:
    """Tell a process what to serve, and return its URL; empty if it ends before it has one."""
    assert process.stdin is not None  # noqa: S101 - opened as a pipe
    assert process.stdout is not None  # noqa: S101
    try:
        process.stdin.write(to_json(msgspec.to_builtins(job)) + b"\n")
        process.stdin.flush()
        return process.stdout.readline().decode().strip()
    except (OSError, ValueError):  # the pipe of a process that has ended, or was closed by `_end`
        return ""


def _end(process: subprocess.Popen[bytes]) -> int:
    """Kill a process, and return its status once it has ended."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(OSError):  # what was not written, because it ended before it read it
                pipe.close()
    return process.wait()


def main(parent: int) -> None:
    """Serve the model that standard input names until it is closed, or the process `parent` has ended.

    A fork of that one keeps the other end of standard input open, and may outlive it.
    """
    import xllamacpp  # noqa: PLC0415 - only this process needs it

    job = msgspec.json.decode(sys.stdin.buffer.readline(), type=_Job)
    params = xllamacpp.CommonParams()
    params.model.path = job.path
    params.model_alias = {job.name}
    params.n_parallel = job.slots
    params.n_ctx = job.slots * job.context
    params.api_keys = [job.key]
    params.verbosity = _ERRORS_ONLY
    if job.threads is not None:
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = job.threads
    for name, value in job.params.items():
        *parts, last = name.split(".")
        target: Any = params
        for part in parts:
            target = getattr(target, part)
        setattr(target, last, value)
    try:
        server = xllamacpp.Server(params)
    except RuntimeError:
        os._exit(1)  # it has written why, and a traceback tells no more
    print(server.listening_address, flush=True)  # noqa: T201 - the message that it is ready
    while os.getppid() == parent and not select.select([sys.stdin], [], [], _PARENT_POLL)[0]:
        pass
    os._exit(0)  # at once, also from the middle of a generation
