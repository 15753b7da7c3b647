"""The surge as a picture: six curves over time, both sides in each panel."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from demo.child import Ending
from demo.provider import RPM
from demo.report import Played, Report, bound, percent
from demo.sample import Sample, pace, refused
from demo.settings import Settings
from demo.workload import STEPS

# Okabe and Ito's colours, which the colour-blind tell apart; light and dark enough to be told apart in grey.
CLASSIC: Final = "#D55E00"
FOREBAY: Final = "#0072B2"
DISK: Final = "#56B4E9"
_INK: Final = "#222222"
_SOFT: Final = "#6b6b6b"
_STYLE: Final[dict[Any, Any]] = {
    "font.size": 10.5,
    "axes.edgecolor": _SOFT,
    "axes.labelcolor": _SOFT,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 12,
    "axes.titleweight": "bold",
    "axes.grid": True,
    "axes.titlepad": 9,
    "grid.color": "#e6e6e6",
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}

_SMALL: Final[dict[str, Any]] = {"textcoords": "offset points", "color": _SOFT, "fontsize": 9.5}
_NAME: Final[dict[str, Any]] = {"fontweight": "bold", "fontsize": 10.5}

_ROOM: Final = 88.0  # per cent; above it nothing can be written
_WORDS: Final = 0.36  # of the width: words at the right end reach so far back
_BESIDE: Final = 0.2  # of the width: words in the middle reach so far to either side

Style = str | tuple[int, tuple[int, ...]]
Points = tuple[list[float], list[float]]


def draw(classic: Played, forebay: Played, found: Report, settings: Settings, path: Path) -> None:
    """Draw it into a PNG file."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(16, 8), dpi=110)
        figure.subplots_adjust(left=0.045, right=0.98, top=0.84, bottom=0.1, hspace=0.3, wspace=0.18)
        figure.text(0.018, 0.945, _headline(found), fontsize=17, fontweight="bold")
        figure.text(0.018, 0.907, _below(found), fontsize=12, color=_SOFT)
        figure.text(0.018, 0.022, _footer(found), fontsize=9.5, color=_SOFT)
        (queue, goodput, refusals), (memory, spend, tokens) = figure.subplots(2, 3, sharex=True)
        _queue(queue, classic, forebay)
        granted = None if classic.plant is None else RPM * settings.speed / len(STEPS)
        _goodput(goodput, classic, forebay, granted, found)
        _memory(memory, classic, forebay, settings.memory_mb)
        _spend(spend, classic, forebay, found)
        _refusals(refusals, classic, forebay, found)
        _tokens(tokens, classic, forebay, found)
        for axes in (memory, spend, tokens):
            axes.set_xlabel("seconds since the surge")
        for axes in (queue, goodput, refusals, memory, spend, tokens):
            axes.set_xlim(0, max(settings.seconds, classic.ended_at, forebay.ended_at))
            axes.tick_params(length=0, which="both")
        figure.savefig(path)


def _headline(found: Report) -> str:
    return f"{found.tasks:,} tasks at once, {found.workers * found.slots} agents, one rate-limited key"


def _below(found: Report) -> str:
    a, b = found.classic, found.forebay
    ours = f"Forebay did {b.done:,} tasks in {found.seconds:g} s and keeps {b.spilled:,} on disk"
    ours += f"; what bound was {bound(b)}." if b.binding else "."
    if a.out_of_memory:
        return f"{ours} The classic supervisor did {a.done:,} and was out of memory after {a.ended_at_s:.0f} s."
    return f"{ours} The classic supervisor did {a.done:,} and lost {a.lost:,}."


def _footer(found: Report) -> str:
    return (
        f"Provider: {found.provider}. Seed {found.seed}. One side after the other, each with {found.seconds:g} s and"
        f" {found.memory_limit_mb} MB. Python {found.python}."
    )


