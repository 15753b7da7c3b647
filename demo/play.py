"""The demo from beginning to end: the classic supervisor, then Forebay, then what came of it."""

from __future__ import annotations

import fcntl
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import msgspec
from rich.console import Console

from demo.child import Child, Ending
from demo.kept import kept
from demo.provider import RPM, Provider, opened
from demo.report import Played, report
from demo.sample import Kind, Orders
from demo.screen import LiveScreen, PlainScreen, Screen
from demo.settings import Settings
from demo.table import summary
from forebay.errors import ForebayError

INTERRUPTED: Final = 130  # the exit status of what Ctrl-C ended
_HANG_UP: Final = 0.3  # seconds in which the plant notices that its clients have gone


class DemoFailed(ForebayError, RuntimeError):
    """The {side} side of the demo ended by itself (status {status}), which it must not. It wrote, in {log}: {tail}."""

    side: str
    status: int | None
    log: str
    tail: str


class DemoBusy(ForebayError, RuntimeError):
    """Another demo is running in {folder}: wait for it, or choose another folder with --out."""

    folder: str


class NothingKept(ForebayError, LookupError):
    """There is nothing to go on with in {folder}: run `make demo` first."""

    folder: str


def run(settings: Settings, console: Console, *, real: tuple[Provider, str] | None = None) -> int:
    """Play both sides, write ``report.json`` and ``surge.png``, and say what came of it. Returns the exit status.

    Args:
        settings: the same for both.
        console: where it is shown.
        real: a provider to call instead of the plant, and its key.

    Raises:
        DemoFailed, DemoBusy: as each says.
    """
    with _folder(settings), _terminable():
        _clear(settings, console)
        with _screen(settings, console, real) as screen:
            stage = _Stage(settings, screen, real)
            classic = stage.play(Kind.CLASSIC)
            forebay = None if classic.ending is Ending.STOPPED else stage.play(Kind.FOREBAY)
        if forebay is None or forebay.ending is Ending.STOPPED:
            _say_kept(settings, console)
            return INTERRUPTED
        _conclude(classic, forebay, settings, console, _name(settings, real))
        console.print("Most of the surge is not done, by design: nobody does more than the key grants.", soft_wrap=True)
        _say_kept(settings, console)
    return 0


def resume(settings: Settings, console: Console, *, real: tuple[Provider, str] | None = None) -> int:
    """Go on with what is on disk, until all is done, time is up, or Ctrl-C. Returns the exit status.

    Args:
        settings: of them, what concerns Forebay.
        console: where it is shown.
        real: a provider to call instead of the plant, and its key.

    Raises:
        NothingKept: no demo has been run there.
        DemoFailed, DemoBusy: as each says.
    """
    if not settings.ledger.exists():
        raise NothingKept(folder=settings.folder)
    status = 0
    with _folder(settings), _terminable():
        if kept(settings.ledger).to_do:
            with _screen(settings, console, real, resumed=True) as screen:
                played = _Stage(settings, screen, real).play(Kind.RESUME)
            status = INTERRUPTED if played.ending is Ending.STOPPED else 0
        _say_kept(settings, console)
    return status


@dataclass(frozen=True, slots=True)
class _Stage:
    """Where the sides are played, one after the other."""

    settings: Settings
    screen: Screen
    real: tuple[Provider, str] | None
    sides: list[Child] = field(default_factory=list)

    def play(self, kind: Kind) -> Played:
        """One side from its beginning to its end, on a fresh plant."""
        log = self.settings.file(f"{kind}.log")
        real, key = self.real or (None, "plant")
        with opened(self.settings, real) as (provider, plant):
            orders = Orders(kind=kind, settings=self.settings, provider=provider)
            with Child(orders, key=key, log=log) as child:
                self.sides.append(child)
                try:
                    child.follow(self._show)
                except KeyboardInterrupt:
                    child.stop(Ending.STOPPED)
                    child.follow(self._show)
            if child.ending is None or child.ending is Ending.CRASHED:
                raise DemoFailed(side=kind.value, status=child.status, log=str(log), tail=child.log_tail() or "(none)")
            time.sleep(_HANG_UP)
            return Played(
                samples=tuple(child.samples),
                latencies=tuple(child.latencies),
                memory=tuple(child.memory),
                peak_rss_mb=child.peak_rss_mb,
                ending=child.ending,
                ended_at=child.seconds,
                kept=None if kind is Kind.CLASSIC else kept(self.settings.ledger),
                # Ctrl-C in a terminal has ended the plant too
                plant=None if plant is None or child.ending is Ending.STOPPED else plant.statistics(),
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
    """The demo's folder, for us alone."""
    Path(settings.folder).mkdir(parents=True, exist_ok=True)
    with settings.file(".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise DemoBusy(folder=settings.folder) from None
        yield


@contextmanager
def _terminable() -> Iterator[None]:
    """A polite kill ends it as Ctrl-C does: nothing is lost."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _clear(settings: Settings, console: Console) -> None:
    """Drop what the last demo left, and say so."""
    with suppress(Exception):  # what cannot be read goes all the same
        if left := kept(settings.ledger).to_do:
            console.print(f"The {left:,} tasks that the last demo left on disk are dropped.")
    for name in ("spill.db", "spill.db-wal", "spill.db-shm", "report.json", "surge.png"):
        settings.file(name).unlink(missing_ok=True)


def _conclude(classic: Played, forebay: Played, settings: Settings, console: Console, provider: str) -> None:
    """Write the report and the picture, and print the table."""
    found = report(classic, forebay, settings, provider)
    figures, picture = settings.file("report.json"), settings.file("surge.png")
    figures.write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    from demo.picture import draw  # noqa: PLC0415 - it takes a second and 50 MB, and is only needed here

    draw(classic, forebay, found, settings, picture)
    console.print(summary(found))
    console.print(f"The figures are in {figures}, the curves in {picture}.", soft_wrap=True)


def _say_kept(settings: Settings, console: Console) -> None:
    """What is left on disk, and how to go on with it."""
    left = kept(settings.ledger)
    if left.to_do:
        out = "" if settings.folder == Settings().folder else f" --out {settings.folder}"
        console.print(
            f'{left.to_do:,} tasks are kept in {settings.ledger}. Go on with them: make demo ARGS="--resume{out}"',
            soft_wrap=True,
        )
    elif left.total:
        failed = f", {left.failed:,} failed" if left.failed else ""
        console.print(f"Nothing is left to do: {left.done:,} tasks are done{failed}.")
