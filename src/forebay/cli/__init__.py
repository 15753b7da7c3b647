"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say in one line what is missing to run it."""
    try:
        from forebay.cli.app import app  # noqa: PLC0415 - typer is an extra
    except ModuleNotFoundError as error:
        sys.exit(missing_extra_message([(error.name or str(error)).partition(".")[0]], "cli"))
    app()


def missing_extra_message(libraries: list[str], extra: str) -> str:
    """What to type when libraries of an extra are not installed."""
    return f'forebay: this needs {", ".join(libraries)}, not installed here: pip install "forebay[{extra}]"'


__all__ = ["main", "missing_extra_message"]
