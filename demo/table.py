"""The report as a table for the terminal."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from rich import box
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from demo.report import Report, SideReport, percent
from demo.sample import SIDES
from demo.screen import COLOURS, NAMES


def _count(value: Any) -> str:
    return f"{value:,}"


def _part(value: int, share: float) -> str:
    return f"{value:,} ({percent(share)})" if value else "0"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f} s"


def _money(value: float | None) -> str:
    return "-" if value is None else f"${value:.4f}"


_ROWS: Final[tuple[tuple[str, Callable[[SideReport], str]], ...]] = (
    ("tasks done", lambda s: _count(s.done)),
    ("  critical, high", lambda s: f"{s.done_by['critical']:,}, {s.done_by['high']:,}"),
    ("done a minute", lambda s: f"{s.done_per_minute:g}"),
    ("failed", lambda s: _count(s.failed)),
    ("lost from memory", lambda s: _count(s.lost)),
    ("kept in overflow", lambda s: _count(s.spilled)),
    ("latency, p50", lambda s: _seconds(s.p50_s)),
    ("  p99", lambda s: _seconds(s.p99_s)),
    ("HTTP attempts", lambda s: _count(s.calls)),
    ("  answered", lambda s: _count(s.calls_answered)),
    ("  refused with 429", lambda s: _part(s.calls_429, s.refused_share)),
    ("tokens billed", lambda s: _count(s.tokens)),
    ("  wasted", lambda s: _part(s.tokens_wasted, s.wasted_share)),
    ("  nobody received", lambda s: "-" if s.tokens_left is None else _count(s.tokens_left)),
    ("dollars", lambda s: f"${s.usd:.2f}"),
    ("dollars per task", lambda s: _money(s.usd_per_done)),
    ("  over the least", lambda s: "-" if s.usd_ratio is None else f"{s.usd_ratio:.2f} x"),
    ("limited by", lambda s: s.limited_by or "unknown"),
    ("  short of", lambda s: s.waiting_for or "-"),
    ("peak memory", lambda s: f"{s.peak_rss_mb:.0f} MB"),
    ("process", lambda s: f"{s.ending}, {s.ended_at_s:.0f} s"),
)


def summary(report: Report) -> RenderableType:
    """Return the table of all sides, row by row, and the verdict."""
    size = Text(f"{report.tasks:,} tasks, {report.seconds:g} s for each side, seed {report.seed}", style="bright_black")
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    table.add_column("", style="bright_black")
    for side in SIDES:
        table.add_column(Text(NAMES[side], style=f"bold {COLOURS[side]}"), justify="right", overflow="fold")
    for name, cell in _ROWS:
        table.add_row(name, *(Text(cell(report.side(side))) for side in SIDES))  # Text: ":key:" is not an emoji
    return Group(Padding(size, (0, 1)), table, Padding(Text(report.verdict), (1, 1, 0, 1)))
