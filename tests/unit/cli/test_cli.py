"""The command line before it does anything."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version


def run(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """``forebay ARGUMENTS`` in a process of its own, where some libraries are not installed."""
    absent = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    program = f"import sys; {absent}from forebay.cli import main; sys.argv[0] = 'forebay'; main()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


def test_it_says_its_version() -> None:
    assert run("--version").stdout == f"forebay {version('forebay')}\n"


def test_it_is_a_module_too() -> None:
    command = [sys.executable, "-m", "forebay.cli", "--version"]
    assert version("forebay") in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_a_missing_library_is_told_in_one_line() -> None:
    done = run("gateway", without=("typer",))
    assert done.returncode == 1
    assert done.stderr == 'forebay: this needs typer, not installed here: pip install "forebay[cli]"\n'
