"""The command line."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command, or say in one line what is missing to run it."""
    try:
        from forebay.cli.app import app  # noqa: PLC0415 - typer and rich are extras
    except ModuleNotFoundError as error:
        sys.exit(missing(error, "cli"))
    app()


def missing(error: ModuleNotFoundError, extra: str) -> str:
    """What to type when a library of an extra is not installed."""
    return f'forebay: this needs {error.name}, which is not installed: pip install "forebay[{extra}]"'


__all__ = ["main", "missing"]
