"""The contract of the SDKs holds for their earlier versions too: openai 2 and anthropic 0, which use httpx."""

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
def test_earlier_versions_of_the_sdks(tmp_path: Path) -> None:
    venv = tmp_path / "venv"
    python = venv / "bin" / "python"
    for command in (
        [sys.executable, "-m", "uv", "venv", "--quiet", "--python", sys.executable, str(venv)],
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
