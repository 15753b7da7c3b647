"""The demo from beginning to end: each side in turn, then the report and the picture."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from demo.provider import RPM, Provider, open_provider
from demo.report import SideRun, report
from demo.sample import SIDES, Instructions, Side
from demo.screen import LiveScreen, PlainScreen, Screen
from demo.settings import Settings
from demo.side_process import Ending, SideProcess
from demo.stored_tasks import count_overflow, count_stored_tasks
from demo.table import summary
from forebay.errors import ForebayError

INTERRUPTED: Final = 130  # exit status after Ctrl-C
_HANG_UP: Final = 0.3  # seconds for the simulated provider to notice that its clients have gone


class DemoFailed(ForebayError, RuntimeError):
    """The {side} side of the demo ended by itself with status {status}. Its log, {log}, ends with: {tail}."""

    side: str
    status: int | None
    log: str
    tail: str


class DemoBusy(ForebayError, RuntimeError):
    """Another demo is running in {folder}: wait for it, or choose another folder with --out."""

    folder: str


class NothingStored(ForebayError, LookupError):
    """There are no tasks to resume in {where}: run `make demo` first."""

    where: str


class OverflowInUse(ForebayError, RuntimeError):
    """The store that OVERFLOW names holds {records:,} records already, and the demo needs an empty one.

    Resume them with `make demo OVERFLOW=... ARGS=--resume`, delete them with `forebay overflow purge`, or give the demo
    a store of its own, such as another ?name= on the same server.
    """

    records: int


def run(settings: Settings, console: Console, *, real: tuple[Provider, str] | None = None) -> int:
    """Run all sides, write ``report.json`` and ``surge.png``, print the table, and return the exit status.

    Args:
        settings: the same for all sides.
        console: shows it.
        real: a provider to call instead of the simulated one, and its key.

    Raises:
        DemoFailed, DemoBusy, OverflowInUse: see each.
        StoreUnavailable: the store that OVERFLOW names cannot be reached.
    """
    with _folder(settings), _terminable():
        _clear(settings, console)
        with _screen(settings, console, real) as screen:
            runner = _Runner(settings, screen, real)
            runs: dict[Side, SideRun] = {}
            for side in SIDES:
                runs[side] = runner.run(side)
                if runs[side].ending is Ending.STOPPED:
                    break
        if runs[side].ending is Ending.STOPPED:
            _print_stored(settings, console)
            return INTERRUPTED
        _conclude(runs, settings, console, _name(settings, real))
        if (stored := runs[Side.FOREBAY].stored) and stored.to_do:
            console.print("Not all tasks are done, by design: no side can do more than the key grants.", soft_wrap=True)
        _print_stored(settings, console)
    return 0


def resume(settings: Settings, console: Console, *, real: tuple[Provider, str] | None = None) -> int:
    """Run the tasks in the overflow until all are done, time is up, or Ctrl-C, and return the exit status.

    Args:
        settings: those that concern Forebay.
        console: shows it.
        real: a provider to call instead of the simulated one, and its key.

    Raises:
        NothingStored: no demo has been run there.
        DemoFailed, DemoBusy: see each.
    """
    if not (settings.own_overflow or settings.store_path.exists()):
        raise NothingStored(where=settings.folder)
    status = 0
    with _folder(settings), _terminable():
        left = count_overflow(settings.overflow)
        if settings.own_overflow and not left.total:
            raise NothingStored(where=settings.overflow_name)
        if left.to_do:
            with _screen(settings, console, real, resumed=True) as screen:
                resumed = _Runner(settings, screen, real).run(Side.RESUME)
            status = INTERRUPTED if resumed.ending is Ending.STOPPED else 0
        _print_stored(settings, console)
    return status


@dataclass(frozen=True, slots=True)
class _Runner:
    """A runner of the sides, one after the other."""

    settings: Settings
    screen: Screen
    real: tuple[Provider, str] | None
    sides: list[SideProcess] = field(default_factory=list)

    def run(self, side: Side) -> SideRun:
        """Run one side to its end, on a new provider."""
        log = self.settings.file(f"{side}.log")
        real, key = self.real or (None, "simulated")
        with open_provider(self.settings, real) as (provider, process):
            instructions = Instructions(side=side, settings=self.settings, provider=provider)
            with SideProcess(instructions, key=key, log=log) as child:
                self.sides.append(child)
                try:
                    child.follow(self._show)
                except KeyboardInterrupt:
                    child.stop(Ending.STOPPED)
                    child.follow(self._show)
            if child.ending is None or child.ending is Ending.CRASHED:
                raise DemoFailed(side=side.value, status=child.status, log=str(log), tail=child.log_tail() or "(none)")
            time.sleep(_HANG_UP)
            return SideRun(
                samples=tuple(child.samples),
                latencies=tuple(child.latencies),
                memory=tuple(child.memory),
                peak_rss_mb=child.peak_rss_mb,
                ending=child.ending,
                ended_at=child.seconds,
                stored=count_overflow(self.settings.overflow) if side.stores_tasks else None,
                # Ctrl-C in a terminal has ended the simulated provider too
                bill=None if process is None or child.ending is Ending.STOPPED else process.statistics(),
            )

    def _show(self) -> None:
        self.screen.show(self.sides)


def _screen(
    settings: Settings, console: Console, real: tuple[Provider, str] | None, *, resumed: bool = False
) -> Screen:
    if not console.is_terminal:
        return PlainScreen(console)
    return LiveScreen(console, settings, _name(settings, real), resumed=resumed)


def _name(settings: Settings, real: tuple[Provider, str] | None) -> str:
    if real is not None:
        return f"{real[0].model} at {urlsplit(real[0].url).hostname}"  # a URL may hold a password
    return f"one simulated key, {round(RPM * settings.speed):,} calls/min"


@contextmanager
def _folder(settings: Settings) -> Iterator[None]:
    """Create and lock the demo's folder."""
    Path(settings.folder).mkdir(parents=True, exist_ok=True)
    with settings.file(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DemoBusy(folder=settings.folder) from None
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """Treat SIGTERM as Ctrl-C, so that nothing is lost."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _clear(settings: Settings, console: Console) -> None:
    """Delete what the last demo left, and print how much that was; a store of the user's own must be empty."""
    if settings.own_overflow and (records := count_overflow(settings.overflow).total):
        raise OverflowInUse(records=records)
    with suppress(Exception):  # an unreadable file is deleted too
        if left := count_stored_tasks(settings.store_path).to_do:
            console.print(f"The {left:,} tasks that the last demo left on disk are dropped.")
    for name in ("spill.db", "spill.db-wal", "spill.db-shm", "report.json", "surge.png"):
        settings.file(name).unlink(missing_ok=True)


def _conclude(runs: Mapping[Side, SideRun], settings: Settings, console: Console, provider: str) -> None:
    """Write the report and the picture, and print the table."""
    found = report(runs, settings, provider)
    figures, picture = settings.file("report.json"), settings.file("surge.png")
    figures.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    from demo.picture import draw  # noqa: PLC0415 - matplotlib takes a second and 50 MB

    draw(runs, found, settings, picture)
    console.print(summary(found))
    console.print(f"The figures are in {figures}, the curves in {picture}.", soft_wrap=True)


def _print_stored(settings: Settings, console: Console) -> None:
    """Print how many tasks are in the overflow, and how to run them."""
    left = count_overflow(settings.overflow)
    if left.to_do:
        out = "" if settings.folder == Settings().folder else f" --out {settings.folder}"
        overflow = " OVERFLOW=..." if settings.own_overflow else ""
        console.print(
            f"{left.to_do:,} tasks are kept in {settings.overflow_name}."
            f' Run them with: make demo{overflow} ARGS="--resume{out}"',
            soft_wrap=True,
        )
    elif left.total:
        failed = f", {left.failed:,} failed" if left.failed else ""
        console.print(f"Nothing is left to do: {left.done:,} tasks are done{failed}.")
