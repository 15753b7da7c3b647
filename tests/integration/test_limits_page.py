"""The names of docs/limits.md are those of the benchmarks that measured its figures."""

from __future__ import annotations

import pytest
from bench import goodput, recovery
from bench.calls.limits import LIMITS, OURS, UPSTREAM
from bench.calls.scenarios import SCENARIOS
from tests.integration.test_docs import DOCS, rows

PAGE = DOCS / "limits.md"
LOADS = [f"{load:g}x" for load in goodput.LOADS]
BY_LIMIT = "| | adaptive | throttled |"
BY_LOAD = "As the offered load grows"
WHOLE_UPSTREAM = "| | upstream | throttled |"
BY_RECOVERY = "| | sharing | throttling |"


def header(start: str) -> list[str]:
    (line, *_) = (line for line in PAGE.read_text().splitlines() if line.startswith(start))
    return [cell.strip() for cell in line.strip("|").split("|")]


def first_column(start: str) -> list[str]:
    return [row[0] for row in rows(PAGE, start)]


def test_the_columns_of_the_figures_are_the_limits_of_the_benchmark() -> None:
    ours, throttled, *others = header(BY_LIMIT)[1:]
    assert (throttled, [ours, *others]) == ("throttled", list(LIMITS))
    assert header(WHOLE_UPSTREAM)[1] == UPSTREAM
    assert header(WHOLE_UPSTREAM)[3] == f"{OURS} alone"


def test_the_rows_of_the_figures_are_the_scenarios_of_the_benchmark() -> None:
    assert first_column(BY_LIMIT) == list(SCENARIOS)
    assert first_column(BY_LOAD) == LOADS


def test_the_rows_of_the_whole_upstream_are_the_scenarios_without_those_of_a_wrong_baseline() -> None:
    learned = [name for name, scenario in SCENARIOS.items() if scenario.duration_error == 1.0]
    assert first_column(WHOLE_UPSTREAM) == learned


def test_the_rows_of_the_recovery_are_the_limits_of_the_benchmark() -> None:
    assert first_column(BY_RECOVERY) == [name for name in recovery.NAMES if name != UPSTREAM]


@pytest.mark.parametrize("scenario", goodput.QUICK)
def test_a_quick_run_has_scenarios_that_there_are(scenario: str) -> None:
    assert scenario in SCENARIOS
