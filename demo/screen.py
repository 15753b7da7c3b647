"""The demo as people watch it: a live table on a terminal, a line every ten seconds anywhere else."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from math import inf
from types import TracebackType
from typing import Final, Self

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from demo.report import percent
from demo.sample import SIDES, Sample, Side, pace, refused
from demo.settings import ENDLESS, Settings
from demo.side_process import Ending, SideProcess
from forebay.interfaces import WorkerState

COLOURS: Final[Mapping[Side, str]] = {
    Side.CLASSIC: "#d55e00",
    Side.SEMAPHORE: "#009e73",
    Side.FOREBAY: "#56b4e9",
    Side.RESUME: "#56b4e9",
}
NAMES: Final[Mapping[Side, str]] = {
    Side.CLASSIC: "classic",
    Side.SEMAPHORE: "semaphores",
    Side.FOREBAY: "Forebay",
    Side.RESUME: "Forebay",
}
_SOFT: Final = "bright_black"
_BARS: Final = "▁▂▃▄▅▆▇█"
_MANY: Final = 0.1  # share of calls refused from which it is shown in red
_TENFOLD: Final = 10.0  # ratios below it have two decimals
_MUCH: Final = 1000.0  # dollars from which cents are left out
_LINE_INTERVAL: Final = 10.0  # seconds between plain lines
_LABEL_WIDTH: Final = 8  # columns
_SIDE_WIDTH: Final = 36  # columns that a side needs at least


class LiveScreen:
    """A table that is redrawn four times a second, on the terminal's alternate screen."""

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

    def show(self, sides: Sequence[SideProcess]) -> None:
        """Draw the table of the sides so far, of which the last may be running."""
        width = self._live.console.width
        table = board(sides, self._settings, self._provider, resumed=self._resumed, width=width)
        self._live.update(table, refresh=True)


