"""The results as charts."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import matplotlib as mpl
from matplotlib.figure import Figure

from bench.calls.limit_run import RunRecord
from bench.calls.limits import OURS, UPSTREAM

# The palette of Okabe and Ito, which is safe for colour-blind readers.
_COLOURS: Final = ("#0072B2", "#009E73", "#E69F00", "#CC79A7", "#56B4E9", "#D55E00", "#222222", "#999999")
_DASHES: Final = ("-", "--", ":")  # when the colours have been used up, they return with other dashes
STYLE: Final[dict[Any, Any]] = {
    "font.size": 10.5,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "grid.color": "#e6e6e6",
}


def line_styles(names: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Return the style of each line, as arguments of ``plot``, for any number of names."""
    looks = itertools.cycle(itertools.product(_DASHES, _COLOURS))
    return {
        name: {"color": colour, "linestyle": dashes, "linewidth": 3.0 if name in (UPSTREAM, OURS) else 1.5}
        for name, (dashes, colour) in zip(names, looks, strict=False)
    }


def plot_goodput_by_load(shares: Mapping[str, Sequence[float]], loads: Sequence[float], folder: Path) -> None:
    """Plot goodput over offered load, one line a limit."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(9, 5), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.set_title("Goodput relative to an oracle, by offered load")
        styles = line_styles(shares)
        for name, values in shares.items():
            axes.plot(loads, values, label=name, marker="o", **styles[name])
        axes.set(xlabel="offered load over capacity", xlim=(0.8, max(loads)), ylim=(0, 1.08))
        axes.grid(visible=True)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(folder / "goodput-load.png")


def plot_goodput_by_scenario(shares: Mapping[tuple[str, str], float], folder: Path) -> None:
    """Plot goodput by scenario and limit, as a table with colours."""
    names = list(dict.fromkeys(name for name, _ in shares))
    limits = list(dict.fromkeys(limit for _, limit in shares))
    with mpl.rc_context({**STYLE, "axes.spines.left": False, "axes.spines.bottom": False}):
        figure = Figure(figsize=(2.8 + 0.9 * len(limits), 1.5 + 0.36 * len(names)), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.set_title("Goodput relative to an oracle, by scenario", pad=14)
        axes.imshow(
            [[shares[name, limit] for limit in limits] for name in names], cmap="RdYlBu", vmin=0, vmax=1, aspect="auto"
        )
        for row, name in enumerate(names):
            for column, limit in enumerate(limits):
                value = shares[name, limit]
                ink = "white" if not 0.15 < value < 0.85 else "black"
                axes.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink)
        axes.set_xticks(range(len(limits)), limits)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0)
        figure.savefig(folder / "goodput.png")


def plot_recovery(records: Mapping[str, RunRecord], kind: str, trigger: tuple[float, float], folder: Path) -> None:
    """Plot useful work over time around a trigger, one line a limit."""
    step = 10
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 5), dpi=120, layout="constrained")
        axes = figure.subplots()
        axes.set_title(f"A minute without any answer, at a {kind} provider")
        styles = line_styles(records)
        for name, record in records.items():
            end = int(max((at for at, *_ in record.levels), default=0))
            times = range(0, end, step)
            served = [record.work(at, at + step) for at in times]
            axes.plot(times, served, label=name, **styles[name])
        axes.axvspan(*trigger, color="#f0f0f0")
        axes.set(xlabel="seconds", ylabel="slots in use", xlim=(0, None), ylim=(0, 100))
        axes.grid(visible=True)
        axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        figure.savefig(folder / f"recovery-{kind}.png")


def plot_fairness(
    waits: Mapping[tuple[int, bool], Sequence[float]],
    gained: Mapping[tuple[str, str], float],
    floods: Mapping[int, Sequence[float]],
    places: Sequence[str],
    folder: Path,
) -> None:
    """Plot the waits of CRITICAL tasks, the turns of tenants over what is due to them, and waits beside a flood."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 4), dpi=80, layout="constrained")
        critical, turns, small = figure.subplots(1, 3)
        critical.set_title("CRITICAL tasks at 3x the load")
        for colour, slots in zip(_COLOURS, dict.fromkeys(slots for slots, _ in waits), strict=False):
            for reserved in (True, False):
                values = waits[slots, reserved]
                above = [1 - index / len(values) for index in range(len(values))]
                label = f"{slots} slots, a fifth reserved" if reserved else f"{slots} slots, none"
                critical.plot(values, above, label=label, color=colour, linestyle="-" if reserved else ":")
        critical.axhline(0.01, color="#999999", linewidth=0.8)
        critical.axvline(1.0, color="#999999", linewidth=0.8)
        critical.set(yscale="log", ylim=(1e-3, 1), xlim=(0, 2.5), xlabel="wait in service times", ylabel="share above")
        critical.legend(frameon=False, fontsize=9)
        turns.set_title("Turns over what the weight says")
        labels = [f"{tenant}\n{place}" for place, tenant in gained]
        turns.bar(range(len(gained)), list(gained.values()), color=_COLOURS[0], width=0.6)
        turns.axhspan(0.9, 1.1, color="#dddddd", zorder=0)
        turns.set_xticks(range(len(gained)), labels, fontsize=8)
        turns.set(ylim=(0, 1.3))
        small.set_title("A task after a flood of another tenant")
        for colour, (place, values) in zip(
            _COLOURS, zip(places, zip(*floods.values(), strict=True), strict=True), strict=False
        ):
            style = ":" if place == "one tenant" else "-"
            small.plot(list(floods), values, label=place, color=colour, marker="o", linestyle=style)
        small.set(
            xscale="log", yscale="symlog", xlabel="tasks in the flood", ylabel="wait in service times", ylim=(0, None)
        )
        small.legend(frameon=False, fontsize=9)
        figure.savefig(folder / "fairness.png")


