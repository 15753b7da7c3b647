"""The suite catches the bugs that it says it catches: each is planted in a copy of the package, and its test fails."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.mutants import call_plants, gateway_plants, plants
from tests.mutants.plants import Mutant

HOUSE = Path(__file__).parents[2]
MUTANTS = [*plants.MUTANTS, *call_plants.MUTANTS, *gateway_plants.MUTANTS]
SOURCE = HOUSE / "src" / "forebay"
SLIPS = ("SyntaxError", "ImportError", "ModuleNotFoundError", "NameError", "AttributeError", "TypeError")
OPTIONS = ["-q", "--exitfirst", "--tb=short", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=20"]

pytestmark = pytest.mark.slow


def run(copy: Path, *tests: str) -> subprocess.CompletedProcess[str]:
    """Run tests against a copy of the package."""
    return subprocess.run(
        [sys.executable, "-m", "pytest", *OPTIONS, "--hypothesis-profile=mutants", *tests],
        cwd=HOUSE,
        env={**os.environ, "PYTHONPATH": str(copy), "COLUMNS": "400"},
        capture_output=True,
        text=True,
        check=False,
    )


def plant(mutant: Mutant, directory: Path) -> None:
    """Put a copy of the package there, with the bug in it."""
    shutil.copytree(SOURCE, directory / "forebay")
    path = directory / "forebay" / mutant.path
    text = path.read_text()
    found = text.count(mutant.old)
    assert found == 1, f"{mutant.path} holds these words {found} times, so the plant must be mended:\n{mutant.old}"
    path.write_text(text.replace(mutant.old, mutant.new))


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name.replace(" ", "-"))
def test_a_planted_bug_is_caught(mutant: Mutant, tmp_path: Path) -> None:
    plant(mutant, tmp_path)
    outcome = run(tmp_path, mutant.caught_by)
    assert outcome.returncode == 1, f"it is not caught:\n{outcome.stdout[-2000:]}{outcome.stderr[-2000:]}"
    (failure,) = re.findall(r"^FAILED .*$", outcome.stdout, re.MULTILINE)
    assert not failure.partition(" - ")[2].startswith(SLIPS), f"it fails for another reason: {failure}"


def test_without_a_bug_these_tests_pass(tmp_path: Path) -> None:
    shutil.copytree(SOURCE, tmp_path / "forebay")
    outcome = run(tmp_path, *dict.fromkeys(mutant.caught_by for mutant in MUTANTS))
    assert outcome.returncode == 0, outcome.stdout[-3000:]
