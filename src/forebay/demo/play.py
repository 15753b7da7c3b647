"""The demo from beginning to end: the classic supervisor, then Forebay, then what came of it."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import msgspec
from rich.console import Console

from forebay.demo.child import Child, Ending
from forebay.demo.kept import Kept, kept
from forebay.demo.provider import RPM, Provider, billed, opened
from forebay.demo.report import Played, Report, report
from forebay.demo.sample import Kind, Orders
from forebay.demo.screen import LiveScreen, PlainScreen, Screen
from forebay.demo.settings import Settings
from forebay.demo.table import summary
from forebay.errors import ForebayError

INTERRUPTED: Final = 130  # the exit status of what Ctrl-C ended
_HANG_UP: Final = 0.3  # seconds in which the plant notices that its clients have gone


class DemoFailed(ForebayError, RuntimeError):
    """The {side} side of the demo ended by itself, which it must not. Its last words in {log}: {tail}."""

    side: str
    log: str
    tail: str


class DemoBusy(ForebayError, RuntimeError):
    """Another demo is running in {folder}: wait for it, or choose another folder with --out."""

    folder: str


class NothingKept(ForebayError, LookupError):
    """There is nothing to go on with in {folder}: run `forebay demo` first."""

    folder: str


def run(settings: Settings, console: Console, *, real: tuple[Provider, str] | None = None) -> int:
    """Play both sides, write ``report.json`` and ``surge.png``, and say what came of it. Returns the exit status.

    Raises:
        DemoFailed, DemoBusy: as each says.
    """
    provider, key = real or (None, "plant")
    with _folder(settings):
        dropped = _clear(settings)
        if dropped:
            console.print(f"(The {dropped:,} tasks that the last demo left on disk are dropped.)")
        sides: list[Child] = []
        played: list[Played] = []
        with _screen(settings, console, provider) as screen:
            for kind in (Kind.CLASSIC, Kind.FOREBAY):
                played.append(_play(kind, settings, provider, key, screen, sides))
                if played[-1].ending is Ending.STOPPED:
                    break
        if played[-1].ending is Ending.STOPPED:
            _say_kept(settings, console)
            return INTERRUPTED
        found = report(*played, settings, provider.url if provider else "plant")
        _write(found, played, settings)
        console.print(summary(found))
        _say_files(settings, console)
        _say_kept(settings, console)
    return 0


def resume(settings: Settings, console: Console, *, real: tuple[Provider, str] | None = None) -> int:
    """Go on with what is on disk, until all is done, time is up, or Ctrl-C. Returns the exit status.

    Raises:
        NothingKept: no demo has been run there.
        DemoFailed, DemoBusy: as each says.
    """
    provider, key = real or (None, "plant")
    if not settings.ledger.exists():
        raise NothingKept(folder=settings.folder)
    with _folder(settings):
        if not kept(settings.ledger).to_do:
            _say_kept(settings, console)
            return 0
        with _screen(settings, console, provider, resumed=True) as screen:
            _play(Kind.RESUME, settings, provider, key, screen, [])
        _say_kept(settings, console)
    return 0


def _play(
    kind: Kind, settings: Settings, real: Provider | None, key: str, screen: Screen, sides: list[Child]
) -> Played:
    """One side from its beginning to its end."""
    with opened(settings, real) as (provider, plant):
        orders = Orders(kind=kind, settings=settings, provider=provider)
        with Child(orders, key=key, log=settings.file(f"{kind}.log")) as child:
            sides.append(child)
            try:
                child.follow(lambda: screen.show(sides))
            except KeyboardInterrupt:
                child.stop(Ending.STOPPED)
                child.follow(lambda: screen.show(sides))
        if child.ending is Ending.CRASHED or child.ending is None:
            raise DemoFailed(side=kind.value, log=settings.file(f"{kind}.log"), tail=child.log_tail() or "(empty)")
        time.sleep(_HANG_UP)
        return Played(
            samples=tuple(child.samples),
            latencies=tuple(child.latencies),
            memory=tuple(child.memory),
            peak_rss_mb=child.peak_rss_mb,
            ending=child.ending,
            ended_at=child.seconds,
            kept=None if kind is Kind.CLASSIC else kept(settings.ledger),
            plant=billed(plant),
        )


def _screen(settings: Settings, console: Console, real: Provider | None, *, resumed: bool = False) -> Screen:
    if not console.is_terminal:
        return PlainScreen(console)
    name = real.url if real else f"{round(RPM * settings.speed):,} calls a minute"
    return LiveScreen(console, settings, name, resumed=resumed)


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


def _clear(settings: Settings) -> int:
    """Drop what the last demo left; returns how many tasks that were."""
    left = 0
    with suppress(Exception):  # whatever it is, it goes
        left = kept(settings.ledger).to_do
    for name in ("spill.db", "spill.db-wal", "spill.db-shm", "report.json", "surge.png"):
        settings.file(name).unlink(missing_ok=True)
    return left


def _write(found: Report, played: list[Played], settings: Settings) -> None:
    settings.file("report.json").write_bytes(msgspec.json.format(msgspec.json.encode(found), indent=2) + b"\n")
    from forebay.demo.picture import draw  # noqa: PLC0415 - matplotlib takes a second and 50 MB, now is early enough

    draw(played[0], played[1], found, settings, settings.file("surge.png"))


def _say_files(settings: Settings, console: Console) -> None:
    console.print(f"\n{settings.file('report.json')} has the figures, {settings.file('surge.png')} the curves.")


def _say_kept(settings: Settings, console: Console) -> None:
    left = kept(settings.ledger) if settings.ledger.exists() else Kept()
    if left.to_do:
        console.print(
            f"{left.to_do:,} tasks are kept in {settings.ledger}, by design: no key could have served them all in this"
            " time. `forebay demo --resume` goes on with them."
        )
    elif left.total:
        failed = f", {left.failed:,} failed" if left.failed else ""
        console.print(f"Nothing is left to do: {left.done:,} tasks are done{failed}.")
