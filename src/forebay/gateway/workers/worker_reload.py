"""A reload of all workers of a gateway: each prepares the new settings, and all serve by them, or none.

A process that the parent forks for it reads the settings, and lets each worker prepare them. If one cannot, all keep
the old ones. Else they are written down, which is the decision, and all are told. A worker that starts, or that is told
of settings that it has not prepared, reads what was written.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Final, Protocol

import msgspec

from forebay.errors import ForebayError
from forebay.events import log
from forebay.gateway.settings import GatewaySettings
from forebay.gateway.workers.worker_channel import MessageHandler, ask_worker

_PREPARE, _COMMIT, _FORGET = "prepare", "commit", "forget"  # kinds of messages
_DONE: Final = b"done"  # the answer to a message that has worked
_PREPARE_TIMEOUT: Final = 30.0  # seconds: secrets and log files may be slow to open
_COMMIT_TIMEOUT: Final = 10.0  # seconds


class SettingsInForce(msgspec.Struct, frozen=True):
    """The settings of a gateway since a reload.

    Attributes:
        generation: how many reloads there were, this one included.
        settings: of the gateway.
    """

    generation: int
    settings: GatewaySettings


class PreparedReload(Protocol):
    """Settings by which a gateway can serve at once, see `Gateway.prepare_reload`."""

    async def commit(self) -> None:
        """Serve by them from now on. It cannot fail."""

    async def discard(self) -> None:
        """Give up what was opened for them."""


def _path(directory: Path) -> Path:
    return directory / "settings"


def read_settings(directory: Path) -> SettingsInForce | None:
    """Return the settings of the latest reload; None if there was none."""
    try:
        return msgspec.msgpack.decode(_path(directory).read_bytes(), type=SettingsInForce)
    except FileNotFoundError:
        return None


def reload_workers(directory: Path, count: int, load: Callable[[], tuple[GatewaySettings, Sequence[str]]]) -> bool:
    """Let all workers serve by other settings, or none; return whether they do. It blocks.

    Workers that are not there, since they died and are being started again, begin with the new settings.

    Args:
        directory: of the gateway's processes.
        count: of the workers.
        load: returns the settings, and what is not as their file says because it needs a restart.
    """
    try:
        settings, kept = load()
    except ForebayError as error:
        log.error("nothing is reloaded, and the old settings stay: %s", error)
        return False
    before = read_settings(directory)
    made = SettingsInForce(1 if before is None else before.generation + 1, settings)
    body = msgspec.msgpack.encode(made)
    answers = [ask_worker(directory, number, _PREPARE, body, within=_PREPARE_TIMEOUT) for number in range(count)]
    numbers = sorted(range(count), key=lambda number: answers[number] is None)  # others do not wait for one that hangs
    if errors := dict.fromkeys(answer.decode() for answer in answers if answer not in (None, _DONE)):
        _tell_all(directory, numbers, _FORGET)
        log.error("nothing is reloaded, and the old settings stay: %s", "; ".join(errors))
        return False
    try:
        _write(directory, body)
    except OSError as error:
        _tell_all(directory, numbers, _FORGET)
        log.error("nothing is reloaded, and the old settings stay: they cannot be noted for the workers: %s", error)
        return False
    _tell_all(directory, numbers, _COMMIT)
    for each in kept:
        log.warning("reloaded, but %s", each)
    return True


def _tell_all(directory: Path, numbers: Sequence[int], kind: str) -> None:
    for number in numbers:
        ask_worker(directory, number, kind, within=_COMMIT_TIMEOUT)


def _write(directory: Path, body: bytes) -> None:
    made = directory / "settings.new"
    made.write_bytes(body)
    os.replace(made, _path(directory))  # noqa: PTH105 - a reader sees the one or the other


class WorkerReload:
    """The part of a reload that happens in one worker.

    Args:
        directory: of the gateway's processes.
        generation: of the settings with which this worker began.
        prepare: returns settings by which it can serve at once.
    """

    def __init__(
        self, directory: Path, generation: int, prepare: Callable[[GatewaySettings], Awaitable[PreparedReload]]
    ) -> None:
        self._directory = directory
        self._generation = generation
        self._prepare = prepare
        self._prepared: tuple[SettingsInForce, PreparedReload] | None = None
        self._in_force: SettingsInForce | None = None  # since the latest reload, as it was written

    @property
    def handlers(self) -> Mapping[str, MessageHandler]:
        """The handlers of the messages of a reload, by kind."""
        return {_PREPARE: self._answer_prepare, _COMMIT: self._answer_commit, _FORGET: self._answer_forget}

    async def catch_up(self) -> None:
        """Serve by the settings of a reload that was decided meanwhile, if there was one."""
        written = await asyncio.get_running_loop().run_in_executor(None, read_settings, self._directory)
        self._in_force = written or self._in_force
        if written is not None and written.generation > self._generation:
            prepared = await self._prepare(written.settings)
            await prepared.commit()
            self._generation = written.generation

    def restore(self) -> None:
        """Write the settings of the latest reload again if their file is missing. It blocks."""
        if self._in_force is None:
            return
        made = self._directory / f"settings.{os.getpid()}"
        with suppress(FileExistsError):  # the file is there, or another worker was faster
            made.write_bytes(msgspec.msgpack.encode(self._in_force))
            try:
                os.link(made, _path(self._directory))
            finally:
                made.unlink()

    async def _answer_prepare(self, body: bytes) -> bytes:
        await self._answer_forget(b"")
        asked = msgspec.msgpack.decode(body, type=SettingsInForce)
        try:
            prepared = await self._prepare(asked.settings)
        except ForebayError as error:
            return f"{error}".encode()
        except Exception as error:  # noqa: BLE001 - the gateway serves on, and the next reload may work
            log.exception("settings cannot be prepared, by a bug of the gateway")
            return f"a bug of the gateway: {type(error).__name__}".encode()
        self._prepared = asked, prepared
        return _DONE

    async def _answer_commit(self, _: bytes) -> bytes:
        ready, self._prepared = self._prepared, None
        if ready is not None:
            self._in_force, prepared = ready
            self._generation = self._in_force.generation
            await prepared.commit()
        await self.catch_up()
        return _DONE

    async def _answer_forget(self, _: bytes) -> bytes:
        ready, self._prepared = self._prepared, None
        if ready is not None:
            await ready[1].discard()
        return _DONE
