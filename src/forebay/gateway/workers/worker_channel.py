"""Messages between the processes of one gateway, over Unix sockets in a private directory of its parent process.

A message is a kind, which is a line, and a body. The receiver reads to the end, answers, and closes. Only this user can
open the directory.
"""

from __future__ import annotations

import asyncio
import functools
import os
import socket
import stat
import sys
import tempfile
from collections.abc import Awaitable, Callable, Mapping
from contextlib import suppress
from pathlib import Path
from shutil import rmtree
from typing import Final, TypeAlias

from forebay.errors import StoreUnavailable
from forebay.events import log

MessageHandler: TypeAlias = Callable[[bytes], Awaitable[bytes]]
"""Returns the answer to the body of a message."""

_PREFIX: Final = "forebay-workers-"
_MAX_PATH: Final = 94  # bytes: with the name of a socket less than the 104 of macOS
_OTHERS: Final = 0o077  # the permissions of other users
_START_AGAIN: Final = "Start the gateway again; until then it goes on with the workers that it has."
_MAX_KIND: Final = 64  # bytes
_CHUNK: Final = 1 << 16  # bytes
_BACKLOG: Final = 128


def make_worker_directory() -> Path:
    """Make the private directory of a gateway's processes, in ``$XDG_RUNTIME_DIR`` or that for temporary files.

    Raises:
        StoreUnavailable: it cannot be made, or has too long a path for a socket.
    """
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    bases = [runtime] if os.path.isabs(runtime) and Path(runtime).is_dir() else []  # noqa: PTH117 - as the XDG says
    why = ""
    for base in (*bases, None):
        try:
            made = tempfile.mkdtemp(prefix=_PREFIX, dir=base)
        except OSError as error:
            why = f"it cannot be made: {error.strerror or error}"
            continue
        if len(os.fsencode(made)) <= _MAX_PATH:
            keep_from_cleaning(made)
            return Path(made)
        Path(made).rmdir()
        why = f"its path is too long for a Unix socket: over {_MAX_PATH} bytes"
    advice = "Set TMPDIR to a directory with a short path that can be written."
    raise StoreUnavailable(where="the directory of the gateway's workers", why=why, advice=advice)


def keep_from_cleaning(directory: str) -> None:
    """Lock a directory until this process and those that it has forked end: systemd-tmpfiles leaves it alone then."""
    if sys.platform != "win32":
        import fcntl  # noqa: PLC0415 - Windows has none

        fcntl.flock(os.open(directory, os.O_RDONLY | os.O_DIRECTORY), fcntl.LOCK_EX | fcntl.LOCK_NB)


def restore_worker_directory(directory: Path) -> bool:
    """Make the private directory of a gateway's processes again if it was removed; return whether it was.

    Raises:
        StoreUnavailable: it cannot be made, or another user has made one in its place.
    """
    try:
        directory.mkdir(mode=0o700)
    except FileExistsError:
        _check_private(directory)
        return False
    except OSError as error:
        why = f"it was removed, and cannot be made again: {error.strerror or error}"
        raise StoreUnavailable(where=str(directory), why=why, advice=_START_AGAIN) from None
    with suppress(OSError):
        keep_from_cleaning(os.fspath(directory))
    log.warning(
        "the directory of the gateway's workers, %s, was removed: it is made again. Keep what cleans temporary files"
        " from it, or set XDG_RUNTIME_DIR to a directory that is not cleaned",
        directory,
    )
    return True


def _check_private(directory: Path) -> None:
    """Check that a directory is this user's alone, because its messages and settings are believed.

    Raises:
        StoreUnavailable: it is not.
    """
    found = directory.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & _OTHERS:
        why = "it was removed, and what is in its place is not a directory that only this user can open"
        raise StoreUnavailable(where=str(directory), why=why, advice=_START_AGAIN)


def remove_if_last(directory: Path) -> None:
    """Remove the private directory of a gateway's processes if no worker has a socket there any more."""
    if not any(directory.glob("*.sock")):
        rmtree(directory, ignore_errors=True)


