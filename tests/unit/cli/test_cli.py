"""The command line itself."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version

import pytest


def run(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``forebay ARGUMENTS`` in another process, as if some libraries were not installed."""
    absent = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    program = f"import sys; {absent}from forebay.cli import main; sys.argv[0] = 'forebay'; main()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_it_prints_its_version() -> None:
    assert run("--version").stdout == f"forebay {version('forebay')}\n"


@pytest.mark.parametrize("module", ["forebay", "forebay.cli"])
def test_it_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "--version"]
    assert version("forebay") in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_missing_library_is_reported_in_one_line() -> None:
    done = run("gateway", without=("typer",))
    assert done.returncode == 1
    assert done.stderr == 'forebay: this command needs typer. To install: pip install "forebay[cli]"\n'