def plot_costs(
    usd: Mapping[tuple[float, str], Sequence[float]],
    late: Mapping[tuple[float, str], Sequence[float]],
    loads: Sequence[float],
    folder: Path,
) -> None:
    """Plot what a task costs, and the share of tasks that are late, over offered load, by deadline and side."""
    deadlines = [*dict.fromkeys(within for within, _ in usd)]
    looks = line_styles(dict.fromkeys(side for _, side in late))
    looks["learned"]["linestyle"] = "--"  # it covers another one
    looks["bound"] = {"color": "#999999", "linestyle": ":", "linewidth": 1.5}
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(14, 6.5), dpi=80, layout="constrained")
        axes = figure.subplots(2, len(deadlines), sharex=True, sharey="row")
        for values, row, label in (
            (usd, axes[0], "thousandths of a dollar"),
            (late, axes[1], "share not done in time"),
        ):
            for column, within in enumerate(deadlines):
                for (other, side), line in values.items():
                    if other == within:
                        row[column].plot(loads, line, label=side, **looks[side])
                row[column].grid(axis="y")
            row[0].set_ylabel(label)
        for column, within in enumerate(deadlines):
            axes[0][column].set_title(f"Deadlines of {within:.0f} s")
            axes[1][column].set_xlabel("offered load over capacity")
        axes[0][0].set_ylim(0, None)
        axes[1][0].set_ylim(0, 0.2)
        axes[0][-1].legend(frameon=False, fontsize=9)
        figure.savefig(folder / "cost.png")


def plot_fan_out(
    healthy: Mapping[str, Sequence[float]],
    retries: Mapping[str, Sequence[float]],
    allowed: Sequence[tuple[float, float]],
    end: float,
    folder: Path,
) -> None:
    """Plot how many healthy branches of a fan-out have ended, and how many retries were made, over time.

    Args:
        healthy: when each healthy branch ended, by the name of the run.
        retries: when each retry began, by the name of the run.
        allowed: times, and how many retries the budget allows until then.
        end: the last second that is shown.
        folder: where the picture goes.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(10, 4), dpi=100, layout="constrained")
        left, right = figure.subplots(1, 2)
        styles = dict(zip(healthy, ({"color": colour} for colour in ("#999999", "#0072B2", "#E69F00")), strict=True))
        left.set_title("Healthy branches that have ended")
        for name, times in healthy.items():
            left.step([0, *sorted(times)], range(len(times) + 1), where="post", label=name, **styles[name])
        right.set_title("Retries")
        for name, times in retries.items():
            steps = [0, *sorted(times), end]
            right.step(steps, [*range(len(times) + 1), len(times)], where="post", label=name, **styles[name])
        right.step(
            [0, *(at for at, _ in allowed), end],
            [allowed[0][1], *(count for _, count in allowed), allowed[-1][1]],
            where="post", label="budget", color="#D55E00", linestyle="--",
        )  # fmt: skip
        for axes in (left, right):
            axes.set(xlabel="seconds", xlim=(0, end), ylim=(0, None))
            axes.grid(visible=True)
            axes.legend(frameon=False, loc="lower right")
        figure.savefig(folder / "fan-out.png")
