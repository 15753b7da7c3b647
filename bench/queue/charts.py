"""The comparisons of queue control as charts, small enough to stand in the decision records."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Final

import matplotlib as mpl
from matplotlib.figure import Figure
from PIL import Image

from bench.calls.charts import STYLE, line_styles

_TICKS: Final = 8.0  # size of the font of small text
_COLUMNS: Final = 3
_DPI: Final = 90
_COLOURS: Final = 255  # as few bytes as a palette takes


def plot_panels(
    path: Path, panels: Mapping[str, Mapping[str, Sequence[float]]], xs: Sequence[float], *, xlabel: str, bold: str
) -> None:
    """Plot a panel for each title: a line for each name over `xs`; the line named `bold` is thick."""
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    names = list(next(iter(panels.values())))
    styles = line_styles(sorted(names, key=lambda name: name != bold))  # the bold line has the first colour
    with mpl.rc_context({**STYLE, "font.size": _TICKS}):
        figure = Figure(figsize=(3.6 * columns, 2.4 * rows + 0.6), layout="constrained")
        all_axes = figure.subplots(rows, columns, squeeze=False).flat
        for unused in all_axes[len(panels) :]:
            unused.set_axis_off()
        for axes, (title, lines) in zip(all_axes, panels.items(), strict=False):
            axes.set_title(title, fontsize=_TICKS + 1)
            for name, values in lines.items():
                look = {**styles[name], "linewidth": 2.5 if name == bold else 1.1}
                axes.plot(xs, values, label=name, marker="o", markersize=2.5, **look)
            axes.set_xscale("log")
            axes.set_xticks(xs, [f"{x:g}" for x in xs])
            axes.minorticks_off()
            axes.set_ylim(bottom=0.5 if min(map(min, lines.values())) > 0.5 else 0.0)
            axes.set_xlabel(xlabel)
            axes.grid(visible=True)
        handles, labels = axes.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(drawn := io.BytesIO(), dpi=_DPI)
        Image.open(drawn).convert("RGB").quantize(_COLOURS).save(path, optimize=True)
