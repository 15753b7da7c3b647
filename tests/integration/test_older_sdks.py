"""The previous major versions of the SDKs, openai 2 and anthropic 0, which use httpx, pass the same tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements" / "older.txt"
SUITE = ("tests/contract/sdks", "tests/integration/test_bind_sdks.py")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_previous_major_versions_of_the_sdks_pass_the_suite(tmp_path: Path) -> None:
    environment = tmp_path / "venv"
    python = environment / "bin" / "python"
    for command in (
        [sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(environment)],
        [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--python", str(python), "-r", str(LOCK)],
    ):
        subprocess.run(command, check=True, timeout=300)
    result = subprocess.run(
        [str(python), "-m", "pytest", "--quiet", "-p", "no:cacheprovider", *SUITE],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT / "src")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-5000:]
    assert "passed" in result.stdout