class PlainScreen:
    """A line every ten seconds, and one when a side ends."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._printed: dict[Side, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, cause: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def show(self, sides: Sequence[SideProcess]) -> None:
        """Print a line if it is time."""
        process = sides[-1]
        due = self._printed.get(process.side, 0.0) + _LINE_INTERVAL
        if process.last is None or (process.ending is None and time.monotonic() < due) or due == inf:
            return
        self._printed[process.side] = inf if process.ending else time.monotonic()
        self._console.print(Text(line(process)), soft_wrap=True)


Screen = LiveScreen | PlainScreen


def line(side: SideProcess) -> str:
    """Return one side in one line."""
    now = side.last
    assert now is not None  # noqa: S101 - checked by the caller
    money = f" ${now.usd:.2f}" if now.usd else ""
    load = "" if now.load is None else f", load {now.load:.2f} ({now.limited_by or 'no limit'})"
    return (
        f"{side.side:9} {clock(side.seconds)}  {now.done:,} done ({pace(side.samples):.0f}/min), {now.running:,}"
        f" running, {now.waiting:,} waiting, {now.spilled:,} spilled, {now.failed:,} failed, {now.calls:,} calls"
        f" ({now.calls_429:,} x 429),{money} {percent(now.useless)} wasted so far, {resident(side):.0f} MB{load}:"
        f" {side.ending or now.stage}"
    )


def board(
    sides: Sequence[SideProcess], settings: Settings, provider: str, *, resumed: bool, width: int = 80
) -> RenderableType:
    """Return everything on one page of at least 80 columns and 24 lines: three sides, or two if it is narrow."""
    head = Text.assemble(("Forebay", "bold"), ("  the surge, resumed" if resumed else "  the surge", "bold"))
    tasks = "" if resumed else f"{settings.tasks:,} tasks · "
    what = Text(f"{tasks}{settings.agents} agents on {settings.workers} workers · {provider}", style=_SOFT)
    table = Table(box=box.SIMPLE_HEAD, expand=True, padding=(0, 1), show_edge=False)
    table.add_column("", style=_SOFT, no_wrap=True, width=_LABEL_WIDTH)
    shown = [Side.RESUME] if resumed else _shown_sides(sides[-1].side if sides else SIDES[0], width)
    for side in shown:
        table.add_column(Text(NAMES[side], style=f"bold {COLOURS[side]}"), ratio=1, no_wrap=True)
    by_side = {process.side: process for process in sides}
    columns = [column(by_side.get(side), settings, side) for side in shown]
    for name, *cells in zip(ROWS, *columns, strict=True):
        table.add_row(name, *cells)
    note = Text(_note(sides), style="italic")
    return Group(Padding(Group(head, what), (0, 1)), Text(), table, Text(), Padding(note, (0, 1)))


def _shown_sides(latest: Side, width: int) -> Sequence[Side]:
    """Return as many sides as fit into `width` columns: `latest` and those before it, then those after it."""
    fit = min(len(SIDES), max(2, (width - _LABEL_WIDTH) // _SIDE_WIDTH))
    first = max(0, SIDES.index(latest) + 1 - fit)
    return SIDES[first : first + fit]


ROWS: Final = (
    *("state", "time", "done", "pace", "running", "waiting", "failed"),
    *("calls", "refused", "dollars", "tokens", "memory", "load", "limit", "short of"),
)


def column(process: SideProcess | None, settings: Settings, side: Side) -> list[RenderableType]:
    """Return one side, row by row."""
    if process is None:
        return [Text("not started", style=_SOFT), *[""] * (len(ROWS) - 1)]
    now = process.last or Sample(t=0.0, stage="starting")
    colour = COLOURS[side]
    endless = settings.seconds >= ENDLESS
    return [
        _state(process, now),
        Text(clock(process.seconds)) if endless else _bar(process.seconds, settings.seconds, clock, colour),
        Text.assemble((f"{now.done:,}", f"bold {colour}"), _urgent(now)),
        Text.assemble((f"{pace(process.samples):.0f}", "bold"), " a minute  ", (spark(process.samples), colour)),
        f"{now.running:,} " + ("unfinished" if side is Side.CLASSIC else f"of {settings.agents} agents{_queued(now)}"),
        f"{now.waiting:,} in memory, " + (f"{now.spilled:,} spilled" if side.stores_tasks else "none spilled"),
        _failed(now),
        f"{now.calls:,}  {now.answered:,} answered",
        _refused(process, now),
        _dollars(now),
        f"{now.tokens:,}  {percent(now.useless)} wasted so far" if now.tokens else "",
        _bar(resident(process), settings.memory_mb, lambda mb: f"{mb:.0f} MB", colour),
        "unknown" if now.load is None else _load(now.load, colour),
        _limit(now),
        now.waiting_for or ("nothing" if now.load else ""),
    ]


def _state(side: SideProcess, now: Sample) -> Text:
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


def _limit(now: Sample) -> Text:
    if not now.load:
        return Text()
    return Text(now.limited_by or "nothing")  # Text: ":key:" is not an emoji


def _dollars(now: Sample) -> str:
    """Return the dollars so far, for each task done, and over the cost of the answers that tasks done consist of."""
    if not now.usd:
        return ""
    each = f"  ${now.usd / now.done:.4f}/task" if now.done else ""
    over = now.usd / now.useful_usd if now.useful_usd else 0.0
    least = f"  {over:.{2 * (over < _TENFOLD)}f}x least" if over else ""
    return f"${now.usd:.{2 * (now.usd < _MUCH)}f}{each}{least}"


def _refused(side: SideProcess, now: Sample) -> Text:
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
    """Return the tasks done in each twelfth of the time so far, as a row of small bars."""
    if len(samples) < points:
        return ""
    cuts = [samples[round(i * (len(samples) - 1) / points)] for i in range(points + 1)]
    done = [b.done - a.done for a, b in itertools.pairwise(cuts)]
    most = max(done)
    return "".join(_BARS[round((len(_BARS) - 1) * n / most)] for n in done) if most else ""


def resident(side: SideProcess) -> float:
    """Return its resident megabytes, as last measured."""
    return side.memory[-1][1] if side.memory else 0.0


def clock(seconds: float) -> str:
    """Return seconds as people write them: ``1:40``, ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _note(sides: Sequence[SideProcess]) -> str:
    process = sides[-1] if sides else None
    now = process.last if process else None
    if process is None or now is None:
        return "Starting."
    if process.side is Side.CLASSIC:
        return (
            "It starts each task as it comes. All of them ask one key for an answer, and a run that gets one competes"
            " with thousands for the next. Its tasks are in memory, and are lost with its process."
        )
    if process.side is Side.SEMAPHORE:
        return (
            "Each worker has a semaphore. Fifty agents ask for half as much again as the key grants, so most calls are"
            " refused. Its tasks wait in memory, in the order in which they came, and are lost with its process."
        )
    if process.side is Side.RESUME:
        rate = pace(process.samples, 60.0)
        left = now.spilled + now.inside
        eta = f", {clock(60 * left / rate)} at this pace" if rate else ""
        return f"{left:,} left{eta}. Ctrl-C ends it at any time: nothing is lost, and --resume continues."
    if now.stage == "draining":
        return "Time is nearly up: it starts nothing, lets the agents finish, and puts the rest back into the overflow."
    return (
        "It starts what the agents and the key can take. The rest waits in the overflow, by priority; most of it still"
        " will when time is up, by design."
    )
