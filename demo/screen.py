"""The demo as one watches it: a live table on a terminal, a line now and then anywhere else."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from math import inf
from types import TracebackType
from typing import Final, Protocol, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from demo.child import Child, Ending
from demo.report import percent
from demo.sample import Kind, Sample, pace, refused
from demo.settings import ENDLESS, Settings
from forebay.interfaces import WorkerState

CLASSIC: Final = "#d55e00"
FOREBAY: Final = "#56b4e9"
_SOFT: Final = "bright_black"
_BARS: Final = "▁▂▃▄▅▆▇█"
_MANY: Final = 0.1  # of the calls refused: worth a colour
_TENFOLD: Final = 10.0  # below it a ratio is told with two decimals
_MUCH: Final = 1000.0  # dollars from which on cents are not told
_SAY: Final = 10.0  # seconds between plain lines


class Screen(Protocol):
    """Where the demo is shown."""

    def __enter__(self) -> Self:
        """Begin."""
        ...

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the terminal as it was."""

    def show(self, sides: Sequence[Child]) -> None:
        """Show the sides so far; the last one may be running."""


class LiveScreen:
    """A table that is drawn anew four times a second, on the terminal's other screen."""

    def __init__(self, console: Console, settings: Settings, provider: str, *, resumed: bool) -> None:
        self._settings, self._provider, self._resumed = settings, provider, resumed
        self._live = Live(console=console, screen=True, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def show(self, sides: Sequence[Child]) -> None:
        """Draw it."""
        self._live.update(board(sides, self._settings, self._provider, resumed=self._resumed), refresh=True)


class PlainScreen:
    """A line every ten seconds, and one for each end."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._said: dict[Kind, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, sides: Sequence[Child]) -> None:
        """Say it, if it is time."""
        side = sides[-1]
        due = self._said.get(side.kind, 0.0) + _SAY
        if side.last is None or (side.ending is None and time.monotonic() < due) or due == inf:
            return
        self._said[side.kind] = inf if side.ending else time.monotonic()
        self._console.print(Text(line(side)), soft_wrap=True)


def line(side: Child) -> str:
    """One side in one line."""
    now = side.last
    assert now is not None  # noqa: S101 - nobody asks before
    money = f" ${now.usd:.2f}" if now.usd else ""
    load = "" if now.load is None else f", load {now.load:.2f} ({now.binding or 'nothing binds'})"
    return (
        f"{side.kind:7} {clock(side.seconds)}  {now.done:,} done ({pace(side.samples):.0f}/min), {now.running:,}"
        f" running, {now.waiting:,} waiting, {now.spilled:,} on disk, {now.failed:,} failed, {now.calls:,} calls"
        f" ({now.calls_429:,} x 429),{money} {percent(now.useless)} of no use yet, {resident(side):.0f} MB{load}:"
        f" {side.ending or now.stage}"
    )


def board(sides: Sequence[Child], settings: Settings, provider: str, *, resumed: bool) -> RenderableType:
    """Everything on one page of 80 columns and 24 lines."""
    head = Text.assemble(("Forebay", "bold"), ("  the surge, resumed" if resumed else "  the surge", "bold"))
    tasks = "" if resumed else f"{settings.tasks:,} tasks · "
    what = Text(f"{tasks}{settings.agents} agents on {settings.workers} workers · {provider}", style=_SOFT)
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    table.add_column("", style=_SOFT, no_wrap=True, width=8)
    kinds = [Kind.RESUME] if resumed else [Kind.CLASSIC, Kind.FOREBAY]
    for kind in kinds:
        classic = kind is Kind.CLASSIC
        title = "classic supervisor" if classic else "Forebay"
        table.add_column(Text(title, style=f"bold {CLASSIC if classic else FOREBAY}"), ratio=1, no_wrap=True)
    by_kind = {side.kind: side for side in sides}
    columns = [column(by_kind.get(kind), settings, kind) for kind in kinds]
    for name, *cells in zip(ROWS, *columns, strict=True):
        table.add_row(name, *cells)
    note = Text(_note(sides), style="italic")
    return Group(Padding(Group(head, what), (0, 1)), Text(), table, Text(), Padding(note, (0, 1)))


ROWS: Final = (
    *("state", "time", "done", "pace", "running", "waiting", "failed"),
    *("calls", "refused", "dollars", "tokens", "memory", "load", "binding", "short of"),
)


def column(side: Child | None, settings: Settings, kind: Kind) -> list[RenderableType]:
    """One side, row by row."""
    if side is None:
        return [Text("waits for its turn", style=_SOFT), *[""] * (len(ROWS) - 1)]
    now = side.last or Sample(t=0.0, stage="starting")
    colour = CLASSIC if kind is Kind.CLASSIC else FOREBAY
    classic = kind is Kind.CLASSIC
    endless = settings.seconds >= ENDLESS
    return [
        _state(side, now),
        Text(clock(side.seconds)) if endless else _bar(side.seconds, settings.seconds, clock, colour),
        Text.assemble((f"{now.done:,}", f"bold {colour}"), _urgent(now)),
        Text.assemble((f"{pace(side.samples):.0f}", "bold"), " a minute  ", (spark(side.samples), colour)),
        f"{now.running:,} " + ("begun and unfinished" if classic else f"of {settings.agents} agents{_queued(now)}"),
        f"{now.waiting:,} in memory, " + ("none on disk" if classic else f"{now.spilled:,} on disk"),
        _failed(now),
        f"{now.calls:,}  {now.answered:,} answered",
        _refused(side, now),
        _dollars(now),
        f"{now.tokens:,}  {percent(now.useless)} of no use yet" if now.tokens else "",
        _bar(resident(side), settings.memory_mb, lambda mb: f"{mb:.0f} MB", colour),
        "it cannot tell" if now.load is None else _load(now.load, colour),
        _binding(now),
        now.scarce or ("nothing" if now.load else ""),
    ]


def _state(side: Child, now: Sample) -> Text:
    if side.ending is None:
        return Text(now.stage, style="bold")
    bad = side.ending in (Ending.OUT_OF_MEMORY, Ending.CRASHED)
    return Text(f"{side.ending} after {clock(side.seconds)}", style="bold red" if bad else "bold")


def _urgent(now: Sample) -> str:
    return f"  {now.done_by[0]:,} critical {now.done_by[1]:,} high" if sum(now.done_by) else ""


def _queued(now: Sample) -> str:
    return f", {now.queued:,} calls wait" if now.queued else ""


def _failed(now: Sample) -> str:
    workers = now.workers.get(WorkerState.FAILED.value, 0)
    return f"{now.failed:,}" + (f"  {workers:,} worker{'s' * (workers > 1)} FAILED" if workers else "")


def _binding(now: Sample) -> Text:
    if not now.load:
        return Text()
    return Text(now.binding or "nothing")  # Text: ":key:" is no picture


def _dollars(now: Sample) -> str:
    """All so far; for each task done; and that over what its own answers cost."""
    if not now.usd:
        return ""
    each = f"  ${now.usd / now.done:.4f}/task" if now.done else ""
    over = now.usd / now.useful_usd if now.useful_usd else 0.0
    least = f"  {over:.{2 * (over < _TENFOLD)}f}x least" if over else ""
    return f"${now.usd:.{2 * (now.usd < _MUCH)}f}{each}{least}"


def _refused(side: Child, now: Sample) -> Text:
    share = refused(side.samples)
    lately = f"  {percent(share)} lately" if now.calls_429 else ""
    return Text(f"{now.calls_429:,} with 429{lately}", style="red" if share > _MANY else "")


def _load(load: float, colour: str) -> Text:
    return Text.assemble((_blocks(load, 10), colour), f" {load:.2f}")


def _bar(value: float, limit: float, show: Callable[[float], str], colour: str) -> Text:
    return Text.assemble((_blocks(value / limit, 10), colour), f" {show(value)} of {show(limit)}")


def _blocks(share: float, width: int) -> str:
    full = round(min(1.0, max(0.0, share)) * width)
    return "━" * full + "╌" * (width - full)


def spark(samples: Sequence[Sample], points: int = 12) -> str:
    """Tasks done in each twelfth of the time so far, as a row of little bars."""
    if len(samples) < points:
        return ""
    cuts = [samples[round(i * (len(samples) - 1) / points)] for i in range(points + 1)]
    done = [b.done - a.done for a, b in itertools.pairwise(cuts)]
    most = max(done)
    return "".join(_BARS[round((len(_BARS) - 1) * n / most)] for n in done) if most else ""


def resident(side: Child) -> float:
    """Its resident megabytes, as last measured."""
    return side.memory[-1][1] if side.memory else 0.0


def clock(seconds: float) -> str:
    """Seconds as one reads them: ``1:40``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _note(sides: Sequence[Child]) -> str:
    side = sides[-1] if sides else None
    now = side.last if side else None
    if side is None or now is None:
        return "Starting."
    if side.kind is Kind.CLASSIC:
        return (
            "It begins each task as it comes. All of them ask one key for an answer, and whoever gets one is one of"
            " thousands that ask for the next. What it holds is in memory, and ends with its process."
        )
    if side.kind is Kind.RESUME:
        rate = pace(side.samples, 60.0)
        left = now.spilled + now.inside
        eta = f", {clock(60 * left / rate)} at this pace" if rate else ""
        return f"{left:,} left{eta}. Ctrl-C ends it at any time: nothing is lost, and --resume goes on again."
    if now.stage == "draining":
        return "Time is nearly up: it starts nothing new, lets the agents finish, and puts the rest back on disk."
    return (
        "It begins what the agents and the key can bear; the rest waits on disk, the most urgent first, and most of it"
        " still will when time is up, by design."
    )
