"""The areas of mutation name files and tests that exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.mutation.areas import AREAS, Area

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("area", AREAS.values(), ids=AREAS)
def test_an_area_names_files_and_tests_that_exist(area: Area) -> None:
    assert [glob for glob in area.files if not list((ROOT / "src" / "forebay").glob(glob))] == []
    assert [test for test in area.tests if not (ROOT / "tests" / test).exists()] == []
