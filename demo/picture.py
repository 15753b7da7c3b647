"""The surge as a picture: six panels over time, each with a curve for each side."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from demo.provider import RPM
from demo.report import Report, SideRun, limit_of, percent
from demo.sample import SIDES, Sample, Side, pace, refused
from demo.screen import NAMES
from demo.settings import Settings
from demo.side_process import Ending
from demo.workload import STEPS

# Okabe and Ito's colours, which colour-blind people can tell apart; light and dark enough to be told apart in grey.
COLOURS: Final[Mapping[Side, str]] = {Side.CLASSIC: "#D55E00", Side.SEMAPHORE: "#009E73", Side.FOREBAY: "#0072B2"}
_DISK: Final = "#56B4E9"
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
    "legend.edgecolor": "white",
    "legend.fontsize": 9.5,
    "legend.framealpha": 0.9,
    "legend.handlelength": 1.2,
    "xtick.color": _SOFT,
    "ytick.color": _SOFT,
    "text.color": _INK,
    "lines.linewidth": 2.2,
    "lines.solid_capstyle": "round",
}
_SMALL: Final[dict[str, Any]] = {"textcoords": "offset points", "color": _SOFT, "fontsize": 9.5}

# The corner and the height of each panel's legend, where its curves hardly ever are.
_LEGENDS: Final = (("left", 0.45), ("right", 1.02), ("right", 0.55), ("left", 0.85), ("right", 1.02), ("right", 0.75))

Style = str | tuple[int, tuple[int, ...]]
Points = tuple[list[float], list[float]]
Runs = Mapping[Side, SideRun]


def draw(runs: Runs, report: Report, settings: Settings, path: Path) -> None:
    """Draw the picture into a PNG file."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=(16, 8), dpi=100)
        figure.subplots_adjust(left=0.045, right=0.98, top=0.84, bottom=0.1, hspace=0.3, wspace=0.18)
        figure.text(0.018, 0.945, _headline(report), fontsize=17, fontweight="bold")
        figure.text(0.018, 0.907, _subtitle(report), fontsize=12, color=_SOFT)
        figure.text(0.018, 0.022, _footer(report), fontsize=9.5, color=_SOFT)
        (queue, goodput, refusals), (memory, spend, tokens) = figure.subplots(2, 3, sharex=True)
        _queue(queue, runs)
        granted = None if runs[Side.FOREBAY].bill is None else RPM * settings.speed / len(STEPS)
        _goodput(goodput, runs, granted, report)
        _memory(memory, runs, settings.memory_mb)
        _spend(spend, runs, report)
        _refusals(refusals, runs, report)
        _tokens(tokens, runs, report)
        for axes in (memory, spend, tokens):
            axes.set_xlabel("seconds since the surge")
        for axes, (corner, height) in zip((queue, goodput, refusals, memory, spend, tokens), _LEGENDS, strict=True):
            axes.set_xlim(0, max(settings.seconds, *(run.ended_at for run in runs.values())))
            axes.tick_params(length=0, which="both")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(loc=f"upper {corner}", bbox_to_anchor=(0.0 if corner == "left" else 1.0, height))
        figure.savefig(path)


def _headline(report: Report) -> str:
    return f"{report.tasks:,} tasks at once, {report.workers * report.slots} agents, one rate-limited key"


def _subtitle(report: Report) -> str:
    classic, semaphore, forebay = report.classic, report.semaphore, report.forebay
    killed = f" and ran out of memory after {classic.ended_at_s:.0f} s" if classic.out_of_memory else ""
    return (
        f"In {report.seconds:g} s Forebay did {forebay.done:,} tasks and keeps {forebay.spilled:,} in its overflow. A"
        f" supervisor with semaphores did {semaphore.done:,} and lost {semaphore.lost:,}; a classic one did"
        f" {classic.done:,} and lost {classic.lost:,}{killed}."
    )


def _footer(report: Report) -> str:
    limit = f" Forebay was limited by {limit_of(report.forebay)}." if report.forebay.limited_by else ""
    return (
        f"Provider: {report.provider}. Seed {report.seed}. One side after the other, each with {report.seconds:g} s and"
        f" {report.memory_limit_mb} MB. Python {report.python}.{limit}"
    )


def _queue(axes: Axes, runs: Runs) -> None:
    axes.set_title("Queue: tasks accepted and not done")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    highest = 1.0
    for side in SIDES:
        points = _positive(runs[side], lambda s: s.inside)
        _line(axes, points, COLOURS[side], f"{NAMES[side]}, in memory", ending=runs[side].ending)
        highest = max([highest, *points[1]])
    disk = _positive(runs[Side.FOREBAY], lambda s: s.spilled)
    _line(axes, disk, _DISK, "Forebay, spilled", style=(0, (4, 2)))
    axes.set_ylim(1, max([10, 4 * highest, *(4 * value for value in disk[1])]))


