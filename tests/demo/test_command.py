"""The demo's command line before it does anything."""

from __future__ import annotations

import subprocess
import sys

import pytest


def run(*arguments: str, without: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    """Run ``python -m demo ARGUMENTS`` in a process of its own, where some libraries are not installed."""
    absent = "".join(f"sys.modules[{name!r}] = None; " for name in without)
    program = f"import sys; {absent}from demo.__main__ import main; sys.argv[0] = 'demo'; main()"
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.mark.parametrize("library", ["typer", "rich", "langgraph", "openai"])
def test_a_missing_library_is_named_in_one_line(library: str) -> None:
    done = run(without=(library,))
    assert done.returncode == 1
    assert done.stderr == f"demo: not installed here: {library}. Run `make demo`, which installs what it needs.\n"


def test_a_size_below_one_is_an_error() -> None:
    done = run("--tasks", "0")
    assert done.returncode == 2
    assert "--tasks" in done.stderr