def _queue(axes: Axes, classic: Played, forebay: Played) -> None:
    axes.set_title("Queue: tasks accepted and not done")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    memory, disk, inside = (
        _points(classic, lambda s: s.inside),
        _points(forebay, lambda s: s.spilled),
        _points(forebay, lambda s: s.inside),
    )
    _line(axes, memory, CLASSIC, ending=classic.ending)
    _line(axes, disk, DISK, style=(0, (4, 2)))
    _line(axes, inside, FOREBAY)
    _label(axes, memory, "classic, in memory: {:,.0f}", CLASSIC, at=0.6, above=True)
    _label(axes, disk, "Forebay, on disk: {:,.0f}", DISK, at=0.6, above=False)
    _label(axes, inside, "Forebay, in memory: {:,.0f}", FOREBAY, at=0.6, above=True)
    axes.set_ylim(1, max(10, 4 * max([*memory[1], *disk[1], *inside[1], 1])))


def _goodput(axes: Axes, classic: Played, forebay: Played, granted: float | None, found: Report) -> None:
    axes.set_title("Goodput: tasks done a minute")
    if granted:
        axes.axhline(granted, color=_SOFT, linewidth=1.2, linestyle=":")
        axes.annotate(f"granted: {granted:.0f}", (0, granted), (5, 5), **_SMALL)
    ours, theirs = _over_time(forebay, pace), _over_time(classic, pace)
    _line(axes, theirs, CLASSIC, ending=classic.ending)
    _line(axes, ours, FOREBAY)
    _label(axes, ours, f"Forebay: {found.forebay.done_per_minute:g} over all", FOREBAY, at=0.6, above=False, gap=12)
    _label(axes, theirs, f"classic: {found.classic.done_per_minute:g} over all", CLASSIC, at=0.6, above=True, gap=12)
    axes.set_ylim(0, 1.2 * max([granted or 1.0, *ours[1], *theirs[1]]))


def _memory(axes: Axes, classic: Played, forebay: Played, limit: int) -> None:
    axes.set_title("Memory of the process, MB")
    axes.axhline(limit, color=_INK, linewidth=1.4, linestyle="--")
    words = f"limit: {limit}, then it is killed"
    axes.annotate(words, (1, limit), (-5, 5), xycoords=("axes fraction", "data"), ha="right", **_SMALL)
    for played, colour, name in ((classic, CLASSIC, "classic"), (forebay, FOREBAY, "Forebay")):
        points = [t for t, _ in played.memory], [mb for _, mb in played.memory]
        _line(axes, points, colour, ending=played.ending)
        _label(
            axes,
            points,
            f"{name}: {played.peak_rss_mb:.0f} at its peak",
            colour,
            at=0.6,
            above=played is classic,
            gap=9,
        )
    axes.set_ylim(0, 1.15 * limit)


def _refusals(axes: Axes, classic: Played, forebay: Played, found: Report) -> None:
    axes.set_title("Refusals: calls answered 429, lately")
    for played, told in ((classic, found.classic), (forebay, found.forebay)):
        points = _over_time(played, lambda samples: 100 * refused(samples))
        none = ", none for its load" if told.calls_429 and told.calls_429 == told.stray_429 else ""
        _share(axes, played, points, f"{percent(told.refused_share)} over all{none}", ours=played is forebay)


def _tokens(axes: Axes, classic: Played, forebay: Played, found: Report) -> None:
    axes.set_title("Waste: tokens so far that are in no task done")
    for played, told in ((classic, found.classic), (forebay, found.forebay)):
        points = _over_time(played, lambda samples: 100 * samples[-1].useless if samples[-1].tokens else math.nan)
        _share(axes, played, points, f"{percent(told.wasted_share)} at the end", ours=played is forebay)


def _share(axes: Axes, played: Played, points: Points, words: str, *, ours: bool) -> None:
    """One side's share of a hundred, its name above it if there is room."""
    name, colour = ("Forebay", FOREBAY) if ours else ("classic", CLASSIC)
    axes.set_ylim(0, 105)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    _line(axes, points, colour, ending=played.ending)
    above = max((y for x, y in zip(*points, strict=True) if x >= _WORDS * points[0][-1]), default=0.0) < _ROOM
    _end(axes, points, f"{name}: {words}", colour, above=above)


