"""The SDKs of the generation before, openai 2 and anthropic 0, which use httpx: the same promises, asked of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HOUSE = Path(__file__).parents[2]
LOCK = HOUSE / "requirements" / "older.txt"
SUITE = ("tests/contract/sdks", "tests/integration/test_bind_sdks.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_sdks_of_the_generation_before(tmp_path: Path) -> None:
    there = tmp_path / "venv"
    python = there / "bin" / "python"
    for command in (
        [sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(there)],
        [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), "-r", str(LOCK)],
    ):
        subprocess.run(command, check=True, timeout=300)
    ran = subprocess.run(
        [str(python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *SUITE],
        cwd=HOUSE,
        env={**os.environ, "PYTHONPATH": str(HOUSE / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout[-5000:]
    assert "passed" in ran.stdout
