"""The storms find the bugs that they are said to find, each injected into a process of its own."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.mutation.test_injected_bugs import SLIPS
from tests.simulation.found_by_storms import FOUND, Bug

ROOT = Path(__file__).parents[2]
SAMPLE = {storm: bug for bug, (storm, _) in reversed(FOUND.items())}.values()  # the first of each storm
pytestmark = pytest.mark.blocks  # in virtual time SQLite runs in the loop's own thread


@pytest.mark.parametrize(
    "bug",
    [bug if bug in SAMPLE else pytest.param(bug, marks=pytest.mark.slow) for bug in FOUND],
    ids=lambda bug: bug.__name__,
)
def test_a_storm_finds_an_injected_bug(bug: Bug) -> None:
    command = [sys.executable, "-m", "tests.simulation.found_by_storms", bug.__name__]
    outcome = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert outcome.returncode == 0, outcome.stderr[-2000:]
    assert not outcome.stdout.startswith(("nothing", *SLIPS)), outcome.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("storm", "seed"), sorted(set(FOUND.values()), key=str))
def test_without_a_bug_these_storms_pass(storm: object, seed: int) -> None:
    storm.run(seed)  # type: ignore[attr-defined]