class WorkerChannel:
    """The socket of one worker, on which it answers messages, and the way to those of the others.

    Args:
        directory: of the gateway's processes.
        number: of this worker, from 0.
        count: of all workers.

    Attributes:
        directory: of the gateway's processes.
        number: of this worker.
        others: the numbers of the other workers.
    """

    def __init__(self, directory: Path, number: int, count: int) -> None:
        self.directory = directory
        self.number = number
        self.others = [other for other in range(count) if other != number]
        self._restorers: list[Callable[[], None]] = []
        self._server: asyncio.Server | None = None
        self._handlers: Mapping[str, MessageHandler] = {}

    async def open(self, handlers: Mapping[str, MessageHandler]) -> None:
        """Answer messages from now on, each kind by its handler."""
        self._handlers = handlers
        path = socket_path(self.directory, self.number)
        listening = await asyncio.get_running_loop().run_in_executor(None, _listen, path)
        self._server = await asyncio.start_unix_server(self._serve, sock=listening)

    def call_when_restored(self, restore: Callable[[], None]) -> None:
        """Call `restore` in a thread once the directory or the socket was made again: what was in it may be gone."""
        self._restorers.append(restore)

    async def keep(self) -> None:
        """Keep the socket from what cleans old files; if it was removed, make it and its directory again.

        Raises:
            StoreUnavailable: it cannot be made again.
        """
        loop, path = asyncio.get_running_loop(), socket_path(self.directory, self.number)
        if self._server is None or await loop.run_in_executor(None, _touch, path):
            return
        await loop.run_in_executor(None, restore_worker_directory, self.directory)
        for restore in self._restorers:
            await loop.run_in_executor(None, restore)
        self._server.close()
        await self.open(self._handlers)

    async def close(self) -> None:
        """Answer no more messages."""
        if self._server is not None:
            path = socket_path(self.directory, self.number)
            await asyncio.get_running_loop().run_in_executor(None, functools.partial(path.unlink, missing_ok=True))
            self._server.close()
            self._server = None

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            kind, _, body = (await reader.read(-1)).partition(b"\n")
            handler = self._handlers.get(kind.decode(errors="replace")[:_MAX_KIND])
            if handler is not None:
                writer.write(await handler(body))
                await writer.drain()
        except OSError:
            pass  # it has gone
        except Exception:  # noqa: BLE001 - the others do without its answer
            log.exception("a message between the workers of this gateway failed, by a bug of the gateway")
        finally:
            writer.close()

    async def ask_others(self, kind: str, body: bytes = b"", *, within: float) -> dict[int, bytes | None]:
        """Return the answers of the other workers, by number; None of one that does not answer in time.

        Args:
            kind: of the message.
            body: of the message.
            within: seconds, for all of them.
        """
        answers = await asyncio.gather(*(self._ask(other, kind, body, within) for other in self.others))
        return dict(zip(self.others, answers, strict=True))

    async def _ask(self, other: int, kind: str, body: bytes, within: float) -> bytes | None:
        try:
            async with asyncio.timeout(within):
                reader, writer = await asyncio.open_unix_connection(socket_path(self.directory, other))
                try:
                    writer.write(kind.encode() + b"\n" + body)
                    writer.write_eof()
                    return await reader.read(-1) or None
                finally:
                    writer.close()
        except (OSError, TimeoutError):
            return None


def socket_path(directory: Path, number: int) -> Path:
    """Return the path of a worker's socket."""
    return directory / f"{number}.sock"


def _touch(path: Path) -> bool:
    """Let a file look new; return False if it is missing."""
    try:
        os.utime(path)
    except FileNotFoundError:
        return False
    return True


def _listen(path: Path) -> socket.socket:
    """Return a socket that listens at a path, in the place of one that nobody has any more.

    Raises:
        StoreUnavailable: its directory was removed.
    """
    if not path.parent.is_dir():
        raise StoreUnavailable(
            where=str(path.parent), why="this directory of the workers was removed", advice=_START_AGAIN
        )
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(os.fspath(path))
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    listening.setblocking(False)
    return listening


def ask_worker(directory: Path, number: int, kind: str, body: bytes = b"", *, within: float) -> bytes | None:
    """Return the answer of a worker to a message; None if it does not answer. It blocks.

    Args:
        directory: of the gateway's processes.
        number: of the worker.
        kind: of the message.
        body: of the message.
        within: seconds, for each step.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(within)
        try:
            connection.connect(os.fspath(socket_path(directory, number)))
            connection.sendall(kind.encode() + b"\n" + body)
            connection.shutdown(socket.SHUT_WR)
            parts = []
            while part := connection.recv(_CHUNK):
                parts.append(part)
        except OSError:
            return None
    return b"".join(parts) or None