def _spend(axes: Axes, classic: Played, forebay: Played, found: Report) -> None:
    least = found.usd_least
    axes.set_title("Spend: dollars so far, per task done so far")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"${value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    ours, theirs = _each(forebay), _each(classic)
    values = [*ours[1], *theirs[1], *([least] if least else [])]
    if not values:
        axes.set_title("Spend: no price is known, or nothing was done")
        return
    if least:
        axes.axhline(least, color=_SOFT, linewidth=1.2, linestyle=":")
        axes.annotate(f"the least that a task needs: ${least:.4f}", (0, least), (5, -14), **_SMALL)
    _line(axes, theirs, CLASSIC, ending=classic.ending)
    _line(axes, ours, FOREBAY)
    for points, name, told, colour in (
        (theirs, "classic", found.classic, CLASSIC),
        (ours, "Forebay", found.forebay, FOREBAY),
    ):
        over = f", {told.usd_ratio:.2f}x the least" if told.usd_ratio else ""
        _end(axes, points, f"{name}: ${{:.4f}}{over}", colour, above=True)
    axes.set_ylim(min(values) / 2.5, 4 * max(values))


def _line(axes: Axes, points: Points, colour: str, *, style: Style = "-", ending: Ending | None = None) -> None:
    """A line; with a cross at its end if its process was killed there."""
    x, y = points
    if not x:
        return
    axes.plot(x, y, color=colour, linestyle=style)
    if ending is Ending.OUT_OF_MEMORY:
        axes.plot(x[-1], y[-1], marker="X", markersize=12, color=colour, markeredgecolor="white", clip_on=False)


def _label(  # noqa: PLR0913 - what it says and where
    axes: Axes, points: Points, text: str, colour: str, *, at: float, above: bool, gap: int = 7
) -> None:
    """A line's name and value, at a share of its length, past whatever it comes to beside that."""
    x, y = points
    if not x:
        return
    index, reach = round(at * (len(x) - 1)), round(_BESIDE * len(x))
    beside = y[max(0, index - reach) : index + reach + 1]
    axes.annotate(
        text.format(y[index]),
        (x[index], max(beside) if above else min(beside)),
        (0, gap if above else -gap),
        textcoords="offset points",
        ha="left" if at == 0 else "center",
        va="bottom" if above else "top",
        color=colour,
        **_NAME,
    )


def _end(axes: Axes, points: Points, text: str, colour: str, *, above: bool) -> None:
    """A line's name and last value, at the right, past whatever it comes to over there."""
    x, y = points
    if not x:
        return
    beside = [value for at, value in zip(x, y, strict=True) if at >= _WORDS * x[-1]]
    axes.annotate(
        text.format(y[-1]),
        (x[-1], max(beside) if above else min(beside)),
        (0, 7 if above else -7),
        ha="right",
        va="bottom" if above else "top",
        **(_SMALL | _NAME | {"color": colour}),
    )


def _over_time(played: Played, value: Callable[[Sequence[Sample]], float]) -> Points:
    """One value of what was told up to each moment."""
    samples: Sequence[Sample] = played.samples
    return [sample.t for sample in samples], [value(samples[: i + 1]) for i in range(len(samples))]


def _points(played: Played, value: Callable[[Sample], float]) -> Points:
    """One value over time, as long as it is above zero and the side at work."""
    samples = [sample for sample in played.samples if value(sample) > 0 and sample.stage != "ended"]
    return [sample.t for sample in samples], [value(sample) for sample in samples]


def _each(played: Played) -> Points:
    """Dollars per task done, from the first one on."""
    samples = [sample for sample in played.samples if sample.done and sample.usd]
    return [sample.t for sample in samples], [sample.usd / sample.done for sample in samples]
