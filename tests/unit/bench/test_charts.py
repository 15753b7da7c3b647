"""The charts of the benchmarks take any number of limits, so that adding one needs no change of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.calls import charts
from bench.calls.limit_run import RunRecord
from bench.calls.limits import UPSTREAM, select
from bench.queue.charts import plot_panels

MANY = [UPSTREAM, *(f"limit {n}" for n in range(12))]


def test_each_of_many_names_has_a_line_of_its_own_look() -> None:
    styles = charts.line_styles(MANY)
    assert list(styles) == MANY
    assert len({(style["color"], style["linestyle"]) for style in styles.values()}) == len(MANY)


def test_more_names_than_looks_all_have_one() -> None:
    names = [str(n) for n in range(100)]
    assert list(charts.line_styles(names)) == names


@pytest.mark.blocks  # matplotlib reads its fonts
def test_the_charts_take_any_number_of_limits(tmp_path: Path) -> None:
    charts.plot_goodput_by_load({name: [0.9, 1.0] for name in MANY}, [1.0, 2.0], tmp_path)
    charts.plot_goodput_by_scenario({(row, name): 0.5 for row in ("steady", "burst") for name in MANY}, tmp_path)
    charts.plot_recovery({name: RunRecord() for name in MANY}, "sharing", (1.0, 2.0), tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"goodput-load.png", "goodput.png", "recovery-sharing.png"}


def test_one_name_can_be_selected_and_an_unknown_one_is_an_error() -> None:
    assert select(MANY, None) == tuple(MANY)
    assert select(MANY, "limit 3") == ("limit 3",)
    with pytest.raises(SystemExit, match="choose one of upstream, limit 0"):
        select(MANY, "limit 99")


@pytest.mark.blocks  # matplotlib reads its fonts
@pytest.mark.parametrize("panels", [1, 3, 5])
def test_panels_take_any_number_of_lines_and_stay_small(tmp_path: Path, panels: int) -> None:
    lines = {name: [0.2, 0.9] for name in MANY}
    chart = tmp_path / "new" / "chart.png"
    plot_panels(chart, {f"panel {n}": lines for n in range(panels)}, [1.0, 10.0], xlabel="load", bold=UPSTREAM)
    assert 0 < chart.stat().st_size < 100_000
