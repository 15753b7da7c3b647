"""The example of each framework runs as it stands."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from tests.frameworks.conftest import INSTALLED

if not INSTALLED:
    pytest.skip("frameworks run in an environment of their own: scripts/test.sh makes it", allow_module_level=True)

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize("framework", INSTALLED)
def test_an_agent_is_backpressured_in_twenty_lines(framework: str, tmp_path: Path) -> None:
    example = EXAMPLES / f"{framework}_20_lines.py"
    assert len(example.read_text().splitlines()) <= 20
    ran = subprocess.run(
        [sys.executable, str(example)], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False
    )
    assert ran.stderr == ""
    assert ran.stdout == "50 agents, 50 calls, 0 refused\n"