def _goodput(axes: Axes, runs: Runs, granted: float | None, report: Report) -> None:
    axes.set_title("Goodput: tasks done a minute")
    if granted:
        axes.axhline(granted, color=_SOFT, linewidth=1.2, linestyle=":")
        axes.annotate(f"granted: {granted:.0f}", (0, granted), (5, 5), **_SMALL)
    highest = granted or 1.0
    for side in SIDES:
        points = _over_time(runs[side], pace)
        words = f"{NAMES[side]}: {report.side(side).done_per_minute:g} over all"
        _line(axes, points, COLOURS[side], words, ending=runs[side].ending)
        highest = max([highest, *points[1]])
    axes.set_ylim(0, 1.5 * highest)


def _memory(axes: Axes, runs: Runs, limit: int) -> None:
    axes.set_title("Memory of the process, MB")
    axes.axhline(limit, color=_INK, linewidth=1.4, linestyle="--")
    words = f"limit: {limit}, then it is killed"
    axes.annotate(words, (1, limit), (-5, 5), xycoords=("axes fraction", "data"), ha="right", **_SMALL)
    for side in SIDES:
        run = runs[side]
        points = [t for t, _ in run.memory], [mb for _, mb in run.memory]
        _line(axes, points, COLOURS[side], f"{NAMES[side]}: peak {run.peak_rss_mb:.0f}", ending=run.ending)
    axes.set_ylim(0, 1.15 * limit)


def _refusals(axes: Axes, runs: Runs, report: Report) -> None:
    axes.set_title("Refusals: calls answered 429, last 20 s")
    for side in SIDES:
        figures = report.side(side)
        points = _over_time(runs[side], lambda samples: 100 * refused(samples))
        none = ", none for its load" if figures.calls_429 and figures.calls_429 == figures.stray_429 else ""
        _share(axes, runs[side], points, f"{NAMES[side]}: {percent(figures.refused_share)} over all{none}", side)


def _tokens(axes: Axes, runs: Runs, report: Report) -> None:
    axes.set_title("Waste: tokens so far of no task done")
    for side in SIDES:
        points = _over_time(runs[side], lambda samples: 100 * samples[-1].useless if samples[-1].tokens else math.nan)
        words = f"{NAMES[side]}: {percent(report.side(side).wasted_share)} at the end"
        _share(axes, runs[side], points, words, side)


def _share(axes: Axes, run: SideRun, points: Points, words: str, side: Side) -> None:
    axes.set_ylim(-2, 105)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    _line(axes, points, COLOURS[side], words, ending=run.ending)


def _spend(axes: Axes, runs: Runs, report: Report) -> None:
    least = report.usd_least
    axes.set_title("Spend: dollars so far, per task done so far")
    axes.set_yscale("log")
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"${value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    values = [least] if least else []
    for side in SIDES:
        figures, points = report.side(side), _usd_per_done(runs[side])
        over = f", {figures.usd_ratio:.2f}x the least" if figures.usd_ratio else ""
        each = f": ${figures.usd_per_done:.4f}" if figures.usd_per_done else ""
        _line(axes, points, COLOURS[side], f"{NAMES[side]}{each}{over}", ending=runs[side].ending)
        values += points[1]
    if not values:
        axes.set_title("Spend: no price is known, or nothing was done")
        return
    if least:
        axes.axhline(least, color=_SOFT, linewidth=1.2, linestyle=":")
        axes.annotate(f"the least that a task needs: ${least:.4f}", (0, least), (5, -14), **_SMALL)
    axes.set_ylim(min(values) / 2.5, 30 * max(values))


def _line(  # noqa: PLR0913 - a curve and how it looks
    axes: Axes, points: Points, colour: str, words: str, *, style: Style = "-", ending: Ending | None = None
) -> None:
    """Draw a curve, with a cross at its end if its process was killed there."""
    x, y = points
    if not x:
        return
    axes.plot(x, y, color=colour, linestyle=style, label=words)
    if ending is Ending.OUT_OF_MEMORY:
        axes.plot(x[-1], y[-1], marker="X", markersize=12, color=colour, markeredgecolor="white", clip_on=False)


def _over_time(run: SideRun, value: Callable[[Sequence[Sample]], float]) -> Points:
    """Return a value of all samples up to each moment."""
    samples: Sequence[Sample] = run.samples
    return [sample.t for sample in samples], [value(samples[: i + 1]) for i in range(len(samples))]


def _positive(run: SideRun, value: Callable[[Sample], float]) -> Points:
    """Return a value over time, where it is above zero and the side is at work."""
    samples = [sample for sample in run.samples if value(sample) > 0 and sample.stage != "ended"]
    return [sample.t for sample in samples], [value(sample) for sample in samples]


def _usd_per_done(run: SideRun) -> Points:
    """Return the dollars per task done, from the first one on."""
    samples = [sample for sample in run.samples if sample.done and sample.usd]
    return [sample.t for sample in samples], [sample.usd / sample.done for sample in samples]
